"""Visitors of a day are counted, over all processes and restarts, each once."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from helpers.damage import break_it
from helpers.visitors import (
    DAY,
    MIDNIGHT,
    NOON,
    TODAY,
    TOMORROW,
    Clock,
    Shop,
    as_root,
    in_threads,
    mode,
    other_process,
    plant_file,
    plant_link,
    plant_open,
    plant_strangers,
    python,
)
from helpers.watch import descriptors
from hypothesis import given
from hypothesis import strategies as st

from flask_usage_metrics.enrich.visitors import tally as tally_module
from flask_usage_metrics.enrich.visitors.tally import VisitorTally
from flask_usage_metrics.runtime.faults import Faults


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path / "place")
    yield shop
    shop.close()


def at(moment: float, visitors: Iterable[object]) -> list[tuple[float, str]]:
    return [(moment, f"{visitor:>016}") for visitor in visitors]


def stored(shop: Shop) -> tuple[int, int]:
    """Return how many ids are in the file of today, and the number it gives."""
    with closing(sqlite3.connect(shop.folder / f"{TODAY}.sqlite3")) as reader:
        (count,) = reader.execute("SELECT COUNT(*) FROM seen").fetchone()
        (number,) = reader.execute("SELECT number FROM tally").fetchone()
    return count, number


def test_each_counts_once_among_all_who_look(shop: Shop) -> None:
    one, two = shop.tally(), shop.tally()
    assert one.today() == 0
    one.add(at(NOON, [1, 2, 2, 3]))
    two.add(iter(at(NOON, [3, 4])))
    one.add(at(NOON, [1, 4]))
    one.add([])
    assert one.today() == two.today() == shop.tally().today() == 4
    assert stored(shop) == (4, 4)
    assert shop.fault_count() == 0


def test_a_restart_begins_with_those_who_were_there(shop: Shop) -> None:
    tally = shop.tally()
    tally.add(at(NOON, range(10)))
    tally.close()
    again = shop.tally()
    assert again.today() == 10
    again.add(at(NOON, range(5, 15)))
    assert again.today() == tally.today() == 15


def test_only_today_counts(shop: Shop) -> None:
    tally = shop.tally()
    tally.add(at(MIDNIGHT - 1, [1]))
    tally.add(at(MIDNIGHT, [2]))
    tally.add(at(MIDNIGHT + DAY - 0.1, [3]))
    tally.add(at(MIDNIGHT + DAY, [4]))
    assert tally.today() == 2


def test_a_new_day_begins_at_zero_and_nothing_of_the_old_is_left(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "instance", tmp_path / "temporary")
    other = Shop(tmp_path / "temporary").make_folder()
    tally, idle = shop.tally(), shop.tally()
    tally.add(at(NOON, range(10)))
    assert idle.today() == 10
    shop.clock.now = NOON + DAY
    keep = {"2024-10-03.key", "2024-10-03.sqlite3.bak", "2024-10-33.sqlite3", "notes"}
    for folder in (shop.folder, other):
        for end in ("-wal", "-shm", "-journal"):
            (folder / f"{TODAY}.sqlite3{end}").write_text("")
        for name in (*keep, "2040-01-01.sqlite3", "2024-10-03.sqlite3"):
            (folder / name).write_text("")
    assert tally.today() == 0
    assert {path.name for path in other.iterdir()} == keep
    assert shop.files() == keep
    tally.add(at(NOON + DAY, range(3)))
    tally.add(at(NOON, range(10)))  # late ones of yesterday
    assert tally.today() == idle.today() == 3
    assert shop.files() == {*keep, f"{TOMORROW}.sqlite3"}
    assert shop.fault_count() == 0
    shop.close()


def test_nothing_is_made_to_look(shop: Shop) -> None:
    assert shop.tally().today() == 0
    shop.tally().add(at(NOON - DAY, [1]))
    assert not shop.state.places[0].exists()


def test_the_set_is_for_its_owner_only(shop: Shop) -> None:
    old = os.umask(0)
    try:
        shop.tally().add(at(NOON, range(5000)))
    finally:
        os.umask(old)
    assert mode(shop.folder / f"{TODAY}.sqlite3") == 0o600
    assert mode(shop.folder) == 0o700


def test_a_set_in_another_place_is_found(tmp_path: Path) -> None:
    before = Shop(tmp_path / "temporary")
    before.tally().add(at(NOON, range(10)))
    after = Shop(tmp_path / "instance", tmp_path / "temporary")
    after.tally().add(at(NOON, range(5, 15)))
    assert after.tally().today() == before.tally().today() == 15
    assert not after.folder.exists()
    before.close()
    after.close()


@given(st.lists(st.text(st.characters(exclude_categories=()), max_size=8)))
def test_any_text_may_be_an_id(
    tmp_path_factory: pytest.TempPathFactory, visitors: list[str]
) -> None:
    tally = VisitorTally(None, "shop", Faults(), clock=Clock())
    tally.add([(NOON, visitor) for visitor in [*visitors, "\ud800", "\0"]])
    assert tally.today() == len({*visitors, "\ud800", "\0"})
    tally.close()


CROWD = """
import os, sys, threading
from pathlib import Path
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.state_dir import StateDir
from flask_usage_metrics.enrich.visitors.tally import VisitorTally
state, faults = StateDir([Path(sys.argv[1])], "shop"), Faults()
start, go = os.pipe()
children = []
for process in range(4):
    child = os.fork()
    if not child:
        os.close(go)
        os.read(start, 1)
        tally = VisitorTally(state, "shop", faults, clock=lambda: 86400.0)
        fallen = []
        def work(thread):
            last = 0
            for step in range(60):
                first = (process * 3 + thread * 2) * 100 + step * 10
                tally.add((86400.0, f"{number:016}") for number in range(first, first + 20))
                number = tally.today()
                fallen.append(number < last)
                last = number
        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(3)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        tally.close()
        os._exit(any(fallen))
    children.append(child)
os.close(go)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
tally = VisitorTally(state, "shop", faults, clock=lambda: 86400.0)
print(tally.today(), faults.counts())
"""


def test_the_number_is_exact_among_processes_and_threads(tmp_path: Path) -> None:
    expected = {
        (process * 3 + thread * 2) * 100 + step * 10 + number
        for process in range(4)
        for thread in range(3)
        for step in range(60)
        for number in range(20)
    }
    assert python(CROWD, tmp_path) == f"{len(expected)} {{}}\n"


ADD_FOREVER = """
import sys, time
from pathlib import Path
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.state_dir import StateDir
from flask_usage_metrics.enrich.visitors.tally import VisitorTally
tally = VisitorTally(StateDir([Path(sys.argv[1])], "shop"), "shop", Faults(),
                     clock=lambda: float(sys.argv[2]))
print("ready", flush=True)
number = 0
while True:
    batch = range(number, number + 50)
    tally.add((float(sys.argv[2]), f"{visitor:>016}") for visitor in batch)
    number += 50
    Path(sys.argv[3]).write_text(str(number))
"""


def test_the_number_is_exact_after_a_kill_in_the_middle(shop: Shop, tmp_path: Path) -> None:
    done = tmp_path / "done"
    for pause in (0.05, 0.11, 0.17):
        done.unlink(missing_ok=True)
        with other_process(ADD_FOREVER, shop.state.places[0], NOON, done) as process:
            while not done.exists():
                time.sleep(0.001)
            time.sleep(pause)
            process.kill()
        added = int(done.read_text() or 0)
        count, number = stored(shop)
        assert count == number >= added
        tally = shop.tally()
        assert tally.today() == number
        tally.add(at(NOON, range(number + 7)))
        assert tally.today() == number + 7
    assert shop.fault_count() == 0


FORKED = """
import os, sys
from pathlib import Path
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.state_dir import StateDir
from flask_usage_metrics.enrich.visitors.tally import VisitorTally
state = StateDir([Path(sys.argv[1])], "shop") if sys.argv[1] else None
tally = VisitorTally(state, "shop", Faults(),
                     clock=lambda: 86400.0)
tally.add([(86400.0, "parent")])
read, write = os.pipe()
child = os.fork()
if child:
    os.close(read)
    tally.add([(86400.0, "parent again")])
    tally.close()
    os.close(write)
    _, status = os.waitpid(child, 0)
    print(status, tally.today())
else:
    os.close(write)
    tally.reset_after_fork()
    tally.add([(86400.0, "parent"), (86400.0, "child")])
    os.read(read, 1)
    tally.add([(86400.0, "child again")])
    print(tally.today(), flush=True)
    tally.close()
"""


def test_a_fork_takes_nothing_away(tmp_path: Path) -> None:
    assert python(FORKED, tmp_path).split() == ["4", "0", "4"]
    # A child lets go of its parent's connection unclosed, of which Python 3.13 warns.
    quiet = "import logging, warnings; logging.disable(); warnings.simplefilter('ignore')\n"
    assert python(quiet + FORKED, "").split()[0] == "3"  # a child alone has its own


def test_a_fork_in_the_middle_of_a_call_blocks_no_child(tmp_path: Path) -> None:
    script = """
import os, sys, threading, warnings
from pathlib import Path
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.state_dir import StateDir
from flask_usage_metrics.enrich.visitors.tally import VisitorTally
warnings.simplefilter("ignore")  # of a fork beside threads
state = StateDir([Path(sys.argv[1])], "shop")
tally = VisitorTally(state, "shop", Faults(), clock=lambda: 86400.0)
inside, done = threading.Event(), threading.Event()
def slow():
    inside.set()
    yield 86400.0, "parent"
    done.wait()
thread = threading.Thread(target=tally.add, args=(slow(),))
thread.start()
inside.wait()
child = os.fork()
if not child:
    tally.reset_after_fork()
    tally.add([(86400.0, "child")])
    print(tally.today(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
done.set()
thread.join()
print(tally.today())
"""
    assert python(script, tmp_path).split() == ["1", "2"]


def test_nothing_is_kept_open(shop: Shop) -> None:
    ids, tally = shop.ids(), shop.tally()
    for number in range(20):
        assert shop.who(ids)
        tally.add(at(NOON, [number]))
        tally.today()
        ids.close()
    assert descriptors(shop.folder) == 0


@pytest.mark.parametrize(
    "how", ["removed", "folder-removed", "emptied", "garbage", "half", "replaced"]
)
def test_damage_loses_nobody_who_was_there_lately(shop: Shop, how: str) -> None:
    tallies = [shop.tally() for _ in range(3)]
    for number, tally in enumerate(tallies):
        tally.add(at(NOON, range(number * 500, number * 500 + 1000)))
    assert [tally.today() for tally in tallies] == [2000] * 3
    break_it(shop.folder / f"{TODAY}.sqlite3", how)
    for _ in range(2):
        for tally in tallies:
            tally.add(at(NOON, ["new"]))
            tally.today()
    assert [tally.today() for tally in tallies] == [2001] * 3
    assert shop.tally().today() == 2001
    assert stored(shop) == (2001, 2001)
    assert how == "replaced" or mode(shop.folder / f"{TODAY}.sqlite3") == 0o600


def test_a_file_that_vanished_gives_no_number(shop: Shop) -> None:
    tally, idle = shop.tally(), shop.tally()
    tally.add(at(NOON, range(10)))
    assert idle.today() == 10
    (shop.folder / f"{TODAY}.sqlite3").unlink()
    assert idle.today() == 0  # it knows of none itself
    assert tally.today() == 10
    assert idle.today() == 10


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the pauses after a failure, in seconds: one second each."""
    clock = Clock(0.0)
    monkeypatch.setattr(tally_module, "monotonic", clock)
    return clock


def test_a_locked_file_delays_but_loses_nothing(shop: Shop, pauses: Clock) -> None:
    tally, fresh = shop.tally(), shop.tally()
    tally.add(at(NOON, range(10)))
    begun = time.monotonic()
    with locked(shop.folder / f"{TODAY}.sqlite3"):
        tally.add(at(NOON, range(10)))  # who was counted lately costs no sync
        assert shop.fault_count() == 0
        tally.add(at(NOON, range(5, 20)))
        assert 0.5 < time.monotonic() - begun < 5
        for number in range(20, 50):
            tally.add(at(NOON, [number]))
            assert tally.today() == 10
        assert shop.fault_count() == 1  # at most one wait in a second
        pauses.now = 0.5
        assert fresh.today() == 0
        fresh.add(at(NOON, ["fresh"]))
        assert shop.fault_count() == 2
    assert tally.today() == 10  # it pauses still
    pauses.now = 1.0
    assert tally.today() == 50
    assert fresh.today() == 0
    fresh.close()  # it adds what is left, without a pause
    assert tally.today() == 51
    assert shop.fault_count() == 2


def test_what_waits_for_a_locked_file_is_bounded(shop: Shop, pauses: Clock) -> None:
    tally = shop.tally()
    tally.add(at(NOON, range(10)))
    tracemalloc.start()
    with locked(shop.folder / f"{TODAY}.sqlite3"):
        tally.add((NOON, f"{visitor:>016}") for visitor in range(110_000))
        held, _ = tracemalloc.get_traced_memory()
        assert held < 20e6
    pauses.now += 1
    assert tally.today() == 100_010
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 2e6
    tally.add(at(NOON, range(110_000)))
    assert tally.today() == 110_000
    assert stored(shop) == (110_000, 110_000)


def test_a_full_disk_delays_but_loses_nothing(tmp_path: Path) -> None:
    script = """
import logging, resource, sys
from pathlib import Path
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.state_dir import StateDir
from flask_usage_metrics.enrich.visitors import tally as module
now = 0.0
module.monotonic = lambda: now  # the clock of the pauses after a failure
logging.disable()
faults = Faults()
state = StateDir([Path(sys.argv[1])], "shop")
tally = module.VisitorTally(state, "shop", faults, clock=lambda: 86400.0)
tally.add([(86400.0, "first")])
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
tally.add((86400.0, str(number)) for number in range(3000))
assert faults.counts() == {"visitors": 1}
assert tally.today() == 1
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
now = 1.0
print(tally.today(), faults.counts())
"""
    assert python(script, tmp_path) == "3001 {'visitors': 1}\n"


@pytest.mark.parametrize(
    "plant", [plant_file, plant_link, plant_open, pytest.param(plant_strangers, marks=as_root)]
)
def test_without_a_place_a_process_counts_alone_until_there_is_one(
    shop: Shop, plant: Callable[[Path], None]
) -> None:
    plant(shop.folder)
    one, two = shop.tally(), shop.tally()
    for _ in range(3):
        one.add(at(NOON, range(6000)))
    two.add(at(NOON, range(5000, 7000)))
    assert one.today() == 6000
    assert two.today() == 2000
    assert shop.fault_count() == 2  # one of each
    if shop.folder.is_dir() and not shop.folder.is_symlink():
        shutil.rmtree(shop.folder)
    else:
        shop.folder.unlink()
    assert one.today() == 6000
    one.add(at(NOON, ["new"]))
    two.add(at(NOON, ["new"]))
    assert one.today() == two.today() == 7001
    assert stored(shop) == (7001, 7001)
    assert shop.fault_count() == 2
    shutil.rmtree(shop.folder)
    shop.folder.write_text("x")
    assert one.today() == 7001  # what it counted alone is no more of interest


@pytest.mark.parametrize("what", ["link", "folder"])
def test_what_is_in_the_place_of_the_set_is_not_used(shop: Shop, what: str) -> None:
    path = shop.make_folder() / f"{TODAY}.sqlite3"
    target = path.with_name("target")
    target.write_bytes(b"")
    if what == "link":
        path.symlink_to(target)
    else:
        path.mkdir()
    tally = shop.tally()
    tally.add(at(NOON, range(10)))
    assert tally.today() == 10
    assert target.read_bytes() == b""
    assert shop.fault_count() == 1


def test_a_place_that_is_lost_leaves_the_last_known_number(shop: Shop, pauses: Clock) -> None:
    tally, other = shop.tally(), shop.tally()
    other.add(at(NOON, range(10)))
    tally.add(at(NOON, [1, 2]))
    assert tally.today() == 10
    aside = shop.folder.with_name("aside")
    shop.folder.rename(aside)
    shop.folder.write_text("x")
    tally.add(at(NOON, ["new"]))
    assert tally.today() == 10
    assert shop.fault_count() == 1
    shop.folder.unlink()
    aside.rename(shop.folder)
    pauses.now += 1
    assert tally.today() == 11


def test_without_a_state_directory_nothing_is_shared(shop: Shop) -> None:
    tally = VisitorTally(None, "shop", shop.faults, clock=shop.clock)
    assert tally.today() == 0
    assert shop.fault_count() == 0

    def add(number: int) -> None:
        for first in range(number * 100, number * 100 + 200, 2):
            tally.add(at(NOON, [first, first + 1]))

    in_threads(4, add)
    assert tally.today() == 500
    assert shop.fault_count() == 1
    shop.clock.now += DAY
    assert tally.today() == 0
    tally.add(at(NOON + DAY, [1]))
    assert tally.today() == 1
    tally.close()


def test_memory_does_not_grow_with_the_number_of_visitors(shop: Shop) -> None:
    tally = shop.tally()
    tally.add((NOON, f"{visitor:>016}") for visitor in range(20_000))
    tracemalloc.start()
    tally.add((NOON, f"{visitor:>016}") for visitor in range(200_000))
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tally.today() == 200_000
    assert size < 1e6
    assert peak < 4e6
