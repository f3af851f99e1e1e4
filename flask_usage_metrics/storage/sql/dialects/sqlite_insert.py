"""INSERT statements of many rows each, as SQLite takes them quickest."""

from __future__ import annotations

import sqlite3
from typing import Any

import sqlalchemy as sa

from flask_usage_metrics.storage.sql.dialects.columns_in_use import ParameterLayout
from flask_usage_metrics.storage.sql.table import COLUMN_NAMES, Columns

_MOST_ROWS = 512 if sqlite3.sqlite_version_info >= (3, 32) else 16
"""Most rows of one INSERT, and a power of two: ten prepared statements do for batches of all sizes.

512 rows have up to 20 992 parameters; SQLite takes 32 766 since 3.32 (2020), and 999 before.
"""

CACHED_STATEMENTS = 16
"""Prepared statements to be kept by a connection: these ten, and some to read by; sqlite3 keeps
128."""


class BatchInsert:
    """Inserts batches by few statements, which name the columns that ever had a value.

    Values that the rows of a batch share are parameters once: the quickest form there is, and one
    that keeps the GIL, which executemany gives away once a row (see tests/benchmarks/README.md).
    """

    def __init__(self) -> None:
        self._layout = ParameterLayout()
        self._statements: dict[int, str] = {}

    def execute(self, connection: sa.Connection, table: sa.Table, columns: Columns) -> None:
        """Insert rows; those whose id is there already are ignored. Hot path."""
        if self._layout.learn(columns):
            self._statements.clear()
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
            for offset, position in enumerate(own):
                values[offset :: len(own)] = columns[position][start : start + size]
            if size not in self._statements:
                self._statements[size] = self._statement(connection, size, table)
            connection.exec_driver_sql(self._statements[size], (*once, *values))
            start += size

    def _statement(self, connection: sa.Connection, rows: int, table: sa.Table) -> str:
        shared, own = self._layout.shared, self._layout.own
        quoted = connection.dialect.identifier_preparer.format_table(table)
        names = ", ".join(COLUMN_NAMES[position] for position in (*shared, *own))
        selected = ["?"] * len(shared) + [f"column{number + 1}" for number in range(len(own))]
        row = f"({', '.join('?' * len(own))})"
        # "WHERE true", or ON CONFLICT would be taken for a join's. No "OR IGNORE", which would
        # also ignore values that the table refuses.
        return (
            f"INSERT INTO {quoted} ({names}) SELECT {', '.join(selected)} "
            f"FROM (VALUES {', '.join([row] * rows)}) WHERE true ON CONFLICT DO NOTHING"
        )
