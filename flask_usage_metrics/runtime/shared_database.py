"""A small SQLite file that several processes share: opened, locked, replaced when it is damaged."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import finalize

from flask_usage_metrics.runtime.fork_gate import FORK_GATE
from flask_usage_metrics.runtime.private_files import (
    check_private_file,
    make_private,
    make_private_file,
    wait_for_lock,
)

_BUSY_SECONDS = 1.0


class SharedDatabase:
    """A SQLite file that several processes write to, in short transactions.

    - The file is made for this user only.
    - A file that was deleted, replaced or emptied since the last transaction is made or opened
      anew. A damaged one is deleted; the next transaction makes a new one.
    - One with a write-ahead log is checked whenever something but the log was written to: by a
      checkpoint, seldom, or by who damaged it. Who has it open might not see that for hours.
    - Forks wait until a transaction is over (see `ForkGate`).
    - A forked child neither uses nor closes a connection that its parent has opened
      (https://www.sqlite.org/howtocorrupt.html, 2.6); it opens one of its own.

    Not thread-safe: whoever owns it has a lock.

    Args:
        path: The file; None: a database in memory, which no other process sees.
        schema: Statements that make those tables that do not exist yet.
        stays_open: Whether the connection stays open between transactions, with a write-ahead log,
            or is closed after each. A file that a process and its forked children both use must not
            stay open: SQLite would take the parent's locks for the child's, and what the child
            writes is lost when the parent closes its connection (seen with SQLite 3.40).

    Attributes:
        openings: How often a connection was opened. If it grew since the last transaction, the
            file may be a new one, and empty.
    """

    def __init__(self, path: Path | None, schema: Sequence[str], *, stays_open: bool) -> None:
        self.openings = 0
        self._path = path
        self._schema = schema
        self._stays_open = stays_open
        self._connection: sqlite3.Connection | None = None
        self._finalizer: finalize[..., Any] | None = None
        self._file: os.stat_result | None = None
        self._checked: tuple[int, int] | None = None
        self._process = 0
        self._has_schema = False

    def exists(self) -> bool:
        """Tell whether the file exists, and is not empty."""
        try:
            return self._path is None or self._path.lstat().st_size > 0
        except OSError:
            return False

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Begin a write transaction, committed in the end; what raises inside rolls it back.

        Yields:
            A connection to a database that has its tables.

        Raises:
            sqlite3.Error: The file cannot be used now, after waiting a second for locks.
            OSError: It cannot be made, or something else is in its place.
            StateUnavailable: Its folder may be written by others.
        """
        with FORK_GATE.entered():
            try:
                connection = self._opened()
                connection.execute("BEGIN IMMEDIATE")
                try:
                    if not self._has_schema:
                        for statement in self._schema:
                            connection.execute(statement)
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    with suppress(sqlite3.Error):
                        connection.execute("ROLLBACK")
                    raise
                self._has_schema = True
            except sqlite3.DatabaseError as error:
                if self._path is not None:  # memory would be lost
                    self._close()
                # Exactly that class: "file is not a database", "disk image is malformed".
                if type(error) is sqlite3.DatabaseError:
                    self._discard()
                raise
            finally:
                if not self._stays_open:
                    self._close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Begin a transaction that only reads, which waits for nobody if the file has a log.

        Yields:
            A connection; the tables may not exist.

        Raises:
            sqlite3.Error: The file cannot be read now.
            OSError: There is none, or something else is in its place.
        """
        with FORK_GATE.entered():
            try:
                connection = self._opened(make=False)
                connection.execute("BEGIN")
                try:
                    yield connection
                finally:
                    with suppress(sqlite3.Error):
                        connection.execute("ROLLBACK")
            except sqlite3.DatabaseError:
                if self._path is not None:
                    self._close()
                raise
            finally:
                if not self._stays_open:
                    self._close()

    def close(self) -> None:
        """Close the file; the next transaction opens it again."""
        with FORK_GATE.entered():
            self._close()

    def _opened(self, *, make: bool = True) -> sqlite3.Connection:
        """Return the connection, a new one if there is none or it is of no use any more."""
        if self._connection is not None and not self._is_current():
            self._close()
        if self._connection is None:
            if not make and self._path is not None:
                check_private_file(self._path)
            self._open()
        assert self._connection is not None
        return self._connection

    def _is_current(self) -> bool:
        """Tell whether the connection is this process's, and to the file that has the path now."""
        if self._process != os.getpid():
            return False
        if self._path is None or self._file is None:
            return True
        try:
            found = self._path.lstat()
        except OSError:
            return False
        if not os.path.samestat(found, self._file):  # no inode is used again while it is open
            return False
        if not found.st_size:  # emptied: we could go on with its log, but nobody else could open it
            self._discard()
            return False
        return not self._stays_open or _content(found) == self._checked

    def _open(self) -> None:
        if self._path is None:
            self._connect(":memory:")
            return
        name = f"{self._path.absolute().as_uri()}?mode=rw"
        make_private(self._path.parent)  # again, if somebody removed it
        with suppress(FileNotFoundError):
            self._file = check_private_file(self._path)
            if self._file.st_size:
                self._connect(name)
                return
        with _one_by_one(self._path.parent):
            self._file = make_private_file(self._path)
            # New, or emptied, with a log of before. One without a log stays empty for a while.
            if self._stays_open and not self._file.st_size:
                self._delete()
                self._file = make_private_file(self._path)
            self._connect(name)

    def _connect(self, name: str) -> None:
        connection = sqlite3.connect(
            name, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=True
        )
        self._process = os.getpid()
        self._connection = connection
        # Closes the connection of an object that is collected without `close`, and keeps it until
        # then.
        self._finalizer = finalize(self, _close_own, connection, self._process)
        self._finalizer.atexit = False
        self._has_schema = False
        self.openings += 1
        if self._stays_open:
            _retry_locked(connection, "PRAGMA journal_mode=WAL")
            if self._path is not None:
                self._checked = _content(self._path.lstat())
                if connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                    raise sqlite3.DatabaseError("the file is damaged")
        # The content need not survive a crash of the machine.
        connection.execute("PRAGMA synchronous=OFF")

    def _close(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._connection = self._finalizer = None

    def _discard(self) -> None:
        """Delete the file that was opened, unless another has taken its place."""
        if self._path is None or self._file is None:
            return
        with suppress(OSError), _one_by_one(self._path.parent):
            if os.path.samestat(self._path.lstat(), self._file):
                self._delete()

    def _delete(self) -> None:
        """Delete the file, and what belongs to it: whoever has them open goes on with those."""
        assert self._path is not None
        for suffix in ("", "-wal", "-shm", "-journal"):
            with suppress(OSError):
                self._path.with_name(f"{self._path.name}{suffix}").unlink()


def _content(found: os.stat_result) -> tuple[int, int]:
    """Return what changes with the content of a file: its size, and when it was written to."""
    return found.st_size, found.st_mtime_ns


@contextmanager
def _one_by_one(folder: Path) -> Iterator[None]:
    """Let one process at a time make or delete files; nobody waits for longer than a second."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # some network file systems lock no folders
            wait_for_lock(descriptor, time.monotonic() + _BUSY_SECONDS, shared=False)
        yield
    finally:
        os.close(descriptor)


_inherited: list[sqlite3.Connection] = []
"""Connections of the parent process, which are kept lest the garbage collector close them."""


def _close_own(connection: sqlite3.Connection, process: int) -> None:
    if process == os.getpid():
        connection.close()
    else:
        _inherited.append(connection)


def _retry_locked(connection: sqlite3.Connection, statement: str) -> None:
    # The switch to a write-ahead log does not wait for locks by itself.
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute(statement)
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.01)
