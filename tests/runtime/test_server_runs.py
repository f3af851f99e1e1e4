"""A run of a server is removed when nobody can need it any more, and not before."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers.process import Process, start_python

from flask_usage_metrics.runtime.processes import is_alive, started
from flask_usage_metrics.runtime.run_notes import RunNote
from flask_usage_metrics.runtime.server_runs import (
    ServerRun,
    dead_runs,
    join_run,
    living_runs,
    remove_run,
)
from flask_usage_metrics.runtime.servers import Server
from flask_usage_metrics.runtime.state_dir import StateDir, digest


def ended() -> tuple[int, str]:
    """Return the number of a process that ended, and when it had started."""
    with Process("sleep", "60") as process:
        since = started(process.pid)
    return process.pid, since


def make_run(home: Path, key: str, starter: int) -> ServerRun:
    note = RunNote.of(Server(frozenset([key]), starter), key)
    return ServerRun(home / f"g-{digest(key)}", note)


def release(home: Path, key: str, starter: str) -> Path:
    """Make a run without members, as earlier versions did."""
    run = make_run(home, key, os.getpid())
    run.join()
    run.release()
    (run.folder / "lock").write_text(starter)
    return run.folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return StateDir([tmp_path / "place"], "shop").home()


def dead(home: Path, own: Path | None = None) -> list[Path]:
    return list(dead_runs([home], own or home / "none"))


def test_dead_runs_are_found_and_removed(home: Path) -> None:
    pid, since = ended()
    folder = release(home, "dead", f"{pid} {since}\n")
    for name in ("totals.sqlite3", "totals.sqlite3-wal", "totals.sqlite3-shm"):
        (folder / name).write_text("")
    assert dead(home) == [folder]
    remove_run(folder)
    assert not folder.exists()
    assert dead(home) == []


def test_a_number_that_was_given_again_keeps_no_run_alive(home: Path) -> None:
    folder = release(home, "again", f"{os.getpid()} 1\n")
    assert not is_alive(os.getpid(), "1")
    assert dead(home) == [folder]


@pytest.mark.parametrize("who", ["member", "starter"])
def test_a_living_run_is_not_removed(home: Path, who: str) -> None:
    pid, since = ended()
    if who == "starter":
        pid, since = os.getppid(), started(os.getppid())
    folder = release(home, "living", f"{pid} {since}\n")
    script = (
        "import fcntl, sys; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_SH);"
        "print('ready', flush=True); sys.stdin.read()"
    )
    with start_python(script, folder / "lock" if who == "member" else __file__) as member:
        assert member.line() == "ready"
        assert dead(home) == []
        remove_run(folder)
        assert (folder / "lock").exists()
    if who == "member":
        assert dead(home) == [folder]
        remove_run(folder)
        assert not folder.exists()


def test_the_own_run_is_never_dead(home: Path) -> None:
    own = make_run(home, "own", os.getpid())
    own.join()
    assert dead(home) == []
    own.release()
    assert dead(home, own.folder) == []
    own.join()
    own.end()
    assert not own.folder.exists()


def test_a_run_with_a_journal_is_kept(home: Path) -> None:
    pid, since = ended()
    folder = release(home, "left", f"{pid} {since}\n")
    (folder / f"{'a' * 16}.journal").write_text("")
    remove_run(folder)
    assert dead(home) == [folder]


def test_foreign_files_are_neither_read_nor_removed(home: Path) -> None:
    pid, since = ended()
    folder = release(home, "foreign", f"{pid} {since}\n")
    foreign = [folder / "notes.txt", home / "notes.txt", home.parent / "notes.txt"]
    strange = [home / "g-xyz", home / "other", folder / "sub"]
    for directory in strange:
        directory.mkdir(mode=0o700)
        foreign.append(directory / "lock")
    for path in foreign:
        path.write_text("precious")
        path.chmod(0o000)
    assert dead(home) == [folder]
    remove_run(folder)
    for path in foreign:
        path.chmod(0o600)
        assert path.read_text() == "precious"
    assert dead(home) == []


def test_who_joins_while_it_is_removed_finds_a_new_one(home: Path) -> None:
    first = make_run(home, "key", 1)
    first.join()
    inode = (first.folder / "lock").stat().st_ino
    first.release()
    shutil.rmtree(first.folder)
    (home / "other").write_text("")  # so that the inode is not used again
    first.join()
    assert (first.folder / "lock").exists()
    assert inode
    first.release()


# ------------------------------------------------------------------------ which one to join

WAITS = """
import os, sys
from pathlib import Path
from flask_usage_metrics.runtime.server_runs import join_run
from flask_usage_metrics.runtime.servers import Server
from flask_usage_metrics.runtime.state_dir import StateDir

state = StateDir([Path(place) for place in sys.argv[3].split()], "shop")
run = join_run(state, Server(frozenset(sys.argv[1].split()), os.getppid()), sys.argv[2])
print(run.folder, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("servers", "runs"),
    [
        pytest.param(["a", "a", "a"], [0, 0, 0], id="one address"),
        pytest.param(["a", "b", "a"], [0, 1, 0], id="another address"),
        pytest.param(["a b", "b a", "a b"], [0, 0, 0], id="two addresses"),
        pytest.param(["a 1", "2 a", "0 a"], [0, 0, 0], id="each has one of its own besides"),
        pytest.param(["b 1", "b 2", "2"], [0, 0, 0], id="an address of another member"),
    ],
)
def test_whoever_has_an_address_in_common_is_in_one_run(
    tmp_path: Path, servers: list[str], runs: list[int]
) -> None:
    found: list[str] = []
    with ExitStack() as stack:
        for names in servers:
            member = stack.enter_context(start_python(WAITS, names, "key", tmp_path / "place"))
            found.append(member.line())
        other = stack.enter_context(start_python(WAITS, servers[0], "other", tmp_path / "place"))
        assert other.line() not in found
        assert [found.index(folder) for folder in found] == runs


def test_many_that_come_at_once_are_in_one_run(tmp_path: Path) -> None:
    with ExitStack() as stack:
        members = [
            stack.enter_context(start_python(WAITS, f"{number} a", "key", tmp_path / "place"))
            for number in range(8)
        ]
        assert len({member.line() for member in members}) == 1


def test_a_run_is_found_where_its_first_member_had_to_make_it(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("in the way")
    with start_python(WAITS, "a", "key", f"{first} {second}") as early:
        folder = early.line()
        assert str(second) in folder
        first.unlink()
        with start_python(WAITS, "a", "key", f"{first} {second}") as late:
            assert late.line() == folder


def test_a_run_whose_server_was_killed_is_not_continued(tmp_path: Path) -> None:
    state = StateDir([tmp_path / "place"], "shop")
    pid, _ = ended()
    first = join_run(state, Server(frozenset(["a"]), pid), "key")
    first.release()
    following = join_run(state, Server(frozenset(["a"]), os.getpid()), "key")
    assert following.folder != first.folder
    assert [folder for folder, _ in living_runs(state.homes())] == [following.folder]
    following.end()


def test_a_run_goes_on_while_the_process_lives_that_starts_its_members(tmp_path: Path) -> None:
    state = StateDir([tmp_path / "place"], "shop")
    server = Server(frozenset(["a"]), os.getppid())
    first = join_run(state, server, "key")
    first.end()
    assert join_run(state, server, "key").folder == first.folder


@pytest.mark.parametrize("has_master", [True, False])
def test_another_address_of_one_master_is_the_same_server(tmp_path: Path, has_master: bool) -> None:
    state = StateDir([tmp_path / "place"], "shop")
    first, second = (
        join_run(state, Server(frozenset([name]), os.getppid(), has_master=has_master), "key")
        for name in "ab"
    )
    assert (first.folder == second.folder) == has_master


def test_a_held_lock_keeps_nobody_from_joining(tmp_path: Path) -> None:
    state = StateDir([tmp_path / "place"], "shop")
    script = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX);"
        "print('ready', flush=True); sys.stdin.read()"
    )
    with start_python(script, state.home() / "joining") as holder:
        assert holder.line() == "ready"
        runs = [join_run(state, Server(frozenset(["a"]), os.getpid()), "key") for _ in range(2)]
    assert runs[0].folder == runs[1].folder


def test_a_run_of_another_container_is_kept_for_some_minutes(tmp_path: Path) -> None:
    state = StateDir([tmp_path / "place"], "shop")
    run = join_run(state, Server(frozenset(["a"]), os.getpid()), "key")
    run.release()
    lock = run.folder / "lock"
    starter, rest = lock.read_text().split("\n", 1)
    lock.write_text(f"{starter}\n{rest.replace(rest.split()[0], 'f' * 16)}")
    # Its journals may be recovered at once, as no living process has them locked.
    assert list(dead_runs(state.homes(), tmp_path)) == [run.folder]
    remove_run(run.folder)
    assert lock.exists()
    os.utime(lock, (time.time() - 700, time.time() - 700))
    remove_run(run.folder)
    assert not run.folder.exists()
    following = join_run(state, Server(frozenset(["a"]), os.getpid()), "key")
    assert [folder for folder, _ in living_runs(state.homes())] == [following.folder]


def test_the_names_in_a_note_are_bounded(tmp_path: Path) -> None:
    state = StateDir([tmp_path / "place"], "shop")
    for number in range(200):
        run = join_run(state, Server(frozenset(["a", str(number)]), os.getpid()), "key")
        assert (run.folder / "lock").stat().st_size < 4096
    assert len(list(state.home().glob("g-*"))) == 1
