"""The schema of a SQL storage: created, or upgraded in place, by whichever process comes first.

A `Component` is a few tables that belong together, with a version that is raised whenever their
description changes. What is missing is found by inspecting the tables, not by replaying migrations:
a table of flask-track-usage can be in several states. The version last inspected is noted in a
table of versions, so that the next process to start need not inspect again. Every change only adds
or widens: a process of an older version works with the tables of a newer one, and leaves the noted
version alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from flask_usage_metrics.errors import StorageUnavailable
from flask_usage_metrics.storage.sql.dialects.base import BUSY_SECONDS, Dialect, Fault
from flask_usage_metrics.storage.sql.table import INTEGER, KEY, Index


@dataclass(frozen=True)
class Component:
    """Tables that are created and upgraded together.

    Attributes:
        name: Its name in the table of versions.
        version: From 1; raised when `tables` or `indexes` change.
        tables: As they should be; all columns but primary keys may be null.
        indexes: Of these tables, without the primary keys.
    """

    name: str
    version: int
    tables: tuple[sa.Table, ...]
    indexes: tuple[Index, ...] = ()


@dataclass(frozen=True)
class Step:
    """One statement of an upgrade.

    Attributes:
        statement: The SQL.
        changes: Its effects for a reader, a line each: ``"add the column usage.method as TEXT"``.
    """

    statement: str
    changes: tuple[str, ...]


class Schema:
    """Creates and upgrades the components of one storage.

    Args:
        name: Name of the table of versions.
        components: One at least. Without the first table of the first one there is nothing to read.
    """

    def __init__(self, name: str, components: Sequence[Component]) -> None:
        self.components = tuple(components)
        self._main = self.components[0].tables[0]
        self._versions = sa.Table(
            name,
            sa.MetaData(schema=self._main.schema),
            sa.Column("component", KEY, primary_key=True),
            sa.Column("version", INTEGER, nullable=False),
        )

    def ensure(
        self, dialect: Dialect, *, create: bool, trust: bool = True, wait_seconds: float
    ) -> bool:
        """Create or upgrade the tables where that is needed; return whether they exist.

        Args:
            dialect: Of the database.
            create: Create the tables if there are none.
            trust: Whether to believe the noted versions; else the tables are inspected.
            wait_seconds: Seconds to wait for another process that upgrades them.

        Raises:
            StorageUnavailable: A table cannot be upgraded; the message says why.
            TimeoutError: Another process was not done in time.
            DBAPIError: See `Dialect.fault_of`.
        """
        with dialect.connect() as connection:
            dialect.connected(connection, create=create)
            if trust and self._is_current(dialect, connection):
                return True
            connection.rollback()
            if not create:
                # Somebody who only reads might not be allowed to do more.
                if not sa.inspect(connection).has_table(self._main.name, self._main.schema):
                    return False
                if not list(self._steps(dialect, connection)):
                    return True
        self.upgrade(dialect, wait_seconds=wait_seconds)
        return True

    def upgrade(self, dialect: Dialect, *, wait_seconds: float = BUSY_SECONDS) -> list[Step]:
        """Create or upgrade the tables, under a lock, and return what was done; see `ensure`."""
        with (
            dialect.connect() as connection,
            dialect.lock(connection, self._versions.name, wait_seconds),
        ):
            steps = self.plan(dialect, connection)
            for step in steps:
                connection.exec_driver_sql(step.statement)
            self._note(connection)
        return steps

    def plan(self, dialect: Dialect, connection: sa.Connection) -> list[Step]:
        """Return what `upgrade` would do; nothing is changed.

        Raises:
            StorageUnavailable: A view has a table's name, or a column cannot be upgraded.
        """
        steps = list(self._steps(dialect, connection))
        if not sa.inspect(connection).has_table(self._versions.name, self._versions.schema):
            name = self._versions.name
            statement = dialect.create_table(self._versions)
            steps.insert(0, Step(statement, (f"create the table {name}",)))
        return steps

    # -- versions -------------------------------------------------------------------------------

    def versions(self, connection: sa.Connection) -> dict[str, int]:
        """Return the noted version of each component, by its name.

        Raises:
            DBAPIError: Such as when there is no table of versions.
        """
        columns = self._versions.c
        rows = connection.execute(sa.select(columns.component, columns.version))
        return {str(component): int(version) for component, version in rows}

    def _is_current(self, dialect: Dialect, connection: sa.Connection) -> bool:
        try:
            noted = self.versions(connection)
        except sa.exc.DBAPIError as error:
            if dialect.fault_of(error) is Fault.SCHEMA:
                return False
            raise
        return all(noted.get(each.name, 0) >= each.version for each in self.components)

    def _note(self, connection: sa.Connection) -> None:
        noted = self.versions(connection)
        table = self._versions
        for each in self.components:
            values = {"component": each.name, "version": each.version}
            if each.name not in noted:
                connection.execute(sa.insert(table).values(values))
            elif noted[each.name] < each.version:
                is_it = table.c.component == each.name
                connection.execute(sa.update(table).where(is_it).values(values))

    # -- inspection -----------------------------------------------------------------------------

    def _steps(self, dialect: Dialect, connection: sa.Connection) -> Iterator[Step]:
        for component in self.components:
            for table in component.tables:
                indexes = [index for index in component.indexes if index.table is table]
                yield from _steps_for(dialect, connection, table, indexes)


def _steps_for(
    dialect: Dialect, connection: sa.Connection, table: sa.Table, indexes: Sequence[Index]
) -> Iterator[Step]:
    inspector = sa.inspect(connection)
    name, schema = table.name, table.schema
    if name in inspector.get_view_names(schema):
        raise StorageUnavailable(reason=f"{dialect.name}: {name} is a view, but must be a table")
    found: set[str | None] = set()
    if inspector.has_table(name, schema):
        yield from _changes(dialect, connection, table, inspector.get_columns(name, schema))
        found = {index["name"] for index in inspector.get_indexes(name, schema)}
    else:
        yield Step(dialect.create_table(table), (f"create the table {name}",))
    for index in indexes:
        if index.name not in found:
            yield Step(dialect.create_index(index), (f"create the index {index.name}",))


def _changes(
    dialect: Dialect,
    connection: sa.Connection,
    table: sa.Table,
    columns: Sequence[Mapping[str, Any]],
) -> Iterator[Step]:
    """Yield the steps that add missing columns and widen narrow ones.

    Raises:
        StorageUnavailable: A column cannot be upgraded.
    """
    # MySQL and SQLite know no case in the names of columns.
    found = {column["name"].lower(): dict(column) for column in columns}
    for name, collation in dialect.collations(connection, table).items():
        found[name.lower()]["collation"] = collation
    key = {column.name for column in table.primary_key}
    problems = [*_in_the_way(dialect, table, found)]
    clauses, changes = [], []
    for column in table.columns:
        it = found.get(column.name)
        wanted = dialect.type_of(column)
        if it is None:
            if column.name in key:
                problems.append(f"{column.name} is missing")
            clauses.append(dialect.add_column(column))
            changes.append(f"add the column {table.name}.{column.name} as {wanted}")
        elif dialect.is_narrow(column, it):
            was = it["type"].compile(dialect.engine.dialect)
            clauses.append(dialect.widen_column(column))
            changes.append(f"widen the column {table.name}.{column.name} from {was} to {wanted}")
    if problems:
        raise StorageUnavailable(
            reason=f"{dialect.name}: the table {table.name} cannot be used: {'; '.join(problems)}"
        )
    if not clauses:
        return
    statements = dialect.alter_table(table, clauses)
    if len(statements) == 1:
        yield Step(statements[0], tuple(changes))
    else:
        for statement, change in zip(statements, changes, strict=True):
            yield Step(statement, (change,))


def _in_the_way(
    dialect: Dialect, table: sa.Table, found: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Yield what no step can mend, in words that name the column."""
    key = [column.name for column in table.primary_key]
    for name, column in found.items():
        ours = table.columns.get(name)
        kind = _kind(column["type"], dialect)
        if ours is None:
            is_filled = (
                column["nullable"]
                or column.get("default") is not None
                or column.get("computed")
                or column.get("identity")
                or column.get("autoincrement") is True
            )
            if not is_filled:
                yield f"{name}, which is not ours, must have a default or may be null"
        elif kind != _kind(ours.type, dialect):
            yield f"{name} is {column['type']}, but must be {dialect.type_of(ours)}"
        elif name in key:
            if key == ["id"] and not dialect.counts_up(column):
                yield f"{name} does not count up by itself"
        elif not column["nullable"]:
            yield f"{name} must be allowed to be null"


def _kind(kind: sa.types.TypeEngine[Any], dialect: Dialect) -> str:
    if isinstance(kind, sa.Boolean) and dialect.name != "postgresql":
        return "integer"  # what it is, under another name
    for name, types in {
        "integer": (sa.Integer,),
        "boolean": (sa.Boolean,),
        "number": (sa.Float, sa.Numeric),  # apart since SQLAlchemy 2.1
        "text": (sa.String,),
    }.items():
        if isinstance(kind, types):
            return name
    if isinstance(kind, sa.DateTime) and not kind.timezone:
        return "time"
    return str(kind)
