"""The tables of a SQL database: made, and upgraded in place, by whichever process comes first.

A `Component` is some tables that go together, with a version that is raised whenever their
description changes. What is lacking is found by looking at the tables, not by replaying the past:
a table of flask-track-usage can be in several states. Which version was looked at last is noted in
a table of its own, so that a process that starts need not look again. All of it is additive: a
process of an older version goes on with what a newer one made, and leaves its version alone.
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
    """Tables that are made and upgraded together.

    Attributes:
        name: Key of its version.
        version: Raised when `tables` or their indexes change; from 1.
        tables: As they should be; all columns but primary keys may be null.
        indexes: Of these tables, beside the primary keys.
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
        changes: What it does, a line each.
    """

    statement: str
    changes: tuple[str, ...]


class Schema:
    """Some components, in the database of one storage.

    Args:
        name: Name of the table of versions.
        components: The first one's first table is what there has to be to read anything.
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
        """Make or upgrade the tables; return whether there are any.

        Args:
            dialect: The database.
            create: Make the tables if there are none.
            trust: Believe the noted versions.
            wait_seconds: How long another process is waited for.

        Raises:
            StorageUnavailable: They cannot be made what they should be: the message says why.
            TimeoutError: Another process has been at it for so long.
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
        """Make the tables what they should be, and return what was done; see `ensure`."""
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
        """Return what `upgrade` would do.

        Raises:
            StorageUnavailable: A table is in the way, or has columns nothing can be done about.
        """
        steps = list(self._steps(dialect, connection))
        if not sa.inspect(connection).has_table(self._versions.name, self._versions.schema):
            name = self._versions.name
            statement = dialect.create_table(self._versions)
            steps.insert(0, Step(statement, (f"create the table {name}",)))
        return steps

    # -- versions -------------------------------------------------------------------------------

    def versions(self, connection: sa.Connection) -> dict[str, int]:
        """Return the noted version of each component.

        Raises:
            DBAPIError: There is no table of them, for one.
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

    # -- what is lacking ------------------------------------------------------------------------

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
        raise StorageUnavailable(f"{dialect.name}: {name} is a view, but must be a table")
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
    """Yield how the columns of a table become what they should be."""
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
            f"{dialect.name}: the table {table.name} cannot be used: {'; '.join(problems)}"
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
    """Yield what nothing can be done about, with names of columns."""
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
