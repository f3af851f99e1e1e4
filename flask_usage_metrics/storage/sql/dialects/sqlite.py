"""SQLite: a database in a file or in memory; one writer at a time."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.pool import QueuePool, StaticPool

from flask_usage_metrics.errors import ConfigError, StorageUnavailable
from flask_usage_metrics.records.query import Every
from flask_usage_metrics.runtime.fork_gate import FORK_GATE
from flask_usage_metrics.runtime.private_files import make_own_file
from flask_usage_metrics.runtime.shown_values import shown
from flask_usage_metrics.storage.sql.dialects.base import BUSY_SECONDS, Dialect, Fault, Presence
from flask_usage_metrics.storage.sql.dialects.sqlite_file import DatabaseFile
from flask_usage_metrics.storage.sql.dialects.sqlite_insert import CACHED_STATEMENTS, BatchInsert
from flask_usage_metrics.storage.sql.table import Columns, to_json, to_text

WAL_BYTES = 64 * 1024 * 1024
"""Most bytes of the write-ahead log after a checkpoint; without a limit the file never shrinks."""

_WRITES_A_LOOK = 32
"""Batches between two looks at the size of the log."""

_CHECKPOINT_MS = 1_000
"""Most milliseconds that a checkpoint waits for readers."""

# A time is stored as text, "2026-11-22 09:00:00.000001": its first characters name the period.
_PERIOD_CHARACTERS = {"hour": 13, "day": 10, "month": 7}


class SQLite(Dialect):
    """SQLite. Times are texts; types of columns hardly matter.

    A file of ours has a write-ahead log, so that readers and one writer do not wait for each other;
    a crash of the machine may lose the last transactions, but damages nothing.

    Deleted rows are overwritten with zeros. SQLite may leave the copy of a few rows it moved in an
    unused part of a page, and of more where others wrote without ``PRAGMA secure_delete``: only
    VACUUM removes these.

    Args:
        engine: See `Dialect`.
        owned: See `Dialect`.
        file: The database's file, of an engine of our own; None: it is in memory, or the caller's.
        timeout: Seconds to wait for a lock, as the connections of our engine do.
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
        if not owned and _is_one_a_connection(engine):
            raise ConfigError(
                "each connection of this engine has a database in memory of its own: create it "
                'with poolclass=StaticPool and connect_args={"check_same_thread": False}, or use '
                'open_storage("sqlite://")'
            )
        self._file = None if file is None else DatabaseFile(file)
        self._is_suspect = False
        self._timeout = timeout
        self._insert = BatchInsert()
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
            raise ConfigError(
                f"a SQLite URL may end with ?timeout=5, but not have {shown(unknown[0])}"
            )
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
                # An INSERT of 512 rows takes 1 or 2 MB, and is useless once the layout changed.
                "cached_statements": CACHED_STATEMENTS,
            },
            hide_parameters=True,
        )
        sa.event.listen(engine, "connect", _configure_connection)
        return cls(engine, owned=True, file=file, timeout=timeout)

    def reset_after_fork(self) -> None:
        """Forget which file it was, and make the lock anew."""
        self._memory_lock = threading.RLock()
        self.forget()

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Keep forks away, and other threads from a database in memory: all share a connection."""
        in_memory = isinstance(self.engine.pool, StaticPool)
        with self._memory_lock if in_memory else nullcontext(), FORK_GATE.entered():
            yield

    def presence(self) -> Presence:
        """Compare the file with the one that was written to."""
        if self._file is None:
            return "present"
        change = self._file.change()
        if change == "cut":
            self._is_suspect = True
            self._file.forget()
            return "suspect"
        if change != "none":
            return "lost"
        return "present" if self._file.is_known() or self._file.exists() else "absent"

    def give_up(self) -> str:
        """Bring what is in the log to the file, wherever that is now, and remove what is left."""
        if self._file is None:
            return ""
        lost = ""
        try:
            if self._file.change() == "emptied":
                self._file.wait_until_sure()
            else:
                records = self._file.records
                lost = f"the file was moved, replaced or deleted, with {records} records of ours"
                pool = self.engine.pool
                # Else a connection would be made, and the file with it.
                if isinstance(pool, QueuePool) and pool.checkedin():
                    with suppress(sa.exc.DBAPIError), self.connect() as connection:
                        connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)").close()
            self._file.remove_remains()
        except StorageUnavailable as error:
            raise StorageUnavailable(reason=f"{self.name}: {error}") from None
        self.forget()
        return lost

    def forget(self) -> None:
        """Forget which file it was."""
        if self._file is not None:
            self._file.forget()

    def confirm(self, records: int) -> None:
        """Look whether the file is still there, and note how long it is."""
        if self._file is None:
            return
        if self._file.change() in ("gone", "replaced", "emptied"):
            raise StorageUnavailable(reason=f"{self.name}: the file was replaced meanwhile")
        self._file.note()
        self._file.records += records

    def make_room(self) -> None:
        """Make the folder, and the file for its owner only; SQLite gives its logs the same rights.

        An existing file is not opened, which would take away SQLite's locks of this process.
        """
        if self._file is not None:
            self._file.path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                make_own_file(self._file.path)

    def connected(self, connection: sa.Connection, *, create: bool) -> None:
        """Switch a file of our own to a write-ahead log, if somebody is going to write."""
        if self._is_suspect:
            if connection.exec_driver_sql("PRAGMA quick_check(1)").scalar() != "ok":
                raise StorageUnavailable(reason=f"{self.name}: the file was cut off: replace it")
            self._is_suspect = False
        if not (create and self.owned and self._file is not None):
            return
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                # Only if need be: the switch locks everybody out, even if it was done before.
                if connection.exec_driver_sql("PRAGMA journal_mode").scalar() != "wal":
                    connection.exec_driver_sql("PRAGMA journal_mode=WAL").close()
                return
            except sa.exc.OperationalError as error:
                # The switch does not wait for locks by itself.
                if not _says(error, "is locked", "busy") or time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    def set_up(self) -> None:
        """Note which file it is."""
        if self._file is not None:
            self._file.note()

    @contextmanager
    def lock(
        self, connection: sa.Connection, name: str, wait_seconds: float = BUSY_SECONDS
    ) -> Iterator[None]:
        """Take the lock for writing, the only one, and wait no longer than the connection does."""
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
        """Begin a transaction, which sqlite3 puts off until something is written."""
        raw = connection.connection.dbapi_connection
        if raw is not None and not raw.in_transaction:
            connection.exec_driver_sql("BEGIN")

    # -- the schema -----------------------------------------------------------------------------

    def alter_table(self, table: sa.Table, clauses: Sequence[str]) -> list[str]:
        """Return one statement a clause: SQLite takes no more."""
        quoted = self.engine.dialect.identifier_preparer.format_table(table)
        return [f"ALTER TABLE {quoted} {clause}" for clause in clauses]

    def widen_column(self, column: sa.Column[Any]) -> str:
        """No column is narrow."""
        raise AssertionError(column.name)

    def is_narrow(self, column: sa.Column[Any], found: Mapping[str, Any]) -> bool:
        """Tell that no column is: SQLite ignores lengths."""
        return False

    def counts_up(self, column: Mapping[str, Any]) -> bool:
        """Only a column declared as INTEGER does."""
        return type(column["type"]) is sa.INTEGER

    # -- writing and deleting -------------------------------------------------------------------

    def insert(self, connection: sa.Connection, table: sa.Table, columns: Columns) -> None:
        """Insert rows by few statements."""
        self._insert.execute(connection, table, columns)

    def delete(
        self,
        connection: sa.Connection,
        table: sa.Table,
        condition: sa.ColumnElement[bool],
    ) -> int:
        """Delete rows, and overwrite their bytes in the file."""
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

        Readers that overlap without a pause keep SQLite from starting it over: it would grow on.
        """
        self._writes += 1
        if self._file is None or self._writes % _WRITES_A_LOOK:
            return False
        return self._file.log_bytes() > WAL_BYTES

    def checkpoint(self, connection: sa.Connection) -> None:
        """Empty the log, after waiting a second at most for those that read from it."""
        before = connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one()
        connection.exec_driver_sql(f"PRAGMA busy_timeout={_CHECKPOINT_MS}").close()
        try:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").close()
        finally:
            connection.exec_driver_sql(f"PRAGMA busy_timeout={before}").close()

    def deleted(self, connection: sa.Connection) -> None:
        """Empty the log, which holds older pages; wait for readers as for a lock."""
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").close()

    # -- expressions ----------------------------------------------------------------------------

    def moment(self, column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """Return the column as the text that is stored."""
        return sa.type_coerce(column, sa.String)

    def bind_moment(self, moment: datetime) -> Any:
        """Return the time as the text that would be stored."""
        return to_text(moment)

    def period(self, moment: sa.ColumnElement[Any], every: Every) -> sa.ColumnElement[str]:
        """Return the first characters of the text."""
        return sa.func.substr(
            moment, sa.literal_column("1"), sa.literal_column(str(_PERIOD_CHARACTERS[every]))
        )

    def variable(self, column: sa.Column[Any], key: str) -> sa.ColumnElement[str]:
        """Take the value out; json_extract makes 1 of true, and other digits of some numbers.

        With two paths it returns an array as it is written, such as ``[0.1,0.1]``.
        """
        path: Any = sa.literal_column(f"""'$."{key}"'""")
        kind, value = sa.func.json_type(column, path), sa.func.json_extract(column, path)
        twice = sa.func.json_extract(column, path, path)
        return sa.case(
            (sa.func.json_valid(column) == sa.literal_column("0"), sa.null()),
            (kind == sa.literal_column("'text'"), value),
            (kind == sa.literal_column("'true'"), sa.literal_column("'true'")),
            (kind == sa.literal_column("'false'"), sa.literal_column("'false'")),
            (
                kind.in_([sa.literal_column("'integer'"), sa.literal_column("'real'")]),
                sa.func.substr(
                    twice,
                    sa.literal_column("2"),
                    (sa.func.length(twice) - sa.literal_column("3")) // sa.literal_column("2"),
                ),
            ),
        )

    def any_of(
        self, expression: sa.ColumnElement[Any], values: Sequence[Any]
    ) -> sa.ColumnElement[bool]:
        """Return ``IN`` of one JSON parameter: SQLite limits the number of parameters."""
        listed = sa.func.json_each(to_json(values).decode()).table_valued("value")
        return expression.in_(sa.select(listed.c.value))

    # -- errors ---------------------------------------------------------------------------------

    def fault_of(self, error: sa.exc.DBAPIError) -> Fault:
        """Go by the text: sqlite3 tells error codes only since Python 3.11."""
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
        """Distrust a file unless it is merely locked: it may be repaired or replaced meanwhile."""
        return self._file is not None and not (self._file.is_known() and _is_locked(error))


def _is_one_a_connection(engine: sa.Engine) -> bool:
    """Tell whether the database is in memory, and another for each connection."""
    name = engine.url.database or ":memory:"
    in_memory = ":memory:" in name or engine.url.query.get("mode") == "memory"
    is_shared = "cache=shared" in name or engine.url.query.get("cache") == "shared"
    return in_memory and not is_shared and not isinstance(engine.pool, StaticPool)


def _configure_connection(connection: sqlite3.Connection, _: Any) -> None:
    # NORMAL is as safe as FULL against a crash of the process, and quicker.
    connection.execute("PRAGMA synchronous=NORMAL").close()
    connection.execute(f"PRAGMA journal_size_limit={WAL_BYTES}").close()
    # Also while inserting, where it costs nothing: SQLite moves rows to other pages, and without it
    # leaves more copies behind.
    connection.execute("PRAGMA secure_delete=ON").close()


def _is_locked(error: sa.exc.DBAPIError) -> bool:
    return _says(error, "is locked", "busy")


def _says(error: sa.exc.DBAPIError, *phrases: str) -> bool:
    text = str(error.orig)
    return any(phrase in text for phrase in phrases)
