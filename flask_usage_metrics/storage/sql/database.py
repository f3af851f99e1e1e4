"""Transactions of one SQL storage.

Creates or upgrades the schema on first use, retries conflicts, maps driver errors.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import sqlalchemy as sa

from flask_usage_metrics.errors import StorageError, StorageUnavailable
from flask_usage_metrics.storage.sql.dialects import dialect_of
from flask_usage_metrics.storage.sql.dialects.base import BUSY_SECONDS, Dialect, Fault
from flask_usage_metrics.storage.sql.schema import Schema, Step

_ATTEMPTS = 3
"""Attempts at a transaction that meets a conflict, or a schema that changed."""

_T = TypeVar("_T")


class Database:
    """Runs transactions for one storage, any number of threads at a time.

    Args:
        given: The dialect, or a Flask-SQLAlchemy object, whose engine may become known later.
        schema: The tables of the storage.
        taken: Called with the dialect once it is known.
        may_be_absent: Returns whether a database without our tables holds no records; else it is an
            error to read it.
    """

    def __init__(
        self,
        given: Dialect | Any,
        schema: Schema,
        taken: Callable[[Dialect], None],
        may_be_absent: Callable[[], bool],
    ) -> None:
        self.schema = schema
        self._taken = taken
        self._may_be_absent = may_be_absent
        # What was lost, until a write has said so.
        self._lost = ""
        self._db = given
        self._app: Any = None
        self._dialect: Dialect | None = None
        self._inherited: list[sa.Pool] = []
        self._start()
        if isinstance(given, Dialect):
            self._take(given)
        else:
            # Outside of an app context Flask-SQLAlchemy 3 tells no engine.
            with suppress(RuntimeError):
                self._take(dialect_of(given.engine))

    @property
    def known(self) -> Dialect | None:
        """The dialect; None while the engine is not known."""
        return self._dialect

    def bind_app(self, app: Any) -> None:
        """Ask for the engine in the context of this Flask app; failing to is no error yet."""
        self._app = app
        with suppress(StorageUnavailable):
            self.reach()

    def reach(self) -> Dialect:
        """Return the dialect; nothing is connected to.

        Raises:
            StorageUnavailable: Its engine can be had in an app context only.
            ConfigError: It is of a database or driver that is not supported.
        """
        if self._dialect is not None:
            return self._dialect
        try:
            if self._app is None:
                return self._take(dialect_of(self._db.engine))
            with self._app.app_context():
                return self._take(dialect_of(self._db.engine))
        except RuntimeError:
            raise StorageUnavailable(
                reason="db tells its engine only in an app context: create the storage inside "
                "`with app.app_context():`, or pass the engine"
            ) from None

    # -- work -----------------------------------------------------------------------------------

    def run(self, work: Callable[[sa.Connection], _T], *, create: bool, absent: _T) -> _T:
        """Run a function in a transaction, and return its result.

        Before, the schema is created or upgraded if this process does not know it to be current.
        Blocks for `BUSY_SECONDS` or more if others hold locks.

        Args:
            work: Called with the connection; called again, twice at most, after a rollback, if the
                transaction met a conflict, or a table or column was missing.
            create: Create the file and the tables if there are none.
            absent: Returned if there are none, `create` is false, and that is no error.

        Raises:
            StorageUnavailable: The database cannot be used now, or is not there.
            StorageError: A value cannot be kept.
        """
        dialect = self.reach()

        def transact() -> _T:
            if not self._prepare(dialect, create):
                self._check_absence(dialect)
                return absent
            with _connection(dialect) as connection, connection.begin():
                return work(connection)

        return self.attempt(transact)

    def fetch(self, query: sa.Executable) -> Sequence[Sequence[Any]]:
        """Return all rows of a query; empty if there is no table. See `run`."""

        def fetch(connection: sa.Connection) -> Sequence[Sequence[Any]]:
            return connection.execute(query).all()

        return self.run(fetch, create=False, absent=())

    def run_locked(
        self,
        work: Callable[[sa.Connection], _T],
        name: str,
        *,
        wait_seconds: float = BUSY_SECONDS,
    ) -> _T | None:
        """Run a function in a transaction that holds a lock between processes; see `run`.

        Args:
            work: As in `run`.
            name: Name of the lock, see `Dialect.lock`.
            wait_seconds: Seconds to wait for the lock. Only after `BUSY_SECONDS`, the default, is
                it an error not to get it.

        Returns:
            The result; None if there is no table, or another process kept the lock.
        """
        dialect = self.reach()

        def transact() -> _T | None:
            if not self._prepare(dialect, create=False):
                self._check_absence(dialect)
                return None
            with (
                _connection(dialect) as connection,
                dialect.lock(connection, name, wait_seconds),
            ):
                return work(connection)

        def attempt() -> _T | None:
            try:
                return transact()
            except TimeoutError:
                if wait_seconds >= BUSY_SECONDS:
                    raise
                return None

        return self.attempt(attempt)

    def attempt(self, work: Callable[[], _T]) -> _T:
        """Call a function, up to `_ATTEMPTS` times if that helps; see `run` for what it raises."""
        dialect = self.reach()
        with dialect.guard():
            for attempt in range(_ATTEMPTS):
                try:
                    return work()
                except OSError as error:
                    # Not the error's own text, which names the file.
                    reason = os.strerror(error.errno) if error.errno else str(error)
                    raise StorageUnavailable(reason=f"{dialect.name}: {reason}") from None
                except sa.exc.TimeoutError:
                    raise StorageUnavailable(
                        reason=f"{dialect.name}: all connections of the engine are in use"
                    ) from None
                except sa.exc.DBAPIError as error:
                    fault = dialect.fault_of(error)
                    message = f"{dialect.name}: {dialect.reason(error)}"
                    if fault is Fault.DATA:
                        raise StorageError(reason=message) from error.orig
                    if fault is Fault.SCHEMA:
                        self._ready_to_read = self._ready_to_write = self._trusts = False
                    elif dialect.distrusts(error):
                        self._start_anew(dialect)
                    if fault is Fault.UNAVAILABLE or attempt == _ATTEMPTS - 1:
                        raise StorageUnavailable(reason=message) from error.orig
        raise AssertionError("unreachable")

    def plan(self) -> list[Step]:
        """Return what `migrate` would do; nothing is changed."""
        dialect = self.reach()

        def plan() -> list[Step]:
            with dialect.connect() as connection:
                return self.schema.plan(dialect, connection)

        return self.attempt(plan)

    def migrate(self) -> list[Step]:
        """Create or upgrade the schema, without trust in the noted versions; return the steps."""
        dialect = self.reach()

        def migrate() -> list[Step]:
            dialect.make_room()
            with dialect.connect() as connection:
                dialect.connected(connection, create=True)
            return self.schema.upgrade(dialect)

        return self.attempt(migrate)

    # -- connections ----------------------------------------------------------------------------

    def close(self) -> None:
        """Close the connections of an engine of our own; the next use opens new ones."""
        if self._dialect is not None:
            with self._dialect.guard():
                self._start_anew(self._dialect)
                self._dialect.forget()
                self._lost = ""

    def reset_after_fork(self) -> None:
        """Use new connections in this process; those of the parent are left untouched."""
        self._start()
        if self._dialect is not None:
            self._dialect.reset_after_fork()
            # Kept, so that they are not closed by the garbage collection either: SQLite forbids
            # to use, even to close, a connection in another process than the one that opened it
            # (https://www.sqlite.org/howtocorrupt.html#_carrying_an_open_database_file_across_a_fork_),
            # and a server would be told that its client goes, which is the parent.
            self._inherited.append(self._dialect.engine.pool)
            self._dialect.engine.dispose(close=False)

    def _start(self) -> None:
        """Forget what this process found out of the schema."""
        self._setting_up = threading.Lock()
        self._ready_to_read = self._ready_to_write = False
        self._trusts = True

    def _take(self, dialect: Dialect) -> Dialect:
        self._dialect = dialect
        self._app = None  # it is not needed any more, and may be dropped
        self._taken(dialect)
        return dialect

    def _prepare(self, dialect: Dialect, create: bool) -> bool:
        """Create or upgrade the schema, unless it is known to be current; return if it exists."""
        presence = dialect.presence()
        if presence == "lost":
            self._lost = dialect.give_up() or self._lost
            self._start_anew(dialect)
            presence = dialect.presence()
        elif presence == "suspect":
            self._start_anew(dialect)
        if create and self._lost:
            # Once, for whoever reports it: the next attempt makes another.
            lost, self._lost = self._lost, ""
            raise StorageUnavailable(reason=f"{dialect.name}: {lost}; the next is made")
        if presence == "absent":
            if not create:
                return False
            self._ready_to_read = self._ready_to_write = False
        if self._ready_to_write if create else self._ready_to_read:
            return True
        with self._setting_up:
            if presence == "absent":
                dialect.make_room()
            try:
                exists = self.schema.ensure(
                    dialect, create=create, trust=self._trusts, wait_seconds=BUSY_SECONDS
                )
            except StorageUnavailable:
                # A file may be replaced before the next time.
                self._start_anew(dialect)
                raise
            dialect.set_up()
            self._trusts = True
            self._ready_to_read = exists
            self._ready_to_write = exists and create
            return exists

    def _check_absence(self, dialect: Dialect) -> None:
        """Raise StorageUnavailable unless what is not there holds no records."""
        if self._lost or not self._may_be_absent():
            what = "file" if dialect.presence() == "absent" else "table of records"
            reason = self._lost or f"there is no {what}: nothing was written yet, or elsewhere"
            raise StorageUnavailable(reason=f"{dialect.name}: {reason}")

    def _start_anew(self, dialect: Dialect) -> None:
        if dialect.owned:
            dialect.engine.dispose()
        self._ready_to_read = self._ready_to_write = False


@contextmanager
def _connection(dialect: Dialect) -> Iterator[sa.Connection]:
    """Connect; if another thread closes the storage meanwhile, close the connection at the end."""
    pool = dialect.engine.pool
    with dialect.connect() as connection:
        try:
            yield connection
        finally:
            if dialect.engine.pool is not pool and not connection.closed:
                # Else it would go back to a pool that nobody empties any more.
                connection.invalidate()
