"""What waits on disk: in order, bounded, exactly once, and there after the process is gone."""

from __future__ import annotations

import itertools
import os
import random
import signal
import stat
import struct
import tempfile
import textwrap
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from helpers.examples import examples
from helpers.process import Done, run_python
from helpers.records import make_record, make_records
from hypothesis import given, settings
from hypothesis import strategies as st

from flask_usage_metrics import StorageUnavailable, UsageRecord, open_storage
from flask_usage_metrics.metrics.sink_counters import SinkCounters
from flask_usage_metrics.pipeline.delivery import sink as delivery
from flask_usage_metrics.pipeline.delivery.sink import Sink
from flask_usage_metrics.pipeline.delivery.spool import Spool
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.storage import Writer

LARGE = 64 * 1024 * 1024
PRELUDE = """
import os, signal, sys, threading, time, warnings
from pathlib import Path
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork
from helpers.records import make_record, make_records
from flask_usage_metrics import StorageUnavailable, open_storage
from flask_usage_metrics.pipeline.delivery.sink import Sink
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.pipeline.delivery.spool import Spool
from flask_usage_metrics.storage import Writer
from flask_usage_metrics.metrics.sink_counters import SinkCounters
"""


def run(program: str) -> Done:
    return run_python(PRELUDE + textwrap.dedent(program), warnings=(), seconds=120)


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def drain(spool: Spool, at_most: int = 7) -> list[UsageRecord]:
    records: list[UsageRecord] = []
    while batch := spool.peek(at_most):
        records += batch
        spool.ack(len(batch))
    assert len(spool) == 0
    return records


def statuses(records: Sequence[UsageRecord]) -> list[int]:
    return [record.status for record in records]


# ---------------------------------------------------------------------------- the spool alone


def test_nothing_is_on_disk_before_the_first_record_and_after_the_last(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "late"
    spool = Spool(folder, LARGE)
    assert spool.recover() == 0
    assert spool.peek(10) == []
    assert not folder.parent.exists()
    records = make_records(3)
    assert spool.append(records) == 0
    (file,) = files(folder)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert drain(spool) == records
    assert files(folder) == []
    spool.close()


def test_a_record_of_anything_json_can_hold_comes_back_the_same(tmp_path: Path) -> None:
    spool = Spool(tmp_path, LARGE)
    record = make_record(
        path="/ü/🦊\x01\x1f\u2028\ufeff",
        query="x" * 300_000,
        track_var={"big": 10**40, "nested": [{"a": None, "b": [1.5, True, "%s"]}]},
        ip_info={"city": "Köln"},
        queue_seconds=1e-300,
    )
    spool.append([record, make_record(), record])
    assert drain(spool)[::2] == [record, record]


def test_a_record_that_cannot_be_encoded_is_dropped_alone(tmp_path: Path) -> None:
    spool = Spool(tmp_path, LARGE)
    records = make_records(3)
    assert spool.append([records[0], make_record(path="\ud800"), *records[1:]]) == 1
    assert drain(spool) == records


operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 60)),
        st.tuples(st.just("peek"), st.integers(1, 80)),
        st.tuples(st.just("ack"), st.integers(0, 80)),
        st.tuples(st.just("reopen"), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=examples(150), deadline=None)
@given(operations, st.sampled_from([500, 9_000, 40_000, LARGE]))
def test_a_spool_is_a_bounded_queue_that_drops_its_oldest(
    todo: list[tuple[str, int]], max_bytes: int
) -> None:
    status = itertools.count()
    with tempfile.TemporaryDirectory() as folder:
        spool = Spool(Path(folder), max_bytes)
        expected: list[UsageRecord] = []
        for operation, number in todo:
            if operation == "append":
                given_records = [make_record(status=next(status)) for _ in range(number)]
                expected += given_records
                dropped = spool.append(given_records)
                assert dropped == 0 or max_bytes < LARGE
                del expected[:dropped]
            elif operation == "peek":
                assert spool.peek(number) == expected[:number]
            elif operation == "ack":
                number = min(number, len(expected))
                spool.ack(number)
                del expected[:number]
            else:
                spool.close()
                spool = Spool(Path(folder), max_bytes)
                assert spool.recover() == len(expected)
            assert len(spool) == len(expected)
            assert sum(file.stat().st_size for file in files(Path(folder))) <= max_bytes
        assert drain(spool) == expected
        assert (spool.damaged, spool.take_lost()) == (0, 0)
        assert files(Path(folder)) == []


def test_a_bound_that_is_hit_drops_a_sixteenth_at_a_time(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1_000_000)
    total = dropped = 0
    while dropped == 0:
        dropped = spool.append(make_records(1))
        total += 1
    assert len(spool) == total - dropped
    assert dropped <= total / 12


def test_the_order_holds_though_the_clock_is_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(10**18, -(10**9))
    monkeypatch.setattr(time, "time_ns", lambda: next(clock))
    records = [make_record(status=status) for status in range(40)]
    spool = Spool(tmp_path, 16 * 3000)
    for record in records:
        spool.append([record])
    assert len(files(tmp_path)) > 5
    spool.close()
    assert spool.recover() == 40
    assert drain(spool) == records


def test_a_full_disk_keeps_all_or_none(tmp_path: Path) -> None:
    done = run(f"""
        import resource
        folder = Path({str(tmp_path)!r})

        def limit(size):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        def sizes():
            return sorted((file.name, file.stat().st_size) for file in folder.iterdir())

        # A new file, the end of one, and one file after another that still had room.
        for max_bytes in (64_000_000, 1_000_000):
            spool = Spool(folder, max_bytes)
            kept = []
            for first in (0, 20, 70):
                if first:
                    kept += make_records(first)
                    assert spool.append(kept[-first:]) == 0
                before = sizes()
                limit(max(size for _, size in before or [("", 0)]) + 9_000)
                for _ in range(3):
                    try:
                        spool.append([*make_records(100), make_record(query="x" * 90_000)])
                    except OSError:
                        pass
                    else:
                        raise AssertionError
                    assert sizes() == before
                    assert len(spool) == len(kept)
                limit(resource.RLIM_INFINITY)
            kept += make_records(5)
            assert spool.append(kept[-5:]) == 0
            assert spool.peek(1000) == kept
            spool.close()
            again = Spool(folder, max_bytes)
            assert again.recover() == len(kept) and again.peek(1000) == kept
            assert again.damaged == 0
            again.ack(len(kept))
            again.close()
            assert sizes() == []
    """)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_a_killed_process_left_is_recovered_in_front_oldest_first(tmp_path: Path) -> None:
    for number in range(2):
        done = run(f"""
            spool = Spool(Path({str(tmp_path)!r}), 300_000)
            for status in range(100):
                assert spool.append([make_record(status={number} * 1000 + status)]) == 0
            spool.peek(50)
            spool.ack(42)
            os.kill(os.getpid(), signal.SIGKILL)
        """)
        assert done.returncode == -signal.SIGKILL
    spool = Spool(tmp_path, LARGE)
    spool.append([make_record(status=5000)])
    assert spool.recover() == 116
    assert spool.recover() == 0
    spool.append([make_record(status=5001)])
    assert len(spool) == 118
    assert statuses(drain(spool)) == [*range(42, 100), *range(1042, 1100), 5000, 5001]
    assert (spool.damaged, files(tmp_path)) == (0, [])


def test_more_than_there_is_room_for_is_recovered_later(tmp_path: Path) -> None:
    for number in range(5):
        dead = Spool(tmp_path, LARGE)
        dead.append([make_record(status=number * 20 + at) for at in range(20)])
        dead.close()
    spool = Spool(tmp_path, 40_000)
    taken: list[UsageRecord] = []
    while spool.recover():
        assert len(spool) <= 40
        taken += drain(spool)
    assert statuses(taken) == list(range(100))


def test_a_file_is_left_to_the_spool_that_has_it(tmp_path: Path) -> None:
    living, other = Spool(tmp_path, LARGE), Spool(tmp_path, LARGE)
    records = make_records(2)
    living.append(records)
    assert (other.recover(), len(other)) == (0, 0)
    assert drain(living) == records
    assert files(tmp_path) == []


def test_a_file_is_recovered_by_one_alone(tmp_path: Path) -> None:
    for _ in range(20):
        records = []
        for _ in range(12):
            dead = Spool(tmp_path, LARGE)
            records += make_records(2)
            dead.append(records[-2:])
            dead.close()
        spools = [Spool(tmp_path, LARGE) for _ in range(4)]
        barrier = threading.Barrier(len(spools))
        came: list[UsageRecord] = []

        def recover(
            spool: Spool,
            barrier: threading.Barrier = barrier,
            came: list[UsageRecord] = came,
        ) -> None:
            barrier.wait()
            # Each removes what it took, while others still have the name of the file.
            while spool.recover():
                came.extend(drain(spool))

        threads = [threading.Thread(target=recover, args=(spool,)) for spool in spools]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Whoever was asked for its files at the wrong moment finds them the next time.
        came += drain(spools[0]) if spools[0].recover() else []
        assert sorted(came, key=lambda record: record.id) == records
        assert files(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_leaves_its_parents_files_alone(tmp_path: Path) -> None:
    done = run(f"""
        folder = Path({str(tmp_path)!r})
        parents = make_records(3)
        spool = Spool(folder, 64_000_000)
        spool.append(parents)
        ready, done = os.pipe(), os.pipe()
        pid = os.fork()
        if not pid:
            spool.reset_after_fork()
            assert len(spool) == 0 and spool.peek(5) == []
            # Still locked by the parent, after the child closed its copies.
            assert spool.recover() == 0
            spool.append(make_records(2))
            os.write(ready[1], b"x")
            os.read(done[0], 1)
            assert len(spool.peek(5)) == 2
            os._exit(0)
        os.read(ready[0], 1)
        other = Spool(folder, 64_000_000)
        assert other.recover() == 0
        assert spool.peek(5) == parents
        # The child has no copy left: what the parent closes is free.
        spool.close()
        assert other.recover() == 3
        assert other.peek(5) == parents
        os.write(done[1], b"x")
        assert os.waitpid(pid, 0)[1] == 0
        assert other.recover() == 2
    """)
    assert (done.returncode, done.stderr) == (0, "")


def test_files_that_are_no_spools_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    dead = Spool(folder, LARGE)
    dead.append(make_records(2))
    dead.close()
    (real,) = files(folder)
    content = real.read_bytes()
    real.rename(tmp_path / "elsewhere")

    def name(number: int) -> Path:
        return folder / f"{number:020d}-0123abcd.spool"

    name(1).symlink_to(tmp_path / "elsewhere")
    name(2).write_bytes(b"not a spool")
    name(3).write_bytes(b"")
    name(4).mkdir()
    os.mkfifo(name(5))
    (folder / "1.spool").write_bytes(content)
    (folder / f"{name(6).name}.bak").write_bytes(content)
    (folder / f"{7:020d}-0123abcd.spool\n").write_bytes(content)
    before = [(path, path.lstat().st_mtime_ns) for path in files(folder)]
    spool = Spool(folder, LARGE)
    assert spool.recover() == 0
    spool.append(make_records(1))
    assert spool.recover() == 0
    assert len(drain(spool)) == 1
    assert [(path, path.lstat().st_mtime_ns) for path in files(folder)] == before
    assert (tmp_path / "elsewhere").read_bytes() == content


damages = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.floats(0, 1), st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("flip"), st.floats(0, 1), st.sampled_from([b"7", b"x", b"\0"])),
        st.tuples(st.just("cut"), st.floats(0, 1), st.just(b"")),
        st.tuples(st.just("extend"), st.just(1.0), st.binary(min_size=1, max_size=100)),
        st.tuples(st.just("zeros"), st.floats(0, 1), st.just(b"\0" * 900)),
    ),
    min_size=1,
    max_size=3,
)


def damage(path: Path, damages: list[tuple[str, float, bytes]]) -> int:
    """Damage a file; return the first offset where it is not as it was."""
    content = path.read_bytes()
    damaged = bytearray(content)
    for kind, where, data in damages:
        at = int(where * len(damaged))
        if kind == "cut":
            del damaged[at:]
        else:
            damaged[at : at + len(data)] = data
    path.write_bytes(damaged)
    same = [old == new for old, new in zip(content, damaged, strict=False)]
    return same.index(False) if False in same else len(same)


def frame_ends(content: bytes) -> Iterator[int]:
    offset = 20
    while offset < len(content):
        length, checksum = struct.unpack_from("<II", content, offset)
        offset += 8 + length
        assert zlib.crc32(content[offset - length : offset]) == checksum
        yield offset


@settings(max_examples=examples(300), deadline=None)
@given(damages, st.integers(0, 12), st.booleans())
def test_a_damaged_file_gives_what_is_before_the_damage_and_nothing_made_up(
    harm: list[tuple[str, float, bytes]], acked: int, recovered: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        spool = Spool(Path(folder), LARGE)
        records = [make_record(status=status) for status in range(12)]
        spool.append(records)
        spool.peek(acked or 1)
        spool.ack(acked)
        if acked == 12:
            return
        (path,) = files(Path(folder))
        ends = list(frame_ends(path.read_bytes()))
        assert len(ends) == 12
        if recovered:
            spool.close()
        first_bad = damage(path, harm)
        whole = records[: sum(end <= first_bad for end in ends)]
        if not recovered or first_bad >= 20:
            whole = whole[acked:]
        if recovered:
            came = spool.recover()
            assert came == len(spool)
            if first_bad < 8:
                assert came == 0
                assert files(Path(folder)) == [path]
                return
        later = [make_record(status=100 + status) for status in range(3)]
        assert spool.append(later) == 0
        pending = len(spool)
        read = drain(spool)
        assert len(read) + spool.take_lost() == pending
        # In the damaged file those that follow may be out of reach.
        assert read[-3:] == later or not recovered
        assert [record for record in read if record in whole] == whole
        assert all(record in records + later for record in read)
        assert statuses(read) == sorted(set(statuses(read)))
        assert files(Path(folder)) == []


def test_a_record_that_was_changed_is_not_taken_for_one(tmp_path: Path) -> None:
    dead = Spool(tmp_path, LARGE)
    dead.append(records := [make_record(status=status) for status in range(201, 206)])
    dead.close()
    (file,) = files(tmp_path)
    file.write_bytes(file.read_bytes().replace(b'"status":203', b'"status":999'))
    spool = Spool(tmp_path, LARGE)
    assert spool.recover() == 4
    assert spool.damaged == 1
    assert drain(spool) == records[:2] + records[3:]


def test_what_follows_a_loss_that_was_noticed_can_be_read(tmp_path: Path) -> None:
    spool = Spool(tmp_path, LARGE)
    records = make_records(10)
    spool.append(records)
    (file,) = files(tmp_path)
    os.truncate(file, file.stat().st_size // 2)
    read = spool.peek(100)
    assert read == records[: len(read)]
    assert (len(spool), spool.take_lost(), spool.damaged) == (len(read), 10 - len(read), 1)
    spool.append(later := make_records(3))
    assert drain(spool) == read + later
    assert spool.take_lost() == 0


@pytest.mark.parametrize("passed", [2, 5, 7, 10, 12])
def test_a_loss_is_counted_once_though_it_is_passed_unread(tmp_path: Path, passed: int) -> None:
    spool = Spool(tmp_path, LARGE)
    records = make_records(10)
    spool.append(records)
    (file,) = files(tmp_path)
    ends = list(frame_ends(file.read_bytes()))
    os.truncate(file, ends[4])
    spool.close()  # A new file is begun for what comes next.
    spool.recover()
    spool.append(records[5:])
    (_, file) = files(tmp_path)
    os.truncate(file, 20)
    spool.append([])
    spool.ack(min(passed, 10))
    left = len(drain(spool))
    assert left + spool.take_lost() == 10 - min(passed, 10)


def test_a_file_that_somebody_removed_first_is_not_recovered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    dead = Spool(tmp_path, LARGE)
    dead.append(make_records(3))
    dead.close()
    (file,) = files(tmp_path)
    flock = fcntl.flock

    def flock_late(descriptor: int, operation: int) -> None:
        file.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    assert Spool(tmp_path, LARGE).recover() == 0


def test_a_file_that_cannot_be_removed_is_not_recovered_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_path: Path, missing_ok: bool = False) -> None:
        raise PermissionError

    spool = Spool(tmp_path, LARGE)
    spool.append(make_records(5))
    monkeypatch.setattr(Path, "unlink", refuse)
    assert len(drain(spool)) == 5
    monkeypatch.undo()
    assert len(files(tmp_path)) == 1
    other = Spool(tmp_path, LARGE)
    assert (spool.recover(), other.recover()) == (0, 0)
    spool.close()
    # That all of it was done with had been noted.
    assert other.recover() == 0
    assert files(tmp_path) == []
    # But what was dropped has not been.
    monkeypatch.setattr(Path, "unlink", refuse)
    spool = Spool(tmp_path, 20_000)
    dropped = sum(spool.append(make_records(5)) for _ in range(20))
    assert dropped + len(spool) == 100
    assert (spool.recover(), other.recover()) == (0, 0)
    spool.close()


# ---------------------------------------------------------------------------- behind a sink


class Kept(Writer):
    """Keeps records, and fails in a way of its own."""

    def set_up(self, fail: Callable[[Sequence[UsageRecord]], object] = lambda batch: None) -> None:
        self.records: list[UsageRecord] = []
        self.fail = fail

    def write(self, batch: Sequence[UsageRecord]) -> None:
        self.fail(batch)
        self.records += batch


class Outage:
    """A storage's way to fail while it is down."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def __call__(self, _batch: Sequence[UsageRecord]) -> None:
        if not self.over.is_set():
            raise StorageUnavailable


class Bench:
    """A sink with its sink_counters."""

    def __init__(
        self,
        storage: Writer,
        folder: Path | None,
        *,
        capacity: int = 100,
        max_bytes: int = LARGE,
        idle_seconds: float = 10,
    ) -> None:
        self.sink_counters = SinkCounters("kept")
        self.faults = Faults()
        self.captured = 0
        self.spool = None if folder is None else Spool(folder, max_bytes)
        self.sink = Sink(
            storage,
            self.sink_counters,
            capacity=capacity,
            idle_seconds=idle_seconds,
            faults=self.faults,
            spool=self.spool,
        )

    def put(self, records: Sequence[UsageRecord], at_once: int = 50) -> None:
        for start in range(0, len(records), at_once):
            some = records[start : start + at_once]
            self.captured += len(some)
            self.sink.put(some, dropped=0, failed=0)

    def flush(self, seconds: float = 20) -> bool:
        return self.sink.flush(time.monotonic() + seconds)

    def fate(self) -> dict[str, int]:
        """Return what became of the records, which must be all."""
        fate = {
            "written": self.sink_counters.written,
            "failed": self.sink_counters.failed,
            "dropped": self.sink_counters.dropped,
            "pending": self.sink.pending(),
        }
        assert sum(fate.values()) == self.captured + self.sink.recovered
        return fate


def counts(written: int, failed: int = 0, dropped: int = 0, pending: int = 0) -> dict[str, int]:
    return {"written": written, "failed": failed, "dropped": dropped, "pending": pending}


def eventually(holds: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def test_a_storage_that_is_up_costs_no_disk(tmp_path: Path) -> None:
    kept = Kept()
    bench = Bench(kept, tmp_path / "spool", capacity=1000)
    records = make_records(900)
    bench.put(records)
    assert bench.flush()
    assert kept.records == records
    assert not (tmp_path / "spool").exists()


def test_an_outage_longer_than_memory_loses_nothing_and_keeps_the_order(tmp_path: Path) -> None:
    outage = Outage()
    kept = Kept(outage)
    bench = Bench(kept, tmp_path)
    records = make_records(5000)
    bench.put(records[:50])
    assert not bench.flush(0.2)
    assert bench.sink.durable() == 50
    bench.put(records[50:])
    assert not bench.flush(0.2)
    assert bench.fate() == counts(0, pending=5000)
    assert bench.sink.durable() == 5000
    assert not bench.sink.up
    outage.over.set()
    assert bench.flush()
    assert kept.records == records
    assert bench.fate() == counts(5000)
    assert bench.sink.up
    assert files(tmp_path) == []
    # Back to memory.
    bench.put(more := make_records(100))
    assert bench.flush()
    assert kept.records == records + more


def test_more_than_the_bound_drops_the_oldest_and_counts(tmp_path: Path) -> None:
    outage = Outage()
    kept = Kept(outage)
    bench = Bench(kept, tmp_path, max_bytes=500_000)
    records = make_records(5000)
    bench.put(records)
    # The thread tries again meanwhile: what is in flight is acked or dropped when it is done.
    assert eventually(lambda: bench.sink_counters.dropped > 4000)
    outage.over.set()
    assert bench.flush()
    fate = bench.fate()
    assert fate == counts(len(kept.records), dropped=5000 - len(kept.records))
    assert 400 < len(kept.records) < 600
    # A batch that was in flight as its file was dropped may have been written.
    assert kept.records[-400:] == records[-400:]
    assert bench.faults.counts()["sink kept"] > 0


def test_a_blocked_storage_overflows_to_the_disk(tmp_path: Path) -> None:
    free = threading.Event()
    deliveries = 0

    def block(_batch: Sequence[UsageRecord]) -> None:
        nonlocal deliveries
        deliveries += 1
        free.wait(30)

    kept = Kept(block)
    bench = Bench(kept, tmp_path)
    records = make_records(3000)
    bench.put(records[:60])
    assert eventually(lambda: deliveries == 1)
    assert bench.sink.durable() == 0
    assert files(tmp_path) == []
    bench.put(records[60:])
    assert bench.fate() == counts(0, pending=3000)
    # Also what is being written is on disk: a kill may have it written twice, never lost.
    assert bench.sink.durable() == 3000
    assert not bench.flush(0.1)
    free.set()
    assert bench.flush()
    assert kept.records == records
    assert bench.fate() == counts(3000)


@pytest.mark.parametrize("ends_well", [True, False])
def test_what_is_dropped_while_it_is_in_flight_is_counted_once(
    tmp_path: Path, ends_well: bool
) -> None:
    blocked = threading.Event()
    free = threading.Event()
    outage = Outage()

    def block(batch: Sequence[UsageRecord]) -> None:
        blocked.set()
        free.wait(30)
        outage(batch)

    if ends_well:
        outage.over.set()
    kept = Kept(block)
    bench = Bench(kept, tmp_path, max_bytes=200_000)
    records = make_records(2000)
    bench.put(records[:50])
    assert blocked.wait(10)
    bench.put(records[50:])
    # Not those 50 that may be written yet.
    assert bench.fate()["dropped"] == 2000 - bench.fate()["pending"]
    assert bench.fate()["pending"] > 50
    assert not bench.flush(0.1)
    free.set()
    assert eventually(lambda: bench.sink.up is ends_well)
    outage.over.set()
    assert bench.flush()
    assert bench.fate() == counts(len(kept.records), dropped=2000 - len(kept.records))
    assert len({record.id for record in kept.records}) == len(kept.records)
    assert (kept.records[:50] == records[:50]) is ends_well
    assert kept.records[-100:] == records[-100:]


def test_a_bound_nothing_fits_in_drops_all_but_what_is_being_written(tmp_path: Path) -> None:
    blocked = threading.Event()
    free = threading.Event()

    def block(_batch: Sequence[UsageRecord]) -> None:
        blocked.set()
        free.wait(30)

    kept = Kept(block)
    bench = Bench(kept, tmp_path, max_bytes=100)
    bench.put(make_records(50))
    assert blocked.wait(10)
    bench.put(make_records(200))
    # When memory was full for the first time; then it had room again.
    assert bench.fate() == counts(0, dropped=100, pending=150)
    free.set()
    assert bench.flush()
    assert bench.fate() == counts(150, dropped=100)


def test_one_poisonous_record_in_the_spool_is_found(tmp_path: Path) -> None:
    outage = Outage()

    def refuse(batch: Sequence[UsageRecord]) -> None:
        outage(batch)
        if any(record.path == "/poison" for record in batch):
            raise ValueError

    kept = Kept(refuse)
    bench = Bench(kept, tmp_path)
    records = make_records(600)
    bench.put([*records[:300], make_record(path="/poison"), *records[300:]])
    assert not bench.flush(0.1)
    outage.over.set()
    assert bench.flush()
    assert kept.records == records
    assert bench.fate() == counts(600, failed=1)
    assert files(tmp_path) == []


def test_a_file_damaged_meanwhile_counts_its_records_as_failed(tmp_path: Path) -> None:
    outage = Outage()
    kept = Kept(outage)
    bench = Bench(kept, tmp_path, capacity=10)
    records = make_records(1000)
    bench.put(records)
    (file,) = files(tmp_path)
    os.truncate(file, file.stat().st_size // 2)
    outage.over.set()
    assert bench.flush()
    written = len(kept.records)
    assert 600 > written > 400
    assert kept.records == records[:written]
    assert bench.fate() == counts(written, failed=1000 - written)
    assert bench.faults.counts()["spool kept"] == 1


def test_a_folder_that_cannot_be_written_leaves_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in place of the folder")
    outage = Outage()
    kept = Kept(outage)
    bench = Bench(kept, tmp_path / "file" / "spool")
    records = make_records(200)
    bench.put(records[:80], at_once=8)
    assert not bench.flush(0.2)
    bench.put(records[80:], at_once=8)
    assert bench.fate() == counts(0, dropped=100, pending=100)
    assert bench.sink.durable() == 0
    outage.over.set()
    assert bench.flush()
    assert kept.records == records[:100]
    assert bench.fate() == counts(100, dropped=100)
    assert bench.sink.durable() == 200
    told = [message for message in caplog.messages if message.startswith("spool")]
    assert len(told) == 1
    assert not any(str(tmp_path) in message for message in told)


def test_a_disk_that_has_room_again_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flask_usage_metrics.pipeline.delivery import queue

    monkeypatch.setattr(queue, "_SPOOL_PAUSE_SECONDS", 0.01)
    obstacle = tmp_path / "spool"
    obstacle.write_text("in place of the folder")
    outage = Outage()
    kept = Kept(outage)
    bench = Bench(kept, obstacle)
    records = make_records(900)
    bench.put(records[:60])
    assert eventually(lambda: bench.faults.counts().get("spool kept", 0) > 0)
    obstacle.unlink()
    time.sleep(0.02)
    bench.put(records[60:])
    assert bench.fate() == counts(0, pending=900)
    outage.over.set()
    assert bench.flush()
    assert kept.records == records


def test_durable_counts_refused_records(tmp_path: Path) -> None:
    outage = Outage()
    bench = Bench(Kept(outage), None, capacity=10)
    assert bench.sink.durable() == 0
    bench.put(make_records(25))
    assert bench.fate() == counts(0, dropped=15, pending=10)
    assert bench.sink.durable() == 0
    outage.over.set()
    assert bench.flush()
    assert bench.sink.durable() == 25
    outage.over.clear()
    bench.put(make_records(5))
    assert bench.sink.durable() == 25


def test_close_saves_what_waits_and_the_next_one_writes_it(tmp_path: Path) -> None:
    outage = Outage()
    first = Bench(Kept(outage), tmp_path)
    records = make_records(700)
    first.put(records)
    assert not first.flush(0.1)
    assert first.sink.close() == 0
    assert first.fate() == counts(0, pending=700)
    kept = Kept()
    second = Bench(kept, tmp_path)
    second.put(more := make_records(5))
    assert eventually(lambda: len(kept.records) == 705)
    assert second.flush()
    assert sorted(kept.records, key=lambda record: record.id) == records + more
    assert second.sink.recovered == 700
    assert second.fate() == counts(705)
    # Nor does the first one take anything back.
    assert first.sink.pending() == 700
    first.sink.close()
    second.sink.close()


def test_close_moves_a_short_outage_to_the_disk_and_the_sink_may_go_on(tmp_path: Path) -> None:
    outage = Outage()
    kept = Kept(outage)
    bench = Bench(kept, tmp_path, idle_seconds=0.05)
    records = make_records(30)
    bench.put(records)
    assert not bench.flush(0.1)
    assert bench.sink.close() == 0
    outage.over.set()
    bench.put(more := make_records(30))
    assert eventually(lambda: len(kept.records) == 60)
    assert bench.flush()
    assert sorted(kept.records, key=lambda record: record.id) == records + more
    assert bench.fate() == counts(60)
    assert bench.sink.recovered == 0
    assert files(tmp_path) == []


def test_a_hung_storage_at_the_end_leaves_all_on_disk(tmp_path: Path) -> None:
    done = run(f"""
        class Hung(Writer):
            def write(self, batch):
                threading.Event().wait()

        sink = Sink(Hung(), SinkCounters("kept"), capacity=1000, idle_seconds=9, faults=Faults(),
                    spool=Spool(Path({str(tmp_path)!r}), 64_000_000))
        sink.put(make_records(700), dropped=0, failed=0)
        time.sleep(0.2)
        assert not sink.flush(time.monotonic() + 0.1)
        assert sink.close() == 0
    """)
    assert (done.returncode, done.stderr) == (0, "")
    assert Spool(tmp_path, LARGE).recover() == 700


@pytest.mark.parametrize("kill", [False, True])
def test_the_next_process_writes_what_one_could_not(tmp_path: Path, kill: bool) -> None:
    import sqlite3

    path = tmp_path / "usage.sqlite3"
    open_storage(f"sqlite:///{path}").write(make_records(1))
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    program = f"""
        sink = Sink(open_storage("sqlite:///{path}"), SinkCounters("sqlite"), capacity=100,
                    idle_seconds=9, faults=Faults(), spool=Spool(Path("{tmp_path}/spool"), 10**8))
        sink.put(make_records(50, app=sys.argv[0]), dropped=0, failed=0)
    """
    end = "os.kill(os.getpid(), signal.SIGKILL)" if kill else "assert sink.close() == 0"
    done = run(f"""{program}
        assert not sink.flush(time.monotonic() + 1)
        sink.put(make_records(900), dropped=0, failed=0)
        assert sink.pending() == 950 and sink.durable() == 950
        {end}
    """)
    assert (done.returncode, "Error" in done.stderr) == (-signal.SIGKILL if kill else 0, False)
    holder.close()
    # Another worker that was there all the time, and had nothing to write.
    storage = open_storage(f"sqlite:///{path}")
    bench = Bench(storage, tmp_path / "spool")
    bench.sink.start()
    assert eventually(lambda: bench.sink_counters.written == 950)
    assert bench.fate() == counts(950)
    assert files(tmp_path / "spool") == []
    assert storage.count() == 951
    bench.sink.close()


def test_a_batch_that_was_written_but_not_removed_comes_once(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite3"
    done = run(f"""
        storage = open_storage("sqlite:///{path}")
        spool = Spool(Path("{tmp_path}/spool"), 10**8)
        spool.append(make_records(300))
        storage.write(spool.peek(100))
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert done.returncode == -signal.SIGKILL
    storage = open_storage(f"sqlite:///{path}")
    assert storage.count() == 100
    bench = Bench(storage, tmp_path / "spool")
    bench.sink.start()
    assert eventually(lambda: bench.sink_counters.written == 300)
    assert storage.count() == 300
    bench.sink.close()


def test_what_another_worker_leaves_is_recovered_by_a_thread_that_idles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "RECOVER_SECONDS", 0.05)
    kept = Kept()
    bench = Bench(kept, tmp_path)
    bench.put(make_records(1))
    assert bench.flush()
    dead = Spool(tmp_path, LARGE)
    dead.append(make_records(9))
    time.sleep(0.2)
    assert len(kept.records) == 1
    dead.close()
    assert eventually(lambda: len(kept.records) == 10)
    assert eventually(lambda: bench.sink.pending() == 0)
    assert (bench.fate(), bench.sink.recovered) == (counts(10), 9)


def test_flush_waits_for_its_own_records_though_older_ones_were_recovered(tmp_path: Path) -> None:
    dead = Spool(tmp_path, LARGE)
    dead.append(make_records(600))
    dead.close()
    outage = Outage()
    written: list[int] = []

    def refuse(batch: Sequence[UsageRecord]) -> None:
        if written:
            outage(batch)
        written.append(len(batch))

    kept = Kept(refuse)
    bench = Bench(kept, tmp_path)
    bench.put(own := make_records(50))
    assert eventually(lambda: bench.sink.recovered == 600)
    for _ in range(3):
        assert not bench.flush(0.1)
    # Others are written, more than it waits for, but not these.
    assert bench.sink_counters.written == 512
    outage.over.set()
    assert bench.flush()
    assert {record.id for record in own} <= {record.id for record in kept.records}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_does_not_write_what_its_parent_spooled(tmp_path: Path) -> None:
    done = run(f"""
        down = True

        class Kept(Writer):
            def set_up(self):
                self.records = []
            def write(self, batch):
                if down:
                    raise StorageUnavailable
                self.records += batch

        kept = Kept()
        sink_counters = SinkCounters("kept")
        sink = Sink(kept, sink_counters, capacity=100, idle_seconds=9, faults=Faults(),
                    spool=Spool(Path({str(tmp_path)!r}), 64_000_000))
        sink.put(make_records(500), dropped=0, failed=0)
        assert not sink.flush(time.monotonic() + 0.2)
        pid = os.fork()
        if not pid:
            sink_counters.reset()
            sink.reset_after_fork()
            down = False
            sink.put(make_records(3), dropped=0, failed=0)
            ok = sink.flush(time.monotonic() + 20) and len(kept.records) == 3
            os._exit(not (ok and sink.pending() == 0 and sink.durable() == 3))
        assert os.waitpid(pid, 0)[1] == 0
        assert sink.pending() == 500
        down = False
        assert sink.flush(time.monotonic() + 20)
        assert len(kept.records) == 500 and sink_counters.written == 500
    """)
    assert (done.returncode, "Error" in done.stderr) == (0, False)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_a_storage_does_each_record_has_one_fate(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)

    def misbehave(_batch: Sequence[UsageRecord]) -> None:
        time.sleep(chance.random() / 200)
        raised = chance.choice([None, None, None, StorageUnavailable, OSError, ValueError])
        if raised is not None:
            raise raised

    kept = Kept(misbehave)
    # So small that it overflows at times, too.
    bench = Bench(kept, tmp_path, max_bytes=100_000)
    lock = threading.Lock()
    records: list[UsageRecord] = []

    def visit() -> None:
        for _ in range(100):
            some = make_records(20)
            with lock:
                records.extend(some)
                bench.put(some)
            time.sleep(0.001)

    threads = [threading.Thread(target=visit) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    deadline = time.monotonic() + 60
    while not bench.flush(0.05) and time.monotonic() < deadline:
        pass
    fate = bench.fate()
    assert (bench.captured, fate["pending"]) == (6000, 0)
    assert fate["written"] == len(kept.records) == len({record.id for record in kept.records})
    places = {record.id: place for place, record in enumerate(records)}
    order = [places[record.id] for record in kept.records]
    assert order == sorted(order)
    assert bench.sink.durable() == 6000
