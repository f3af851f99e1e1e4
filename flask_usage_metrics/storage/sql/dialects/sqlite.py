"""SQLite: a file, or memory; one writer at a time."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.pool import QueuePool, StaticPool

from flask_usage_metrics.errors import ConfigError
from flask_usage_metrics.records.query import Every
from flask_usage_metrics.runtime.fork_gate import FORK_GATE
from flask_usage_metrics.storage.sql.dialects.base import BUSY_SECONDS, Dialect, Fault, Place
from flask_usage_metrics.storage.sql.dialects.columns_in_use import ParameterLayout
from flask_usage_metrics.storage.sql.table import COLUMN_NAMES, Columns, to_json, to_text

WAL_BYTES = 64 * 1024 * 1024
"""What is left of the write-ahead log after a checkpoint; without a limit it keeps its size."""

_WRITES_A_LOOK = 32
_RELIEF_MS = 1_000

# A datetime is stored as text, "2026-11-22 09:00:00.000001": so much of it names the period.
_PERIOD_CHARACTERS = {"hour": 13, "day": 10, "month": 7}

# A batch is inserted by statements of so many rows: powers of two, so that ten prepared
# statements do for batches of all sizes (one for each size would be compiled ever again, at 8 µs
# a row, and be kept at 2 to 5 kB a row). 512 rows have up to 20 992 parameters; SQLite takes
# 32 766 of them since 3.32 (2020), and 999 before.
_MOST_ROWS = 512 if sqlite3.sqlite_version_info >= (3, 32) else 16

_CACHED_STATEMENTS = 16
"""These ten, and some to read by; sqlite3 would keep 128."""


class SQLite(Dialect):
    """Times are text; types hardly matter.

    An engine of our own has a write-ahead log, so that readers and one writer do not wait for each
    other; a crash of the machine may lose the last transactions, but harms no others.

    A batch is plain INSERT statements of up to 512 rows each, whose shared values are parameters
    once: 6 µs of CPU a row, where one JSON parameter taken apart with ``json_each`` cost 41, and
    executemany gives the GIL away once a row, waiting up to 5 ms for it each time beside a busy
    thread.

    What is deleted is overwritten with zeros. SQLite may leave the copy of a row it moved
    (measured: of 1 in 25 000) in an unused part of a page, and more of them where others wrote
    without ``PRAGMA secure_delete``: only VACUUM takes these away.
    """

    name = "sqlite"
    drivers: ClassVar[Mapping[str, str]] = {"pysqlite": "sqlite3"}

    def __init__(
        self,
        engine: sa.Engine,
        *,
        owned: bool = False,
        file: Path | None = None,
        timeout: float = BUSY_SECONDS,
    ) -> None:
        super().__init__(engine, owned=owned)
        self._file = file
        self._timeout = timeout
        self._layout = ParameterLayout()
        self._inserts: dict[int, str] = {}
        self._writes = 0
        self.reset_after_fork()

    @classmethod
    def open(cls, location: sa.URL) -> SQLite:
        """Return the dialect of a file or of memory; see `SQLStorage.from_url`."""
        if location.host or location.username or location.password or location.port:
            raise ConfigError(
                "a SQLite URL is sqlite:///relative/file or sqlite:////absolute/file: "
                "three slashes or four"
            )
        unknown = sorted(set(location.query) - {"timeout"})
        if unknown:
            raise ConfigError(f"a SQLite URL may end with ?timeout=5, but not have {unknown[0]!r}")
        timeout = BUSY_SECONDS
        if "timeout" in location.query:
            try:
                timeout = float(str(location.query["timeout"]))
            except ValueError:
                raise ConfigError("timeout must be a number of seconds") from None
        in_memory = location.database in (None, "", ":memory:")
        file = None if in_memory else Path(str(location.database)).absolute()
        engine = sa.create_engine(
            sa.URL.create("sqlite", database=None if file is None else str(file)),
            # One connection is one database in memory: all threads share it, under our lock.
            poolclass=StaticPool if in_memory else QueuePool,
            connect_args={
                "timeout": timeout,
                "check_same_thread": False,
                # Each INSERT of 512 rows is kept at 1 or 2 MB, and no longer used after a change.
                "cached_statements": _CACHED_STATEMENTS,
            },
            hide_parameters=True,
        )
        sa.event.listen(engine, "connect", _configure_connection)
        return cls(engine, owned=True, file=file, timeout=timeout)

    def reset_after_fork(self) -> None:
        """Forget which file it was, and who holds the lock."""
        self._memory_lock = threading.RLock()
        self._identity: tuple[int, int] | None = None

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Keep forks away, and other threads from memory, which all share one connection to."""
        in_memory = isinstance(self.engine.pool, StaticPool)
        with self._memory_lock if in_memory else nullcontext(), FORK_GATE.entered():
            yield

    def place(self) -> Place:
        """Look whether the file is there, and the one that was set up."""
        if self._file is None:
            return "there"
        identity = _identity(self._file)
        if self._identity is not None and self._identity != identity:
            # Deleted or replaced: connections to the old file would go on, into the void.
            self._identity = None
            return "replaced"
        return "there" if identity else "absent"

    def make_place(self) -> None:
        """Make the folder."""
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)

    def connected(self, connection: sa.Connection, *, create: bool) -> None:
        """Have a file of our own write ahead into a log."""
        if not (create and self.owned and self._file is not None):
            return
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                # Only if need be: the switch wants the file for itself, even if it is done already.
                if connection.exec_driver_sql("PRAGMA journal_mode").scalar() != "wal":
                    connection.exec_driver_sql("PRAGMA journal_mode=WAL").close()
                return
            except sa.exc.OperationalError as error:
                # It does not wait for locks by itself: of 120 processes that began on a new file
                # at once, 3 to 4 failed; with this none of 320.
                if not _says(error, "is locked", "busy") or time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    def set_up(self) -> None:
        """Note which file it is."""
        if self._file is not None:
            self._identity = _identity(self._file)

    @contextmanager
    def lock(
        self, connection: sa.Connection, name: str, wait_seconds: float = BUSY_SECONDS
    ) -> Iterator[None]:
        """Take the one lock for writing there is, and wait no longer than the connection does."""
        connection.begin()
        raw = connection.connection.dbapi_connection
        if raw is not None and raw.in_transaction:
            # The engine is the caller's, and begins transactions itself: deferred ones, in which
            # what was read first cannot be followed by a write when another was quicker.
            connection.exec_driver_sql("ROLLBACK")
        timeout = connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one()
        patience = min(timeout, round(1000 * wait_seconds))
        connection.exec_driver_sql(f"PRAGMA busy_timeout={patience}").close()
        try:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        except sa.exc.OperationalError as error:
            if _is_locked(error):
                raise TimeoutError(self.reason(error)) from None
            raise
        finally:
            connection.exec_driver_sql(f"PRAGMA busy_timeout={timeout}").close()
        try:
            yield
        except BaseException:
            connection.rollback()
            raise
        connection.commit()

    def snapshot(self, connection: sa.Connection) -> None:
        """Begin, which sqlite3 puts off until something is written."""
        raw = connection.connection.dbapi_connection
        if raw is not None and not raw.in_transaction:
            connection.exec_driver_sql("BEGIN")

    # -- the schema -----------------------------------------------------------------------------

    def alter_table(self, table: sa.Table, clauses: Sequence[str]) -> list[str]:
        """Return one statement a change: SQLite knows no other."""
        quoted = self.engine.dialect.identifier_preparer.format_table(table)
        return [f"ALTER TABLE {quoted} {clause}" for clause in clauses]

    def widen_column(self, column: sa.Column[Any]) -> str:
        """Nothing needs to be widened."""
        raise AssertionError(column.name)

    def is_narrow(self, column: sa.Column[Any], found: Mapping[str, Any]) -> bool:
        """No column is: lengths are ignored."""
        return False

    def counts_up(self, column: Mapping[str, Any]) -> bool:
        """Only what is declared as INTEGER does."""
        return type(column["type"]) is sa.INTEGER

    # -- writing and deleting -------------------------------------------------------------------

    def insert(self, connection: sa.Connection, table: sa.Table, columns: Columns) -> None:
        """Insert rows by few statements, of all columns that ever had a value."""
        if self._layout.learn(columns):
            self._inserts.clear()
        shared, own = self._layout.shared, self._layout.own
        once = [columns[position][0] for position in shared]
        # The transaction must begin with a write: one that reads first and then wants to
        # write is refused at once, whatever the timeout, when another writer was quicker.
        count = len(columns[0])
        start, size = 0, _MOST_ROWS
        while start < count:
            while size > count - start:
                size //= 2
            values: list[Any] = [None] * (size * len(own))
            for place, position in enumerate(own):
                values[place :: len(own)] = columns[position][start : start + size]
            if size not in self._inserts:
                self._inserts[size] = self._insert(size, table)
            connection.exec_driver_sql(self._inserts[size], (*once, *values))
            start += size

    def _insert(self, rows: int, table: sa.Table) -> str:
        shared, own = self._layout.shared, self._layout.own
        quoted = self.engine.dialect.identifier_preparer.format_table(table)
        names = ", ".join(COLUMN_NAMES[position] for position in (*shared, *own))
        selected = ["?"] * len(shared) + [f"column{number + 1}" for number in range(len(own))]
        row = f"({', '.join('?' * len(own))})"
        # "WHERE true", or ON CONFLICT would be taken for a join's. No "OR IGNORE", which would
        # also ignore values that the table refuses.
        return (
            f"INSERT INTO {quoted} ({names}) SELECT {', '.join(selected)} "
            f"FROM (VALUES {', '.join([row] * rows)}) WHERE true ON CONFLICT DO NOTHING"
        )

    def delete(
        self,
        connection: sa.Connection,
        table: sa.Table,
        condition: sa.ColumnElement[bool],
    ) -> int:
        """Delete rows, and their bytes from the file."""
        before = connection.exec_driver_sql("PRAGMA secure_delete").scalar_one()
        connection.exec_driver_sql("PRAGMA secure_delete=ON").close()
        try:
            return super().delete(connection, table, condition)
        finally:
            # The engine may be the caller's. As a number, 2 would be taken for ON.
            setting = ("OFF", "ON", "FAST")[before]
            connection.exec_driver_sql(f"PRAGMA secure_delete={setting}").close()

    def needs_checkpoint(self) -> bool:
        """Look at the size of the log now and then.

        Readers that take turns without a pause keep SQLite from beginning it anew: 0.9 GB seen.
        """
        self._writes += 1
        if self._file is None or self._writes % _WRITES_A_LOOK:
            return False
        log = self._file.with_name(f"{self._file.name}-wal")
        try:
            return log.stat().st_size > WAL_BYTES
        except FileNotFoundError:
            return False

    def checkpoint(self, connection: sa.Connection) -> None:
        """Empty the log: new readers do without it, and the old ones are waited for."""
        before = connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one()
        connection.exec_driver_sql(f"PRAGMA busy_timeout={_RELIEF_MS}").close()
        try:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").close()
        finally:
            connection.exec_driver_sql(f"PRAGMA busy_timeout={before}").close()

    def deleted(self, connection: sa.Connection) -> None:
        """Empty the log, which holds older pages; a reader is waited for as for a lock."""
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").close()

    # -- expressions ----------------------------------------------------------------------------

    def moment(self, column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """Return the text that is stored."""
        return sa.type_coerce(column, sa.String)

    def bind_moment(self, moment: datetime) -> Any:
        """Return the text that would be stored."""
        return to_text(moment)

    def period(self, moment: sa.ColumnElement[Any], every: Every) -> sa.ColumnElement[str]:
        """Return the beginning of the text."""
        return sa.func.substr(
            moment, sa.literal_column("1"), sa.literal_column(str(_PERIOD_CHARACTERS[every]))
        )

    def any_of(
        self, expression: sa.ColumnElement[Any], values: Sequence[Any]
    ) -> sa.ColumnElement[bool]:
        """Take the values as one parameter: SQLite might not take as many."""
        listed = sa.func.json_each(to_json(values).decode()).table_valued("value")
        return expression.in_(sa.select(listed.c.value))

    # -- errors ---------------------------------------------------------------------------------

    def fault_of(self, error: sa.exc.DBAPIError) -> Fault:
        """Go by their texts: sqlite3 tells error codes only since Python 3.11."""
        if isinstance(error, sa.exc.OperationalError):
            missing = _says(error, "no such table", "no such column", "no column")
            return Fault.SCHEMA if missing else Fault.UNAVAILABLE
        # Exactly DatabaseError: "file is not a database", "malformed". Its other subclasses
        # are about values: those of one record, which cannot be kept.
        if type(error) is sa.exc.DatabaseError:
            return Fault.UNAVAILABLE
        return Fault.SCHEMA if _says(error, "NOT NULL constraint failed") else Fault.DATA

    def reason(self, error: sa.exc.DBAPIError) -> str:
        """Return SQLite's own text, which holds neither path nor values; SQLAlchemy's do."""
        return str(error.orig)

    def distrusts(self, error: sa.exc.DBAPIError) -> bool:
        """Have the file be opened anew, which may be repaired or replaced before the next time."""
        is_used = self._identity is not None and _is_locked(error)
        return self._file is not None and not is_used


def _configure_connection(connection: sqlite3.Connection, _: Any) -> None:
    # NORMAL is as safe as FULL against a crash of the process, and costs a third per small batch.
    connection.execute("PRAGMA synchronous=NORMAL").close()
    connection.execute(f"PRAGMA journal_size_limit={WAL_BYTES}").close()
    # For what is deleted, and at no cost also for what is inserted: SQLite moves rows to other
    # pages, and without it left copies behind of 200 in 273 552 rows deleted later, with it of 20.
    connection.execute("PRAGMA secure_delete=ON").close()


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _is_locked(error: sa.exc.DBAPIError) -> bool:
    return _says(error, "is locked", "busy")


def _says(error: sa.exc.DBAPIError, *phrases: str) -> bool:
    text = str(error.orig)
    return any(phrase in text for phrase in phrases)
