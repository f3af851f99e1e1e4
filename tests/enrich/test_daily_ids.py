"""Visitors are told apart for one day, in all processes alike, and never again after it."""

from __future__ import annotations

import os
import shutil
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from hashlib import blake2b
from ipaddress import ip_address
from pathlib import Path

import pytest
from helpers.visitors import (
    DAY,
    MIDNIGHT,
    NOON,
    PERSON,
    STRANGER,
    TODAY,
    TOMORROW,
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
from hypothesis import given
from hypothesis import strategies as st

from flask_usage_metrics.enrich.visitors.daily_ids import GRACE_SECONDS, VisitorIds


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path / "place")
    yield shop
    shop.close()


# ------------------------------------------------------------------------ who is who


ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)
TEXTS = st.text(st.characters(exclude_categories=()), max_size=600)


@given(ADDRESSES, TEXTS, TEXTS)
def test_an_id_is_a_keyed_hash_of_network_user_agent_and_host(
    tmp_path_factory: pytest.TempPathFactory, address: str, agent: str, host: str
) -> None:
    shop = Shop(tmp_path_factory.getbasetemp() / "hashes")
    visitor = shop.ids().identify(NOON, address, agent, host)
    (path,) = shop.folder.iterdir()
    parsed = ip_address(address)
    network = parsed.packed if parsed.version == 4 else parsed.packed[:8]
    texts = "\0" + agent[:512] + "\0" + host[:255].lower()
    expected = blake2b(
        network + texts.encode("utf-8", "surrogatepass"),
        key=path.read_bytes(),
        digest_size=8,
        person=b"visitor",
    )
    assert visitor == expected.hexdigest()
    assert len(visitor) == 16
    assert shop.fault_count() == 0


def test_visitors_differ_by_network_user_agent_and_host_but_not_by_more(shop: Shop) -> None:
    ids = shop.ids()
    different = [
        PERSON,
        ("203.0.113.10", *PERSON[1:]),
        ("2001:db8:0:1::1", *PERSON[1:]),
        ("2001:db8:0:2::1", *PERSON[1:]),
        (PERSON[0], "curl/8", PERSON[2]),
        (PERSON[0], PERSON[1], "blog.example"),
        (PERSON[0], "", ""),
        (PERSON[0], "a" * 512, ""),
        (PERSON[0], "", "a" * 255),
    ]
    known = [ids.identify(NOON, *person) for person in different]
    assert len(set(known)) == len(different)
    same = [
        (0, (*PERSON[:2], "SHOP.example")),
        (2, ("2001:db8:0:1:ffff::2", *PERSON[1:])),
        (7, (PERSON[0], "a" * 513, "")),
        (8, (PERSON[0], "", "A" * 256)),
    ]
    for number, person in same:
        assert ids.identify(NOON, *person) == known[number]


@pytest.mark.parametrize(
    "address", [None, "", "unknown", "203.0.113", "1" * 1000, "::1%" + "z" * 100, "\ud800", "::\0"]
)
def test_without_an_address_nobody_is_told_apart(shop: Shop, address: str | None) -> None:
    assert shop.ids().identify(NOON, address, "", "") is None


def test_the_apps_of_one_place_have_keys_of_their_own(shop: Shop) -> None:
    blog = VisitorIds(shop.state, "blog", shop.faults, clock=shop.clock)
    assert shop.who(blog) != shop.who()


def test_what_is_remembered_of_visitors_is_bounded(shop: Shop) -> None:
    ids = shop.ids()
    shop.who(ids)
    tracemalloc.start()
    for number in range(200):
        ids.identify(NOON, "203.0.113.9", f"{number} " + "a" * 100_000, "b" * 100_000)
        ids.identify(NOON, "1" * 100_000 + str(number), "", "")
    for number in range(20_000):
        ids.identify(NOON, "203.0.113.9", str(number), "")
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 4e6


# ------------------------------------------------------------------------ one key for all


def test_processes_that_start_together_agree(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.state_dir import StateDir
from flask_usage_metrics.enrich.visitors.daily_ids import VisitorIds
for number in range(10):
    state = StateDir([Path(sys.argv[1]) / str(number)], "shop")
    start, go = os.pipe()
    read, write = os.pipe()
    children = []
    for _ in range(16):
        child = os.fork()
        if not child:
            faults = Faults()
            ids = VisitorIds(state, "shop", faults, clock=lambda: 86400.0)
            os.close(go)
            os.read(start, 1)
            visitor = ids.identify(86400.0, "203.0.113.9", "", "")
            os.write(write, f"{visitor} {faults.counts()}\\n".encode())
            os._exit(0)
        children.append(child)
    os.close(go)
    for child in children:
        os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as file:
        lines = file.read().splitlines()
    os.close(start)
    print(len(lines), len(set(lines)), lines[0][16:])
"""
    assert python(script, tmp_path).splitlines() == ["16 1  {}"] * 10


def test_threads_that_start_together_agree(shop: Shop) -> None:
    ids = VisitorIds(None, "shop", shop.faults, clock=shop.clock)
    found = set()
    in_threads(8, lambda _: found.add(shop.who(ids)))
    assert len(found) == 1
    assert shop.fault_count() == 1


def test_a_restart_on_the_same_day_changes_nobody(shop: Shop) -> None:
    ids = shop.ids()
    visitor = shop.who(ids)
    ids.close()
    assert shop.files() == {f"{TODAY}.key"}
    shop.clock.now += 3600
    assert shop.who() == shop.who(ids) == visitor
    assert shop.fault_count() == 0


def test_the_key_is_for_its_owner_only(shop: Shop) -> None:
    old = os.umask(0)
    try:
        shop.who()
    finally:
        os.umask(old)
    (path,) = shop.folder.iterdir()
    assert (mode(path), mode(path.parent)) == (0o600, 0o700)
    assert len(path.read_bytes()) == 32


def test_a_key_in_another_place_is_found(tmp_path: Path) -> None:
    before = Shop(tmp_path / "temporary")
    visitor = before.who()
    after = Shop(tmp_path / "instance", tmp_path / "temporary")
    assert after.make_folder() != before.folder
    assert after.who() == visitor
    assert after.files() == set()


@pytest.mark.parametrize("content", [b"", b"1234567", b"x" * 33, bytes(32)])
def test_what_is_no_key_is_replaced(shop: Shop, content: bytes) -> None:
    path = shop.make_folder() / f"{TODAY}.key"
    path.write_bytes(content)
    assert shop.who() == shop.who()
    assert len(path.read_bytes()) == 32
    assert any(path.read_bytes())
    assert path.read_bytes() != content
    assert shop.fault_count() == 0


LOCK = """
import fcntl, os, sys, time
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(descriptor, fcntl.LOCK_EX)
print("ready", flush=True)
time.sleep(60)
"""


def test_who_is_killed_while_it_makes_the_key_blocks_nobody(shop: Shop) -> None:
    with other_process(LOCK, shop.make_folder() / f"{TODAY}.key") as holder:
        threading.Timer(0.3, holder.kill).start()
        assert shop.who() == shop.who()
    assert shop.fault_count() == 0


@pytest.mark.alone
def test_who_hangs_delays_only_until_there_is_a_key(shop: Shop) -> None:
    path = shop.make_folder() / f"{TODAY}.key"
    with other_process(LOCK, path):
        ids = shop.ids()
        start = time.monotonic()
        alone = shop.who(ids)
        assert 0.5 < time.monotonic() - start < 5
        assert shop.fault_count() == 1
        path.write_bytes(b"k" * 32)  # which is complete: nobody writes it again
        start = time.monotonic()
        shared = shop.who()
        assert time.monotonic() - start < 0.5
    assert shop.who() == shared != alone
    assert shop.who(ids) == alone  # ids do not change in mid-day
    assert shop.fault_count() == 1


def plant_key_link(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    target = folder.with_name("target")
    target.write_bytes(b"k" * 32)
    (folder / f"{TODAY}.key").symlink_to(target)


def plant_strangers_key(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / f"{TODAY}.key").write_bytes(b"k" * 32)
    os.chown(folder / f"{TODAY}.key", STRANGER, STRANGER)


def plant_key_folder(folder: Path) -> None:
    (folder / f"{TODAY}.key").mkdir(mode=0o700, parents=True)
    folder.chmod(0o700)


def plant_pipe(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.mkfifo(folder / f"{TODAY}.key")


@pytest.mark.parametrize(
    "plant",
    [
        plant_file,
        plant_link,
        plant_open,
        plant_key_link,
        plant_key_folder,
        plant_pipe,
        pytest.param(plant_strangers, marks=as_root),
        pytest.param(plant_strangers_key, marks=as_root),
    ],
)
def test_what_is_planted_is_not_used_and_each_process_counts_alone(
    shop: Shop, plant: Callable[[Path], None]
) -> None:
    plant(shop.folder)
    target = shop.folder.with_name("target")
    before = target.read_bytes() if target.is_file() else None
    one, two = shop.ids(), shop.ids()
    alone = shop.who(one)
    assert alone not in (None, shop.who(two))
    key = {"key": b"k" * 32, "digest_size": 8, "person": b"visitor"}
    text = ip_address(PERSON[0]).packed + f"\0{PERSON[1]}\0{PERSON[2]}".encode()
    assert alone != blake2b(text, **key).hexdigest()  # type: ignore[arg-type]
    assert shop.who(one) == alone
    assert shop.fault_count() == 2  # one of each
    if before is not None:
        assert target.read_bytes() == before
    elif target.exists():
        assert not list(target.iterdir())


def test_without_a_place_there_is_one_fault_a_day(shop: Shop) -> None:
    ids = VisitorIds(None, "shop", shop.faults, clock=shop.clock)
    alone = shop.who(ids)
    for _ in range(10):
        shop.clock.now += 600
        assert shop.who(ids) == alone
    assert shop.fault_count() == 1
    shop.clock.now = NOON + DAY
    assert shop.who(ids) not in (None, alone)
    assert shop.who(ids, NOON) is None
    assert shop.fault_count() == 2
    assert not shop.folder.exists()


def test_a_full_disk_harms_nobody(tmp_path: Path) -> None:
    script = """
import resource, sys
from pathlib import Path
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.state_dir import StateDir
from flask_usage_metrics.enrich.visitors.daily_ids import VisitorIds
state, faults = StateDir([Path(sys.argv[1])], "shop"), Faults()
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
made = []
for limit in (0, 7, limits[0]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    ids = VisitorIds(state, "shop", faults, clock=lambda: 86400.0)
    made.append((ids, ids.identify(86400.0, "203.0.113.9", "", "")))
assert len({visitor for _, visitor in made}) == 3
for ids, visitor in made:
    assert ids.identify(86400.0, "203.0.113.9", "", "") == visitor
print(faults.counts())
"""
    log = "import logging; logging.disable()\n"
    assert python(log + script, tmp_path) == "{'visitors': 2}\n"
    (path,) = tmp_path.glob("**/*.key")
    assert len(path.read_bytes()) == 32


FORK = """
import os, sys
from pathlib import Path
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.state_dir import StateDir
from flask_usage_metrics.enrich.visitors.daily_ids import VisitorIds
state = StateDir([Path(sys.argv[1])], "shop") if sys.argv[1] else None
ids = VisitorIds(state, "shop", Faults(), clock=lambda: 86400.0)
print(ids.identify(86400.0, "203.0.113.9", "", ""), flush=True)
for _ in range(3):
    if not os.fork():
        ids.reset_after_fork()
        print(ids.identify(86400.0, "203.0.113.9", "", ""), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.parametrize("shared", [True, False])
def test_forked_children_agree_with_their_parent(tmp_path: Path, shared: bool) -> None:
    log = "import logging; logging.disable()\n"
    lines = python(log + FORK, tmp_path if shared else "").splitlines()
    assert len(lines) == 4
    assert len(set(lines)) == 1


def test_a_forked_child_reads_the_key_again(shop: Shop) -> None:
    ids = shop.ids()
    before = shop.who(ids)
    (shop.folder / f"{TODAY}.key").write_bytes(b"k" * 32)
    assert shop.who(ids) == before
    ids.reset_after_fork()
    assert shop.who(ids) == shop.who() != before


# ------------------------------------------------------------------------ never again


def holds(folder: Path, secret: bytes) -> bool:
    return any(secret in path.read_bytes() for path in folder.glob("**/*") if path.is_file())


def test_after_the_day_nobody_can_tell_who_it_was(shop: Shop, tmp_path: Path) -> None:
    ids, witness = shop.ids(), tmp_path / "hard-link"
    visitor = shop.who(ids)
    path = shop.folder / f"{TODAY}.key"
    secret = path.read_bytes()
    assert holds(tmp_path, secret)
    witness.hardlink_to(path)  # what is left on the disk when a file is removed
    moment = shop.clock.now = MIDNIGHT + DAY - 0.1
    assert shop.who(ids) == visitor

    shop.clock.now = MIDNIGHT + DAY + 0.1
    other = shop.who(ids)
    assert other not in (None, visitor)
    shop.clock.now = MIDNIGHT + DAY + GRACE_SECONDS - 0.1
    for one in (ids, shop.ids()):  # late ones of yesterday, also after a restart
        assert shop.who(one, moment) == visitor
        assert shop.who(one) == other
    assert holds(tmp_path, secret)

    shop.clock.now = MIDNIGHT + DAY + GRACE_SECONDS
    ids.maintain()
    assert witness.read_bytes() == bytes(32)
    assert not holds(tmp_path, secret)
    assert shop.files() == {f"{TOMORROW}.key"}
    for one in (ids, shop.ids()):
        assert shop.who(one, moment) is None
        assert shop.who(one) == other
    assert shop.files() == {f"{TOMORROW}.key"}
    assert shop.fault_count() == 0


@pytest.mark.parametrize("how", ["maintain", "identify"])
def test_a_key_of_this_process_alone_is_forgotten_too(shop: Shop, how: str) -> None:
    ids = VisitorIds(None, "shop", shop.faults, clock=shop.clock)
    visitor = shop.who(ids)
    shop.clock.now = MIDNIGHT + DAY + GRACE_SECONDS - 1
    assert shop.who(ids, NOON) == visitor
    shop.clock.now += 1
    if how == "maintain":
        ids.maintain()
        assert ids.due_in() is None
        shop.clock.now -= 1  # not even to a clock that was set back
        assert shop.who(ids, NOON) is None
    else:
        assert shop.who(ids, NOON) is None


def test_no_key_is_made_for_a_day_that_is_over_or_far_ahead(shop: Shop) -> None:
    ids = shop.ids()
    shop.clock.now = MIDNIGHT + 10
    for moment in (MIDNIGHT - 1, MIDNIGHT - DAY, MIDNIGHT + DAY, NOON + 50 * DAY, -1e18, 1e18):
        assert shop.who(ids, moment) is None
    assert not shop.folder.exists()
    assert ids.due_in() is None
    assert shop.fault_count() == 0


def test_what_another_run_left_is_destroyed_at_first_use(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "instance", tmp_path / "temporary")
    folders = [shop.make_folder(), Shop(tmp_path / "temporary").make_folder()]
    due = [
        "2024-10-03.key",
        "1999-12-31.key",
        "2040-01-01.key",  # the clock was wrong
        *(f"2024-10-03.sqlite3{end}" for end in ("", "-wal", "-shm", "-journal")),
    ]
    others = [
        f"{TODAY}.sqlite3",
        f"{TODAY}.key",
        "2024-13-03.key",
        "2024-10-03.key.bak",
        "2024-10-03.txt",
        "old2024-10-03.key",
        "٢٠٢٤-10-03.key",
        "notes",
    ]
    witnesses = []
    for folder in folders:
        for name in (*due, *others):
            (folder / name).write_bytes(b"k" * 32)
        for name in due[:3]:
            witnesses.append(tmp_path / f"{len(witnesses)}")
            witnesses[-1].hardlink_to(folder / name)
    shop.who()
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == set(others)
        assert {path.read_bytes() for path in folder.iterdir()} == {b"k" * 32}
    assert [path.read_bytes() for path in witnesses] == [bytes(32)] * 6
    assert shop.fault_count() == 0


def test_what_the_app_left_under_another_name_is_destroyed_too(shop: Shop) -> None:
    blog = VisitorIds(shop.state, "blog", shop.faults, clock=shop.clock)
    visitor = shop.who(blog)
    (path,) = shop.folder.parent.glob("visitors-*/*")
    secret = path.read_bytes()
    foreign = shop.folder.with_name("other") / path.name
    foreign.parent.mkdir(mode=0o700)
    foreign.write_bytes(b"k" * 32)
    shop.who()
    assert path.read_bytes() == secret
    assert shop.who(blog) == visitor
    shop.clock.now += DAY
    shop.who()
    assert not path.exists()
    assert foreign.exists()


def test_a_link_in_the_place_of_an_old_key_is_removed_but_not_followed(shop: Shop) -> None:
    target = shop.make_folder().with_name("target")
    target.write_bytes(b"precious")
    (shop.folder / "2000-01-01.key").symlink_to(target)
    shop.ids().maintain()
    assert shop.files() == set()
    assert target.read_bytes() == b"precious"


def test_what_cannot_be_destroyed_is_reported_and_tried_again(shop: Shop) -> None:
    stubborn = shop.make_folder() / "2000-01-01.key"
    stubborn.mkdir()
    old = [shop.folder / f"{year}-01-01.key" for year in (1999, 2001)]
    for path in old:
        path.write_bytes(b"k" * 32)
    ids = shop.ids()
    ids.maintain()
    assert not any(path.exists() for path in old)
    assert shop.fault_count() == 1
    due = ids.due_in()
    assert due is not None
    assert 0 < due <= 60
    ids.maintain()
    assert shop.fault_count() == 1
    stubborn.rmdir()
    stubborn.write_bytes(b"k" * 32)
    shop.clock.now += due
    ids.maintain()
    assert shop.files() == set()
    assert shop.fault_count() == 1
    assert ids.due_in() is None


def test_who_starts_in_the_grace_destroys_at_its_end(shop: Shop) -> None:
    shop.who()
    path = shop.folder / f"{TODAY}.key"
    ids = shop.ids()
    shop.clock.now = MIDNIGHT + DAY + 5
    ids.maintain()
    assert path.exists()
    shop.clock.now = MIDNIGHT + DAY + GRACE_SECONDS
    ids.maintain()
    assert not path.exists()


def test_the_disk_is_looked_at_once_a_day(shop: Shop) -> None:
    ids = shop.ids()
    ids.maintain()
    old = shop.make_folder() / "2000-01-01.key"
    old.write_bytes(b"k" * 32)
    for moment in (NOON, MIDNIGHT + DAY, MIDNIGHT + DAY + GRACE_SECONDS - 1):
        shop.clock.now = moment
        ids.maintain()
        assert old.exists()
    shop.clock.now += 1
    ids.maintain()
    assert not old.exists()


def test_it_is_known_when_something_is_due(shop: Shop) -> None:
    ids = shop.ids()
    assert ids.due_in() is None
    shop.clock.now = MIDNIGHT + DAY - 10
    shop.who(ids)
    assert ids.due_in() == 10 + GRACE_SECONDS
    shop.clock.now += 20
    shop.who(ids)
    assert ids.due_in() == GRACE_SECONDS - 10
    shop.clock.now += GRACE_SECONDS
    assert ids.due_in() == 0
    ids.maintain()
    assert ids.due_in() == DAY - 10
    ids.close()
    assert ids.due_in() is None


def test_a_clock_that_is_set_back_over_midnight_finds_the_keys_of_both_days(shop: Shop) -> None:
    ids = shop.ids()
    shop.clock.now = MIDNIGHT + DAY - 5
    late = shop.who(ids)
    shop.clock.now = MIDNIGHT + DAY + 5
    early = shop.who(ids)
    shop.clock.now = MIDNIGHT + DAY - 2
    for one in (ids, shop.ids()):
        assert shop.who(one) == late
        assert shop.who(one, MIDNIGHT + DAY + 5) == early
    shop.clock.now = MIDNIGHT + DAY + 7
    for one in (ids, shop.ids()):
        assert shop.who(one) == early
        assert shop.who(one, MIDNIGHT + DAY - 5) == late


def test_a_request_of_the_first_seconds_of_tomorrow_is_tomorrows(shop: Shop) -> None:
    ids = shop.ids()
    shop.clock.now = MIDNIGHT + DAY - 2
    today, tomorrow = shop.who(ids), shop.who(ids, MIDNIGHT + DAY + 1)
    assert tomorrow not in (None, today)
    shop.clock.now = MIDNIGHT + DAY + 3
    assert shop.who() == tomorrow


def test_a_clock_that_was_years_ahead_puts_nothing_off(shop: Shop) -> None:
    ids = shop.ids()
    shop.clock.now = NOON + 5000 * DAY
    wrong = shop.who(ids)
    assert wrong is not None
    shop.clock.now = NOON
    assert shop.who(ids) not in (None, wrong)
    assert shop.files() == {f"{TODAY}.key"}
    assert shop.who(ids, NOON + 5000 * DAY) is None
    due = ids.due_in()
    assert due is not None
    assert due <= DAY + GRACE_SECONDS


def test_many_may_destroy_at_once(shop: Shop) -> None:
    for number in range(200):
        (shop.make_folder() / f"{1000 + number}-01-01.key").write_bytes(b"k" * 32)
    everybody = [shop.ids() for _ in range(8)]
    in_threads(8, lambda number: everybody[number].maintain())
    assert shop.files() == set()
    assert shop.fault_count() == 0


def test_a_vanished_folder_harms_nobody(shop: Shop) -> None:
    ids = shop.ids()
    visitor = shop.who(ids)
    shutil.rmtree(shop.state.places[0])
    shop.clock.now += 60
    ids.maintain()
    assert shop.who(ids) == visitor
    shop.clock.now += DAY
    assert shop.who(ids) == shop.who() != visitor
    assert shop.fault_count() == 0
