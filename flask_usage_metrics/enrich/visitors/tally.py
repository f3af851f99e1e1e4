"""The number of visitors today: one set of ids that all processes of an app share."""

from __future__ import annotations

import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import islice
from os.path import lexists
from pathlib import Path
from time import monotonic, time

from flask_usage_metrics.enrich.visitors.files import DAY_SECONDS, VisitorFiles
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.forks import FORKS
from flask_usage_metrics.runtime.private_files import (
    StateUnavailable,
    check_private_file,
    make_private_file,
)
from flask_usage_metrics.runtime.shared_database import SharedDatabase
from flask_usage_metrics.runtime.state_dir import StateDir
from flask_usage_metrics.runtime.texts import encodable

_PAUSE_SECONDS = 1.0
"""Seconds before a file that could not be used is tried again."""

_BATCH = _RECENT = 4096
_MAX_PENDING = 100_000

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS seen (id TEXT PRIMARY KEY) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS tally (number INTEGER NOT NULL, token TEXT NOT NULL)",
)


class VisitorTally:
    """Counts the different visitors of today (UTC), over all processes and restarts.

    While there is no place for the file, each process counts alone, in memory.

    Args:
        state: Where the app's processes keep what they share; None: nowhere.
        app: Name of the app, which no other in the same place has.
        faults: Where failures are reported.
        clock: Seconds since the epoch; for tests.
    """

    def __init__(
        self,
        state: StateDir | None,
        app: str,
        faults: Faults,
        *,
        clock: Callable[[], float] = time,
    ) -> None:
        self._files = VisitorFiles(state, app)
        self._faults = faults
        self._clock = clock
        self._lock = threading.Lock()
        self._start(None)
        FORKS.register(self)

    def _start(self, day: int | None) -> None:
        self._day = day
        self._number = 0
        self._token: str | None = None  # names the file that the number and recent ids are from
        self._recent: set[str] = set()
        self._pending: set[str] = set()
        self._retry_at = 0.0
        self._memory: SharedDatabase | None = None

    def add(self, moment_ids: Iterable[tuple[float, str]]) -> None:
        """Add visitors, each of whom counts once; never raises, may block for a second.

        Args:
            moment_ids: Time of a request in seconds since the epoch, and id of its visitor; those
                of other days than today are ignored.
        """
        with self._lock:
            start = self._turn() * DAY_SECONDS
            end = start + DAY_SECONDS
            for moment, visitor in moment_ids:
                if start <= moment < end and visitor not in self._recent:
                    if len(self._pending) < _MAX_PENDING:
                        self._pending.add(visitor)
                    if len(self._pending) >= _BATCH:
                        self._sync()
            if self._pending:
                self._sync()

    def today(self) -> int:
        """Return how many visitors all processes saw today; never raises.

        Returns:
            The last known number while the file cannot be read.
        """
        with self._lock:
            self._turn()
            self._sync()
            return self._number

    def reset_after_fork(self) -> None:
        """Start anew: the parent process adds what it has pending."""
        self._lock = threading.Lock()
        self._start(None)

    def close(self) -> None:
        """Add what is pending."""
        with self._lock:
            if self._pending:
                self._retry_at = 0.0
                self._sync()
            self._start(None)

    # ------------------------------------------------------------------------ days and files

    def _turn(self) -> int:
        """Return the day, since the epoch; a new one starts at zero, with a file of its own."""
        day = int(self._clock() // DAY_SECONDS)
        if day != self._day:
            self._start(day)
            for other, path in list(self._files.all()):
                # Of days before, and of days that a wrong clock made up; keys have a grace.
                if not day <= other <= day + 1 and path.suffix != ".key":
                    with suppress(OSError):
                        path.unlink()
        return day

    def _path(self) -> Path | None:
        """Return the file of today, made if need be; None if there is nothing to put into it.

        Raises:
            OSError: It cannot be made, or something else is in its place.
            StateUnavailable: There is no folder that only this user may write.
        """
        day = self._day or 0
        for path in self._files.tallies(day):
            with suppress(OSError):
                check_private_file(path)
                return path
        if not (self._pending or self._recent or self._memory):
            return None
        path = self._files.new_tally(day)
        make_private_file(path)
        return path

    # ------------------------------------------------------------------------ sharing

    def _sync(self) -> None:
        """Add the pending ids and read the number; if that fails, a later call tries again."""
        if monotonic() < self._retry_at:
            return
        path = None
        try:
            try:
                path = self._path()
            except (OSError, StateUnavailable) as error:
                if self._token is not None and self._memory is None:
                    raise  # there was a place: there are more visitors than are known here
                self._sync_memory(error)
            else:
                if path is None:
                    self._number = 0
                else:
                    self._sync_file(path)
        except (OSError, StateUnavailable, sqlite3.Error) as error:
            self._faults.report("visitors", error, "visitors are added later")
            # Not after a damaged file, which was deleted: the next sync makes a new one.
            if path is None or lexists(path):
                self._retry_at = monotonic() + _PAUSE_SECONDS

    def _sync_memory(self, error: Exception) -> None:
        if self._memory is None:
            self._faults.report("visitors", error, "visitors are counted once for each process")
            self._memory = SharedDatabase(None, _SCHEMA, stays_open=True)
        self._merge_into(self._memory, None)

    def _sync_file(self, path: Path) -> None:
        # Opened each time: forked children use the same file.
        self._merge_into(SharedDatabase(path, _SCHEMA, stays_open=False), self._memory)
        self._memory = None

    def _merge_into(self, database: SharedDatabase, memory: SharedDatabase | None) -> None:
        """Add the pending ids, and those of the database in memory, in one transaction.

        Raises:
            sqlite3.Error: The file cannot be used now; nothing was added.
        """
        insert = "INSERT OR IGNORE INTO seen VALUES (?)"
        with database.transaction() as connection:
            connection.execute(
                "INSERT INTO tally SELECT 0, ? WHERE NOT EXISTS (SELECT 1 FROM tally)",
                (secrets.token_hex(8),),
            )
            number, token = connection.execute("SELECT number, token FROM tally").fetchone()
            # A new file, in place of one that vanished or was damaged, gets what is still known.
            new = self._pending if token == self._token else self._pending | self._recent
            before = connection.total_changes
            connection.executemany(insert, ((_text(visitor),) for visitor in new))
            if memory is not None:
                with memory.transaction() as alone:
                    connection.executemany(insert, alone.execute("SELECT id FROM seen"))
            if added := connection.total_changes - before:
                connection.execute("UPDATE tally SET number = number + ?", (added,))
        self._number = number + added
        self._token = token
        if len(self._recent) + len(new) > _RECENT:
            self._recent.clear()
        self._recent.update(islice(new, _RECENT))
        self._pending.clear()


def _text(visitor: str) -> str:
    # SQLite refuses lone surrogates.
    return visitor if visitor.isascii() else encodable(visitor)
