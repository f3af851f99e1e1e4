"""Filters and summaries of the read API, and how records are added up where SQL cannot."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any, Literal

import msgspec

from flask_usage_metrics.records.record import UsageRecord

Order = Literal["oldest", "newest"]
Every = Literal["hour", "day", "month"]

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""Upper bounds of the latency buckets, in seconds: those of OpenTelemetry's HTTP server metrics
(semantic-conventions, http-metrics) and of client_python's default."""

EQUALITY_FILTERS = (
    "endpoint",
    "method",
    "status",
    "country",
    "client",
    "path",
    "username",
    "blueprint",
    "visitor",
    "trace_id",
    "remote_addr",
    "consumer",
    "url",
    "user_agent",
    "language",
    "app",
)
"""Filters that compare for equality: fields of the record by these names, and `url`."""

GROUP_FIELDS = (*EQUALITY_FILTERS, "browser", "platform", "exception", "rule")
"""Fields of the record that `summarize` can group by, and `url`."""


class Filter(msgspec.Struct, frozen=True):
    """The records that a read call selects: those for which all conditions hold.

    Attributes:
        since: Aware UTC; included. None: from the first.
        until: Aware UTC; not included. None: to the last.
        any_of: For each field, the values it may have; None among them means unknown.
        status_classes: First digits the status may have, such as ``{5}``; None: any.
        path_prefixes: Beginnings the path may have; None: any.
    """

    since: datetime | None = None
    until: datetime | None = None
    any_of: dict[str, tuple[Any, ...]] = {}
    status_classes: frozenset[int] | None = None
    path_prefixes: tuple[str, ...] | None = None

    @classmethod
    def parse(
        cls, since: datetime | None, until: datetime | None, conditions: dict[str, Any]
    ) -> Filter:
        """Check the arguments of a read call.

        Args:
            since: Start of the range, included; naive means UTC.
            until: End of the range, not included; naive means UTC.
            conditions: By name of the filter a value, or a list of values any of which may hold.

        Raises:
            TypeError: A filter of that name is not known.
            ValueError: A status class is not like ``"5xx"``.
        """
        any_of: dict[str, tuple[Any, ...]] = {}
        status_classes: frozenset[int] | None = None
        path_prefixes: tuple[str, ...] | None = None
        for name, given in conditions.items():
            values = as_tuple(given)
            if name in EQUALITY_FILTERS:
                any_of[name] = values
            elif name == "status_class":
                status_classes = frozenset(_status_class(value) for value in values)
            elif name == "path_prefix":
                path_prefixes = tuple(str(value) for value in values)
            else:
                known = ", ".join((*EQUALITY_FILTERS, "status_class", "path_prefix"))
                raise TypeError(f"unknown filter {name!r}: expected one of {known}")
        return cls(as_utc(since), as_utc(until), any_of, status_classes, path_prefixes)

    def matches(self, record: UsageRecord) -> bool:
        """Tell whether a record is selected."""
        if self.since is not None and record.started_at < self.since:
            return False
        if self.until is not None and record.started_at >= self.until:
            return False
        if self.status_classes is not None and record.status // 100 not in self.status_classes:
            return False
        if self.path_prefixes is not None and not record.path.startswith(self.path_prefixes):
            return False
        return all(getattr(record, field) in values for field, values in self.any_of.items())


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over the records of one group.

    Attributes:
        group: The value of each field grouped by.
        start: Start of the hour, day or month (aware UTC); None when not asked for.
        requests: Number of records.
        errors: Number of these with a 5xx status (`UsageRecord.is_server_error`).
        bytes_sent: Bytes of the responses' bodies.
        duration_seconds_sum: Seconds the requests took, added up.
        p50: Median of the duration in seconds, estimated inside its bucket as Prometheus does.
        p95: 95th percentile, likewise.
        p99: 99th percentile, likewise.
        visitors: Number of different identifiers of visitors; None when not asked for.
        rolled_up: Whether any of it was read from sums by hour and day, which stay when records
            are pruned: then there may be fewer records.
    """

    group: dict[str, Any]
    start: datetime | None
    requests: int
    errors: int
    bytes_sent: int
    duration_seconds_sum: float
    p50: float
    p95: float
    p99: float
    visitors: int | None = None
    rolled_up: bool = False


def as_tuple(given: Any) -> tuple[Any, ...]:
    """Return the values given to a filter: those of a list, tuple or set, else the one value."""
    if isinstance(given, list | tuple | set | frozenset):
        return tuple(given)
    return (given,)


def as_utc(moment: datetime | None) -> datetime | None:
    """Return the moment in UTC; a naive one is taken as UTC."""
    if moment is None:
        return None
    if moment.tzinfo is None:
        return moment.replace(tzinfo=timezone.utc)
    return moment.astimezone(timezone.utc)


def truncate(moment: datetime, every: Every) -> datetime:
    """Return the start of the hour, day or month a moment lies in."""
    start = moment.replace(minute=0, second=0, microsecond=0)
    if every == "hour":
        return start
    start = start.replace(hour=0)
    return start if every == "day" else start.replace(day=1)


def next_start(start: datetime, every: Every) -> datetime | None:
    """Return the start of the next hour, day or month.

    Args:
        start: As `truncate` returns it.
        every: ``"hour"``, ``"day"`` or ``"month"``.

    Returns:
        Aware UTC, as `start` is; None if it would be after the year 9999.
    """
    length = {"hour": timedelta(hours=1), "day": timedelta(days=1), "month": timedelta(days=31)}
    try:
        return truncate(start + length[every], every)
    except OverflowError:
        return None


def check_grouping(by: Collection[str], every: str | None) -> tuple[str, ...]:
    """Check the arguments of `summarize` and return the fields to group by.

    Raises:
        ValueError: A field or a period of that name is not known.
    """
    fields = (by,) if isinstance(by, str) else tuple(by)
    for field in fields:
        if field not in GROUP_FIELDS:
            raise ValueError(
                f"cannot group by {field!r}: expected one of {', '.join(GROUP_FIELDS)}"
            )
    if every not in (None, "hour", "day", "month"):
        raise ValueError(f"every must be 'hour', 'day', 'month' or None, not {every!r}")
    return fields


def quantile(q: float, counts: Sequence[int], bounds: Sequence[float]) -> float:
    """Estimate a quantile from bucket counts as Prometheus' `histogram_quantile` does.

    Args:
        q: Between 0 and 1.
        counts: Records in each bucket (not cumulative); one more than `bounds`, the last being
            those above the highest bound.
        bounds: Upper bounds in seconds, ascending.

    Returns:
        Seconds, interpolated linearly inside the bucket; the highest bound when the quantile lies
        above it; NaN without records.
    """
    total = sum(counts)
    if not total:
        return float("nan")
    rank = q * total
    below = 0
    for position, count in enumerate(counts[:-1]):
        if below + count >= rank and count:
            lower = bounds[position - 1] if position else 0.0
            return lower + (bounds[position] - lower) * (rank - below) / count
        below += count
    return bounds[-1]


def summary_order(summary: Summary) -> tuple[Any, ...]:
    """Return a sort key of summaries: by start, the busiest group first, then by its values."""
    names = tuple((value is not None, str(value)) for value in summary.group.values())
    start = summary.start.timestamp() if summary.start else 0.0
    return (start, -summary.requests, names)


def summarize_records(
    records: Iterable[UsageRecord],
    fields: Sequence[str],
    every: Every | None,
    bounds: Sequence[float],
    *,
    visitors: bool = False,
) -> list[Summary]:
    """Add up records by group, for a storage that cannot aggregate by itself.

    Memory grows with the number of groups, not of records; with `visitors` also with the number of
    different visitors of each group.
    """
    sums: dict[tuple[Any, ...], _Sums] = {}
    for record in records:
        start = truncate(record.started_at, every) if every else None
        key = (start, *(getattr(record, field) for field in fields))
        group = sums.get(key)
        if group is None:
            group = sums[key] = _Sums([0] * (len(bounds) + 1), set())
        group.requests += 1
        group.errors += record.is_server_error
        group.bytes_sent += record.bytes_sent
        group.duration_seconds_sum += record.duration_seconds
        group.counts[bisect_left(bounds, record.duration_seconds)] += 1
        if visitors and record.visitor is not None:
            group.visitors.add(record.visitor)
    summaries = [
        make_summary(
            dict(zip(fields, key[1:], strict=True)),
            key[0],
            (group.requests, group.errors, group.bytes_sent, group.duration_seconds_sum),
            group.counts,
            bounds,
            len(group.visitors) if visitors else None,
        )
        for key, group in sums.items()
    ]
    return sorted(summaries, key=summary_order)


def make_summary(
    group: dict[str, Any],
    start: datetime | None,
    sums: tuple[int, int, int, float],
    counts: Sequence[int],
    bounds: Sequence[float],
    visitors: int | None = None,
    *,
    rolled_up: bool = False,
) -> Summary:
    """Build a `Summary` from sums and bucket counts.

    Args:
        group: The value of each field grouped by.
        start: Start of the period, aware UTC, or None.
        sums: Requests, errors, bytes sent, duration in seconds.
        counts: See `quantile`.
        bounds: See `quantile`.
        visitors: Number of different visitors; None when it was not asked for.
        rolled_up: See `Summary`.
    """
    requests, errors, bytes_sent, duration_seconds_sum = sums
    return Summary(
        group=group,
        start=start,
        requests=requests,
        errors=errors,
        bytes_sent=bytes_sent,
        duration_seconds_sum=duration_seconds_sum,
        p50=quantile(0.5, counts, bounds),
        p95=quantile(0.95, counts, bounds),
        p99=quantile(0.99, counts, bounds),
        visitors=visitors,
        rolled_up=rolled_up,
    )


class _Sums(msgspec.Struct):
    counts: list[int]
    visitors: set[str]
    requests: int = 0
    errors: int = 0
    bytes_sent: int = 0
    duration_seconds_sum: float = 0.0


def _status_class(value: Any) -> int:
    text = str(value)
    if len(text) == 3 and text[0] in "12345" and text[1:].lower() == "xx":
        return int(text[0])
    raise ValueError(f"status_class must be like '5xx', not {value!r}")
