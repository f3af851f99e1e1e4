"""`summarize` in SQL: from the hourly and daily sums where they say it all, else from the rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any, Literal

import msgspec
import sqlalchemy as sa

from flask_usage_metrics.records.methods import METHODS
from flask_usage_metrics.records.query import Every, Filter, truncate
from flask_usage_metrics.records.summary import Summary, Sums, make_summary, summary_order
from flask_usage_metrics.storage.sql.dialects.base import Dialect, period_start
from flask_usage_metrics.storage.sql.query import Query
from flask_usage_metrics.storage.sql.rollup_tables import (
    AT_MOST,
    DIMENSIONS,
    SUMS,
    RollupTables,
    spelled,
)


class Range(msgspec.Struct, frozen=True):
    """A range of time, and the table that is read for it.

    Attributes:
        table: ``"records"`` (rows are added up), or ``"hourly"`` or ``"daily"`` (sums are).
        since: Start, included, aware UTC; None: from the first.
        until: End, not included, aware UTC; None: to the last.
        dirty_hours: Hours, as `Dialect.period` spells them, whose sums are stale. Of the records
            only their rows are read, of the sums all but theirs (frozen sums are never stale).
            Empty: all of the range is read.
    """

    table: Literal["records", "hourly", "daily"]
    since: datetime | None
    until: datetime | None
    dirty_hours: Sequence[str] = ()


class Summarizer:
    """One call of `Storage.summarize`, within one transaction that only reads.

    Args:
        tables: The sums, and the records.
        connection: In the transaction, where `Dialect.snapshot` was called.
        dialect: Of the database.
        wanted: Which records are meant.
        fields: Fields to group by.
        every: Period to group by as well; None: none.
        bounds: Upper bounds of the latency buckets, in seconds, ascending.
        visitors: Whether different visitors are counted, which takes rows.
        methods: Methods that are told apart.
    """

    def __init__(
        self,
        tables: RollupTables,
        connection: sa.Connection,
        dialect: Dialect,
        wanted: Filter,
        fields: Sequence[str],
        every: Every | None,
        bounds: Sequence[float],
        *,
        visitors: bool,
        methods: Set[str],
    ) -> None:
        self._tables = tables
        self._connection = connection
        self._dialect = dialect
        self._wanted = wanted
        self._fields = fields
        self._every = every
        self._bounds = bounds
        self._visitors = visitors
        self._methods = methods

    def answer(self) -> list[Summary]:
        """Return what `Storage.summarize` does, in its order."""
        ranges = self._ranges()
        size = len(self._fields) + (self._every is not None)
        added: dict[tuple[Any, ...], list[Any]] = {}
        for each in ranges:
            for row in self._read(each):
                key, numbers = tuple(row[:size]), row[size:]
                if not numbers[0]:
                    # Without grouping there is a row even if there are no records.
                    continue
                sums = added.get(key)
                if sums is None:
                    added[key] = list(numbers)
                else:
                    added[key] = [
                        None if one is None else one + other
                        for one, other in zip(sums, numbers, strict=True)
                    ]
        rolled_up = ranges[0].table != "records"
        summaries = [self._summary(key, sums, rolled_up=rolled_up) for key, sums in added.items()]
        return sorted(summaries, key=summary_order)

    def _summary(self, key: tuple[Any, ...], sums: Sequence[Any], *, rolled_up: bool) -> Summary:
        requests, errors, sent, seconds, streams, first, visitors, *at_most = sums
        start, values = (None, key) if self._every is None else (period_start(key[0]), key[1:])
        # MySQL's and PostgreSQL's sums of integers are decimals.
        upto = [0, *map(int, at_most), int(requests)]
        return make_summary(
            dict(zip(self._fields, values, strict=True)),
            start,
            Sums(int(requests), int(errors), int(sent), float(seconds), int(streams), float(first)),
            [count - below for below, count in pairwise(upto)],
            self._bounds,
            visitors,
            rolled_up=rolled_up,
        )

    def _ranges(self) -> list[Range]:
        """Return what to read; each request is counted by exactly one range.

        An hour of which only a part is wanted is read from its rows: pruned ones are missing.
        """
        since, until = self._wanted.since, self._wanted.until
        rows_only = [Range("records", since, until)]
        asked = {*self._fields, *self._wanted.any_of}
        if self._visitors or self._wanted.path_prefixes is not None or not asked <= {*DIMENSIONS}:
            return rows_only
        if not METHODS.issuperset(self._wanted.any_of.get("method", ())):
            return rows_only  # sums do not tell unusual ones apart
        reached = self._tables.reached(self._connection)
        if reached is None:
            return rows_only
        try:
            first = None if since is None else _rounded_up(since, "hour")
        except OverflowError:  # the last hour there is
            return rows_only
        last = None if until is None else truncate(until, "hour")
        end = reached if last is None else min(last, reached)
        if first is not None and first >= end:
            return rows_only
        dirty = self._tables.dirty_hours(self._connection, end)
        if first is not None:
            dirty = [hour for hour in dirty if hour >= spelled(first)]
        if dirty:  # until they are rolled up again
            ranges = [Range("hourly", first, last, dirty), Range("records", first, end, dirty)]
        else:
            ranges = [*_whole_hours(first, last, end, self._every)]
        if since is not None and first is not None and since < first:
            ranges.append(Range("records", since, first))
        if until is None or end < until:
            ranges.append(Range("records", end, until))
        return ranges

    def _read(self, wanted: Range) -> Iterator[Sequence[Any]]:
        """Yield rows like those of `Query.sums`; several may be of the same group."""
        table = getattr(self._tables, wanted.table)
        query = Query(table, self._dialect, self._methods)
        times = {"since": wanted.since, "until": wanted.until}
        conditions = query.conditions(msgspec.structs.replace(self._wanted, **times))
        if wanted.table == "records":
            if wanted.dirty_hours:
                conditions.append(self._dialect.any_of(query.period("hour"), wanted.dirty_hours))
            yield from self._connection.execute(
                query.sums(
                    conditions, self._fields, self._every, self._bounds, visitors=self._visitors
                )
            )
            return
        if wanted.dirty_hours:
            is_dirty = self._dialect.any_of(query.period("hour"), wanted.dirty_hours)
            conditions.append(sa.or_(table.c.frozen == sa.true(), sa.not_(is_dirty)))
        groups = [query.group(field) for field in self._fields]
        if self._every is not None:
            groups.insert(0, query.period(self._every))
        known = self._tables.bounds(self._connection)
        widest = max(map(len, known.values()), default=0)
        columns = [table.c[name] for name in (*SUMS, *AT_MOST[:widest])]
        selected = (
            # Null where only versions added up that did not know a column.
            sa.select(
                *groups,
                table.c.bounds,
                *(sa.func.coalesce(sa.func.sum(column), 0) for column in columns),
            )
            .where(*conditions)
            .group_by(*groups, table.c.bounds)
        )
        columns_of = {number: _columns_of(theirs, self._bounds) for number, theirs in known.items()}
        size = len(groups)
        start = size + 1 + len(SUMS)
        for row in self._connection.execute(selected):
            counts = row[start:]
            at_most = [0 if index is None else counts[index] for index in columns_of[row[size]]]
            yield (*row[:size], *row[size + 1 : start], None, *at_most)


def _whole_hours(
    first: datetime | None, last: datetime | None, end: datetime, every: Every | None
) -> Iterator[Range]:
    """Yield the ranges for whole hours: days where these do, else hours.

    Args:
        first: Start of the first hour; None: from the first there is.
        last: End of the last hour; None: to the last there is.
        end: End of the last wanted hour that is rolled up.
        every: See `Summarizer`.
    """
    # Beyond the hours that are rolled up there may be sums of rows that were pruned early: hence
    # to the last, not to the end.
    first_day = None if first is None else _rounded_up(first, "day")
    last_day = truncate(end, "day")
    if every == "hour" or (first_day is not None and first_day >= last_day):
        yield Range("hourly", first, last)
        return
    if first is not None and first_day is not None and first < first_day:
        yield Range("hourly", first, first_day)
    yield Range("daily", first_day, last_day)
    if last is None or last_day < last:
        yield Range("hourly", last_day, last)


def _columns_of(known: Sequence[float], bounds: Sequence[float]) -> list[int | None]:
    """Return for each bound the index of the greatest known one not above it; None: none is."""
    indexes: list[int | None] = []
    for bound in bounds:
        below = [index for index, one in enumerate(known) if one <= bound]
        indexes.append(below[-1] if below else None)
    return indexes


def _rounded_up(moment: datetime, every: Literal["hour", "day"]) -> datetime:
    start = truncate(moment, every)
    if start == moment:
        return start
    return start + (timedelta(hours=1) if every == "hour" else timedelta(days=1))
