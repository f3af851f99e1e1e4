"""A SQLite file that others empty, move, replace, delete or cut while it is written to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from helpers.old_tables import plain
from helpers.process import run_python, until
from helpers.records import make_record, make_records

from flask_usage_metrics.errors import StorageUnavailable
from flask_usage_metrics.storage import open_storage
from flask_usage_metrics.storage.sql import SQLStorage


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "usage.sqlite3"


def opened(file: Path) -> SQLStorage:
    storage = open_storage(f"sqlite:///{file}?timeout=1")
    assert isinstance(storage, SQLStorage)
    return storage


@pytest.fixture
def storage(file: Path) -> Iterator[SQLStorage]:
    with closing(opened(file)) as storage:
        yield storage


def rows(file: Path) -> int:
    with closing(opened(file)) as storage:
        return storage.count()


def replacement(file: Path, count: int) -> Path:
    other = file.with_name("other.sqlite3")
    with closing(opened(other)) as storage:
        storage.write(make_records(count))
    return other


SITE = """
import json, os, signal, sys, time
from pathlib import Path
from flask import Flask
from flask_usage_metrics import TrackUsage

folder, how = Path(sys.argv[1]), sys.argv[2]
file = folder / "usage.sqlite3"
app = Flask("shop")
app.config["TRACK_USAGE_STATE_DIR"] = str(folder / "state")
app.config["TRACK_USAGE_FLUSH_SECONDS"] = 0.05
usage = TrackUsage(app, f"sqlite:///{file}")
client = app.test_client()

def visit(count):
    for _ in range(count):
        client.get("/nowhere")

def shown(name):
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

visit(300)
assert usage.flush()
if how == "emptied":
    os.truncate(file, 0)
elif how == "moved":
    file.rename(folder / "moved.sqlite3")
elif how == "replaced":
    (folder / "other.sqlite3").replace(file)
else:
    file.unlink()
visit(1)
flushed = usage.flush(0.5)
up = shown('flask_usage_sink_up{sink="sqlite"}')
visit(99)
deadline = time.monotonic() + 20
while shown('flask_usage_records_pending{sink="sqlite"}') and time.monotonic() < deadline:
    time.sleep(0.1)
print(json.dumps({
    "flushed": flushed,
    "up at once": up,
    "up": shown('flask_usage_sink_up{sink="sqlite"}'),
    "is a fault": shown('flask_usage_faults_total{part="sink sqlite"}') > 0,
    "written": shown('flask_usage_records_total{sink="sqlite",result="written"}'),
}), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["emptied", "moved", "replaced", "deleted"])
def test_a_site_goes_on_in_a_good_file_and_tells(tmp_path: Path, file: Path, how: str) -> None:
    replacement(file, 10)
    done = run_python(SITE, tmp_path, how)
    assert done.returncode == -9, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    # An empty file may be one that somebody is copying to: it is waited for.
    at_once = {"flushed": False, "up at once": 0} if how == "emptied" else {}
    assert told | at_once == told
    assert told | {"up": 1, "is a fault": True, "written": 400} == told
    assert rows(file) == (110 if how == "replaced" else 100)
    if how == "moved":
        assert rows(tmp_path / "moved.sqlite3") == 300


@pytest.mark.parametrize("how", ["moved", "replaced"])
def test_what_was_in_the_log_stays_with_its_file(file: Path, storage: SQLStorage, how: str) -> None:
    other = replacement(file, 10)
    with closing(opened(file)) as worker:
        storage.write(make_records(200))
        worker.write(make_records(50))
        moved = file.with_name("moved.sqlite3")
        file.rename(moved)
        if how == "replaced":
            other.rename(file)
        for one in (storage, worker):
            with pytest.raises(StorageUnavailable, match="moved, replaced or deleted, with"):
                one.write([make_record()])
        for _ in range(3):
            storage.write([make_record()])
            worker.write([make_record()])
        assert storage.count() == worker.count() == (16 if how == "replaced" else 6)
    assert rows(moved) == 250
    assert rows(file) == (16 if how == "replaced" else 6)


def test_what_was_committed_to_a_file_that_went_meanwhile_is_not_taken_for_written(
    file: Path, storage: SQLStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write([make_record()])
    run = storage.database.run

    def run_and_lose(*arguments: Any, **options: Any) -> Any:
        run(*arguments, **options)
        file.unlink()

    with monkeypatch.context() as patched:
        patched.setattr(storage.database, "run", run_and_lose)
        with pytest.raises(StorageUnavailable, match="replaced meanwhile"):
            storage.write([record := make_record()])
    with pytest.raises(StorageUnavailable, match="with 1 records of ours"):
        storage.write([record])
    storage.write([record])
    assert list(storage.records()) == [record]


def test_a_file_that_is_emptied_and_filled_again_is_kept(file: Path, storage: SQLStorage) -> None:
    storage.write(make_records(20))
    storage.database.run(storage.database.reach().deleted, create=False, absent=None)
    content = file.read_bytes()
    os.truncate(file, 0)
    with pytest.raises(StorageUnavailable, match="20 records that this process wrote are lost"):
        storage.write([make_record()])
    file.write_bytes(content)
    storage.write([make_record()])
    assert storage.count() == 21


def test_a_file_that_is_cut_off_takes_nothing_until_it_is_whole(
    file: Path, storage: SQLStorage
) -> None:
    storage.write(make_records(3_999))
    storage.database.run(storage.database.reach().deleted, create=False, absent=None)
    storage.write([make_record()])
    storage.database.run(storage.database.reach().deleted, create=False, absent=None)
    content = file.read_bytes()
    os.truncate(file, len(content) // 8192 * 4096)
    for _ in range(3):
        with pytest.raises(StorageUnavailable):
            storage.write([make_record()])
    file.write_bytes(content)
    storage.write([make_record()])
    assert rows(file) == 4_001


def test_a_vacuum_is_no_damage(file: Path, storage: SQLStorage) -> None:
    storage.write(make_records(4_000))
    with plain(file) as connection:
        connection.execute("DELETE FROM flask_usage WHERE id > 10")
        connection.commit()
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    storage.write(make_records(5))
    assert storage.count() == 15


def test_a_file_that_others_replace_while_it_is_closed_is_not_missed(
    file: Path, storage: SQLStorage
) -> None:
    storage.write(make_records(3))
    storage.close()
    replacement(file, 10).replace(file)
    storage.write([make_record()])
    assert storage.count() == 11
    until(lambda: rows(file), 11)
