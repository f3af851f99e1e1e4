"""The totals of sibling workers, added together in one small SQLite file of their generation."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from weakref import finalize

import msgspec

from flask_usage_metrics.metrics.exemplars import Row, newest
from flask_usage_metrics.runtime.fork_gate import FORK_GATE
from flask_usage_metrics.runtime.private_files import (
    StateUnavailable,
    is_still,
    make_private,
    open_private,
)
from flask_usage_metrics.runtime.processes import is_alive, started

Numbers = list[int | float]
Key = tuple[str, tuple[str, ...]]
"""Name of a family, and the label values of one of its series."""

_BUSY_SECONDS = 1.0

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS change (number INTEGER NOT NULL)",
    "INSERT INTO change SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM change)",
    "CREATE TABLE IF NOT EXISTS series (family TEXT, labels TEXT, numbers TEXT, changed INTEGER,"
    " PRIMARY KEY (family, labels)) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS series_changed ON series (changed)",
    "CREATE TABLE IF NOT EXISTS exemplar (family TEXT, labels TEXT, packed TEXT, changed INTEGER,"
    " PRIMARY KEY (family, labels)) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS exemplar_changed ON exemplar (changed)",
    "CREATE TABLE IF NOT EXISTS journal (id TEXT PRIMARY KEY, folded INTEGER) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS worker (pid INTEGER PRIMARY KEY, started TEXT, gauges TEXT)",
)

_to_json = msgspec.json.Encoder().encode
_numbers = msgspec.json.Decoder(Numbers).decode
_labels = msgspec.json.Decoder(tuple[str, ...]).decode
_row = msgspec.json.Decoder(Row).decode


class Gauges(msgspec.Struct, frozen=True):
    """What one worker has at this moment.

    Attributes:
        in_progress: Requests being answered.
        pending: For each sink, records that are not decided.
        up: For each sink, whether its last write went well.
        journaled: Whether what is captured survives a kill.
    """

    in_progress: int
    pending: dict[str, int]
    up: dict[str, bool]
    journaled: bool


class Changes(NamedTuple):
    """What is not as it was before a sync, whoever changed it.

    Attributes:
        sums: The sums of all siblings.
        exemplars: The newest of all siblings.
    """

    sums: dict[Key, Numbers]
    exemplars: dict[Key, Row]


class SharedTotals:
    """What all siblings counted; each adds what it counted since its last sync.

    One sync is one transaction: it reads what the others changed and writes what is new. A worker
    that dies takes nothing away, and nothing grows with the number of workers there ever were.
    Should the file vanish or be damaged, the siblings make a new one of what they remember, taking
    the larger of two numbers: each sync reads all changes first, so the last visitor knows
    everything. Nothing falls; what others counted since the last sync of the first who notices
    may be missing, a few requests.

    Of exemplars each bucket keeps the newest, whoever observed it.

    Args:
        path: The file.

    Attributes:
        merged: The sums of all siblings, as of the last sync.
        exemplars: The newest of all siblings, as of the last sync.
        workers: Gauges of the living siblings by process id, as of the last sync.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.merged: dict[Key, Numbers] = {}
        self.exemplars: dict[Key, Row] = {}
        self.workers: dict[int, Gauges] = {}
        self._connection: sqlite3.Connection | None = None
        self._descriptor: int | None = None
        self._seen = 0
        self._is_new = False
        self._pid = os.getpid()

    @FORK_GATE.entered()
    def sync(
        self,
        new: Mapping[Key, Numbers],
        commits: Mapping[str, int],
        gauges: Gauges,
        exemplars: Mapping[Key, Row] = {},
    ) -> Changes:
        """Add what is new, and learn what others added.

        Args:
            new: What was counted since the last sync; taken exactly once, unless this raises.
            commits: For each journal, the number of the last commit that is part of `new`.
            gauges: Of this process.
            exemplars: What was observed since the last sync; kept where it is the newest.

        Returns:
            What is new, added to what was there, and what others added since the last sync.

        Raises:
            sqlite3.Error: The file cannot be used now; nothing was added.
            OSError: The file cannot be opened.
            StateUnavailable: Its folder is not ours alone.
        """
        try:
            return self._sync(new, commits, gauges, exemplars)
        except sqlite3.DatabaseError as error:
            self.close()
            # Exactly that class: "file is not a database", "disk image is malformed".
            if type(error) is sqlite3.DatabaseError:
                with suppress(OSError):
                    self._path.unlink()
            raise

    def _sync(
        self,
        new: Mapping[Key, Numbers],
        commits: Mapping[str, int],
        gauges: Gauges,
        exemplars: Mapping[Key, Row],
    ) -> Changes:
        connection = self._open()
        remembered = self._is_new and bool(self.merged)
        connection.execute("BEGIN IMMEDIATE")
        try:
            theirs = self._read_changes(connection)
            newer = self._newer(self._read_exemplars(connection), exemplars)
            written: Mapping[Key, Numbers] = new
            if remembered:
                for key, numbers in self.merged.items():
                    theirs[key] = _larger(numbers, theirs.get(key))
                written = {**theirs, **new}
            sums = {
                key: _sum(theirs.get(key) or self.merged.get(key), new.get(key)) for key in written
            }
            kept = {**self.exemplars, **newer} if remembered else {k: newer[k] for k in exemplars}
            (change,) = connection.execute("SELECT number FROM change").fetchone()
            connection.executemany(
                "INSERT OR REPLACE INTO series VALUES (?, ?, ?, ?)",
                [
                    (family, _to_json(labels).decode(), _to_json(sums[family, labels]).decode(),
                     change + 1)
                    for family, labels in sums
                ],
            )  # fmt: skip
            connection.executemany(
                "INSERT OR REPLACE INTO exemplar VALUES (?, ?, ?, ?)",
                [
                    (family, _to_json(labels).decode(), _to_json(row).decode(), change + 1)
                    for (family, labels), row in kept.items()
                ],
            )
            connection.executemany("INSERT OR REPLACE INTO journal VALUES (?, ?)", commits.items())
            connection.execute(
                "INSERT OR REPLACE INTO worker VALUES (?, ?, ?)",
                (self._pid, started(self._pid), _to_json(gauges).decode()),
            )
            workers = self._read_workers(connection)
            connection.execute("UPDATE change SET number = ?", (change + 1,))
            connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise
        changes = Changes({**theirs, **sums}, newer)
        self.merged.update(changes.sums)
        self.exemplars.update(newer)
        self.workers = workers
        self._seen = change + 1
        self._is_new = False
        return changes

    @FORK_GATE.entered()
    def last_commit(self, journal: str) -> int | None:
        """Return the number of the last commit of a journal that is in the sums; None if not known.

        Raises:
            sqlite3.Error: The file cannot be read now.
            OSError: The file cannot be opened.
        """
        connection = self._open()
        row = connection.execute("SELECT folded FROM journal WHERE id = ?", (journal,)).fetchone()
        return None if row is None else int(row[0])

    @FORK_GATE.entered()
    def forget(self, journals: Iterable[str]) -> None:
        """Forget journals that are gone; it does no harm to remember them."""
        with suppress(sqlite3.Error, OSError, StateUnavailable):
            connection = self._open()
            connection.executemany(
                "DELETE FROM journal WHERE id = ?", [(journal,) for journal in journals]
            )

    @FORK_GATE.entered()
    def release(self) -> None:
        """Take this process' gauges out and close the file."""
        with suppress(sqlite3.Error, OSError, StateUnavailable):
            connection = self._open()
            connection.execute("DELETE FROM worker WHERE pid = ?", (self._pid,))
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    # ------------------------------------------------------------------------ the file

    def _open(self) -> sqlite3.Connection:
        """Return the connection."""
        if self._descriptor is not None:
            if not is_still(self._path, self._descriptor):
                self.close()
            elif self._connection is not None and not os.fstat(self._descriptor).st_size:
                # Emptied: we could go on with its WAL, but nobody else could open it.
                with suppress(OSError):
                    self._path.unlink()
                self.close()
        if self._connection is not None:
            return self._connection
        make_private(self._path.parent)  # again, if somebody removed it
        # SQLite would make the file for everybody to read, and follow a link.
        self._descriptor = open_private(self._path)
        connection = sqlite3.connect(
            self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            _retry_locked(connection, "PRAGMA journal_mode=WAL")
            # The totals need not survive a crash of the machine: the counters begin anew then.
            connection.execute("PRAGMA synchronous=OFF")
            connection.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.execute("COMMIT")
        except BaseException:
            connection.close()
            os.close(self._descriptor)
            self._descriptor = None
            raise
        finalize(self, connection.close).atexit = False  # as of a storage that nobody closes
        self._connection = connection
        self._seen = 0
        self._is_new = True
        return connection

    def _read_changes(self, connection: sqlite3.Connection) -> dict[Key, Numbers]:
        rows = connection.execute(
            "SELECT family, labels, numbers FROM series WHERE changed > ?", (self._seen,)
        )
        return {(family, _labels(labels)): _numbers(numbers) for family, labels, numbers in rows}

    def _read_exemplars(self, connection: sqlite3.Connection) -> dict[Key, Row]:
        rows = connection.execute(
            "SELECT family, labels, packed FROM exemplar WHERE changed > ?", (self._seen,)
        )
        return {(family, _labels(labels)): _row(packed) for family, labels, packed in rows}

    def _newer(self, *found: Mapping[Key, Row]) -> dict[Key, Row]:
        """Return the series that were found, each bucket with the newest that is known now."""
        newer: dict[Key, Row] = {}
        for rows in found:
            for key, row in rows.items():
                newer[key] = newest(newer.get(key) or self.exemplars.get(key), row)
        return newer

    def _read_workers(self, connection: sqlite3.Connection) -> dict[int, Gauges]:
        workers: dict[int, Gauges] = {}
        dead = []
        for pid, since, gauges in connection.execute("SELECT * FROM worker").fetchall():
            if is_alive(pid, since):
                workers[pid] = msgspec.json.decode(gauges, type=Gauges)
            else:
                dead.append((pid,))
        connection.executemany("DELETE FROM worker WHERE pid = ?", dead)
        return workers


def _sum(one: Numbers | None, other: Numbers | None) -> Numbers:
    if one is None or other is None:
        return one or other or []
    return [a + b for a, b in zip(one, other, strict=True)]


def _larger(one: Numbers | None, other: Numbers | None) -> Numbers:
    if one is None or other is None:
        return one or other or []
    return [max(a, b) for a, b in zip(one, other, strict=True)]


def _retry_locked(connection: sqlite3.Connection, statement: str) -> None:
    # The switch to WAL does not wait for locks by itself.
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute(statement)
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.01)
