"""Summaries: sums and quantiles over the records of a group, as the read API returns them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence, Set
from datetime import datetime
from typing import Any

import msgspec

from flask_usage_metrics.records.methods import METHODS, OTHER_METHOD
from flask_usage_metrics.records.query import Every, truncate, value_of
from flask_usage_metrics.records.record import UsageRecord

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""Upper bounds of the latency buckets, in seconds: those of OpenTelemetry's HTTP server metrics
(semantic-conventions, http-metrics) and of client_python's default."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over the records of one group.

    Attributes:
        group: The value of each field grouped by; ``"_OTHER"`` for all methods but HTTP's nine and
            those that the app's rules name, as strangers can make up any number.
        start: Start of the hour, day or month (aware UTC); None when not asked for.
        requests: Number of records.
        errors: Number of these with a 5xx status (`UsageRecord.is_server_error`).
        bytes_sent: Bytes of the responses' bodies.
        duration_seconds_sum: Seconds the requests took, added up.
        streams: Number of these that were answered by a stream (`UsageRecord.first_byte_seconds`).
        first_byte_seconds_sum: Seconds until the first byte of these streams, added up.
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
    streams: int = 0
    first_byte_seconds_sum: float = 0.0


class Sums(msgspec.Struct):
    """The sums of a group, as `Summary` names them."""

    requests: int = 0
    errors: int = 0
    bytes_sent: int = 0
    duration_seconds_sum: float = 0.0
    streams: int = 0
    first_byte_seconds_sum: float = 0.0


def summarize_records(
    records: Iterable[UsageRecord],
    fields: Sequence[str],
    every: Every | None,
    bounds: Sequence[float],
    *,
    visitors: bool = False,
    methods: Set[str] = METHODS,
) -> list[Summary]:
    """Add up records by group, for a storage that cannot aggregate by itself.

    Memory grows with the number of groups, not of records; with `visitors` also with the number of
    different visitors of each group.
    """
    groups: dict[tuple[Any, ...], _Group] = {}
    for record in records:
        start = truncate(record.started_at, every) if every else None
        key = (start, *(_group_value(record, field, methods) for field in fields))
        group = groups.get(key)
        if group is None:
            group = groups[key] = _Group(Sums(), [0] * (len(bounds) + 1), set())
        sums = group.sums
        sums.requests += 1
        sums.errors += record.is_server_error
        sums.bytes_sent += record.bytes_sent
        sums.duration_seconds_sum += record.duration_seconds
        if record.first_byte_seconds is not None:
            sums.streams += 1
            sums.first_byte_seconds_sum += record.first_byte_seconds
        group.counts[bisect_left(bounds, record.duration_seconds)] += 1
        if visitors and record.visitor is not None:
            group.visitors.add(record.visitor)
    summaries = [
        make_summary(
            dict(zip(fields, key[1:], strict=True)),
            key[0],
            group.sums,
            group.counts,
            bounds,
            len(group.visitors) if visitors else None,
        )
        for key, group in groups.items()
    ]
    return sorted(summaries, key=summary_order)


def _group_value(record: UsageRecord, field: str, methods: Set[str]) -> Any:
    value = value_of(record, field)
    return OTHER_METHOD if field == "method" and value not in methods else value


class _Group(msgspec.Struct):
    sums: Sums
    counts: list[int]
    visitors: set[str]


def make_summary(
    group: dict[str, Any],
    start: datetime | None,
    sums: Sums,
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
        sums: Of its records.
        counts: See `quantile`.
        bounds: See `quantile`.
        visitors: Number of different visitors; None when it was not asked for.
        rolled_up: See `Summary`.
    """
    return Summary(
        group=group,
        start=start,
        **msgspec.structs.asdict(sums),
        p50=quantile(0.5, counts, bounds),
        p95=quantile(0.95, counts, bounds),
        p99=quantile(0.99, counts, bounds),
        visitors=visitors,
        rolled_up=rolled_up,
    )


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
