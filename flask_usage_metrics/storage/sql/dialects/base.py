"""The contract `Dialect`: everything in which SQL databases differ from each other.

The rest, in `SQLStorage`, `Schema` and `Query`, is written once for all of them. It relies on these
promises, which the storage contract tests on each database:

- **Times**: what `moment` returns compares with, and sorts as, what
  `bind_moment` returns; microseconds are kept. What is read is a text or a naive datetime, UTC.
- **Periods** (`period`): the start of the hour, day or month as text, ``2026-11-22 09``,
  ``2026-11-22`` or ``2026-11``: the same on all, sorting as time does, made without parameters
  so that it can be grouped by; `period_start` makes it a datetime.
- **Texts** are compared by their characters alone: case, accents and trailing spaces count.
- **Null** sorts before everything, in `ascending` as in the index that `Schema` makes.
- **Locks** (`lock`): one process at a time is inside, in a transaction that is committed at the
  end, or rolled back by an exception. Nothing may be read or written on the connection before.
- **Faults** (`fault_of`): what an exception of the database means to the caller.

An instance belongs to one storage in one process; it may remember what it likes.
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
"""How long a lock is waited for."""

Place = Literal["there", "absent", "replaced"]


class Fault(enum.Enum):
    """What an exception of the database means."""

    UNAVAILABLE = "it may go away by itself: try again later"
    SCHEMA = "a table or column is not as expected: look at the schema, then once more"
    CONFLICT = "two transactions were in each other's way, or a connection was lost: once more"
    DATA = "a value of a record cannot be kept, and never will be"


class Dialect(ABC):
    """What one kind of database does in its own way.

    Args:
        engine: Of that kind.
        owned: Whether the engine was made for this storage, and may be configured and disposed of.

    Attributes:
        name: Short name of the kind, the value of the label ``sink``.
        engine: The engine.
        owned: See above.
    """

    name: ClassVar[str]
    drivers: ClassVar[Mapping[str, str]]
    """Drivers that work, the one taken if a URL names none first, and what to install for each."""

    def __init__(self, engine: sa.Engine, *, owned: bool = False) -> None:
        self.engine = engine
        self.owned = owned

    # -- connecting -----------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def open(cls, location: sa.URL) -> Dialect:
        """Return a dialect with an engine of its own; nothing is connected to yet.

        Args:
            location: With a driver of `drivers`, which is installed.

        Raises:
            ConfigError: The URL lacks something, or holds what is not known; it is not repeated.
        """

    def connect(self) -> sa.Connection:
        """Return a connection of the engine.

        Raises:
            StorageUnavailable: The driver failed in a way of its own, such as at an option.
            DBAPIError: See `fault_of`.
            OSError: As it comes.
        """
        try:
            return self.engine.connect()
        except (sa.exc.SQLAlchemyError, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - it must not look as if a record were the cause
            reason = f"cannot connect ({type(error).__name__})"
            raise StorageUnavailable(f"{self.name}: {reason}") from None

    def reset_after_fork(self) -> None:  # noqa: B027 - there may be nothing to do
        """Forget what is known of, and shared with, the parent process."""

    def guard(self) -> AbstractContextManager[Any]:
        """Return what to be inside of whenever a connection is used."""
        return nullcontext()

    def place(self) -> Place:
        """Tell, without connecting, whether there is a database at all, and still the same."""
        return "there"

    def make_place(self) -> None:  # noqa: B027 - there may be nothing to do
        """Make where the database is to be, if it is absent and that can be done."""

    def connected(self, connection: sa.Connection, *, create: bool) -> None:  # noqa: B027 - there may be nothing to do
        """Do what is to be done before the schema is looked at.

        Args:
            connection: A new one.
            create: Whether somebody is going to write.
        """

    def set_up(self) -> None:  # noqa: B027 - there may be nothing to do
        """Note that the schema was found, or made, as it should be."""

    @abstractmethod
    def lock(
        self, connection: sa.Connection, name: str, wait_seconds: float = BUSY_SECONDS
    ) -> AbstractContextManager[None]:
        """Return a lock between processes, inside of which a transaction is open.

        Args:
            connection: Nothing was executed on it yet.
            name: What is locked; another name may be waited for, too.
            wait_seconds: Waited at most for the lock, and for locks of tables inside of it.

        Raises:
            TimeoutError: Somebody else has had it for so long.
            DBAPIError: Likewise, or anything else; see `fault_of`.
        """

    def snapshot(self, connection: sa.Connection) -> None:  # noqa: B027 - it may be so anyway
        """Have all that is read in the transaction be of one moment.

        Args:
            connection: In a transaction in which nothing was read yet.
        """

    # -- the schema -----------------------------------------------------------------------------

    def create_table(self, table: sa.Table) -> str:
        """Return the statement that makes a table."""
        return str(CreateTable(table).compile(dialect=self.engine.dialect)).strip()

    def create_index(self, index: Index) -> str:
        """Return the statement that makes an index, in the order of `ascending`."""
        prepare = self.engine.dialect.identifier_preparer
        unique = "UNIQUE " if index.unique else ""
        columns = ", ".join(map(self.indexed, map(prepare.quote, index.columns)))
        table = prepare.format_table(index.table)
        return f"CREATE {unique}INDEX {prepare.quote(index.name)} ON {table} ({columns})"

    def indexed(self, quoted_column: str) -> str:
        """Return a column as it is in an index."""
        return quoted_column

    def alter_table(self, table: sa.Table, clauses: Sequence[str]) -> list[str]:
        """Return the statements for changes of a table: as few as there can be."""
        quoted = self.engine.dialect.identifier_preparer.format_table(table)
        return [f"ALTER TABLE {quoted} {', '.join(clauses)}"]

    def add_column(self, column: sa.Column[Any]) -> str:
        """Return the clause of an ALTER TABLE that adds a column."""
        return f"ADD COLUMN {self._quoted(column)} {self.type_of(column)}"

    @abstractmethod
    def widen_column(self, column: sa.Column[Any]) -> str:
        """Return the clause of an ALTER TABLE that gives a column its type."""

    def type_of(self, column: sa.Column[Any]) -> str:
        """Return the type of a column as it is declared."""
        return column.type.compile(self.engine.dialect)

    @abstractmethod
    def is_narrow(self, column: sa.Column[Any], found: Mapping[str, Any]) -> bool:
        """Tell whether a column of the same kind takes less than it should.

        Args:
            column: As it should be.
            found: As an `sqlalchemy.Inspector` tells it, and what `collations` told.
        """

    def collations(self, connection: sa.Connection, table: sa.Table) -> Mapping[str, str]:
        """Return the names of the columns' collations, where these matter."""
        return {}

    def counts_up(self, column: Mapping[str, Any]) -> bool:
        """Tell whether a primary key that was found is given to a row that names none."""
        return bool(column.get("autoincrement")) or "identity" in column

    # -- writing and deleting -------------------------------------------------------------------

    @abstractmethod
    def insert(self, connection: sa.Connection, table: sa.Table, columns: Columns) -> None:
        """Insert rows of `sql_table.to_columns`; those whose record is there already stay.

        Args:
            connection: In a transaction, in which nothing may have been read yet.
            table: Of `sql_table.describe`.
            columns: Of one row at least.

        Raises:
            ValueError: A value cannot be kept; nothing more is to be done in the transaction.
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
            condition: Which rows.
        """
        return connection.execute(sa.delete(table).where(condition)).rowcount

    def needs_checkpoint(self) -> bool:
        """Tell, after a write, whether `checkpoint` is due."""
        return False

    def checkpoint(self, connection: sa.Connection) -> None:  # noqa: B027 - there may be nothing to do
        """Give back room that is not needed any more, without waiting long; best effort."""

    def deleted(self, connection: sa.Connection) -> None:  # noqa: B027 - there may be nothing to do
        """Do what is to be done after all was deleted that was to be; best effort."""

    # -- expressions ----------------------------------------------------------------------------

    def moment(self, column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """Return a time column as what compares with `bind_moment`."""
        return column

    def bind_moment(self, moment: datetime) -> Any:
        """Return a time, which is taken as UTC if it is naive, to compare a column with."""
        if moment.tzinfo is not None:
            moment = moment.astimezone(timezone.utc)
        return moment.replace(tzinfo=None)

    @abstractmethod
    def period(self, moment: sa.ColumnElement[Any], every: Every) -> sa.ColumnElement[str]:
        """Return the start of the hour, day or month a time lies in, as text; see above.

        Args:
            moment: As `moment` returns it.
            every: ``"hour"``, ``"day"`` or ``"month"``.
        """

    @abstractmethod
    def any_of(
        self, expression: sa.ColumnElement[Any], values: Sequence[Any]
    ) -> sa.ColumnElement[bool]:
        """Return the condition that an expression is one of any number of values.

        It leaves the order of an index as it is.

        Args:
            expression: A text, or an integer.
            values: One at least, all of that type, none null, each such that a record can have it.
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
        """Tell what an exception means."""

    @abstractmethod
    def reason(self, error: sa.exc.DBAPIError) -> str:
        """Return what happened, without a value, a path, a host or a user's name."""

    def distrusts(self, error: sa.exc.DBAPIError) -> bool:
        """Tell whether all connections are to be opened anew after this."""
        return False

    def _in_text(self, table: sa.Table) -> str:
        """Return the name of a table as it is to be in `sqlalchemy.text`."""
        name = self.engine.dialect.identifier_preparer.format_table(table)
        # Percent signs, which some drivers want doubled, are so by then; text() does it again.
        if self.engine.dialect.paramstyle in ("format", "pyformat"):
            name = name.replace("%%", "%")
        return name.replace(":", "\\:")

    def _quoted(self, column: sa.Column[Any]) -> str:
        return self.engine.dialect.identifier_preparer.quote(column.name)


def period_start(text: str) -> datetime:
    """Return the start of a `Dialect.period` as aware UTC."""
    whole = {7: f"{text}-01", 13: f"{text}:00"}.get(len(text), text)
    return datetime.fromisoformat(whole).replace(tzinfo=timezone.utc)
