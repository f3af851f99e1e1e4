"""The tables of the file in which workers share the app's own metrics, and how they are read."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from flask_usage_metrics.metrics.app_families import AppFamily

SCHEMA = (
    "CREATE TABLE IF NOT EXISTS state"
    " (lineage BLOB, number INTEGER, deaths INTEGER, several INTEGER)",
    "CREATE TABLE IF NOT EXISTS worker (pid INTEGER PRIMARY KEY, started BLOB)",
    "CREATE TABLE IF NOT EXISTS dead (name BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS family (pid INTEGER, name BLOB, data BLOB, changed INTEGER,"
    " PRIMARY KEY (pid, name)) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS family_changed ON family (changed)",
)

DEAD = 0
"""Process id of the rows that hold what the dead had counted."""

_REMEMBERED = 256
"""How many of the dead are known by name."""

# JSON has no infinity, which a gauge may well be.
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(AppFamily).decode


class AppState(NamedTuple):
    """How far the history of a file has come.

    Attributes:
        lineage: Random name of its history; ``b""``: it has none yet.
        number: Of the last change.
        deaths: How many workers there were whose counts are among those of the dead.
        several: Whether a worker was told that its server has several.
    """

    lineage: bytes = b""
    number: int = 0
    deaths: int = 0
    several: int = 0


def encode(family: AppFamily) -> bytes:
    """Return a family as bytes.

    Raises:
        UnicodeEncodeError: A text holds a lone surrogate.
    """
    return _encode(family)


def decode(data: bytes) -> AppFamily:
    """Return a family of bytes.

    Raises:
        msgspec.MsgspecError: It is not what was written.
    """
    try:
        family = _decode(data)
    except (TypeError, UnicodeDecodeError) as error:
        raise msgspec.DecodeError(type(error).__name__) from error
    if any(len(sample.labels) % 2 for sample in family.samples):
        raise msgspec.DecodeError("a label without a value")
    return family


def read_state(connection: sqlite3.Connection) -> AppState:
    """Return the state; one without a lineage if the file is new."""
    row = connection.execute("SELECT lineage, number, deaths, several FROM state").fetchone()
    return AppState() if row is None else AppState(*row)


def write_state(connection: sqlite3.Connection, state: AppState) -> None:
    """Replace the state."""
    connection.execute("DELETE FROM state")
    connection.execute("INSERT INTO state VALUES (?, ?, ?, ?)", state)


def read_workers(connection: sqlite3.Connection) -> dict[int, str]:
    """Return when each worker started, by its process id."""
    rows = connection.execute("SELECT pid, started FROM worker")
    return {int(pid): started.decode() for pid, started in rows}


def write_worker(connection: sqlite3.Connection, pid: int, started: str) -> None:
    """Write when a worker started."""
    connection.execute("INSERT OR REPLACE INTO worker VALUES (?, ?)", (pid, started.encode()))


def read_rows(
    connection: sqlite3.Connection, since: int, but: int
) -> list[tuple[int, bytes, bytes]]:
    """Return process id, name and data of the families that changed after a change.

    Args:
        connection: To the file.
        since: Number of the change; -1: all.
        but: Process id whose families are left out.
    """
    query = "SELECT pid, name, data FROM family WHERE changed > ? AND pid != ?"
    return connection.execute(query, (since, but)).fetchall()


def rows_of(connection: sqlite3.Connection, pid: int) -> dict[bytes, bytes]:
    """Return the data of each family of a worker, or of the dead, by name; empty: it has gone."""
    query = "SELECT name, data FROM family WHERE pid = ?"
    return dict(connection.execute(query, (pid,)).fetchall())


def write_rows(
    connection: sqlite3.Connection, pid: int, rows: Mapping[bytes, bytes], change: int
) -> None:
    """Write families of a worker, or of the dead, changed by this change."""
    connection.executemany(
        "INSERT OR REPLACE INTO family VALUES (?, ?, ?, ?)",
        [(pid, name, data, change) for name, data in rows.items()],
    )


def delete_worker(connection: sqlite3.Connection, pid: int) -> None:
    """Delete a worker and its families."""
    connection.execute("DELETE FROM family WHERE pid = ?", (pid,))
    connection.execute("DELETE FROM worker WHERE pid = ?", (pid,))


def read_dead(connection: sqlite3.Connection) -> frozenset[bytes]:
    """Return the names of the last workers whose counts are among those of the dead."""
    return frozenset(name for (name,) in connection.execute("SELECT name FROM dead"))


def write_dead(connection: sqlite3.Connection, names: Iterable[bytes], deaths: int) -> None:
    """Note that the counts of workers are among those of the dead.

    Args:
        connection: To the file.
        names: Of the workers.
        deaths: How many there were with them.
    """
    connection.executemany(
        "INSERT OR REPLACE INTO dead VALUES (?, ?)", [(name, deaths) for name in names]
    )
    connection.execute("DELETE FROM dead WHERE number <= ?", (deaths - _REMEMBERED,))


def dead_name(pid: int, started: str) -> bytes:
    """Return the name of a process among the dead."""
    return f"{pid} {started}".encode()
