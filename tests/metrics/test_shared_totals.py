"""The workers' totals in one file: exact under any syncs, and made anew when it is damaged."""

from __future__ import annotations

import json
import random
import sqlite3
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from helpers.damage import break_it
from helpers.examples import examples
from helpers.process import start_python
from helpers.records import START, make_record
from helpers.watch import descriptors
from hypothesis import given, settings
from hypothesis import strategies as st

from flask_usage_metrics.metrics.exemplars import BucketExemplars, pack
from flask_usage_metrics.metrics.families import Numbers
from flask_usage_metrics.metrics.gauges import Gauges
from flask_usage_metrics.metrics.shared_totals import SharedTotals
from flask_usage_metrics.metrics.totals_tables import SeriesKey

GAUGES = Gauges(0, {}, {}, True)
A: SeriesKey = ("requests", ("GET", "a"))
B: SeriesKey = ("requests", ("GET", "b"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "g"
    folder.mkdir(mode=0o700)
    return folder / "totals.sqlite3"


def add(file: SharedTotals, **counts: int) -> None:
    file.sync({("requests", ("GET", name)): [n] for name, n in counts.items()}, {}, GAUGES)


def look(file: SharedTotals) -> dict[str, float]:
    file.sync({}, {}, GAUGES)
    return {labels[1]: numbers[0] for (_, labels), numbers in file.merged.items()}


def insist(files: list[SharedTotals], new: dict[SeriesKey, Numbers]) -> None:
    """Offer until all have taken it; in turns, as workers do: one may wait for another to close."""
    waiting = list(files)
    for _ in range(5):
        for file in list(waiting):
            with suppress(sqlite3.Error):
                file.sync(new, {}, GAUGES)
                waiting.remove(file)
        if not waiting:
            return
    raise AssertionError("not taken")


def test_each_sees_the_sum_of_all_and_only_what_changed_is_written(path: Path) -> None:
    files = [SharedTotals(path) for _ in range(3)]
    for number, file in enumerate(files):
        add(file, a=1, **{"bcd"[number]: 10})
    for file in files:
        assert look(file) == {"a": 3, "b": 10, "c": 10, "d": 10}
    with closing(sqlite3.connect(path)) as reader:
        rows = reader.execute("SELECT labels, changed FROM series").fetchall()
    assert {json.loads(labels)[1]: changed for labels, changed in rows} == {
        "a": 3,
        "b": 1,
        "c": 2,
        "d": 3,
    }
    for file in files:
        file.close()


def test_a_sync_tells_what_it_changed_and_what_others_did(path: Path) -> None:
    one, other = SharedTotals(path), SharedTotals(path)
    assert one.sync({A: [1], B: [2]}, {}, GAUGES) == ({A: [1], B: [2]}, {})
    assert one.sync({}, {}, GAUGES) == ({}, {})
    assert other.sync({A: [10]}, {}, GAUGES, {A: [b"x"]}) == (
        {A: [11], B: [2]},
        {A: [b"x"]},
    )
    assert one.sync({B: [3]}, {}, GAUGES) == ({A: [11], B: [5]}, {A: [b"x"]})
    path.unlink()
    assert other.sync({A: [1]}, {}, GAUGES) == ({A: [12], B: [5]}, {A: [b"x"]})
    assert one.sync({}, {}, GAUGES) == ({A: [12], B: [5]}, {A: [b"x"]})
    for file in (one, other):
        file.close()


def test_sums_are_exact_under_concurrent_syncs(path: Path) -> None:
    names = "abcdefgh"
    expected: Counter[str] = Counter()
    lock = threading.Lock()
    fallen = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        file = SharedTotals(path)
        last: dict[SeriesKey, Numbers] = {}
        for _ in range(60):
            counts = {rng.choice(names): rng.randrange(1, 9) for _ in range(rng.randrange(4))}
            new: dict[SeriesKey, Numbers] = {
                ("requests", ("GET", n)): [c] for n, c in counts.items()
            }
            while True:
                try:
                    file.sync(new, {}, GAUGES)
                    break
                except sqlite3.OperationalError:
                    continue
            with lock:
                expected.update(counts)
            fallen.extend(key for key, was in last.items() if file.merged[key] < was)
            last = dict(file.merged)
        file.close()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not fallen
    file = SharedTotals(path)
    assert look(file) == expected
    file.close()


def test_sums_are_exact_among_processes_that_are_killed(path: Path) -> None:
    script = """
import sqlite3, sys, time
from pathlib import Path
from flask_usage_metrics.metrics.gauges import Gauges
from flask_usage_metrics.metrics.shared_totals import SharedTotals
file = SharedTotals(Path(sys.argv[1]))
number = 0
while True:
    try:
        number += 1
        file.sync({("requests", ("GET", sys.argv[2])): [1]}, {sys.argv[2]: number},
                   Gauges(1, {}, {}, True))
    except sqlite3.OperationalError:
        number -= 1
    time.sleep(0.002)
"""
    children = [start_python(script, path, name) for name in ("a", "b", "c")]
    file = SharedTotals(path)
    deadline = time.monotonic() + 60
    while len(file.merged) < 3 or len(file.workers) < 4:
        assert time.monotonic() < deadline
        with suppress(sqlite3.OperationalError):  # the others release hardly a gap
            file.sync({}, {}, GAUGES)
    assert {pid for pid, gauges in file.workers.items() if gauges.in_progress} == {
        child.pid for child in children
    }
    for child in children:
        with child:  # which is killed
            time.sleep(0.1)
    sums = look(file)
    assert len(file.workers) == 1  # the gauges of the dead are gone
    # The number of the commit and the sums are of one transaction.
    assert sums == {name: file.last_commit(name) for name in "abc"}
    file.forget(["a"])
    assert [file.last_commit(name) is None for name in "abc"] == [True, False, False]
    file.release()


HOWS = ["removed", "folder-removed", "emptied", "garbage", "half", "replaced"]


@pytest.mark.parametrize("how", HOWS)
def test_damage_loses_nothing_that_somebody_saw(path: Path, how: str) -> None:
    files = [SharedTotals(path) for _ in range(3)]
    for file in files:
        add(file, a=5, b=1)
    for file in files:
        assert look(file) == {"a": 15, "b": 3}
    break_it(path, how)
    insist(files, {A: [1]})
    for file in files:
        assert file.merged[A][0] >= 16
        assert file.merged[B] == [3]
    for file in files:
        assert look(file) == {"a": 18, "b": 3}
    newcomer = SharedTotals(path)
    assert look(newcomer) == {"a": 18, "b": 3}
    for file in [*files, newcomer]:
        file.close()


@pytest.mark.parametrize("how", ["removed", "garbage", "emptied"])
def test_damage_at_any_moment_makes_no_value_fall_and_none_is_missing(path: Path, how: str) -> None:
    rng = random.Random(how)
    files = [SharedTotals(path) for _ in range(3)]
    seen = [0.0] * 3
    for step in range(150):
        if step % 25 == 24:
            break_it(path, how)
            insist(files, {})
        who = rng.randrange(3)
        insist([files[who]], {A: [1]})
        assert files[who].merged[A][0] > max(seen)
        seen[who] = files[who].merged[A][0]
    assert max(seen) == 150
    for file in files:
        file.close()


COPY = "totals-copy.sqlite3"


@pytest.mark.parametrize("how", HOWS)
def test_what_one_worker_alone_knows_is_not_missing_when_the_copy_is_lost_too(
    path: Path, how: str
) -> None:
    files = [SharedTotals(path) for _ in range(4)]
    for file in files:
        add(file, a=1, b=1)
    for number, file in enumerate(files):  # each has seen more than the one before
        add(file, a=10 ** (number + 1))
    if how != "folder-removed":
        break_it(path.with_name(COPY), how)
    break_it(path, how)
    waiting = [files[1], files[3], files[0], files[2]]
    insist(waiting, {A: [100_000]})
    for file in files:
        assert look(file) == {"a": 11_114 + 400_000, "b": 4}
        file.close()


def test_what_others_know_is_added_to_what_one_began_that_knew_nothing(path: Path) -> None:
    files = [SharedTotals(path) for _ in range(3)]
    for file in files:
        add(file, a=100)
    break_it(path.with_name(COPY), "removed")
    break_it(path, "removed")
    files.append(SharedTotals(path))
    add(files[3], a=1_000)  # as a worker that has just started
    for file in files * 2:
        insist([file], {A: [1]})
    for file in files:
        assert look(file) == {"a": 1_308}
        file.close()


def test_an_old_file_in_its_place_is_not_added_again(path: Path, tmp_path: Path) -> None:
    files = [SharedTotals(path) for _ in range(2)]
    for file in files:
        add(file, a=100)
    for number in range(3):
        with (
            closing(sqlite3.connect(path)) as source,
            closing(sqlite3.connect(tmp_path / f"old{number}")) as old,
        ):
            source.backup(old)
        break_it(path, "emptied")
        for file in files:
            insist([file], {A: [1]})
    for number in range(3):
        path.with_name(COPY).unlink()
        (tmp_path / f"old{number}").replace(path)
        path.chmod(0o600)
        for file in files:
            insist([file], {})
        assert look(files[0]) == look(files[1]) == {"a": 206}
    for file in files:
        file.close()


def test_losses_in_a_row_lose_nothing_that_somebody_knows(path: Path) -> None:
    files = [SharedTotals(path) for _ in range(4)]
    for number, file in enumerate(files):
        add(file, a=10**number)
    for number in (3, 2, 1, 0):  # none has come again since the loss before
        break_it(path, "emptied")
        insist([files[number]], {A: [10_000]})
    for file in files * 2:
        insist([file], {})
    for file in files:
        assert look(file) == {"a": 1_111 + 40_000}
        file.close()


def test_a_commit_is_known_wherever_what_it_counted_is(path: Path) -> None:
    """Also in a file made of a copy that was locked when it should have had them."""
    one, other = SharedTotals(path), SharedTotals(path)
    one.sync({A: [1]}, {"journal": 1}, GAUGES)
    other.sync({}, {}, GAUGES)
    with closing(sqlite3.connect(path.with_name(COPY), isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        one.sync({A: [1]}, {"journal": 2}, GAUGES)
    break_it(path, "emptied")
    insist([other, one], {})
    assert other.last_commit("journal") == 2
    assert look(other) == {"a": 2}
    one.close()
    other.close()


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.sampled_from([0, 1, 2, 3, "emptied", "removed"]), max_size=25))
def test_what_is_remembered_is_added_once_when_file_and_copy_are_lost(
    steps: list[int | str],
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "g", "totals.sqlite3")
        path.parent.mkdir(mode=0o700)
        files = [SharedTotals(path) for _ in range(4)]
        counted = 0
        for step in [0, 1, 2, 3, *steps]:
            if isinstance(step, int):
                insist([files[step]], {A: [1, 0.1]})
                counted += 1
            else:
                for name in (path.name, COPY):
                    with suppress(FileNotFoundError):
                        break_it(path.with_name(name), step)
        insist(files * 2, {})
        for file in files:
            assert file.merged == {A: [counted, pytest.approx(counted / 10)]}
            file.close()


def test_a_file_that_lacks_what_is_known_here_is_not_gone_over_to(path: Path) -> None:
    """Though each of its sums may be larger by now: what it lacks would be forgotten."""
    one, other = SharedTotals(path), SharedTotals(path)
    for file in (one, other):
        add(file, a=1)
    with closing(sqlite3.connect(path.with_name(COPY), isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        add(one, a=10)
    break_it(path, "emptied")
    insist([other], {A: [100]})
    with pytest.raises(sqlite3.OperationalError):
        one.read()
    assert look(one) == look(other) == {"a": 112}
    one.close()
    other.close()


WORKERS = range(3)
WORK = [*(f"sync {number}" for number in WORKERS), "end 0", "kill 0", "kill 1"]


@settings(max_examples=examples(60), deadline=None)
@given(data=st.data())
def test_no_sum_falls_or_is_wrong_whatever_is_lost_at_once(data: st.DataObject) -> None:
    """Workers come, go, are killed and sync in any order, while the file or its copy is damaged.

    Always the same of both: whoever has a file open may not see at once that it is damaged.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder, "g", "totals.sqlite3")
        path.parent.mkdir(mode=0o700)
        files = [SharedTotals(path) for _ in WORKERS]
        journals = [f"journal {number}" for number in WORKERS]
        commits = dict.fromkeys(journals, 0)
        damaged = path.with_name(data.draw(st.sampled_from([path.name, COPY])))
        counted, is_whole = 0, False
        for step in data.draw(st.lists(st.sampled_from([*WORK, *HOWS[2:]]), max_size=25)):
            kind, _, number = step.partition(" ")
            if kind == "sync":
                file, journal = files[int(number)], journals[int(number)]
                commits[journal] += 1
                counted += 1
                file.sync({A: [1]}, {journal: commits[journal]}, GAUGES)
                # Nobody knows less, and nobody shows what may fall.
                assert file.merged[A] == [counted]
                is_whole = True
            elif number:
                file, journal = files[int(number)], journals[int(number)]
                file.release() if kind == "end" else file.close()
                files[int(number)] = SharedTotals(path)
                journals[int(number)] = f"journal {len(commits)}"
                commits[journals[int(number)]] = 0
                if commits[journal] and files[2].is_known:  # as who recovers the journal asks
                    with suppress(sqlite3.DatabaseError):  # it is damaged: he comes again
                        files[2].last_commit(journal)
                    assert files[2].last_commit(journal) == commits[journal]
            elif is_whole:
                break_it(damaged, step)
                is_whole = False
        for file in files * 2:
            file.sync({}, {}, GAUGES)
        for file in files:
            assert file.merged.get(A, [0]) == [counted]
            file.close()


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE series SET labels = x'ff'",
        "UPDATE series SET numbers = '[1'",
        "UPDATE series SET numbers = '[1, 2]'",
        "UPDATE series SET family = x'ffff'",
        "UPDATE series SET family = NULL",
        "UPDATE series SET labels = '[\"GET\"]'",
        "UPDATE worker SET gauges = x'00'",
        "UPDATE worker SET started = 5",
        "UPDATE exemplar SET packed = 7",
        "UPDATE state SET number = 0",
        "DELETE FROM state",
    ],
)
def test_what_cannot_be_read_is_damage(path: Path, change: str) -> None:
    widths = {"requests": (2, 1)}
    files = [SharedTotals(path, widths) for _ in range(2)]
    for file in files:
        file.sync({A: [5], B: [1]}, {"journal": 7}, GAUGES, {A: [b"x"]})
    with closing(sqlite3.connect(path)) as other:
        with suppress(sqlite3.IntegrityError):  # a key of two rows
            other.execute(change)
        other.execute("UPDATE series SET changed = 1000")
        other.execute("UPDATE exemplar SET changed = 1000")
        other.commit()
    for file in files:
        file.sync({A: [1]}, {}, GAUGES)
    for file in (*files, SharedTotals(path, widths)):
        file.sync({}, {}, GAUGES)
        assert file.merged == {A: [12], B: [2]}
        assert file.exemplars == {A: [b"x"]}
        assert file.last_commit("journal") == 7
        file.close()


@pytest.mark.parametrize("how", ["locked", "in the way"])
def test_what_is_shared_can_be_read_when_it_cannot_be_written(path: Path, how: str) -> None:
    one, other = SharedTotals(path), SharedTotals(path)
    add(one, a=1)
    add(other, a=1)
    if how == "in the way":
        path.unlink()
        path.mkdir()
        assert one.read().sums == {A: [2]} == one.merged
        with pytest.raises(OSError, match="not a file"):
            one.sync({}, {}, GAUGES)
        path.rmdir()
    else:
        with closing(sqlite3.connect(path, isolation_level=None)) as locker:
            locker.execute("BEGIN EXCLUSIVE")
            locker.execute("UPDATE state SET number = number")
            assert one.read().sums == {A: [2]} == one.merged
            assert one.read().sums == {}
            with pytest.raises(sqlite3.OperationalError):
                one.sync({}, {}, GAUGES)
            locker.execute("ROLLBACK")
    newcomer = SharedTotals(path)
    assert newcomer.read().sums == {A: [2]}
    add(one, a=1)
    assert look(other) == look(newcomer) == {"a": 3}
    for file in (one, other, newcomer):
        file.close()


def test_reading_makes_no_file(path: Path) -> None:
    file = SharedTotals(path)
    with pytest.raises(FileNotFoundError):
        file.read()
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("first", ["last_commit", "forget", "release"])
def test_who_first_asks_a_new_file_something_still_tells_what_it_knows(
    path: Path, first: str
) -> None:
    one = SharedTotals(path)
    add(one, a=100, b=7)
    break_it(path, "removed")
    if first == "last_commit":
        assert one.last_commit("journal") is None
    elif first == "forget":
        one.forget(["journal"])
    else:
        one.release()
    two = SharedTotals(path)
    add(two, a=1)  # it never saw the old file
    add(one, b=1)
    assert one.merged[A][0] >= 100
    assert look(one)["b"] == 8
    assert look(two) == look(one)
    one.close()
    two.close()


def test_a_locked_file_raises_within_about_a_second_and_adds_nothing(path: Path) -> None:
    file, fresh = SharedTotals(path), SharedTotals(path)
    add(file, a=1)
    before = descriptors(path.parent)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        other.execute("UPDATE state SET number = number")
        for who in (file, fresh):
            start = time.monotonic()
            with pytest.raises(sqlite3.OperationalError):
                who.sync({A: [10]}, {"j": 1}, GAUGES)
            # Less than the 5 seconds of Python's default, even on a busy machine.
            assert time.monotonic() - start < 4
        other.execute("ROLLBACK")
    assert path.exists()
    file.sync({A: [10]}, {"j": 1}, GAUGES)
    fresh.sync({A: [100]}, {}, GAUGES)
    assert look(file) == look(fresh) == {"a": 111}
    assert file.last_commit("j") == 1
    file.close()
    fresh.close()
    assert descriptors(path.parent) < before


def test_a_locked_file_keeps_no_descriptor(path: Path) -> None:
    add(file := SharedTotals(path), a=1)
    file.close()
    before = descriptors(path.parent)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        other.execute("UPDATE state SET number = number")
        for _ in range(2):
            with pytest.raises(sqlite3.OperationalError):
                file.last_commit("j")
        other.execute("ROLLBACK")
    file.close()
    assert descriptors(path.parent) == before


def test_the_gauges_of_a_worker_that_releases_the_file_go_with_it(path: Path) -> None:
    file = SharedTotals(path)
    add(file, a=1)
    assert len(file.workers) == 1
    with closing(sqlite3.connect(path)) as other:
        other.execute("INSERT INTO worker SELECT 1, x'35', gauges FROM worker")
        other.execute("INSERT INTO worker SELECT 999999999, x'', gauges FROM worker LIMIT 1")
        other.commit()
    add(file, a=1)
    assert len(file.workers) == 1
    file.release()
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT * FROM worker").fetchall() == []
        assert other.execute("SELECT numbers FROM series").fetchall() == [(b"[2]",)]


def exemplar(second: float) -> bytes:
    began = START + timedelta(seconds=second)
    return pack(make_record(started_at=began, trace_id="1" * 32, span_id="2" * 16))


def observe(
    file: SharedTotals, exemplars: dict[SeriesKey, BucketExemplars]
) -> dict[SeriesKey, BucketExemplars]:
    """Visit as a worker does: an exemplar comes with the count of its series."""
    file.sync({key: [1] for key in exemplars}, {}, GAUGES, exemplars)
    return file.exemplars


class TestExemplars:
    def test_each_sees_the_newest_and_only_what_changed_is_written(self, path: Path) -> None:
        one, other = SharedTotals(path), SharedTotals(path)
        observe(one, {A: [exemplar(1), b"", exemplar(9)], B: [b"", exemplar(1), b""]})
        observe(other, {A: [exemplar(2), exemplar(2), exemplar(2)]})
        expected = {
            A: [exemplar(2), exemplar(2), exemplar(9)],
            B: [b"", exemplar(1), b""],
        }
        assert observe(other, {}) == observe(one, {}) == expected
        with closing(sqlite3.connect(path)) as reader:
            rows = reader.execute("SELECT labels, changed FROM exemplar").fetchall()
        assert {json.loads(labels)[1]: changed for labels, changed in rows} == {"a": 2, "b": 1}
        one.close()
        other.close()

    def test_only_what_changed_is_read(self, path: Path) -> None:
        one, other = SharedTotals(path), SharedTotals(path)
        observe(one, {A: [exemplar(1)]})
        observe(other, {B: [exemplar(1)]})
        with closing(sqlite3.connect(path)) as changer:
            changer.execute("UPDATE exemplar SET packed = 'unreadable' WHERE changed < 2")
            changer.commit()
        assert observe(one, {})[B] == observe(other, {})[B] == [exemplar(1)]
        one.close()
        other.close()

    def test_all_agree_on_the_newest_whoever_comes_when(self, path: Path) -> None:
        rng = random.Random(7)
        files = [SharedTotals(path) for _ in range(3)]
        expected: dict[SeriesKey, BucketExemplars] = {}
        for step in range(200):
            if step % 50 == 49:
                break_it(path, "removed")
                insist(files, {})
            key: SeriesKey = ("requests", ("GET", rng.choice("abc")))
            row = [exemplar(rng.randrange(1000)) if rng.random() < 0.5 else b"" for _ in "123"]
            observe(rng.choice(files), {key: row})
            expected[key] = [*map(max, expected.get(key, row), row)]
        for file in files:
            observe(file, {})
        for file in files:
            assert observe(file, {}) == expected
            file.close()

    @pytest.mark.parametrize("how", HOWS)
    def test_damage_loses_nothing_that_somebody_saw(self, path: Path, how: str) -> None:
        files = [SharedTotals(path) for _ in range(3)]
        for second, file in enumerate(files):
            observe(file, {A: [exemplar(second)], ("requests", (f"{second}",)): [exemplar(1)]})
        seen = dict(observe(files[0], {}))
        assert len(seen) == 4
        break_it(path, how)
        insist(files, {})
        newcomer = SharedTotals(path)
        for file in [*files, newcomer]:
            assert observe(file, {}) == seen
            file.close()

    def test_a_sync_that_fails_adds_none(self, path: Path) -> None:
        file, other = SharedTotals(path), SharedTotals(path)
        observe(file, {A: [exemplar(1)]})
        observe(other, {})
        with closing(sqlite3.connect(path, isolation_level=None)) as breaker:
            breaker.execute(
                "CREATE TRIGGER none BEFORE INSERT ON worker BEGIN SELECT RAISE(ABORT, 'no'); END"
            )
            with pytest.raises(sqlite3.IntegrityError):
                observe(file, {A: [exemplar(2)], B: [exemplar(2)]})
            assert file.exemplars == {A: [exemplar(1)]}
            breaker.execute("DROP TRIGGER none")
        assert observe(other, {}) == {A: [exemplar(1)]}
        assert observe(file, {A: [exemplar(2)]}) == {A: [exemplar(2)]}
        file.close()
        other.close()
