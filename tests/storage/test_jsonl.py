"""Records as JSON lines: the contract, and what a file can suffer."""

from __future__ import annotations

import os
import stat
import threading
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from helpers.process import run_python, start_python
from helpers.records import START, make_record, make_records
from storage_contract import StorageContract

from flask_usage_metrics.errors import StorageUnavailable
from flask_usage_metrics.storage import open_storage
from flask_usage_metrics.storage.jsonl import JSONLinesStorage


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "usage.jsonl"


@pytest.fixture
def storage(file: Path) -> JSONLinesStorage:
    storage = open_storage(f"jsonl:///{file}")
    assert isinstance(storage, JSONLinesStorage)
    storage.is_of_app = True
    return storage


class TestContract(StorageContract):
    bytes_per_record_read = 60

    @pytest.fixture
    def storage(self, file: Path) -> JSONLinesStorage:
        storage = JSONLinesStorage(file)
        storage.is_of_app = True
        return storage


def test_a_line_is_one_record_by_its_field_names(storage: JSONLinesStorage, file: Path) -> None:
    assert not file.parent.exists()
    storage.write(make_records(2))
    lines = file.read_text().splitlines()
    assert len(lines) == 2
    assert msgspec.json.decode(lines[1])["started_at"] == "2026-11-22T09:00:01Z"
    assert msgspec.json.decode(lines[1])["path"] == "/user/ann"


def test_a_line_torn_by_a_crash_costs_only_itself(storage: JSONLinesStorage, file: Path) -> None:
    first, second, third = make_records(3)
    storage.write([first, second])
    with file.open("r+b") as torn:
        torn.truncate(file.stat().st_size - 30)
    assert list(storage.records()) == [first]
    storage.write([third])
    storage.write([second])
    assert list(storage.records()) == [first, second, third]
    assert len(file.read_text().splitlines()) == 4


def test_a_last_line_without_its_newline_is_a_record(storage: JSONLinesStorage, file: Path) -> None:
    records = make_records(2)
    storage.write(records[:1])
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    assert list(storage.records()) == records[:1]
    storage.write(records[1:])
    assert list(storage.records()) == records


def test_lines_that_are_no_records_are_skipped_and_kept(
    storage: JSONLinesStorage, file: Path
) -> None:
    records = make_records(2)
    storage.write(records[:1])
    garbage = (
        b'\n{}\n[1, 2]\nnull\n{"id": 5}\n\xff\xfe\n' + b"[" * 5_000 + b"\nplain text\n"
        b'{"id": "x", "started_at": "2026-11-22T09:00:00"}\n'
    )
    with file.open("ab") as other:
        other.write(garbage)
    storage.write(records[1:])
    assert list(storage.records()) == records
    assert storage.prune(START + timedelta(seconds=1)) == 1
    assert list(storage.records()) == records[1:]
    assert garbage in file.read_bytes()


def test_a_line_of_an_earlier_version_lacks_fields(storage: JSONLinesStorage, file: Path) -> None:
    record = make_record()
    storage.write([record])
    line = msgspec.json.decode(file.read_bytes())
    for name in ("consumer", "parent_span_id", "utm_source", "utm_medium", "utm_campaign", "ref"):
        assert line.pop(name) is None
    file.write_bytes(msgspec.json.encode(line) + b"\n")
    assert list(storage.records(utm_source=None)) == [record]


def test_a_field_of_a_later_version_is_ignored(storage: JSONLinesStorage, file: Path) -> None:
    storage.write([record := make_record()])
    file.write_text(file.read_text().replace('{"id"', '{"later": [1], "id"'))
    assert list(storage.records()) == [record]


def test_a_record_written_twice_at_a_distance_is_read_once(storage: JSONLinesStorage) -> None:
    records = make_records(10)
    storage.write(records)
    storage.write([make_record(started_at=START + timedelta(days=1))])
    storage.write(records[:3])
    assert list(storage.records(limit=10)) == records
    assert storage.count() == 11
    assert storage.prune(START + timedelta(seconds=3)) == 3
    assert storage.count() == 8


def test_erase_leaves_lines_that_are_no_records(storage: JSONLinesStorage, file: Path) -> None:
    ann, bob = make_record(username="ann"), make_record(username="bob")
    storage.write([ann, bob])
    broken = b'{"username": "ann", "id": 5}\nann\n'
    with file.open("ab") as other:
        other.write(broken)
    size = file.stat().st_size
    assert storage.erase(username="nobody") == 0
    assert file.stat().st_size == size
    assert storage.erase(username="ann") == 1
    assert list(storage.records()) == [bob]
    assert file.read_bytes().endswith(broken)
    assert ann.id.encode() not in file.read_bytes()
    assert [path.name for path in file.parent.iterdir()] == ["usage.jsonl"]


def test_prune_without_a_time_deletes_nothing(storage: JSONLinesStorage) -> None:
    storage.write([make_record()])
    assert storage.prune(None) == 0  # type: ignore[arg-type]
    assert storage.count() == 1


FILL = """
import resource, sys
from helpers.records import make_records
from flask_usage_metrics.errors import StorageUnavailable
from flask_usage_metrics.storage.jsonl import JSONLinesStorage
storage = JSONLinesStorage(sys.argv[1])
storage.write(make_records(10))
size = __import__("os").stat(sys.argv[1]).st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, resource.RLIM_INFINITY))
try:
    storage.write(make_records(10))
except StorageUnavailable as error:
    assert str(error) == "jsonl: File too large", error
else:
    raise SystemExit("it fitted")
assert __import__("os").stat(sys.argv[1]).st_size == size
assert storage.count() == 10
"""


def test_a_disk_that_fills_up_takes_nothing_of_the_batch(file: Path) -> None:
    assert run_python(FILL, file) == (0, "", "")


def test_a_full_disk_is_unavailable_without_naming_the_file() -> None:
    with pytest.raises(StorageUnavailable, match=r"^jsonl: No space left on device$"):
        JSONLinesStorage("/dev/full").write([make_record()])


def test_a_path_that_cannot_be_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    for path in (tmp_path, tmp_path / "plain" / "usage.jsonl"):
        storage = JSONLinesStorage(path)
        with pytest.raises(StorageUnavailable, match="directory"):
            storage.write([make_record()])
        with pytest.raises(StorageUnavailable, match="directory"):
            storage.count()
        with pytest.raises(StorageUnavailable, match="directory"):
            storage.prune(START)
        with pytest.raises(StorageUnavailable, match="directory"):
            storage.erase(username="ann")


def test_a_file_that_goes_away_is_made_again(storage: JSONLinesStorage, file: Path) -> None:
    storage.write([make_record()])
    file.unlink()
    file.parent.rmdir()
    assert storage.count() == 0
    storage.write([record := make_record()])
    assert list(storage.records()) == [record]


def test_prune_keeps_the_mode_of_the_file_and_a_link_to_it(
    storage: JSONLinesStorage, file: Path, tmp_path: Path
) -> None:
    storage.write(make_records(3))
    file.chmod(0o640)
    os.chown(file, os.getuid(), os.getgid())
    link = tmp_path / "link.jsonl"
    link.symlink_to(file)
    assert JSONLinesStorage(link).prune(START + timedelta(seconds=2)) == 2
    assert link.is_symlink()
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert storage.count() == 1
    assert [path.name for path in file.parent.iterdir()] == ["usage.jsonl"]


def test_what_is_appended_while_others_prune_is_not_lost(file: Path) -> None:
    written: list[str] = []
    enough = threading.Event()

    def write(name: str) -> None:
        storage = JSONLinesStorage(file)
        while not enough.wait(0.001):
            batch = make_records(5, path=name)
            storage.write(batch)
            written.extend(record.id for record in batch)

    writers = [threading.Thread(target=write, args=(f"/{number}",)) for number in range(3)]
    for writer in writers:
        writer.start()
    pruner = JSONLinesStorage(file)
    for _ in range(6):
        pruner.write([make_record(started_at=START - timedelta(days=1))])
        assert pruner.prune(START) == 1
    enough.set()
    for writer in writers:
        writer.join()
    assert sorted(record.id for record in pruner.records()) == sorted(written)


APPEND = """
import sys
from helpers.records import make_record
from flask_usage_metrics.storage.jsonl import JSONLinesStorage
storage = JSONLinesStorage(sys.argv[1])
for number in range(50):
    storage.write([make_record(id=f"{sys.argv[2]}-{number}-{row}") for row in range(20)])
"""


def test_processes_append_at_once(storage: JSONLinesStorage, file: Path) -> None:
    processes = [start_python(APPEND, file, number) for number in range(4)]
    while any(process.poll() is None for process in processes):
        assert storage.count() % 20 == 0
    assert [process.finish() for process in processes] == [(0, "", "")] * 4
    assert storage.count() == 4 * 50 * 20
    assert len(file.read_bytes().splitlines()) == 4 * 50 * 20
