"""How many visitors there were today: one set of ids that all processes of the app share."""

from __future__ import annotations

import os
import secrets
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any
from weakref import finalize

from flask_usage_metrics.enrich.visitors.files import DAY_SECONDS, VisitorFiles
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.fork_gate import FORK_GATE
from flask_usage_metrics.runtime.private_files import StateUnavailable, open_private
from flask_usage_metrics.runtime.state_dir import StateDir
from flask_usage_metrics.runtime.texts import encodable

_BUSY_SECONDS = 1.0
_PAUSE_SECONDS = 1.0
"""The file is left alone for so long when it could not be used."""

_BATCH = _RECENT = 4096
_MAX_PENDING = 100_000

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS seen (id TEXT PRIMARY KEY) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS tally (number INTEGER NOT NULL, token TEXT NOT NULL)",
)


class VisitorTally:
    """How many different visitors there were today (UTC), over all processes and restarts.

    The file is opened for each visit and closed after it, which costs 0.1 ms. A connection that
    stays open over a fork makes SQLite take the child's locks for granted, and what the child
    writes is lost when the parent closes its own (https://www.sqlite.org/howtocorrupt.html, 2.6);
    and a WAL whose database is removed under it makes the next one unusable ("disk I/O error")
    until all have closed theirs. Both were seen with SQLite 3.40.

    Args:
        state: Where the app's processes keep what they share; None: nowhere.
        app: What no other app in the same place has.
        faults: Where failures are reported.
        clock: Seconds since the epoch; for tests.
    """

    def __init__(
        self,
        state: StateDir | None,
        app: str,
        faults: Faults,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._files = VisitorFiles(state, app)
        self._faults = faults
        self._clock = clock
        self._lock = threading.Lock()
        self._start_anew(None)

    def _start_anew(self, day: int | None) -> None:
        self._day = day
        self._number = 0
        self._token: str | None = None  # of the file that the number and the recent ids are of
        self._recent: set[str] = set()
        self._pending: set[str] = set()
        self._retry_at = 0.0
        self._memory: sqlite3.Connection | None = None
        self._close_memory: Callable[[], object] | None = None

    def add(self, moment_ids: Iterable[tuple[float, str]]) -> None:
        """Add visitors, each of whom counts once; it never raises, and may wait a second.

        Args:
            moment_ids: When, in seconds since the epoch, and who; of other days than today they
                are ignored.
        """
        with FORK_GATE.entered(), self._lock:
            start = self._turn() * DAY_SECONDS
            end = start + DAY_SECONDS
            for moment, visitor in moment_ids:
                if start <= moment < end and visitor not in self._recent:
                    if len(self._pending) < _MAX_PENDING:
                        self._pending.add(visitor)
                    if len(self._pending) >= _BATCH:
                        self._exchange()
            if self._pending:
                self._exchange()

    def today(self) -> int:
        """Return how many visitors all processes saw today; it never raises.

        Returns:
            The last known number while the file cannot be read.
        """
        with FORK_GATE.entered(), self._lock:
            self._turn()
            self._exchange()
            return self._number

    def reset_after_fork(self) -> None:
        """Start anew: the parent process will add what it has yet to add."""
        self._lock = threading.Lock()
        # Nothing is closed, another thread may have been at it (see _opened).
        self._start_anew(None)

    def close(self) -> None:
        """Add what is left."""
        with FORK_GATE.entered(), self._lock:
            if self._pending:
                self._retry_at = 0.0
                self._exchange()
            self._forget_memory()
            self._start_anew(None)

    # ------------------------------------------------------------------------ days and files

    def _turn(self) -> int:
        """Return the day, since the epoch; a new one begins at zero, with a file of its own."""
        day = int(self._clock() // DAY_SECONDS)
        if day != self._day:
            self._forget_memory()
            self._start_anew(day)
            for other, path in list(self._files.all()):
                # Of days before, and of days that a wrong clock made up; keys have a grace.
                if not day <= other <= day + 1 and path.suffix != ".key":
                    with suppress(OSError):
                        path.unlink()
        return day

    def _path(self) -> Path | None:
        """Return the file of today, made for its owner only; None if nothing is to be in it.

        Raises:
            OSError: It cannot be made.
            StateUnavailable: There is no place that is ours alone.
        """
        day = self._day or 0
        for path in self._files.tallies(day):
            if _is_ours(path):
                return path
        if not (self._pending or self._recent or self._memory):
            return None
        path = self._files.new_tally(day)
        # SQLite would make the file for everybody to read, and follow a link. Only a new one is
        # opened here: to close it takes all locks away that this process has on it.
        with suppress(FileExistsError):
            os.close(open_private(path, exclusive=True))
        if not _is_ours(path):
            raise StateUnavailable("something that is no file of ours is in its place")
        return path

    # ------------------------------------------------------------------------ visits

    def _exchange(self) -> None:
        """Add what is pending, and learn the number; try again later if that fails."""
        if time.monotonic() < self._retry_at:
            return
        path = None
        try:
            try:
                path = self._path()
            except (OSError, StateUnavailable) as error:
                if self._token is not None and self._memory is None:
                    raise  # there was a place: there are more visitors than are known here
                self._visit_memory(error)
            else:
                if path is None:
                    self._number = 0
                else:
                    self._visit(path)
        except (OSError, StateUnavailable, sqlite3.Error) as error:
            self._faults.report("visitors", error, "visitors are added later")
            # Exactly that class: "file is not a database", "disk image is malformed".
            if type(error) is sqlite3.DatabaseError and path is not None:
                with suppress(OSError):
                    path.unlink()
                    return
            self._retry_at = time.monotonic() + _PAUSE_SECONDS

    def _visit(self, path: Path) -> None:
        connection, close = self._opened(f"{path.absolute().as_uri()}?mode=rw")
        try:
            # The number need not survive a crash of the machine.
            connection.execute("PRAGMA synchronous=OFF")
            self._merge(connection, self._memory)
        finally:
            close()
        self._forget_memory()

    def _visit_memory(self, error: Exception) -> None:
        """Count in this process only, until there is a place."""
        if self._memory is None:
            self._faults.report("visitors", error, "visitors are counted once for each process")
            self._memory, self._close_memory = self._opened(":memory:")
        self._merge(self._memory, None)

    def _forget_memory(self) -> None:
        if self._close_memory is not None:
            self._close_memory()
        self._memory = self._close_memory = None

    def _opened(self, name: str) -> tuple[sqlite3.Connection, finalize[..., Any]]:
        """Return a connection and what closes it.

        Until then it is not collected, which would close it: in a forked child that must not be.
        """
        connection = sqlite3.connect(
            name, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=True
        )
        close = finalize(self, connection.close)
        close.atexit = False
        return connection, close

    def _merge(self, connection: sqlite3.Connection, memory: sqlite3.Connection | None) -> None:
        """Make one transaction; nothing was added if it raises.

        Raises:
            sqlite3.Error: The file cannot be used now.
        """
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.execute(
                "INSERT INTO tally SELECT 0, ? WHERE NOT EXISTS (SELECT 1 FROM tally)",
                (secrets.token_hex(8),),
            )
            number, token = connection.execute("SELECT number, token FROM tally").fetchone()
            # A new file, in place of one that vanished or was damaged, gets what is still known.
            new = self._pending if token == self._token else self._pending | self._recent
            before = connection.total_changes
            insert = "INSERT OR IGNORE INTO seen VALUES (?)"
            connection.executemany(insert, ((_text(visitor),) for visitor in new))
            if memory is not None:
                connection.executemany(insert, memory.execute("SELECT id FROM seen"))
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


def _is_ours(path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
