"""The tables of sums beside a table of records, by hour and by day."""

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

VERSION = 1
"""To be raised when the columns or indexes of these tables change."""

DIMENSIONS = ("endpoint", "method", "status", "country", "client")
"""What sums are kept apart by: fields of the record."""

SUMS = ("requests", "errors", "bytes_sent", "duration_seconds_sum")
"""What is added up: 5xx are errors; bytes of response bodies; seconds."""

MOST_BOUNDS = 31
"""Of histograms with more bounds only every second is kept, or every third, and so on."""

AT_MOST = tuple(f"at_most_{place}" for place in range(MOST_BOUNDS))
"""How many requests took at most as long as a bound of the histogram says; null beyond the last."""


class RollupTables:
    """The tables of sums that belong to a table of records, named after it.

    Args:
        records: The table of records.

    Attributes:
        hourly: A row for each hour, set of `DIMENSIONS`, and bounds; several are to be added up.
            ``frozen`` are the sums of rows that were pruned.
        daily: Likewise for days that are over; pruned rows are in it, too.
        upkeep: What is done (``reached``: the hour before which all hours are rolled up), what is
            to be done (``late``: an hour that is to be rolled up again), and the ``bounds`` that
            sums refer to.
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
        """Return what `Schema` makes of these."""
        indexes = tuple(
            Index(f"ix_{table.name}_datetime", table, ("datetime",))
            for table in (self.hourly, self.daily)
        )
        return Component("rollups", VERSION, (self.hourly, self.daily, self.upkeep), indexes)

    def reached(self, connection: sa.Connection) -> datetime | None:
        """Return the end of the last hour that is rolled up; None: none is."""
        rows = self.upkeep.c
        found = connection.execute(sa.select(rows.note).where(rows.what == "reached")).scalar()
        return None if found is None else period_start(found)

    def late(self, connection: sa.Connection, before: datetime) -> list[str]:
        """Return the hours before another that are to be rolled up again, as `Dialect.period`."""
        rows = self.upkeep.c
        late = sa.and_(rows.what == "late", rows.note < spelled(before))
        found = connection.execute(sa.select(rows.note).where(late).distinct())
        return sorted(found.scalars())

    def bounds(self, connection: sa.Connection) -> dict[int, list[float]]:
        """Return the bounds in seconds, ascending, by what sums refer to them by."""
        rows = self.upkeep.c
        found = connection.execute(sa.select(rows.id, rows.note).where(rows.what == "bounds"))
        return {number: [*map(float, spelled.split())] for number, spelled in found}


def spelled(hour: datetime) -> str:
    """Return the start of an hour as `Dialect.period` does."""
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
        *(
            sa.Column(name, FLOAT if name == "duration_seconds_sum" else BIG_INTEGER)
            for name in SUMS
        ),
        *(sa.Column(name, BIG_INTEGER) for name in AT_MOST),
        schema=records.schema,
        extend_existing=True,
    )
