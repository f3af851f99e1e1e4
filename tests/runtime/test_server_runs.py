"""A run of a server is removed when nobody can need it any more, and not before."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from helpers.process import Process, start_python

from flask_usage_metrics.runtime.processes import is_alive, started
from flask_usage_metrics.runtime.server_runs import ServerRun, dead_runs, remove_run
from flask_usage_metrics.runtime.state_dir import StateDir


def ended() -> tuple[int, str]:
    """Return the number of a process that ended, and when it had started."""
    with Process("sleep", "60") as process:
        since = started(process.pid)
    return process.pid, since


def release(home: Path, key: str, starter: str) -> Path:
    """Make a run without members."""
    run = ServerRun(home, key, os.getpid())
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
    own = ServerRun(home, "own", os.getpid())
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
    first = ServerRun(home, "key", 1)
    first.join()
    inode = (first.folder / "lock").stat().st_ino
    first.release()
    shutil.rmtree(first.folder)
    (home / "other").write_text("")  # so that the inode is not used again
    first.join()
    assert (first.folder / "lock").exists()
    assert inode
    first.release()
