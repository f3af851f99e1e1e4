"""The storage in one table of a SQL database: all that is the same in every database."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from datetime import datetime, timedelta, timezone
from typing import Any, TypeVar

import sqlalchemy as sa

from flask_usage_metrics.errors import ConfigError, StorageError, StorageUnavailable
from flask_usage_metrics.records.query import Every, Filter, Order, as_utc
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.records.summary import Summary
from flask_usage_metrics.runtime.collected import when_collected
from flask_usage_metrics.storage.base import Storage
from flask_usage_metrics.storage.sql.database import Database
from flask_usage_metrics.storage.sql.dialects import dialect_of, open_dialect
from flask_usage_metrics.storage.sql.dialects.base import BUSY_SECONDS, Dialect
from flask_usage_metrics.storage.sql.query import FIELDS, Query
from flask_usage_metrics.storage.sql.rollup_tables import RollupTables
from flask_usage_metrics.storage.sql.rollups import Rollups, mark_dirty, mark_dirty_where
from flask_usage_metrics.storage.sql.schema import Component, Schema, Step
from flask_usage_metrics.storage.sql.summaries import Summarizer
from flask_usage_metrics.storage.sql.table import (
    describe,
    record_index,
    time_index,
    to_columns,
    to_record,
)

PAGE = 500
"""Rows read at a time: few enough for memory, enough for speed; see tests/benchmarks/README.md."""

DELETED_AT_ONCE = 5_000
"""Rows deleted, or looked through, in one transaction, for which writers wait."""

VERSION = 3
"""Version of the table of records; to be raised when its columns or indexes change."""

_PATIENCE_SECONDS = 0.1
"""Seconds that maintenance waits for its lock; another process that has it does the work."""

# Seconds until `maintain` is called again: with more to do, and with nothing left.
_SOON_SECONDS = 0.05
_LATER_SECONDS = 60.0

_T = TypeVar("_T")


class SQLStorage(Storage):
    """A table of a SQL database, ``flask_usage``: SQLite, PostgreSQL, MariaDB, MySQL.

    The first write creates the table, or upgrades one of flask-track-usage; the first read upgrades
    it, too, but creates none. Nothing is opened before. A batch is one transaction of few
    statements. Methods may be called by any thread. Databases differ in `dialects` only.

    Messages of exceptions hold no path, address, user or value.

    Args:
        engine: An SQLAlchemy engine, which stays the caller's: `close` does not dispose of it.
        metadata: Where the table is described as well, such as for Alembic; None: nowhere else.
        table_name: Name of the table.
        db: Instead of an engine, a Flask-SQLAlchemy object, or anything with ``engine``. If it
            tells its engine in an app context only, create the storage in one, or call `bind_app`.
        hooks: See `Writer`.

    Attributes:
        table_name: Name of the table.
        track_table: Its description, for queries of one's own, as in flask-track-usage.

    Raises:
        ConfigError: There is neither engine nor db, or it is not for one of these databases.
    """

    name = "sql"

    def set_up(
        self,
        engine: sa.Engine | None = None,
        metadata: sa.MetaData | None = None,
        table_name: str = "flask_usage",
        db: Any = None,
        hooks: Any = None,
    ) -> None:
        """Take the constructor's arguments; `Writer` has taken the hooks."""
        if engine is None and db is None:
            raise ConfigError("SQLStorage needs an engine or db, a Flask-SQLAlchemy object")
        self.table_name = table_name
        self.track_table = self._table = describe(table_name, metadata)
        self._sums = RollupTables(self._table)
        self._has_pruned = False
        self.database = Database(
            db if engine is None else dialect_of(engine),
            Schema(f"{table_name}_schema", self.components()),
            self._taken,
            self._may_be_absent,
        )

    @classmethod
    def from_url(cls, url: str, *, table_name: str = "flask_usage") -> SQLStorage:
        """Return a storage with an engine of its own.

        Args:
            url: ``sqlite:///relative/file``, ``sqlite:////absolute/file``, or ``sqlite://`` for a
                database in memory, gone with `close`; with ``?timeout=5``, the seconds to wait for
                a lock. A relative path is taken from the directory the process is in now.
                ``postgresql://user:password@host/database``, or ``mysql://…`` or ``mariadb://…``;
                with a driver, as in ``postgresql+psycopg://…``, and options of the driver.
            table_name: Name of the table.

        Raises:
            ConfigError: The URL is not like these, or its driver is not installed; the message
                does not repeat it.
        """
        dialect = open_dialect(url)
        storage = cls(engine=dialect.engine, table_name=table_name)
        storage.database = Database(
            dialect, storage.database.schema, storage._taken, storage._may_be_absent
        )
        # A storage that nobody closes closes its connections when it is collected: sqlite3 warns of
        # each that is not since Python 3.13. Not at exit, when the app's own handlers close it.
        when_collected(storage, dialect.engine.dispose)
        return storage

    def components(self) -> list[Component]:
        """Return the tables the storage needs, that of the records first."""
        indexes = (record_index(self._table), time_index(self._table))
        return [
            Component("records", VERSION, (self._table,), indexes),
            self._sums.component(),
        ]

    @property
    def identity(self) -> str:
        """Database and table: ``"sql postgresql+psycopg://user:***@host/database flask_usage"``."""
        dialect = self.database.known
        url = "" if dialect is None else dialect.engine.url.render_as_string()
        return f"sql {url} {self._table.name}"

    def bind_app(self, app: Any) -> None:
        """Ask `db` for its engine in the context of this Flask app."""
        self.database.bind_app(app)

    def close(self) -> None:
        """Close the connections of an engine of our own; the next use opens new ones."""
        self.database.close()

    def reset_after_fork(self) -> None:
        """Use new connections in this process; those of the parent are left untouched."""
        self.database.reset_after_fork()

    def _taken(self, dialect: Dialect) -> None:
        # Somebody may have given it another name.
        if self.name == SQLStorage.name:
            self.name = dialect.name

    def _may_be_absent(self) -> bool:
        return self.is_of_app

    def _query(self) -> Query:
        return Query(self._table, self.database.reach())

    # -- the read and write API -----------------------------------------------------------------

    def write(self, batch: Sequence[UsageRecord]) -> None:
        """Keep a batch in one transaction; records that are kept already stay as they are.

        Raises:
            StorageUnavailable: The database cannot be reached or written now, or its tables cannot
                be created or upgraded; nothing was written.
            Exception: A record holds a value the database cannot keep; nothing was written.
        """
        self.is_of_app = True
        if not batch:
            return
        columns = to_columns(batch)
        moments = [record.started_at for record in batch]
        dialect = self.database.reach()

        def insert(connection: sa.Connection) -> None:
            dialect.insert(connection, self._table, columns)
            mark_dirty(self._sums, connection, moments, datetime.now(timezone.utc))

        self.database.run(insert, create=True, absent=None)
        dialect.confirm(len(batch))
        if dialect.needs_checkpoint():
            with suppress(StorageError):
                self.database.run(dialect.checkpoint, create=False, absent=None)

    def select(self, wanted: Filter, order: Order, limit: int | None) -> Iterator[UsageRecord]:
        """Yield the wanted records by (started_at, id), page by page; no transaction stays open.

        A record written meanwhile is yielded too if it sorts after those yielded before.
        """
        query = self._query()
        page = whole = query.page(wanted, order)
        left = limit
        while left is None or left > 0:
            size = PAGE if left is None else min(PAGE, left)
            rows = self.database.fetch(page.limit(size))
            for row in rows:
                yield to_record(row[0], row[1], dict(zip(FIELDS, row[2:], strict=True)))
            if len(rows) < size:
                return
            left = None if left is None else left - size
            page = whole.where(query.beyond(order, rows[-1]))

    def count(
        self, since: datetime | None = None, until: datetime | None = None, **filters: Any
    ) -> int:
        """Return how many records `records` would yield."""
        conditions = self._query().conditions(self.wanted(since, until, filters))
        query = sa.select(sa.func.count()).select_from(self._table)
        rows = self.database.fetch(query.where(*conditions))
        return int(rows[0][0]) if rows else 0

    def aggregate(
        self,
        wanted: Filter,
        fields: Sequence[str],
        every: Every | None,
        *,
        visitors: bool = False,
    ) -> list[Summary]:
        """Return what `summarize` does; the database adds up."""
        dialect = self.database.reach()

        def read(connection: sa.Connection) -> list[Summary]:
            dialect.snapshot(connection)
            return Summarizer(
                self._sums,
                connection,
                dialect,
                wanted,
                fields,
                every,
                self.bounds,
                visitors=visitors,
                methods=self._known_methods(),
            ).answer()

        return self.database.run(read, create=False, absent=[])

    def prune(self, before: datetime) -> int:
        """Delete the records with ``started_at < before`` and return how many these were.

        In chunks like `delete`, but their hourly and daily sums stay; these are brought up to date
        first. Blocks until all is done.

        Raises:
            StorageUnavailable: The database cannot be reached or written now.
        """
        while self._change_sums(lambda rollups: rollups.advance(datetime.now(timezone.utc))):
            pass
        end = as_utc(before) or before
        total = 0
        while (deleted := self._prune_some(end, BUSY_SECONDS)) is not None:
            total += deleted
            # SQLite's lock is not fair: without a pause the writers that wait would get no turn.
            time.sleep(0.005)
        if total:
            self._finish_deleting()
        return total

    def delete(self, wanted: Filter) -> int:
        """Delete the wanted records and return how many these were.

        In chunks, each a transaction of its own: after a failure some may be deleted. Records
        written meanwhile may stay. Blocks until all is done.

        SQLite overwrites their bytes at once (but see `dialects.sqlite`), PostgreSQL after a VACUUM
        when the space is used again, MariaDB and MySQL after InnoDB's purge when the space is used
        again. Write-ahead logs, binary logs, replicas and backups keep them.

        Raises:
            StorageUnavailable: The database cannot be reached or written now.
        """
        key = self._table.c.id
        doomed = sa.and_(*self._query().conditions(wanted))
        rows = self.database.fetch(sa.select(sa.func.max(key)))
        last = rows[0][0] if rows else None
        total, start = 0, -(2**63)
        while last is not None and start <= last:
            # First only read a chunk of the primary key: no writer need wait for a chunk without
            # doomed rows, and the transaction that deletes begins with a write.
            part = (
                sa.select(key, sa.case((doomed, 1), else_=0).label("doomed"))
                .where(key.between(start, last))
                .order_by(key)
                .limit(DELETED_AT_ONCE)
                .subquery()
            )
            ends = sa.select(sa.func.max(part.c.id), sa.func.max(part.c.doomed))
            rows = self.database.fetch(ends)
            end, found = rows[0] if rows else (None, None)
            if end is None:
                break
            if found:
                total += self._delete_some(sa.and_(key.between(start, end), doomed))
            start = end + 1
        # Even if there was none: an earlier call may have been interrupted before this.
        self._finish_deleting()
        return total

    # -- maintenance ----------------------------------------------------------------------------

    def maintain(self, keep: timedelta | None, now: datetime) -> float:
        """Roll up one hour, or prune some old records; see `Writer.maintain`.

        One process at a time does it, under a lock; the others return at once, for a minute later.
        """
        if self._change_sums(lambda rollups: rollups.advance(now), wait_seconds=_PATIENCE_SECONDS):
            return _SOON_SECONDS
        if keep is not None and self._prune_some(now - keep, wait_seconds=_PATIENCE_SECONDS):
            self._has_pruned = True
            return _SOON_SECONDS
        if self._has_pruned:
            self._has_pruned = False
            self._finish_deleting()
        return _LATER_SECONDS

    def _prune_some(self, before: datetime, wait_seconds: float) -> int | None:
        return self._change_sums(
            lambda rollups: rollups.prune(before, DELETED_AT_ONCE), wait_seconds=wait_seconds
        )

    def _change_sums(
        self, work: Callable[[Rollups], _T], *, wait_seconds: float = BUSY_SECONDS
    ) -> _T | None:
        """Call a function with the `Rollups`, under their lock; see `Database.run_locked`."""
        dialect = self.database.reach()
        return self.database.run_locked(
            lambda connection: work(
                Rollups(self._sums, connection, dialect, self.bounds, self._known_methods())
            ),
            self._sums.upkeep.name,
            wait_seconds=wait_seconds,
        )

    # -- the schema -----------------------------------------------------------------------------

    def plan(self) -> list[Step]:
        """Return what `migrate` would do; nothing is changed.

        Raises:
            StorageUnavailable: The database cannot be reached, or its tables not be upgraded, now.
        """
        if self.database.reach().presence() == "absent":
            # Connecting would create the file; the plan is that of any empty database.
            with closing(SQLStorage.from_url("sqlite://", table_name=self._table.name)) as empty:
                return empty.database.plan()
        return self.database.plan()

    def migrate(self) -> list[Step]:
        """Create the tables, or upgrade them, and return what was done.

        As the first write does, but without trust in the noted versions.

        Raises:
            StorageUnavailable: The database cannot be reached, or its tables not be upgraded, now.
        """
        return self.database.migrate()

    # -- deleting -------------------------------------------------------------------------------

    def _delete_some(self, condition: sa.ColumnElement[bool]) -> int:
        """Delete the rows of a condition in one transaction, and return their number."""
        dialect = self.database.reach()

        def delete(connection: sa.Connection) -> int:
            mark_dirty_where(self._sums, connection, dialect, condition)
            return dialect.delete(connection, self._table, condition)

        deleted = self.database.run(delete, create=False, absent=0)
        # SQLite's lock is not fair: without a pause the writers that wait would get no turn.
        time.sleep(0.005)
        return deleted

    def _finish_deleting(self) -> None:
        with suppress(StorageUnavailable):
            self.database.run(self.database.reach().deleted, create=False, absent=None)
