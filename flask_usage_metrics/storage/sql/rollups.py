"""Sums by hour and day beside the rows of a SQL table, which stay when the rows are pruned.

An hour that is over is rolled up once: its rows are added up by endpoint, method, status, country
and client. What changes its rows later changes the sums in a way that leaves them right whenever a
transaction ends, and whoever dies in between:

- Rows that are written after their hour is over are marked in the same transaction. A marked hour
  is rolled up again, from all of its rows. So are hours that rows are erased from.
- Rows that are pruned go over into *frozen* sums, in the transaction that deletes them. Rolling up
  again replaces only the sums of the rows that are left.

So the sums of an hour are always those of its rows, with the pruned ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import sqlalchemy as sa

from flask_usage_metrics.records.query import Filter, next_start, truncate
from flask_usage_metrics.storage.sql.dialects.base import Dialect, period_start
from flask_usage_metrics.storage.sql.query import Query
from flask_usage_metrics.storage.sql.rollup_tables import (
    AT_MOST,
    DIMENSIONS,
    MOST_BOUNDS,
    SUMS,
    RollupTables,
    spelled,
)
from flask_usage_metrics.storage.sql.table import MOMENT

CLOSING = timedelta(minutes=5)
"""An hour is rolled up so long after its end: by then its rows are written, as a rule."""

_LATE = CLOSING - timedelta(minutes=1)
"""Rows written so long after the end of their hour are marked: a minute before they need be, for
transactions that take long and clocks that differ."""

_HOUR = timedelta(hours=1)
_DAY = timedelta(days=1)
_MARKS_AT_ONCE = 500


def mark_late(
    tables: RollupTables, connection: sa.Connection, moments: Sequence[datetime], now: datetime
) -> None:
    """Mark the hours that are over of rows that are written in this transaction.

    Args:
        tables: The sums.
        connection: In the transaction.
        moments: When the rows' requests started, aware.
        now: Aware UTC.
    """
    over = truncate(now - _LATE, "hour")
    if min(moments) >= over:  # nearly always
        return
    late = [moment for moment in moments if moment < over]
    marks = []
    # Hour by hour, which are few: to truncate each moment costs half as much as to write its row.
    while late:
        hour = truncate(min(late).astimezone(timezone.utc), "hour")
        marks.append({"what": "late", "note": spelled(hour)})
        late = [moment for moment in late if moment >= hour + _HOUR]
    connection.execute(sa.insert(tables.upkeep), marks)


def mark_erased(
    tables: RollupTables, connection: sa.Connection, dialect: Dialect, rows: sa.ColumnElement[bool]
) -> None:
    """Mark the hours of rows that are about to be deleted in this transaction."""
    period = Query(tables.records, dialect).period("hour")
    hours = sa.select(sa.literal("late"), period).where(rows).distinct()
    connection.execute(sa.insert(tables.upkeep).from_select(["what", "note"], hours))


class Rollups:
    """Changes of the sums, in one transaction that holds a lock: that of `lock_name`.

    Args:
        tables: The sums.
        connection: In the transaction.
        dialect: Of the database.
        bounds: Upper bounds of the latency buckets, in seconds, ascending.
    """

    def __init__(
        self,
        tables: RollupTables,
        connection: sa.Connection,
        dialect: Dialect,
        bounds: Sequence[float],
    ) -> None:
        self._tables = tables
        self._connection = connection
        self._dialect = dialect
        self._query = Query(tables.records, dialect)
        step = -(-len(bounds) // MOST_BOUNDS)
        self._bounds = bounds if step <= 1 else bounds[::-step][::-1]

    def advance(self, now: datetime) -> bool:
        """Roll up one hour, if any waits for it; return whether there may be another.

        Args:
            now: Aware UTC.
        """
        reached = self._tables.reached(self._connection)
        if reached is None:
            first = self._first(None, None)
            if first is None:
                return False
            reached = truncate(first, "hour")
            self._reach(reached)
        if self._roll_up_late(reached):
            return True
        over = truncate(now - CLOSING, "hour")
        if reached >= over:
            return False
        first = self._first(reached, over)
        # Not before it: SQLite sorts texts, and somebody may have spelled a time otherwise.
        hour = None if first is None else max(truncate(first, "hour"), reached)
        if hour is not None:
            self._roll_up(hour)
        end = over if hour is None else hour + _HOUR
        self._reach(end)
        for day in self._days(truncate(reached, "day"), truncate(end, "day")):
            self._roll_up_day(day)
        return hour is not None

    def prune(self, before: datetime, limit: int) -> int | None:
        """Let the sums of some old rows stay, and delete these.

        Args:
            before: Rows that started before then are old; aware UTC.
            limit: At most so many are deleted.

        Returns:
            How many were deleted; None if there are no old rows.
        """
        moment = self._query.moment
        key = self._tables.records.c.id
        found: Sequence[Any] = self._execute(
            sa.select(key, moment)
            .where(*self._query.conditions(Filter(until=before)))
            .order_by(moment)
            .limit(limit)
            # Else a row might be erased before it is deleted here, and yet stay in the sums.
            .with_for_update()
        ).all()
        if not found:
            return None
        hour = truncate(_parsed(found[0][1]), "hour")
        # By their keys: a row that is written meanwhile must not be deleted without being added.
        keys = [number for number, started in found if truncate(_parsed(started), "hour") == hour]
        doomed = self._dialect.any_of(key, keys)
        self._add_up(hour, doomed, frozen=True)
        reached = self._tables.reached(self._connection)
        if reached is not None and hour < reached:
            # What goes over is taken away here, instead of adding up all that is left anew.
            self._add_up(hour, doomed, frozen=False, sign=-1)
        self._dialect.delete(self._connection, self._tables.records, doomed)
        if self._first(hour, next_start(hour, "hour")) is None:
            self._forget(hour)
        return len(keys)

    def _first(self, since: datetime | None, until: datetime | None) -> datetime | None:
        """Return when the first request of a range started."""
        moment = self._query.moment
        found = self._execute(
            sa.select(moment)
            .where(*self._query.conditions(Filter(since=since, until=until)))
            .order_by(moment)
            .limit(1)
        ).scalar()
        return None if found is None else _parsed(found)

    def _reach(self, moment: datetime) -> None:
        """Note that all hours before then are rolled up."""
        upkeep = self._tables.upkeep
        self._execute(sa.delete(upkeep).where(upkeep.c.what == "reached"))
        self._execute(sa.insert(upkeep).values(what="reached", note=spelled(moment)))

    def _roll_up_late(self, reached: datetime) -> bool:
        """Roll up the first marked hour again; those not reached yet will have their turn."""
        upkeep = self._tables.upkeep
        marks = upkeep.c
        marked = sa.and_(marks.what == "late", marks.note < spelled(reached))
        late = self._execute(sa.select(sa.func.min(marks.note)).where(marked)).scalar()
        if late is None:
            return False
        # By their ids: a mark that is committed from now on must stay.
        ids = self._execute(
            sa.select(marks.id)
            .where(marks.what == "late", marks.note == late)
            .limit(_MARKS_AT_ONCE)
        ).scalars()
        self._execute(sa.delete(upkeep).where(marks.id.in_(ids.all())))
        hour = period_start(late)
        self._roll_up(hour)
        day = truncate(hour, "day")
        if day + _DAY <= reached:
            self._roll_up_day(day)
        return True

    def _roll_up(self, hour: datetime) -> None:
        """Replace the sums of an hour's rows."""
        self._forget(hour)
        rows = self._query.conditions(Filter(since=hour, until=hour + _HOUR))
        self._add_up(hour, sa.and_(*rows), frozen=False)

    def _forget(self, hour: datetime) -> None:
        """Delete the sums of an hour's rows, but not the frozen ones."""
        hourly = self._tables.hourly
        is_it = self._dialect.moment(hourly.c.datetime) == self._dialect.bind_moment(hour)
        self._execute(sa.delete(hourly).where(is_it, hourly.c.frozen == sa.false()))

    def _add_up(
        self, hour: datetime, rows: sa.ColumnElement[bool], *, frozen: bool, sign: int = 1
    ) -> None:
        """Add the sums of some of an hour's rows, or take them away."""
        query = self._query.sums([rows], DIMENSIONS, None, self._bounds, visitors=False)
        found = query.subquery()
        dimensions, sums = [*found.c][: len(DIMENSIONS)], [*found.c][len(DIMENSIONS) :]
        del sums[len(SUMS)]  # the visitors
        selected = sa.select(
            sa.literal(hour.replace(tzinfo=None), MOMENT),
            sa.literal(frozen),
            sa.literal(self._bounds_id()),
            *dimensions,
            *(sums if sign > 0 else (-one for one in sums)),
        )
        names = ["datetime", "frozen", "bounds", *DIMENSIONS, *SUMS]
        names += AT_MOST[: len(self._bounds)]
        self._execute(sa.insert(self._tables.hourly).from_select(names, selected))

    def _days(self, since: datetime, until: datetime) -> list[datetime]:
        """Return the days of a range that have sums."""
        query = Query(self._tables.hourly, self._dialect)
        conditions = query.conditions(Filter(since=since, until=until))
        found = self._execute(sa.select(query.period("day")).where(*conditions).distinct())
        return [period_start(day) for day in found.scalars()]

    def _roll_up_day(self, day: datetime) -> None:
        """Replace the sums of a day by those of its hours."""
        hourly, daily = self._tables.hourly, self._tables.daily
        whole = Filter(since=day, until=day + _DAY)
        keys = [hourly.c[name] for name in ("bounds", *DIMENSIONS)]
        columns = [*SUMS, *AT_MOST]
        selected = (
            sa.select(
                sa.literal(day.replace(tzinfo=None), MOMENT),
                *keys,
                *(sa.func.sum(hourly.c[name]) for name in columns),
            )
            .where(*Query(hourly, self._dialect).conditions(whole))
            .group_by(*keys)
            .having(sa.func.sum(hourly.c.requests) != 0)
        )
        self._execute(sa.delete(daily).where(*Query(daily, self._dialect).conditions(whole)))
        names = ["datetime", "bounds", *DIMENSIONS, *columns]
        self._execute(sa.insert(daily).from_select(names, selected))

    def _bounds_id(self) -> int:
        """Return what sums refer to the bounds by."""
        upkeep = self._tables.upkeep
        rows = upkeep.c
        bounds = " ".join(map(repr, self._bounds))
        known = sa.select(rows.id).where(rows.what == "bounds", rows.note == bounds)
        found = self._execute(known).scalar()
        if found is None:
            self._execute(sa.insert(upkeep).values(what="bounds", note=bounds))
            found = self._execute(known).scalar_one()
        return int(found)

    def _execute(self, statement: sa.Executable) -> sa.CursorResult[Any]:
        return self._connection.execute(statement)


def lock_name(tables: RollupTables) -> str:
    """Return the name of the lock that whoever changes sums holds."""
    return tables.upkeep.name


def _parsed(moment: Any) -> datetime:
    """Return what `Dialect.moment` selects as aware UTC."""
    found: datetime = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
    return found.replace(tzinfo=timezone.utc)
