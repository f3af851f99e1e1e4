"""The contract `Dialect`: everything in which SQL databases differ from each other.

The rest, in `SQLStorage`, `Schema` and `Query`, is written once for all of them. It relies on these
promises, which the storage contract tests on each database:

- **Times**: the expression of `moment` compares with that of `bind_moment`, and sorts by time;
  microseconds are kept. A time that is read is a text or a naive datetime, UTC.
- **Periods** (`period`): the start of the hour, day or month as text, ``2026-11-22 09``,
  ``2026-11-22`` or ``2026-11``: the same in all databases, sorting by time. The expression has no
  parameters, so that it can be grouped by. `period_start` makes a datetime of the text.
- **Texts** are compared by their characters alone: case, accents and trailing spaces count.
- **Variables** (`variable`): what `variable_text` makes of a value in a JSON text; null where that
  is None, and where the text is no JSON, such as one that flask-track-usage cut off. The expression
  has no parameters either.
- **Null** sorts before everything, in `ascending` and in the indexes that `Schema` creates.
- **Locks** (`lock`): one process at a time is inside, in a transaction that is committed at the
  end, or rolled back by an exception. Nothing may be read or written on the connection before.
- **Faults** (`fault_of`): whether to try again after an exception of the database.

An instance belongs to one storage in one process, and may keep state.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timezone
from typing import Any, ClassVar, Literal

import sqlalchemy as sa
from sqlalchemy.schema import CreateTable

from flask_usage_metrics.errors import StorageUnavailable
from flask_usage_metrics.records.query import Every
from flask_usage_metrics.storage.sql.table import Columns, Index

BUSY_SECONDS = 5.0
"""Seconds to wait for a lock, unless a URL says otherwise."""

Presence = Literal["present", "absent", "lost", "suspect"]
"""Of a database: absent means it has yet to be created, lost that it was there and is no more, even
if another one is, suspect that it may be damaged."""


class Fault(enum.Enum):
    """The kind of a database exception, which decides what is done about it."""

    UNAVAILABLE = "it may go away by itself: try again later"
    SCHEMA = "a table or column is not as expected: look at the schema, then once more"
    CONFLICT = "two transactions were in each other's way, or a connection was lost: once more"
    DATA = "a value of a record cannot be kept, and never will be"


class Dialect(ABC):
    """One kind of database, in use by one storage.

    Args:
        engine: Of that kind of database.
        owned: Whether the engine was made for this storage, and may be configured and disposed of.

    Attributes:
        name: Short name of the kind, the value of the label ``sink``.
        drivers: What to ``pip install`` for each driver that works, by SQLAlchemy's name of the
            driver. The first one is taken for a URL that names none.
        engine: The engine.
        owned: See above.
    """

    name: ClassVar[str]
    drivers: ClassVar[Mapping[str, str]]

    def __init__(self, engine: sa.Engine, *, owned: bool = False) -> None:
        self.engine = engine
        self.owned = owned

    # -- connecting -----------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def open(cls, location: sa.URL) -> Dialect:
        """Return a dialect with an engine of its own; nothing is connected to yet.

        Args:
            location: The URL; it names a driver of `drivers`, which is installed.

        Raises:
            ConfigError: A part of the URL is missing or not known; the message does not repeat it.
        """

    def connect(self) -> sa.Connection:
        """Return a connection of the engine.

        Raises:
            StorageUnavailable: The driver raised something of its own, such as for an option.
            DBAPIError: See `fault_of`.
            OSError: The file cannot be opened, or the host cannot be reached.
        """
        try:
            return self.engine.connect()
        except (sa.exc.SQLAlchemyError, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - it must not look as if a record were the cause
            reason = f"cannot connect ({type(error).__name__})"
            raise StorageUnavailable(reason=f"{self.name}: {reason}") from None

    def reset_after_fork(self) -> None:  # noqa: B027 - there may be nothing to do
        """Make locks anew, and forget the parent process's files; called in a forked child."""

    def guard(self) -> AbstractContextManager[Any]:
        """Return a context manager, to be entered whenever a connection is used."""
        return nullcontext()

    def presence(self) -> Presence:
        """Tell, without connecting, whether the database exists, and is the one it was."""
        return "present"

    def give_up(self) -> str:
        """Make way for another database after a loss, before all connections are closed.

        Returns:
            What is lost, as a clause for a message; empty if that was said already.

        Raises:
            StorageUnavailable: That cannot be done now, or it is not sure yet that it is lost.
        """
        return ""

    def forget(self) -> None:  # noqa: B027 - there may be nothing to do
        """Take whatever database is found next for the right one."""

    def confirm(self, records: int) -> None:  # noqa: B027 - there may be nothing to do
        """See that records that were committed are in the database that others find.

        Raises:
            StorageUnavailable: They are not: it was replaced meanwhile.
        """

    def make_room(self) -> None:  # noqa: B027 - there may be nothing to do
        """Make the folder of an absent database, if it has one.

        Raises:
            OSError: It cannot be made.
        """

    def connected(self, connection: sa.Connection, *, create: bool) -> None:  # noqa: B027 - there may be nothing to do
        """Configure the database on the first connection, before the schema is inspected.

        Args:
            connection: Of this engine, new.
            create: Whether somebody is going to write.
        """

    def set_up(self) -> None:  # noqa: B027 - there may be nothing to do
        """Note that the schema of the database is current; for `presence`."""

    @abstractmethod
    def lock(
        self, connection: sa.Connection, name: str, wait_seconds: float = BUSY_SECONDS
    ) -> AbstractContextManager[None]:
        """Return a lock between processes; a transaction is open while it is held.

        Args:
            connection: Nothing was executed on it yet.
            name: Name of the lock; a dialect may have the same lock for all names.
            wait_seconds: Most seconds to wait for it, and for locks of tables while it is held.

        Raises:
            TimeoutError: Another process held it for so long.
            DBAPIError: Likewise, or anything else; see `fault_of`.
        """

    def snapshot(self, connection: sa.Connection) -> None:  # noqa: B027 - it may be so anyway
        """Let all statements of the transaction read one and the same state.

        Args:
            connection: In a transaction in which nothing was read yet.
        """

    # -- the schema -----------------------------------------------------------------------------

    def create_table(self, table: sa.Table) -> str:
        """Return the statement that creates a table, without its indexes."""
        return str(CreateTable(table).compile(dialect=self.engine.dialect)).strip()

    def create_index(self, index: Index) -> str:
        """Return the statement that creates an index, in the order of `ascending`."""
        prepare = self.engine.dialect.identifier_preparer
        unique = "UNIQUE " if index.unique else ""
        columns = ", ".join(map(self.indexed, map(prepare.quote, index.columns)))
        table = prepare.format_table(index.table)
        return f"CREATE {unique}INDEX {prepare.quote(index.name)} ON {table} ({columns})"

    def indexed(self, quoted_column: str) -> str:
        """Return a column as a CREATE INDEX spells it.

        Args:
            quoted_column: Its name, quoted.
        """
        return quoted_column

    def alter_table(self, table: sa.Table, clauses: Sequence[str]) -> list[str]:
        """Return the statements that change a table: one, or one a clause.

        Args:
            table: The table.
            clauses: Of `add_column` and `widen_column`; one at least.
        """
        quoted = self.engine.dialect.identifier_preparer.format_table(table)
        return [f"ALTER TABLE {quoted} {', '.join(clauses)}"]

    def add_column(self, column: sa.Column[Any]) -> str:
        """Return the clause of an ALTER TABLE that adds a column."""
        return f"ADD COLUMN {self._quoted(column)} {self.type_of(column)}"

    @abstractmethod
    def widen_column(self, column: sa.Column[Any]) -> str:
        """Return the clause of an ALTER TABLE that gives an existing column its type."""

    def type_of(self, column: sa.Column[Any]) -> str:
        """Return the type of a column as SQL declares it."""
        return column.type.compile(self.engine.dialect)

    @abstractmethod
    def is_narrow(self, column: sa.Column[Any], found: Mapping[str, Any]) -> bool:
        """Tell whether an existing column takes less than it should: shorter or fewer values.

        Args:
            column: As it should be.
            found: The existing one, of the same kind, as an `sqlalchemy.Inspector` describes it;
                with ``"collation"`` if `collations` names one.
        """

    def collations(self, connection: sa.Connection, table: sa.Table) -> Mapping[str, str]:
        """Return the collations of a table's columns by name; empty where they do not matter."""
        return {}

    def counts_up(self, column: Mapping[str, Any]) -> bool:
        """Tell whether the database numbers rows by this primary key.

        Args:
            column: The existing one, as an `sqlalchemy.Inspector` describes it.
        """
        return bool(column.get("autoincrement")) or "identity" in column

    # -- writing and deleting -------------------------------------------------------------------

    @abstractmethod
    def insert(self, connection: sa.Connection, table: sa.Table, columns: Columns) -> None:
        """Insert rows; those whose record id exists already stay as they are.

        Args:
            connection: In a transaction, in which nothing may have been read yet.
            table: Of `table.describe`.
            columns: Of `table.to_columns`; one row at least.

        Raises:
            ValueError: A value cannot be kept; the transaction is to be rolled back.
            OverflowError: Likewise.
            TypeError: Likewise.
            DBAPIError: See `fault_of`.
        """

    def delete(
        self, connection: sa.Connection, table: sa.Table, condition: sa.ColumnElement[bool]
    ) -> int:
        """Delete rows and return how many these were.

        Args:
            connection: In a transaction.
            table: Where from.
            condition: For the rows.
        """
        return connection.execute(sa.delete(table).where(condition)).rowcount

    def needs_checkpoint(self) -> bool:
        """Tell, after a write, whether `checkpoint` is due."""
        return False

    def checkpoint(self, connection: sa.Connection) -> None:  # noqa: B027 - there may be nothing to do
        """Shrink the write-ahead log, without waiting long; best effort."""

    def deleted(self, connection: sa.Connection) -> None:  # noqa: B027 - there may be nothing to do
        """Clear copies of deleted rows, such as in a log, after the last `delete`; best effort."""

    # -- expressions ----------------------------------------------------------------------------

    def moment(self, column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """Return the expression for a column of times; see above."""
        return column

    def bind_moment(self, moment: datetime) -> Any:
        """Return a time to compare `moment` with; naive means UTC."""
        if moment.tzinfo is not None:
            moment = moment.astimezone(timezone.utc)
        return moment.replace(tzinfo=None)

    @abstractmethod
    def period(self, moment: sa.ColumnElement[Any], every: Every) -> sa.ColumnElement[str]:
        """Return the expression for the start of the hour, day or month of a time; see above.

        Args:
            moment: Of `moment`.
            every: ``"hour"``, ``"day"`` or ``"month"``.
        """

    @abstractmethod
    def variable(self, column: sa.Column[Any], key: str) -> sa.ColumnElement[str]:
        """Return the expression for a value of ``g.track_var`` as a text; see above.

        Args:
            column: Of texts, JSON objects most of them.
            key: Letters, digits, ``_`` and ``-``: nothing that would have to be escaped.
        """

    @abstractmethod
    def any_of(
        self, expression: sa.ColumnElement[Any], values: Sequence[Any]
    ) -> sa.ColumnElement[bool]:
        """Return the condition that an expression is one of any number of values.

        The database can still read by an index on it, in its order.

        Args:
            expression: A text, or an integer.
            values: One at least, all of that type, none None, each such that a record can have it.
        """

    def ascending(self, expression: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """Return the expression to order by, null first."""
        return expression.asc()

    def descending(self, expression: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """Return the expression to order by, null last."""
        return expression.desc()

    # -- errors ---------------------------------------------------------------------------------

    @abstractmethod
    def fault_of(self, error: sa.exc.DBAPIError) -> Fault:
        """Tell what to do about an exception."""

    @abstractmethod
    def reason(self, error: sa.exc.DBAPIError) -> str:
        """Return the reason for a message, without a value, a path, a host or a user's name."""

    def distrusts(self, error: sa.exc.DBAPIError) -> bool:
        """Tell whether to open all connections anew after this, as the database may be another."""
        return False

    def _in_text(self, table: sa.Table) -> str:
        """Return the name of a table, quoted for `sqlalchemy.text`."""
        name = self.engine.dialect.identifier_preparer.format_table(table)
        # Percent signs, which some drivers want doubled, are so by then; text() does it again.
        if self.engine.dialect.paramstyle in ("format", "pyformat"):
            name = name.replace("%%", "%")
        return name.replace(":", "\\:")

    def _quoted(self, column: sa.Column[Any]) -> str:
        return self.engine.dialect.identifier_preparer.quote(column.name)


def period_start(text: str) -> datetime:
    """Return the start of a period, as `Dialect.period` spells it, as aware UTC."""
    whole = {7: f"{text}-01", 13: f"{text}:00"}.get(len(text), text)
    return datetime.fromisoformat(whole).replace(tzinfo=timezone.utc)
