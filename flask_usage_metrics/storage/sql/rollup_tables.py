"""The tables of hourly and daily sums that belong to a table of records."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from flask_usage_metrics.storage.sql.dialects.base import period_start
from flask_usage_metrics.storage.sql.schema import Component
from flask_usage_metrics.storage.sql.table import (
    BIG_INTEGER,
    BOOLEAN,
    FLOAT,
    INTEGER,
    KEY,
    MOMENT,
    SERIAL,
    TEXT,
    Index,
)

VERSION = 2
"""To be raised when the columns or indexes of these tables change."""

DIMENSIONS = ("endpoint", "method", "status", "country", "client")
"""Fields of the record that sums are grouped by."""

SUMS = (
    "requests",
    "errors",
    "bytes_sent",
    "duration_seconds_sum",
    "streams",
    "first_byte_seconds_sum",
)
"""Columns of sums: requests; those with status 500 to 599; bytes of response bodies; seconds;
requests that were answered by a stream; seconds until their first byte. The last two are null in
the sums of versions that did not know them."""

_SECONDS = ("duration_seconds_sum", "first_byte_seconds_sum")

MOST_BOUNDS = 31
"""Of a histogram with more bounds only every second is kept, or every third, and so on."""

AT_MOST = tuple(f"at_most_{index}" for index in range(MOST_BOUNDS))
"""Columns of cumulative counts: requests no longer than each bound; null beyond the last bound."""

# Values of the column `what` of the upkeep table.
REACHED = "reached"
DIRTY = "late"
BOUNDS = "bounds"


class RollupTables:
    """The tables of sums of one table of records, named after it.

    Args:
        records: The table of records.

    Attributes:
        records: The same.
        hourly: A row for an hour, values of `DIMENSIONS` and bounds; several such are to be added
            up. ``frozen`` marks the sums of rows that were pruned.
        daily: Likewise for days that are over; includes pruned rows.
        upkeep: Notes, a row each: `REACHED`, the end of the last hour that is rolled up; `DIRTY`,
            an hour whose sums are stale; `BOUNDS`, which rows of sums refer to by its id.
    """

    def __init__(self, records: sa.Table) -> None:
        self.records = records
        frozen: sa.Column[Any] = sa.Column("frozen", BOOLEAN)
        self.hourly = _describe(records, "hourly", [frozen])
        self.daily = _describe(records, "daily", [])
        self.upkeep = sa.Table(
            f"{records.name}_upkeep",
            records.metadata,
            sa.Column("id", SERIAL, primary_key=True),
            sa.Column("what", KEY),
            sa.Column("note", TEXT),
            schema=records.schema,
            extend_existing=True,
        )

    def component(self) -> Component:
        """Return these tables and their indexes, for `Schema`."""
        indexes = tuple(
            Index(f"ix_{table.name}_datetime", table, ("datetime",))
            for table in (self.hourly, self.daily)
        )
        return Component("rollups", VERSION, (self.hourly, self.daily, self.upkeep), indexes)

    def reached(self, connection: sa.Connection) -> datetime | None:
        """Return the end of the last hour that is rolled up, aware UTC; None: none is."""
        rows = self.upkeep.c
        found = connection.execute(sa.select(rows.note).where(rows.what == REACHED)).scalar()
        return None if found is None else period_start(found)

    def dirty_hours(self, connection: sa.Connection, before: datetime) -> list[str]:
        """Return the hours with stale sums, ascending, as `Dialect.period` spells them.

        Args:
            connection: In a transaction.
            before: Only hours that begin before then; aware UTC.
        """
        rows = self.upkeep.c
        is_dirty = sa.and_(rows.what == DIRTY, rows.note < spelled(before))
        found = connection.execute(sa.select(rows.note).where(is_dirty).distinct())
        return sorted(found.scalars())

    def bounds(self, connection: sa.Connection) -> dict[int, list[float]]:
        """Return all bounds that sums refer to: seconds, ascending, by their id."""
        rows = self.upkeep.c
        found = connection.execute(sa.select(rows.id, rows.note).where(rows.what == BOUNDS))
        return {number: [*map(float, spelled.split())] for number, spelled in found}


def spelled(hour: datetime) -> str:
    """Return the start of an hour in UTC as `Dialect.period` spells it: ``2026-11-22 09``."""
    return hour.replace(tzinfo=None).isoformat(" ", "hours")


def _describe(records: sa.Table, every: str, extra: Sequence[sa.Column[Any]]) -> sa.Table:
    return sa.Table(
        f"{records.name}_{every}",
        records.metadata,
        sa.Column("id", SERIAL, primary_key=True),
        # Named as in the table of records, so that a `Query` does for these, too.
        sa.Column("datetime", MOMENT),
        *extra,
        sa.Column("bounds", INTEGER),
        *(sa.Column(field, INTEGER if field == "status" else TEXT) for field in DIMENSIONS),
        *(sa.Column(name, FLOAT if name in _SECONDS else BIG_INTEGER) for name in SUMS),
        *(sa.Column(name, BIG_INTEGER) for name in AT_MOST),
        schema=records.schema,
        extend_existing=True,
    )
