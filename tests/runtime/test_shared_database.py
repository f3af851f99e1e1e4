"""A shared SQLite file: private, replaced when it is damaged, and each process with its own."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import pytest
from helpers.damage import break_it
from helpers.process import run_python

from flask_usage_metrics.runtime.private_files import StateUnavailable
from flask_usage_metrics.runtime.shared_database import SharedDatabase

SCHEMA = ("CREATE TABLE IF NOT EXISTS word (word TEXT)",)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "words 100%.sqlite3"


def add(database: SharedDatabase, word: str) -> list[str]:
    with database.transaction() as connection:
        connection.execute("INSERT INTO word VALUES (?)", (word,))
        return [word for (word,) in connection.execute("SELECT word FROM word ORDER BY word")]


def opened_files(folder: Path) -> set[str]:
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found.add(str(descriptor.readlink()))
    return {name for name in found if name.startswith(f"{folder}/")}


@pytest.mark.parametrize("stays_open", [True, False])
def test_several_see_what_each_has_added(path: Path, stays_open: bool) -> None:
    one, other = (SharedDatabase(path, SCHEMA, stays_open=stays_open) for _ in range(2))
    assert add(one, "a") == ["a"]
    assert add(other, "b") == ["a", "b"]
    assert add(one, "c") == ["a", "b", "c"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert (one.openings, other.openings) == ((1, 1) if stays_open else (2, 1))
    assert bool(opened_files(path.parent)) == stays_open
    one.close()
    other.close()
    assert not opened_files(path.parent)
    assert add(one, "d") == ["a", "b", "c", "d"]
    one.close()


@pytest.mark.parametrize("stays_open", [True, False])
def test_a_transaction_that_fails_adds_nothing(path: Path, stays_open: bool) -> None:
    database = SharedDatabase(path, SCHEMA, stays_open=stays_open)
    for error in (KeyError, sqlite3.OperationalError, KeyboardInterrupt):
        with pytest.raises(error), database.transaction() as connection:  # noqa: PT012
            connection.execute("INSERT INTO word VALUES ('lost')")
            raise error
    assert add(database, "a") == ["a"]
    database.close()


@pytest.mark.parametrize("how", ["deleted", "folder-deleted", "replaced", "emptied"])
def test_another_file_in_its_place_is_noticed(path: Path, how: str) -> None:
    database = SharedDatabase(path, SCHEMA, stays_open=True)
    add(database, "a")
    openings = database.openings
    if how == "deleted":
        path.unlink()
    elif how == "folder-deleted":
        path.parent.rename(path.parent.with_name("aside"))
    elif how == "replaced":
        path.with_name("other").write_bytes(b"")
        path.with_name("other").replace(path)
    else:
        path.write_bytes(b"")
    assert "c" in add(database, "c")  # SQLite may find "a" in the log that was left
    newcomer = SharedDatabase(path, SCHEMA, stays_open=True)
    assert "c" in add(newcomer, "d")
    newcomer.close()
    assert database.openings == openings + 1
    database.close()


def test_a_file_that_another_process_made_anew_is_gone_over_to(path: Path) -> None:
    database, newcomer = (SharedDatabase(path, SCHEMA, stays_open=True) for _ in range(2))
    assert add(database, "a") == ["a"]
    path.parent.rename(path.parent.with_name("aside"))
    assert add(newcomer, "b") == ["b"]
    assert add(database, "c") == ["b", "c"]
    assert add(newcomer, "d") == ["b", "c", "d"]
    database.close()
    newcomer.close()


@pytest.mark.parametrize("how", ["half", "garbage"])
def test_damage_is_noticed_by_who_has_all_of_it_in_memory(path: Path, how: str) -> None:
    database = SharedDatabase(path, SCHEMA, stays_open=True)
    with database.transaction() as connection:
        connection.executemany("INSERT INTO word VALUES (?)", [(f"{n:0100}",) for n in range(999)])
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert len(add(database, "a")) == 1000
    break_it(path, how)
    with suppress(sqlite3.DatabaseError):
        add(database, "b")
    assert "c" in add(database, "c")
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("PRAGMA quick_check").fetchall() == [("ok",)]
    database.close()


@pytest.mark.parametrize("stays_open", [True, False])
def test_a_damaged_file_is_replaced(path: Path, stays_open: bool) -> None:
    SharedDatabase(path, SCHEMA, stays_open=stays_open).close()
    path.parent.mkdir(mode=0o700)
    path.write_bytes(b"garbage" * 1000)
    database = SharedDatabase(path, SCHEMA, stays_open=stays_open)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        add(database, "a")
    assert not path.exists()
    assert add(database, "b") == ["b"]
    database.close()


def test_a_locked_file_is_waited_for_a_second_and_kept(path: Path) -> None:
    database = SharedDatabase(path, SCHEMA, stays_open=True)
    add(database, "a")
    with database.transaction() as connection:
        assert connection.execute("PRAGMA busy_timeout").fetchone() == (1000,)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            add(database, "b")
    assert add(database, "c") == ["a", "c"]
    database.close()


def test_a_link_or_a_folder_of_everybody_is_refused(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    target = path.with_name("target")
    target.write_bytes(b"")
    path.symlink_to(target)
    database = SharedDatabase(path, SCHEMA, stays_open=False)
    with pytest.raises(PermissionError):
        add(database, "a")
    assert target.read_bytes() == b""
    path.unlink()
    path.parent.chmod(0o777)
    with pytest.raises(StateUnavailable):
        add(database, "a")


def test_in_memory_nothing_is_lost_to_an_error() -> None:
    database = SharedDatabase(None, SCHEMA, stays_open=True)
    add(database, "a")
    for error in (KeyError, sqlite3.OperationalError):
        with pytest.raises(error), database.transaction():
            raise error
    assert add(database, "b") == ["a", "b"]
    assert add(SharedDatabase(None, SCHEMA, stays_open=True), "c") == ["c"]


def test_a_transaction_inside_of_another(path: Path) -> None:
    one = SharedDatabase(path, SCHEMA, stays_open=False)
    memory = SharedDatabase(None, SCHEMA, stays_open=True)
    with one.transaction() as connection:
        for word in add(memory, "a"):
            connection.execute("INSERT INTO word VALUES (?)", (word,))
    assert add(one, "b") == ["a", "b"]


FORK = """
import gc, os, sys, warnings
from pathlib import Path
from flask_usage_metrics.runtime.shared_database import SharedDatabase

# Since 3.13 a connection that is not closed is told, which is what a child must do.
warnings.simplefilter("ignore", ResourceWarning)
path = Path(sys.argv[1]) if sys.argv[1] else None
database = SharedDatabase(path, ("CREATE TABLE IF NOT EXISTS word (word TEXT)",), stays_open=True)
with database.transaction() as inherited:
    inherited.execute("INSERT INTO word VALUES ('parent')")
child = os.fork()
if child:
    assert os.waitpid(child, 0)[1] == 0
    with database.transaction() as connection:
        assert connection is inherited
        connection.execute("INSERT INTO word VALUES ('parent again')")
else:
    os.mkdir("child")
    os.chdir("child")  # to a file of its own, as workers that are forked have
    for step in range(2):
        with database.transaction() as connection:
            assert connection is not inherited
            assert connection.execute("SELECT * FROM word").fetchall() == [("child",)] * step
            connection.execute("INSERT INTO word VALUES ('child')")
        inherited.total_changes  # raises if it is closed
    assert database.openings == 2
    del connection
    database.close()
    del database
    gc.collect()
    inherited.total_changes
"""

DROPPED = """
import gc, os, sys, warnings
from pathlib import Path
from flask_usage_metrics.runtime.shared_database import SharedDatabase

warnings.simplefilter("ignore", ResourceWarning)  # as above
database = SharedDatabase(Path(sys.argv[1]), (), stays_open=True)
with database.transaction() as inherited:
    pass
child = os.fork()
del database
gc.collect()
try:
    inherited.total_changes
    is_open = True
except Exception:
    is_open = False
assert is_open is not bool(child)
assert not child or os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("script", [FORK, DROPPED], ids=["used", "dropped"])
@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_forked_child_neither_uses_nor_closes_its_parents_connection(
    tmp_path: Path, script: str, kind: str
) -> None:
    if (script, kind) == (DROPPED, "memory"):
        script = script.replace("Path(sys.argv[1])", "None")
    done = run_python(script, "folder/words" if kind == "file" else "", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
