"""The totals of a server's workers, added together in one small SQLite file that they share."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from flask_usage_metrics.metrics.exemplars import BucketExemplars, newest
from flask_usage_metrics.metrics.families import LabelValues, Numbers
from flask_usage_metrics.metrics.gauges import Gauges
from flask_usage_metrics.runtime.private_files import StateUnavailable
from flask_usage_metrics.runtime.processes import is_alive, started
from flask_usage_metrics.runtime.shared_database import SharedDatabase

SeriesKey = tuple[str, LabelValues]
"""Name of a family, and the label values of one of its series."""

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
_labels = msgspec.json.Decoder(LabelValues).decode
_buckets = msgspec.json.Decoder(BucketExemplars).decode


class Changes(NamedTuple):
    """The series that this or another worker changed since this worker's last sync.

    Attributes:
        sums: The sums of all workers.
        exemplars: The newest of all workers.
    """

    sums: dict[SeriesKey, Numbers]
    exemplars: dict[SeriesKey, BucketExemplars]


class SharedTotals:
    """The sums of all workers of a server; each adds what it counted since its last sync.

    A sync is one transaction: it reads what others changed and writes what is new here. A worker
    that dies takes nothing away, and nothing grows with the number of workers there ever were.

    If the file is lost or damaged, the workers fill a new one from memory, taking the larger of
    two numbers. No sum falls. What others counted since the last sync of the first worker that
    notices may be missing: a few requests.

    Each bucket keeps the newest exemplar of all workers.

    Not thread-safe: `Totals` has a lock.

    Args:
        path: The file.

    Attributes:
        merged: The sums of all workers, as of the last sync.
        exemplars: The newest of all workers, as of the last sync.
        workers: Gauges of the living workers by process id, as of the last sync.
    """

    def __init__(self, path: Path) -> None:
        self._database = SharedDatabase(path, _SCHEMA, stays_open=True)
        self.merged: dict[SeriesKey, Numbers] = {}
        self.exemplars: dict[SeriesKey, BucketExemplars] = {}
        self.workers: dict[int, Gauges] = {}
        self._last_change = 0
        self._last_opening = 0
        self._pid = os.getpid()

    def sync(
        self,
        new: Mapping[SeriesKey, Numbers],
        commits: Mapping[str, int],
        gauges: Gauges,
        exemplars: Mapping[SeriesKey, BucketExemplars] = {},
    ) -> Changes:
        """Add the numbers counted here, and read those that other workers added.

        Args:
            new: Numbers counted here since the last sync; added once, or not at all if this raises.
            commits: For each journal id, the number of the last commit that is part of `new`.
            gauges: Of this process.
            exemplars: Those observed here since the last sync; kept where they are the newest.

        Returns:
            The changed series, those that changed here among them.

        Raises:
            sqlite3.Error: The file cannot be used now; nothing was added.
            OSError: The file cannot be opened.
            StateUnavailable: Its folder may be written by others.
        """
        with self._database.transaction() as connection:
            is_new = self._database.openings != self._last_opening
            is_refilled = is_new and bool(self.merged)
            last_change = 0 if is_new else self._last_change
            theirs = _read_series(connection, last_change)
            newer = self._newer(_read_exemplars(connection, last_change), exemplars)
            written: Mapping[SeriesKey, Numbers] = new
            if is_refilled:
                for key, numbers in self.merged.items():
                    theirs[key] = _larger(numbers, theirs.get(key))
                written = {**theirs, **new}
            sums = {
                key: _sum(theirs.get(key) or self.merged.get(key), new.get(key)) for key in written
            }
            rows = {**self.exemplars, **newer} if is_refilled else {k: newer[k] for k in exemplars}
            (change,) = connection.execute("SELECT number FROM change").fetchone()
            connection.executemany(
                "INSERT OR REPLACE INTO series VALUES (?, ?, ?, ?)",
                [
                    (family, _to_json(labels).decode(), _to_json(numbers).decode(), change + 1)
                    for (family, labels), numbers in sums.items()
                ],
            )
            connection.executemany(
                "INSERT OR REPLACE INTO exemplar VALUES (?, ?, ?, ?)",
                [
                    (family, _to_json(labels).decode(), _to_json(row).decode(), change + 1)
                    for (family, labels), row in rows.items()
                ],
            )
            connection.executemany("INSERT OR REPLACE INTO journal VALUES (?, ?)", commits.items())
            connection.execute(
                "INSERT OR REPLACE INTO worker VALUES (?, ?, ?)",
                (self._pid, started(self._pid), _to_json(gauges).decode()),
            )
            workers = _living_workers(connection)
            connection.execute("UPDATE change SET number = ?", (change + 1,))
        changes = Changes({**theirs, **sums}, newer)
        self.merged.update(changes.sums)
        self.exemplars.update(newer)
        self.workers = workers
        self._last_change = change + 1
        self._last_opening = self._database.openings
        return changes

    def last_commit(self, journal: str) -> int | None:
        """Return the number of a journal's last commit that is in the sums; None if not known.

        Raises:
            sqlite3.Error: The file cannot be used now.
            OSError: The file cannot be opened.
            StateUnavailable: Its folder may be written by others.
        """
        with self._database.transaction() as connection:
            row = connection.execute(
                "SELECT folded FROM journal WHERE id = ?", (journal,)
            ).fetchone()
        return None if row is None else int(row[0])

    def forget(self, journals: Iterable[str]) -> None:
        """Delete the commits of journals that are gone; best effort, never raises."""
        with (
            suppress(sqlite3.Error, OSError, StateUnavailable),
            self._database.transaction() as connection,
        ):
            connection.executemany(
                "DELETE FROM journal WHERE id = ?", [(journal,) for journal in journals]
            )

    def release(self) -> None:
        """Take this process's gauges out of the file and close it."""
        with (
            suppress(sqlite3.Error, OSError, StateUnavailable),
            self._database.transaction() as connection,
        ):
            connection.execute("DELETE FROM worker WHERE pid = ?", (self._pid,))
        self.close()

    def close(self) -> None:
        """Close the file; the next sync opens it again."""
        self._database.close()

    def _newer(
        self, *found: Mapping[SeriesKey, BucketExemplars]
    ) -> dict[SeriesKey, BucketExemplars]:
        """Return the series that were found, each bucket with the newest that is known now."""
        newer: dict[SeriesKey, BucketExemplars] = {}
        for rows in found:
            for key, row in rows.items():
                newer[key] = newest(newer.get(key) or self.exemplars.get(key), row)
        return newer


def _read_series(connection: sqlite3.Connection, since: int) -> dict[SeriesKey, Numbers]:
    rows = connection.execute(
        "SELECT family, labels, numbers FROM series WHERE changed > ?", (since,)
    )
    return {(family, _labels(labels)): _numbers(numbers) for family, labels, numbers in rows}


def _read_exemplars(connection: sqlite3.Connection, since: int) -> dict[SeriesKey, BucketExemplars]:
    rows = connection.execute(
        "SELECT family, labels, packed FROM exemplar WHERE changed > ?", (since,)
    )
    return {(family, _labels(labels)): _buckets(packed) for family, labels, packed in rows}


def _living_workers(connection: sqlite3.Connection) -> dict[int, Gauges]:
    """Return the gauges of living workers by process id; delete those of the dead."""
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
