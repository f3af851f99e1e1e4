"""Rollups: hourly and daily sums of the rows of a SQL table, kept when the rows are pruned.

An hour that is over is rolled up once: its rows are added up by endpoint, method, status, country
and client. Later changes of its rows keep the sums right at the end of every transaction, even if a
process dies in between:

- Writing a row whose hour is over, or erasing one, marks the hour *dirty* in the same transaction.
  A dirty hour is rolled up again, from all its rows; until then it is read from its rows.
- Pruning rows adds them to *frozen* sums in the transaction that deletes them. Rolling up again
  replaces the other sums only.

So the sums of an hour are those of its rows and of the rows that were pruned.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from datetime import datetime, timedelta, timezone
from typing import Any

import sqlalchemy as sa

from flask_usage_metrics.records.query import Filter, next_start, truncate
from flask_usage_metrics.storage.sql.dialects.base import Dialect, period_start
from flask_usage_metrics.storage.sql.query import Query
from flask_usage_metrics.storage.sql.rollup_tables import (
    AT_MOST,
    BOUNDS,
    DIMENSIONS,
    DIRTY,
    MOST_BOUNDS,
    REACHED,
    SUMS,
    RollupTables,
    spelled,
)
from flask_usage_metrics.storage.sql.table import MOMENT

CLOSING = timedelta(minutes=5)
"""Time between the end of an hour and its rollup; by then nearly all its rows are written."""

_LATE = CLOSING - timedelta(minutes=1)
"""Time after an hour's end from which on a row written into it makes it dirty: a minute shorter
than `CLOSING`, for transactions that take long and clocks that differ."""

_HOUR = timedelta(hours=1)
_DAY = timedelta(days=1)
_MARKS_AT_ONCE = 500


def mark_dirty(
    tables: RollupTables, connection: sa.Connection, moments: Sequence[datetime], now: datetime
) -> None:
    """Mark as dirty the hours that are over and that this transaction has written rows into.

    Args:
        tables: The sums.
        connection: In the transaction.
        moments: Start times of the rows' requests, aware; one at least.
        now: Aware UTC.
    """
    over = truncate(now - _LATE, "hour")
    if min(moments) >= over:  # nearly always
        return
    late = [moment for moment in moments if moment < over]
    marks = []
    # Hour by hour: there are few hours, and truncating every moment is slow.
    while late:
        hour = truncate(min(late).astimezone(timezone.utc), "hour")
        marks.append({"what": DIRTY, "note": spelled(hour)})
        late = [moment for moment in late if moment >= hour + _HOUR]
    connection.execute(sa.insert(tables.upkeep), marks)


def mark_dirty_where(
    tables: RollupTables, connection: sa.Connection, dialect: Dialect, rows: sa.ColumnElement[bool]
) -> None:
    """Mark as dirty the hours of rows that this transaction is about to erase.

    Args:
        tables: The sums.
        connection: In the transaction.
        dialect: Of the database.
        rows: Condition for the rows.
    """
    period = Query(tables.records, dialect).period("hour")
    hours = sa.select(sa.literal(DIRTY), period).where(rows).distinct()
    connection.execute(sa.insert(tables.upkeep).from_select(["what", "note"], hours))


class Rollups:
    """Changes the sums within one transaction.

    Args:
        tables: The sums.
        connection: In the transaction, which holds the lock (`Dialect.lock`) with the name of the
            upkeep table.
        dialect: Of the database.
        bounds: Upper bounds of the latency buckets, in seconds, ascending.
        methods: Methods that are told apart.
    """

    def __init__(
        self,
        tables: RollupTables,
        connection: sa.Connection,
        dialect: Dialect,
        bounds: Sequence[float],
        methods: Set[str],
    ) -> None:
        self._tables = tables
        self._connection = connection
        self._dialect = dialect
        self._methods = methods
        self._query = Query(tables.records, dialect, methods)
        step = -(-len(bounds) // MOST_BOUNDS)
        self._bounds = bounds if step <= 1 else bounds[::-step][::-1]

    def advance(self, now: datetime) -> bool:
        """Roll up the next hour, or a dirty one; return whether there may be more to do.

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
        if self._roll_up_dirty(reached):
            return True
        over = truncate(now - CLOSING, "hour")
        if reached >= over:
            return False
        first = self._first(reached, over)
        # `max`: SQLite compares times as texts, and a row may hold one in another spelling.
        hour = None if first is None else max(truncate(first, "hour"), reached)
        if hour is not None:
            self._roll_up(hour)
        end = over if hour is None else hour + _HOUR
        self._reach(end)
        for day in self._days(truncate(reached, "day"), truncate(end, "day")):
            self._roll_up_day(day)
        return hour is not None

    def prune(self, before: datetime, limit: int) -> int | None:
        """Delete some old rows, and keep their sums.

        Args:
            before: Rows of requests that started before then are old; aware UTC.
            limit: Most rows to delete.

        Returns:
            Rows deleted, all of one hour; None if there are no old rows.
        """
        moment = self._query.moment
        key = self._tables.records.c.id
        found: Sequence[Any] = self._execute(
            sa.select(key, moment)
            .where(*self._query.conditions(Filter(until=before)))
            .order_by(moment)
            .limit(limit)
            # Else another transaction could erase a row first, and it would stay in the sums.
            .with_for_update()
        ).all()
        if not found:
            return None
        hour = truncate(_parsed(found[0][1]), "hour")
        # By key: a row that is written meanwhile is in no sum, so it must not be deleted.
        keys = [number for number, started in found if truncate(_parsed(started), "hour") == hour]
        doomed = self._dialect.any_of(key, keys)
        self._add_up(hour, doomed, frozen=True)
        reached = self._tables.reached(self._connection)
        if reached is not None and hour < reached:
            # Subtracted from the hour's sums, which is less work than to add up the rows left.
            self._add_up(hour, doomed, frozen=False, sign=-1)
        self._dialect.delete(self._connection, self._tables.records, doomed)
        if self._first(hour, next_start(hour, "hour")) is None:
            self._forget(hour)
        return len(keys)

    def _first(self, since: datetime | None, until: datetime | None) -> datetime | None:
        """Return when the first request of a range started, aware UTC; None: it has none."""
        moment = self._query.moment
        found = self._execute(
            sa.select(moment)
            .where(*self._query.conditions(Filter(since=since, until=until)))
            .order_by(moment)
            .limit(1)
        ).scalar()
        return None if found is None else _parsed(found)

    def _reach(self, moment: datetime) -> None:
        """Note that all hours before this one are rolled up."""
        upkeep = self._tables.upkeep
        self._execute(sa.delete(upkeep).where(upkeep.c.what == REACHED))
        self._execute(sa.insert(upkeep).values(what=REACHED, note=spelled(moment)))

    def _roll_up_dirty(self, reached: datetime) -> bool:
        """Roll up the first dirty hour again; return whether there was one before `reached`."""
        upkeep = self._tables.upkeep
        marks = upkeep.c
        marked = sa.and_(marks.what == DIRTY, marks.note < spelled(reached))
        dirty = self._execute(sa.select(sa.func.min(marks.note)).where(marked)).scalar()
        if dirty is None:
            return False
        # By id: a mark that is committed from now on must stay.
        ids = self._execute(
            sa.select(marks.id)
            .where(marks.what == DIRTY, marks.note == dirty)
            .limit(_MARKS_AT_ONCE)
        ).scalars()
        self._execute(sa.delete(upkeep).where(marks.id.in_(ids.all())))
        hour = period_start(dirty)
        self._roll_up(hour)
        day = truncate(hour, "day")
        if day + _DAY <= reached:
            self._roll_up_day(day)
        return True

    def _roll_up(self, hour: datetime) -> None:
        """Replace the sums of an hour's rows; the frozen ones stay."""
        self._forget(hour)
        rows = self._query.conditions(Filter(since=hour, until=hour + _HOUR))
        self._add_up(hour, sa.and_(*rows), frozen=False)

    def _forget(self, hour: datetime) -> None:
        """Delete the sums of an hour's rows; the frozen ones stay."""
        hourly = self._tables.hourly
        is_it = self._dialect.moment(hourly.c.datetime) == self._dialect.bind_moment(hour)
        self._execute(sa.delete(hourly).where(is_it, hourly.c.frozen == sa.false()))

    def _add_up(
        self, hour: datetime, rows: sa.ColumnElement[bool], *, frozen: bool, sign: int = 1
    ) -> None:
        """Add the sums of some of an hour's rows, or subtract them.

        Args:
            hour: Its start, aware UTC.
            rows: Condition for the rows.
            frozen: Which sums of the hour are changed.
            sign: 1 to add, -1 to subtract.
        """
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
        """Return the starts of the days of a range that have hourly sums."""
        query = Query(self._tables.hourly, self._dialect)
        conditions = query.conditions(Filter(since=since, until=until))
        found = self._execute(sa.select(query.period("day")).where(*conditions).distinct())
        return [period_start(day) for day in found.scalars()]

    def _roll_up_day(self, day: datetime) -> None:
        """Replace the sums of a day by those of its hours."""
        hourly, daily = self._tables.hourly, self._tables.daily
        whole = Filter(since=day, until=day + _DAY)
        # By `group` again: older versions kept unusual methods apart in the sums of an hour.
        hours = Query(hourly, self._dialect, self._methods)
        keys = [hourly.c.bounds, *map(hours.group, DIMENSIONS)]
        columns = [*SUMS, *AT_MOST]
        selected = (
            sa.select(
                sa.literal(day.replace(tzinfo=None), MOMENT),
                *keys,
                *(sa.func.sum(hourly.c[name]) for name in columns),
            )
            .where(*hours.conditions(whole))
            .group_by(*keys)
            .having(sa.func.sum(hourly.c.requests) != 0)
        )
        self._execute(sa.delete(daily).where(*Query(daily, self._dialect).conditions(whole)))
        names = ["datetime", "bounds", *DIMENSIONS, *columns]
        self._execute(sa.insert(daily).from_select(names, selected))

    def _bounds_id(self) -> int:
        """Return the id of the bounds in the upkeep table, where they are noted if need be."""
        upkeep = self._tables.upkeep
        rows = upkeep.c
        bounds = " ".join(map(repr, self._bounds))
        known = sa.select(rows.id).where(rows.what == BOUNDS, rows.note == bounds)
        found = self._execute(known).scalar()
        if found is None:
            self._execute(sa.insert(upkeep).values(what=BOUNDS, note=bounds))
            found = self._execute(known).scalar_one()
        return int(found)

    def _execute(self, statement: sa.Executable) -> sa.CursorResult[Any]:
        return self._connection.execute(statement)


def _parsed(moment: Any) -> datetime:
    """Return a time as `Dialect.moment` selects it, a text or naive, as aware UTC."""
    found: datetime = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
    return found.replace(tzinfo=timezone.utc)
