"""Summaries from sums by hour and by day, as far as there are any, and from rows for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any, Literal

import msgspec
import sqlalchemy as sa

from flask_usage_metrics.records.query import (
    Every,
    Filter,
    Summary,
    make_summary,
    summary_order,
    truncate,
)
from flask_usage_metrics.storage.sql.dialects.base import Dialect, period_start
from flask_usage_metrics.storage.sql.query import Query
from flask_usage_metrics.storage.sql.rollup_tables import (
    AT_MOST,
    DIMENSIONS,
    SUMS,
    RollupTables,
    spelled,
)


class Piece(msgspec.Struct, frozen=True):
    """A part of a range, and what is read for it.

    Attributes:
        source: Rows, or sums by hour or by day.
        since: Start, included, aware UTC; None: from the first.
        until: End, not included; None: to the last.
        late: Hours, as `Dialect.period`, whose sums are not what the rows are. Rows are read of
            these only, sums without what they say of these rows. Empty: there are none.
    """

    source: Literal["records", "hourly", "daily"]
    since: datetime | None
    until: datetime | None
    late: Sequence[str] = ()


class Summarizer:
    """Answers one question, in a transaction that reads.

    Args:
        tables: The sums, and the records.
        connection: In the transaction.
        dialect: Of the database.
        wanted: Which records are meant.
        fields: What is grouped by.
        every: What else.
        bounds: Upper bounds of the latency buckets, in seconds, ascending.
        visitors: Whether different visitors are counted, which no sums can tell.
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
    ) -> None:
        self._tables = tables
        self._connection = connection
        self._dialect = dialect
        self._wanted = wanted
        self._fields = fields
        self._every = every
        self._bounds = bounds
        self._visitors = visitors

    def answer(self) -> list[Summary]:
        """Do the work of `Storage.summarize`."""
        pieces = self._divide()
        size = len(self._fields) + (self._every is not None)
        added: dict[tuple[Any, ...], list[Any]] = {}
        for piece in pieces:
            for row in self._read(piece):
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
        rolled_up = pieces[0].source != "records"
        summaries = [self._summary(key, sums, rolled_up=rolled_up) for key, sums in added.items()]
        return sorted(summaries, key=summary_order)

    def _summary(self, key: tuple[Any, ...], sums: Sequence[Any], *, rolled_up: bool) -> Summary:
        requests, errors, bytes_sent, seconds, visitors, *at_most = sums
        start, values = (None, key) if self._every is None else (period_start(key[0]), key[1:])
        # MySQL's and PostgreSQL's sums of integers are decimals.
        upto = [0, *map(int, at_most), int(requests)]
        return make_summary(
            dict(zip(self._fields, values, strict=True)),
            start,
            (int(requests), int(errors), int(bytes_sent), float(seconds)),
            [count - below for below, count in pairwise(upto)],
            self._bounds,
            visitors,
            rolled_up=rolled_up,
        )

    def _divide(self) -> list[Piece]:
        """Return what to read, so that each request is in one piece.

        An hour that is meant in part only is read from its rows: what of it was pruned is missing.
        """
        since, until = self._wanted.since, self._wanted.until
        rows_only = [Piece("records", since, until)]
        asked = {*self._fields, *self._wanted.any_of}
        if self._visitors or self._wanted.path_prefixes is not None or not asked <= {*DIMENSIONS}:
            return rows_only
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
        late = self._tables.late(self._connection, end)
        if first is not None:
            late = [hour for hour in late if hour >= spelled(first)]
        if late:  # for the moment
            pieces = [Piece("hourly", first, last, late), Piece("records", first, end, late)]
        else:
            pieces = [*_whole_hours(first, last, end, self._every)]
        if since is not None and first is not None and since < first:
            pieces.append(Piece("records", since, first))
        if until is None or end < until:
            pieces.append(Piece("records", end, until))
        return pieces

    def _read(self, piece: Piece) -> Iterator[Sequence[Any]]:
        """Yield rows as `Query.sums`, several of which may be of the same group."""
        table = getattr(self._tables, piece.source)
        query = Query(table, self._dialect)
        times = {"since": piece.since, "until": piece.until}
        conditions = query.conditions(msgspec.structs.replace(self._wanted, **times))
        if piece.source == "records":
            if piece.late:
                conditions.append(self._dialect.any_of(query.period("hour"), piece.late))
            yield from self._connection.execute(
                query.sums(
                    conditions, self._fields, self._every, self._bounds, visitors=self._visitors
                )
            )
            return
        if piece.late:
            is_late = self._dialect.any_of(query.period("hour"), piece.late)
            conditions.append(sa.or_(table.c.frozen == sa.true(), sa.not_(is_late)))
        groups = [query.field(field) for field in self._fields]
        if self._every is not None:
            groups.insert(0, query.period(self._every))
        known = self._tables.bounds(self._connection)
        widest = max(map(len, known.values()), default=0)
        columns = [table.c[name] for name in (*SUMS, *AT_MOST[:widest])]
        selected = (
            sa.select(*groups, table.c.bounds, *map(sa.func.sum, columns))
            .where(*conditions)
            .group_by(*groups, table.c.bounds)
        )
        places = {number: _places(theirs, self._bounds) for number, theirs in known.items()}
        size = len(groups)
        start = size + 1 + len(SUMS)
        for row in self._connection.execute(selected):
            counts = row[start:]
            at_most = [0 if place is None else counts[place] for place in places[row[size]]]
            yield (*row[:size], *row[size + 1 : start], None, *at_most)


def _whole_hours(
    first: datetime | None, last: datetime | None, end: datetime, every: Every | None
) -> Iterator[Piece]:
    # Beyond the hours that are rolled up there may be sums of rows that were pruned early: hence
    # to the last, not to the end.
    first_day = None if first is None else _rounded_up(first, "day")
    last_day = truncate(end, "day")
    if every == "hour" or (first_day is not None and first_day >= last_day):
        yield Piece("hourly", first, last)
        return
    if first is not None and first_day is not None and first < first_day:
        yield Piece("hourly", first, first_day)
    yield Piece("daily", first_day, last_day)
    if last is None or last_day < last:
        yield Piece("hourly", last_day, last)


def _places(known: Sequence[float], bounds: Sequence[float]) -> list[int | None]:
    """Return for each bound the place of the greatest known one that is not above it."""
    places: list[int | None] = []
    for bound in bounds:
        below = [place for place, one in enumerate(known) if one <= bound]
        places.append(below[-1] if below else None)
    return places


def _rounded_up(moment: datetime, every: Literal["hour", "day"]) -> datetime:
    start = truncate(moment, every)
    if start == moment:
        return start
    return start + (timedelta(hours=1) if every == "hour" else timedelta(days=1))
