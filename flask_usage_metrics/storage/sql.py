"""Records in one table of a SQL database; so far of SQLite only."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import datetime, timezone
from itertools import chain, compress, cycle
from pathlib import Path
from typing import Any, TypeVar
from weakref import finalize

import sqlalchemy as sa
from sqlalchemy.pool import QueuePool, StaticPool
from sqlalchemy.schema import CreateTable

from flask_usage_metrics.errors import ConfigError, StorageError, StorageUnavailable
from flask_usage_metrics.query import (
    Every,
    Filter,
    Order,
    Summary,
    make_summary,
    summary_order,
)
from flask_usage_metrics.record import UsageRecord
from flask_usage_metrics.storage.base import Storage
from flask_usage_metrics.storage.sql_table import (
    COLUMN_NAMES,
    COLUMN_OF,
    COLUMNS,
    IF_NULL,
    describe,
    to_json,
    to_record,
    to_row,
    to_text,
)

PAGE = 500
"""Rows read at a time: 2.5 MB; 1 000 made reading 5 % faster, 100 slower by a quarter."""

DELETED_AT_ONCE = 5_000
"""Rows deleted, or looked through, in one transaction: writers wait for some 25 ms only."""

BUSY_SECONDS = 5.0
"""How long SQLite waits for a lock; with 4 writers on one file none of 26 937 writes failed."""

WAL_BYTES = 64 * 1024 * 1024
"""What is left of the write-ahead log after a checkpoint; without a limit it keeps its size."""

_T = TypeVar("_T")
# A datetime is stored as text, "2026-11-22 09:00:00.000001": so much of it names the period.
_PERIOD_CHARACTERS = {"hour": 13, "day": 10, "month": 7}

# A batch is inserted by statements of so many rows: powers of two, so that ten prepared
# statements do for batches of all sizes (one for each size would be compiled ever again, at 8 µs
# a row, and be kept at 5 kB a row). 512 rows have 19 968 parameters; SQLite takes 32 766 of them
# since 3.32 (2020), and 999 before.
_MOST_ROWS = 512 if sqlite3.sqlite_version_info >= (3, 32) else 16


class SQLStorage(Storage):
    """A table of a SQL database, ``flask_usage``; so far SQLite only.

    The table is made, or one of flask-track-usage upgraded, by the first write (an existing one
    also by the first read). Nothing is opened before. Rows keep their place and are read by name.

    A batch is one transaction of plain INSERT statements, of up to 512 rows each: 15 µs of CPU a
    row, where one JSON parameter taken apart with ``json_each`` costs 41 and executemany gives
    the GIL away once a row, waiting up to 5 ms for it each time beside a busy thread.

    The messages of what it raises hold no path and no value.

    Args:
        engine: An SQLAlchemy engine, which stays the caller's: `close` leaves it alone.
        metadata: Where the table is to be described, such as for Alembic; None: nowhere.
        table_name: Name of the table.
        db: Instead of an engine, a Flask-SQLAlchemy object, or anything with ``engine``. It may
            need an app context, which threads have not: then create the storage inside one, or
            call `bind_app`.

    Raises:
        ConfigError: There is neither engine nor db, or it is not for SQLite.
    """

    name = "sqlite"

    def set_up(
        self,
        engine: sa.Engine | None = None,
        metadata: sa.MetaData | None = None,
        table_name: str = "flask_usage",
        db: Any = None,
    ) -> None:
        """Keep the engine, and describe the table."""
        if engine is None and db is None:
            raise ConfigError("SQLStorage needs an engine or db, a Flask-SQLAlchemy object")
        self._db = db
        self._app: Any = None
        self._file: Path | None = None
        self._owned = False
        self._patience_seconds = BUSY_SECONDS
        self._inherited: list[sa.Pool] = []
        self._start()
        self._engine: sa.Engine | None = None
        if engine is not None:
            self._engine = _checked(engine)
        else:
            # Outside of an app context Flask-SQLAlchemy 3 tells no engine.
            with suppress(RuntimeError):
                self._engine = _checked(db.engine)
        self._table = describe(table_name, metadata)
        self._filled = (False,) * len(COLUMNS)
        self._inserts: dict[tuple[tuple[str, ...], int], str] = {}

    @classmethod
    def from_url(cls, url: str, *, table_name: str = "flask_usage") -> SQLStorage:
        """Return a storage with an engine of its own.

        The file gets a write-ahead log, so that readers and one writer do not wait for each other;
        a crash of the machine may lose the last transactions, but harms no others.

        Args:
            url: ``sqlite:///relative/file``, ``sqlite:////absolute/file``, or ``sqlite://`` for a
                database in memory, gone with `close`. ``?timeout=5`` may follow, the seconds to
                wait for a lock. A relative path is taken from the directory the process is in now.
            table_name: Name of the table.

        Raises:
            ConfigError: The URL is not like these; the message does not repeat it.
        """
        location = _parse_url(url)
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
            connect_args={"timeout": timeout, "check_same_thread": False},
            hide_parameters=True,
        )
        sa.event.listen(engine, "connect", _configure_connection)
        storage = cls(engine=engine, table_name=table_name)
        storage._file = file
        storage._owned = True
        # A storage that nobody closes gives its connections back all the same: since Python 3.13
        # sqlite3 warns of each that is left. Not at exit, when the app's own handlers close it.
        finalize(storage, engine.dispose).atexit = False
        storage._patience_seconds = timeout
        return storage

    @property
    def identity(self) -> str:
        """Database and table, without a password."""
        url = "" if self._engine is None else self._engine.url.render_as_string()
        return f"sql {url} {self._table.name}"

    def bind_app(self, app: Any) -> None:
        """Ask `db` for its engine in the context of this Flask app."""
        self._app = app

    def write(self, batch: Sequence[UsageRecord]) -> None:
        """Keep a batch in one transaction; records that are kept already stay as they are.

        Raises:
            StorageUnavailable: The database is locked, cannot be opened or written, or is corrupt.
            Exception: A record holds what SQLite cannot keep; nothing was written.
        """
        if not batch:
            return
        rows = [to_row(record) for record in batch]
        filled = self._fill(rows)
        columns = tuple(compress(COLUMN_NAMES, filled))

        def insert(connection: sa.Connection) -> None:
            # The transaction must begin with a write: one that reads first and then wants to
            # write is refused at once, whatever the timeout, when another writer was quicker.
            start, size = 0, _MOST_ROWS
            while start < len(rows):
                while size > len(rows) - start:
                    size //= 2
                values = compress(chain.from_iterable(rows[start : start + size]), cycle(filled))
                connection.exec_driver_sql(self._insert(columns, size, connection), tuple(values))
                start += size

        self._run(insert, create=True, absent=None)

    def select(self, wanted: Filter, order: Order, limit: int | None) -> Iterator[UsageRecord]:
        """Yield the wanted records by (started_at, id), page by page; no transaction stays open.

        What is written meanwhile is yielded too if its turn is still to come.
        """
        fields = UsageRecord.__struct_fields__
        keys = self._keys()
        query = (
            sa.select(*keys, self._table.c.url, *map(self._read, fields))
            .where(*self._conditions(wanted))
            .order_by(*(key.asc() if order == "oldest" else key.desc() for key in keys))
        )
        page = query
        left = limit
        while left is None or left > 0:
            size = PAGE if left is None else min(PAGE, left)
            rows = self._fetch(page.limit(size))
            for row in rows:
                yield to_record(row[2], row[3], dict(zip(fields, row[4:], strict=True)))
            if len(rows) < size:
                return
            left = None if left is None else left - size
            page = query.where(self._beyond(order, rows[-1]))

    def count(
        self, since: datetime | None = None, until: datetime | None = None, **filters: Any
    ) -> int:
        """Return how many records `records` would yield."""
        wanted = self.wanted(since, until, filters)
        query = sa.select(sa.func.count()).select_from(self._table)
        rows = self._fetch(query.where(*self._conditions(wanted)))
        return int(rows[0][0]) if rows else 0

    def aggregate(
        self,
        wanted: Filter,
        fields: Sequence[str],
        every: Every | None,
        *,
        visitors: bool = False,
    ) -> list[Summary]:
        """Do the work of `summarize`, in the database."""
        groups = [self._read(field) for field in fields]
        if every is not None:
            moment = self._keys()[0]
            groups.insert(0, sa.func.substr(moment, 1, _PERIOD_CHARACTERS[every]))
        status, duration = self._read("status"), self._read("duration_seconds")
        # Only when asked for: it has SQLite keep each visitor of each group.
        distinct = sa.func.count(self._read("visitor").distinct()) if visitors else sa.null()
        query = (
            sa.select(
                *groups,
                sa.func.count(),
                sa.func.sum(sa.case((status.between(500, 599), 1), else_=0)),
                sa.func.sum(self._read("bytes_sent")),
                sa.func.sum(duration),
                distinct,
                *(sa.func.sum(sa.case((duration <= bound, 1), else_=0)) for bound in self.bounds),
            )
            .select_from(self._table)
            .where(*self._conditions(wanted))
            .group_by(*groups)
        )
        summaries = []
        for row in self._fetch(query):
            values = list(row)
            start = _period_start(values.pop(0)) if every is not None else None
            group = dict(zip(fields, values, strict=False))
            requests, errors, bytes_sent, duration_sum, different, *at_most = values[len(fields) :]
            if not requests:
                # Without grouping there is a row even if there are no records.
                continue
            counts = [
                count - below
                for below, count in zip([0, *at_most], [*at_most, requests], strict=True)
            ]
            sums = (requests, errors, bytes_sent, duration_sum)
            summaries.append(make_summary(group, start, sums, counts, self.bounds, different))
        return sorted(summaries, key=summary_order)

    def prune(self, before: datetime) -> int:
        """Delete the records with ``started_at < before`` and return how many these were.

        As `delete` does it.

        Raises:
            StorageUnavailable: The database cannot be opened or written now.
        """
        moment, _, key = self._keys()
        old = sa.select(key).where(moment < to_text(before)).limit(DELETED_AT_ONCE)
        total = 0
        while deleted := self._delete_some(key.in_(old)):
            total += deleted
        if total and self._file is not None:
            self._empty_log()
        return total

    def delete(self, wanted: Filter) -> int:
        """Delete the wanted records and return how many these were; their bytes are gone, too.

        In chunks, each a transaction of its own: after a failure some may be deleted. What is
        written meanwhile may stay. The bytes are overwritten with zeros, and the write-ahead log,
        which holds older pages, is emptied; a reader is waited for as long as for a lock, and if
        it goes on, emptying is left to the next call. SQLite may leave the copy of a row it moved
        (measured: of 1 in 25 000) in an unused part of a page, and more of them where others
        wrote without ``PRAGMA secure_delete``: only VACUUM takes these away.

        Raises:
            StorageUnavailable: The database cannot be opened or written now.
        """
        key = self._table.c.id
        doomed = sa.and_(*self._conditions(wanted))
        rows = self._fetch(sa.select(sa.func.max(key)))
        last = rows[0][0] if rows else None
        total, start = 0, -(2**63)
        while last is not None and start <= last:
            # First only read, a part of the table by its primary key: no writer need wait for a
            # part that holds none, and the transaction that deletes begins with a write.
            part = (
                sa.select(key, doomed.label("doomed"))
                .where(key.between(start, last))
                .order_by(key)
                .limit(DELETED_AT_ONCE)
                .subquery()
            )
            rows = self._fetch(sa.select(sa.func.max(part.c.id), sa.func.max(part.c.doomed)))
            end, found = rows[0] if rows else (None, None)
            if end is None:
                break
            if found:
                total += self._delete_some(key.between(start, end), doomed)
            start = end + 1
        # Even if there was none: an earlier call may have been cut short.
        self._empty_log()
        return total

    def close(self) -> None:
        """Close the connections of an engine of our own; the next use opens new ones."""
        if self._owned and self._engine is not None:
            self._engine.dispose()
        self._ready_to_read = self._ready_to_write = False

    def reset_after_fork(self) -> None:
        """Use new connections in this process; those of the parent are left untouched."""
        self._start()
        if self._engine is not None:
            # Kept, so that they are not closed by the garbage collection either: SQLite forbids
            # to use, even to close, a connection in another process than the one that opened it
            # (https://www.sqlite.org/howtocorrupt.html#_carrying_an_open_database_file_across_a_fork_).
            self._inherited.append(self._engine.pool)
            self._engine.dispose(close=False)

    def _start(self) -> None:
        """Know nothing yet, of this process."""
        self._setting_up = threading.Lock()
        self._memory_lock = threading.RLock()
        self._ready_to_read = self._ready_to_write = False
        self._identity: tuple[int, int] | None = None

    # -- how the database is reached ------------------------------------------------------------

    def _run(self, work: Callable[[sa.Connection], _T], *, create: bool, absent: _T) -> _T:
        """Do something in a transaction, with the table as it should be.

        Args:
            work: Called with the connection; once more if the table turns out to be gone.
            create: Make the file and the table if need be.
            absent: Returned if there is no table and none was to be made.

        Raises:
            StorageUnavailable: The database cannot be used now.
        """
        engine = self._reach()
        shared = isinstance(engine.pool, StaticPool)
        guard: AbstractContextManager[Any] = self._memory_lock if shared else nullcontext()
        try:
            with guard:
                for last in (False, True):
                    if not self._prepare(engine, create):
                        return absent
                    try:
                        with engine.begin() as connection:
                            return work(connection)
                    except sa.exc.OperationalError as error:
                        if last or not _says(error, "no such table", "no such column", "no column"):
                            raise
                        self._ready_to_read = self._ready_to_write = False
        except OSError as error:
            # Not the error's own text, which names the file.
            reason = os.strerror(error.errno) if error.errno else type(error).__name__
            raise StorageUnavailable(f"sqlite: {reason}") from None
        except sa.exc.TimeoutError:
            raise StorageUnavailable("sqlite: all connections of the engine are in use") from None
        except sa.exc.DBAPIError as error:
            # SQLite's own texts hold neither path nor values, but SQLAlchemy's do.
            message = f"sqlite: {error.orig}"
            # Exactly DatabaseError: "file is not a database", "malformed". Its other subclasses
            # are about values: those of one record, which cannot be kept.
            if not (
                isinstance(error, sa.exc.OperationalError) or type(error) is sa.exc.DatabaseError
            ):
                raise StorageError(message) from error.orig
            if self._file is not None and not (self._identity and _is_locked(error)):
                # The file may be repaired or replaced before the next attempt.
                self._start_anew(engine)
            raise StorageUnavailable(message) from error.orig
        raise AssertionError("unreachable")

    def _fetch(self, query: sa.Executable) -> Sequence[Sequence[Any]]:
        """Return all rows of a query; none if there is no table."""

        def fetch(connection: sa.Connection) -> Sequence[Sequence[Any]]:
            return connection.execute(query).all()

        return self._run(fetch, create=False, absent=())

    def _delete_some(self, *conditions: sa.ColumnElement[bool]) -> int:
        """Delete rows, and their bytes from the file, in a transaction of its own."""
        statement = sa.delete(self._table).where(*conditions)

        def delete(connection: sa.Connection) -> int:
            before = connection.exec_driver_sql("PRAGMA secure_delete").scalar_one()
            connection.exec_driver_sql("PRAGMA secure_delete=ON").close()
            try:
                return connection.execute(statement).rowcount
            finally:
                # The engine may be the caller's. As a number, 2 would be taken for ON.
                setting = ("OFF", "ON", "FAST")[before]
                connection.exec_driver_sql(f"PRAGMA secure_delete={setting}").close()

        deleted = self._run(delete, create=False, absent=0)
        # SQLite's lock is not fair: without a pause the writers that wait would get no turn.
        time.sleep(0.005)
        return deleted

    def _empty_log(self) -> None:
        # A reader that never paused can have let the log grow without bound (0.9 GB seen).
        with suppress(StorageUnavailable):
            self._fetch(sa.text("PRAGMA wal_checkpoint(TRUNCATE)"))

    def _reach(self) -> sa.Engine:
        if self._engine is None:
            try:
                if self._app is None:
                    self._engine = _checked(self._db.engine)
                else:
                    with self._app.app_context():
                        self._engine = _checked(self._db.engine)
            except RuntimeError:
                raise StorageUnavailable(
                    "db tells its engine only in an app context: create the storage inside "
                    "`with app.app_context():`, or pass the engine"
                ) from None
        return self._engine

    def _prepare(self, engine: sa.Engine, create: bool) -> bool:
        """Make the table what it should be, unless that is known; return whether there is one."""
        replaced = (
            self._file is not None
            and self._identity is not None
            and self._identity != _identity(self._file)
        )
        if not replaced and (self._ready_to_write if create else self._ready_to_read):
            return True
        with self._setting_up:
            if replaced:
                # Deleted or replaced: connections to the old file would go on, into the void.
                self._start_anew(engine)
                self._identity = None
            if self._file is not None and _identity(self._file) is None:
                if not create:
                    return False
                self._file.parent.mkdir(parents=True, exist_ok=True)
            exists = self._set_up_table(engine, create)
            if self._file is not None:
                self._identity = _identity(self._file)
            self._ready_to_read = exists
            self._ready_to_write = exists and create
            return exists

    def _start_anew(self, engine: sa.Engine) -> None:
        if self._owned:
            engine.dispose()
        self._ready_to_read = self._ready_to_write = False

    def _set_up_table(self, engine: sa.Engine, create: bool) -> bool:
        """Create or upgrade the table; other processes may do so at the same moment."""
        deadline = time.monotonic() + self._patience_seconds
        while True:
            try:
                with engine.connect() as connection:
                    connection.execution_options(isolation_level="AUTOCOMMIT")
                    return self._upgrade(connection, create)
            except sa.exc.OperationalError as error:
                # The switch to WAL does not wait for locks by itself: of 120 processes that began
                # on a new file at once, 3 to 4 failed; with this none of 320.
                if not _is_locked(error) or time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    def _upgrade(self, connection: sa.Connection, create: bool) -> bool:
        quote = connection.dialect.identifier_preparer.quote
        table = quote(self._table.name)
        if create and self._owned and self._file is not None:
            _switch_to_wal(connection)
        present = _column_names(connection, table)
        if not present:
            if not create:
                return False
            connection.execute(CreateTable(self._table, if_not_exists=True))
            # Once more: an older version in another process may have been quicker.
            present = _column_names(connection, table)
        missing = [column for column in self._table.columns if column.name not in present]
        for column in missing:
            kind = column.type.compile(connection.dialect)
            try:
                connection.exec_driver_sql(
                    f"ALTER TABLE {table} ADD COLUMN {quote(column.name)} {kind}"
                )
            except sa.exc.OperationalError as error:
                if not _says(error, "duplicate column name"):
                    raise
        if create or missing:
            time_index = quote(f"ix_{self._table.name}_datetime")
            id_index = quote(f"ix_{self._table.name}_record_id")
            connection.exec_driver_sql(
                f"CREATE UNIQUE INDEX IF NOT EXISTS {id_index} ON {table} (record_id)"
            )
            connection.exec_driver_sql(
                f"CREATE INDEX IF NOT EXISTS {time_index} ON {table} (datetime, record_id)"
            )
        return True

    # -- parts of statements --------------------------------------------------------------------

    def _fill(self, rows: Sequence[Sequence[Any]]) -> tuple[bool, ...]:
        """Return which columns rows have ever had a value for; the others need not be named.

        Up to Python 3.11 sqlite3 looks for an adapter for each None, at 3 000 instructions, and a
        row has ten of them: leaving them out made writing a third cheaper.
        """
        filled = tuple(
            known or any(row[position] is not None for row in rows)
            for position, known in enumerate(self._filled)
        )
        self._filled = filled
        return filled

    def _insert(self, columns: tuple[str, ...], rows: int, connection: sa.Connection) -> str:
        statement = self._inserts.get((columns, rows))
        if statement is None:
            table = connection.dialect.identifier_preparer.quote(self._table.name)
            row = f"({', '.join('?' * len(columns))})"
            # No "OR IGNORE", which would also ignore values that the table refuses.
            statement = self._inserts[columns, rows] = (
                f"INSERT INTO {table} ({', '.join(columns)}) "
                f"VALUES {', '.join([row] * rows)} ON CONFLICT DO NOTHING"
            )
        return statement

    def _keys(self) -> tuple[Any, Any, Any]:
        """Return what rows are sorted by: time as the stored text, record id, primary key.

        Old rows have no record id. Null sorts before all ids, as does what `to_record` makes of
        their primary key.
        """
        columns = self._table.c
        return sa.type_coerce(columns.datetime, sa.String), columns.record_id, columns.id

    def _beyond(self, order: Order, row: Sequence[Any]) -> sa.ColumnElement[bool]:
        """Return the condition for the rows that come after this one, without an OFFSET."""
        moment, record_id, key = self._keys()
        last_moment, last_record_id, last_key = row[:3]
        tied: sa.ColumnElement[bool]
        if order == "oldest":
            if last_record_id is None:
                tied = sa.or_(record_id.is_not(None), key > last_key)
            else:
                tied = record_id > last_record_id
            return sa.and_(moment >= last_moment, sa.or_(moment > last_moment, tied))
        if last_record_id is None:
            tied = sa.and_(record_id.is_(None), key < last_key)
        else:
            tied = sa.or_(record_id.is_(None), record_id < last_record_id)
        return sa.and_(moment <= last_moment, sa.or_(moment < last_moment, tied))

    def _read(self, field: str) -> Any:
        """Return the expression for a field, the same wherever it is read, grouped or compared."""
        if field == "started_at":
            return self._keys()[0]
        column = self._table.c[COLUMN_OF[field]]
        return sa.func.coalesce(column, IF_NULL[field]) if field in IF_NULL else column

    def _conditions(self, wanted: Filter) -> list[sa.ColumnElement[bool]]:
        moment = self._keys()[0]
        conditions: list[sa.ColumnElement[bool]] = [moment.is_not(None)]
        if wanted.since is not None:
            conditions.append(moment >= to_text(wanted.since))
        if wanted.until is not None:
            conditions.append(moment < to_text(wanted.until))
        for field, values in wanted.any_of.items():
            conditions.append(_is_any_of(self._read(field), field, values))
        if wanted.status_classes is not None:
            status = self._read("status")
            conditions.append(
                sa.or_(
                    sa.false(),
                    *(
                        status.between(100 * digit, 100 * digit + 99)
                        for digit in sorted(wanted.status_classes)
                    ),
                )
            )
        if wanted.path_prefixes is not None:
            # Not LIKE: it is blind to case, and % and _ mean themselves in a path.
            path = self._read("path")
            conditions.append(
                sa.or_(
                    sa.false(),
                    *(
                        sa.func.substr(path, 1, len(prefix)) == prefix
                        for prefix in wanted.path_prefixes
                    ),
                )
            )
        return conditions


def _is_any_of(expression: Any, field: str, values: Sequence[Any]) -> sa.ColumnElement[bool]:
    # Only values of the field's type: SQLite would take "200" for 200 in some places.
    kind: type | tuple[type, ...] = int if field == "status" else str
    present = [value for value in values if isinstance(value, kind) and _fits(value)]
    # One parameter, since there may be more values than SQLite takes parameters.
    listed = sa.func.json_each(to_json(present).decode()).table_valued("value")
    is_listed: sa.ColumnElement[bool] = expression.in_(sa.select(listed.c.value))
    return sa.or_(is_listed, expression.is_(None)) if None in values else is_listed


def _fits(value: Any) -> bool:
    """Tell whether a record can have the value at all: JSON or SQLite might not take another."""
    if isinstance(value, str):
        return "\0" not in value and value.encode(errors="ignore").decode() == value
    return -(2**63) <= int(value) < 2**63


def _period_start(text: str) -> datetime:
    return datetime.fromisoformat(f"{text}-01" if len(text) == 7 else text).replace(
        tzinfo=timezone.utc
    )


def _checked(engine: Any) -> sa.Engine:
    if not isinstance(engine, sa.Engine):
        hint = ": for a URL there is SQLStorage.from_url" if isinstance(engine, str) else ""
        raise ConfigError(f"engine must be an SQLAlchemy Engine, not {type(engine).__name__}{hint}")
    if engine.dialect.name != "sqlite":
        raise ConfigError(f"SQLStorage supports only sqlite so far, not {engine.dialect.name}")
    return engine


def _parse_url(url: str) -> sa.URL:
    try:
        location = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        raise ConfigError("not a database URL: expected sqlite:///file") from None
    if location.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise ConfigError(f"SQLStorage supports only sqlite so far, not {location.drivername}")
    if location.host or location.username or location.password or location.port:
        raise ConfigError(
            "a SQLite URL is sqlite:///relative/file or sqlite:////absolute/file: "
            "three slashes or four"
        )
    unknown = sorted(set(location.query) - {"timeout"})
    if unknown:
        raise ConfigError(f"a SQLite URL may end with ?timeout=5, but not have {unknown[0]!r}")
    return location


def _configure_connection(connection: sqlite3.Connection, _: Any) -> None:
    # NORMAL is as safe as FULL against a crash of the process, and costs a third per small batch.
    connection.execute("PRAGMA synchronous=NORMAL").close()
    connection.execute(f"PRAGMA journal_size_limit={WAL_BYTES}").close()
    # For what is deleted, and at no cost also for what is inserted: SQLite moves rows to other
    # pages, and without it left copies behind of 200 in 273 552 rows deleted later, with it of 20.
    connection.execute("PRAGMA secure_delete=ON").close()


def _switch_to_wal(connection: sa.Connection) -> None:
    # Only if need be: the switch wants the file for itself, even if nothing is to change.
    if connection.exec_driver_sql("PRAGMA journal_mode").scalar() != "wal":
        connection.exec_driver_sql("PRAGMA journal_mode=WAL")


def _column_names(connection: sa.Connection, quoted_table: str) -> set[str]:
    rows = connection.exec_driver_sql(f"PRAGMA table_info({quoted_table})")
    return {str(row[1]).lower() for row in rows}


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _says(error: sa.exc.DBAPIError, *phrases: str) -> bool:
    # By their texts: sqlite3 tells error codes only since Python 3.11.
    text = str(error.orig)
    return any(phrase in text for phrase in phrases)


def _is_locked(error: sa.exc.DBAPIError) -> bool:
    return _says(error, "is locked", "busy")
