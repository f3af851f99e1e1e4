"""The totals behind the metrics: of all apps on one registry, in this process."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import Protocol, TypeVar
from weakref import WeakSet

from flask_usage_metrics.faults import Faults
from flask_usage_metrics.metrics import (
    BUILD_INFO,
    CLIENT_REQUESTS,
    DESCRIPTIONS,
    DURATION,
    EXCEPTIONS,
    FAULTS,
    FOLDED,
    IN_PROGRESS,
    METHODS,
    OTHER_METHOD,
    OTHER_STATUS,
    OVERFLOW,
    PENDING,
    RECORDS,
    REQUEST_BYTES,
    REQUEST_LABELS,
    REQUESTS,
    RESPONSE_BYTES,
    SINK_UP,
    UNKNOWN_COUNTRY,
    UNMATCHED,
    Description,
    Family,
    LabelSet,
    Shape,
)
from flask_usage_metrics.record import UsageRecord

Values = tuple[str, ...]
Row = TypeVar("Row")

_STATUSES = {status: str(status) for status in range(100, 600)}


class Account:
    """What became of the records handed to one sink; each record is in one count at most.

    Attributes:
        sink: Value of the label ``sink``.
        written: Records that were written.
        dropped: Records there was no room for.
        failed: Records that can never be written.
    """

    __slots__ = ("dropped", "failed", "sink", "written")

    def __init__(self, sink: str) -> None:
        self.sink = sink
        self.reset()

    def reset(self) -> None:
        """Start anew, in a forked child."""
        self.written = self.dropped = self.failed = 0

    def add(self, *, written: int = 0, dropped: int = 0, failed: int = 0) -> None:
        """Count records; for one caller at a time."""
        self.written += written
        self.dropped += dropped
        self.failed += failed


class Source(Protocol):
    """What the gauges of one app are read from, at each scrape."""

    def drain(self) -> None:
        """Fold what is buffered; for a bounded time, without waiting for anything remote."""

    def in_progress(self) -> int:
        """Return the number of requests being answered."""

    def pending(self) -> dict[str, int]:
        """Return the number of records each sink has yet to write."""

    def up(self) -> dict[str, bool]:
        """Return whether each sink's last write went well."""


class Totals:
    """Adds up the records of the apps on one registry.

    Args:
        shape: Labels, buckets and bound of the families.
        version: Version of the package.
    """

    def __init__(self, shape: Shape, version: str) -> None:
        self.shape = shape
        self._version = version
        self._sources: WeakSet[Source] = WeakSet()
        self._accounts: list[Account] = []
        self._faults: list[Faults] = []
        self._names = {described: _names(described, shape) for described in DESCRIPTIONS}
        self._picked = [REQUEST_LABELS.index(label) for label in shape.histogram_labels]
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Start at zero: the parent process keeps counting its own."""
        self._lock = threading.Lock()
        self._requests = self._table(REQUESTS, _Latencies)
        # With the same labels the counter and the histogram are the same numbers, kept once.
        same = self.shape.histogram_labels == REQUEST_LABELS
        self._durations = self._requests if same else self._table(DURATION, _Latencies)
        self._exceptions = self._table(EXCEPTIONS, _Count)
        self._sizes = self._table(RESPONSE_BYTES, _Sizes)
        self._clients = self._table(CLIENT_REQUESTS, _Count)
        self._overflow = {"country": 0, "endpoint": 0, "exception": 0}
        for account in self._accounts:
            account.reset()

    # ------------------------------------------------------------------------ writing

    def add(self, records: Iterable[UsageRecord]) -> None:
        """Count records; each is in exactly one series of each family it belongs to."""
        with self._lock:
            for record in records:
                self._add(record)

    def account(self, sink: str) -> Account:
        """Return a new account; accounts of the same sink are added up."""
        account = Account(sink)
        with self._lock:
            self._accounts.append(account)
        return account

    def watch(self, source: Source, faults: Faults) -> None:
        """Read gauges from a source for as long as it lives, and its faults for ever."""
        self._sources.add(source)
        self._faults.append(faults)

    def _add(self, record: UsageRecord) -> None:
        values = (
            record.method if record.method in METHODS else OTHER_METHOD,
            UNMATCHED if record.endpoint is None else record.endpoint,
            _STATUSES.get(record.status, OTHER_STATUS),
            record.country or UNKNOWN_COUNTRY,
        )
        series = self._requests.get(values) or self._first_seen(values)
        seconds = record.duration_seconds
        bucket = bisect_left(self.shape.buckets, seconds)
        series.counts[bucket] += 1
        series.seconds += seconds
        if self._durations is not self._requests:
            folded = series.labels.values
            durations = self._durations[tuple([folded[position] for position in self._picked])]
            durations.counts[bucket] += 1
            durations.seconds += seconds
        sizes = self._sizes[self._sizes.fit(values[1:2], (FOLDED,))]
        sizes.sent += record.bytes_sent
        sizes.received += record.bytes_received or 0
        self._clients[(record.client,)].count += 1
        if record.exception is not None:
            raised = (sizes.labels.values[0], record.exception)
            fitted = self._exceptions.fit(raised, (FOLDED, FOLDED))
            if fitted != raised:
                self._overflow["exception"] += 1
            self._exceptions[fitted].count += 1

    def _first_seen(self, values: Values) -> _Latencies:
        """Return the series of a label set not seen before; a full table folds it."""
        table = self._requests
        if table.is_full():
            method, endpoint, status, _ = values
            self._overflow["country"] += 1
            values = (method, endpoint, status, FOLDED)
            # Some room beyond the bound keeps the endpoints apart for a while longer.
            if values not in table and table.is_full(spare=table.bound // 10):
                self._overflow["endpoint"] += 1
                values = (method, FOLDED, status, FOLDED)
        return table[values]

    def _table(self, described: Description, make: Callable[[LabelSet, Shape], Row]) -> Table[Row]:
        return Table(self._names[described], self.shape, make)

    # ------------------------------------------------------------------------ reading

    def families(self) -> list[Family]:
        """Return all families, after folding what the apps have buffered."""
        sources = list(self._sources)
        for source in sources:
            source.drain()
        taken: dict[Description, list[tuple[LabelSet, float]]] = {}
        with self._lock:
            taken[REQUESTS] = [(row.labels, sum(row.counts)) for row in self._requests.values()]
            histograms = [
                (row.labels, list(accumulate(row.counts)), row.seconds)
                for row in self._durations.values()
            ]
            taken[EXCEPTIONS] = [(row.labels, row.count) for row in self._exceptions.values()]
            taken[RESPONSE_BYTES] = [(row.labels, row.sent) for row in self._sizes.values()]
            taken[REQUEST_BYTES] = [(row.labels, row.received) for row in self._sizes.values()]
            taken[CLIENT_REQUESTS] = [(row.labels, row.count) for row in self._clients.values()]
            computed = {OVERFLOW: _keyed(self._overflow), RECORDS: self._results()}
        computed[IN_PROGRESS] = {(): sum(source.in_progress() for source in sources)}
        computed[PENDING] = _keyed(_merged(sum, [source.pending() for source in sources]))
        computed[SINK_UP] = _keyed(_merged(min, [source.up() for source in sources]))
        computed[FAULTS] = _keyed(_merged(sum, [faults.counts() for faults in self._faults]))
        computed[BUILD_INFO] = {(self._version,): 1}
        for described, values in computed.items():
            names = self._names[described]
            taken[described] = [
                (LabelSet(names, key), value) for key, value in sorted(values.items())
            ]
        return [
            Family(
                described,
                self._names[described],
                taken.get(described, []),
                self.shape.buckets,
                histograms if described is DURATION else [],
            )
            for described in DESCRIPTIONS
        ]

    def descriptions(self) -> list[Family]:
        """Return all families without samples; nothing is folded for it."""
        return [
            Family(described, self._names[described], [], self.shape.buckets, [])
            for described in DESCRIPTIONS
        ]

    def _results(self) -> dict[Values, int]:
        results: dict[Values, int] = {}
        for account in self._accounts:
            for result in ("written", "dropped", "failed"):
                key = (account.sink, result)
                results[key] = results.get(key, 0) + getattr(account, result)
        return results


class _Count:
    __slots__ = ("count", "labels")

    def __init__(self, labels: LabelSet, _shape: Shape) -> None:
        self.labels = labels
        self.count = 0


class _Sizes:
    __slots__ = ("labels", "received", "sent")

    def __init__(self, labels: LabelSet, _shape: Shape) -> None:
        self.labels = labels
        self.sent = self.received = 0


class _Latencies:
    __slots__ = ("counts", "labels", "seconds")

    def __init__(self, labels: LabelSet, shape: Shape) -> None:
        self.labels = labels
        self.counts = [0] * (len(shape.buckets) + 1)
        self.seconds = 0.0


class Table(dict[Values, Row]):
    """The series of one family by their label values; a missing one is made when asked for."""

    def __init__(
        self, names: tuple[str, ...], shape: Shape, make: Callable[[LabelSet, Shape], Row]
    ) -> None:
        super().__init__()
        self.bound = shape.max_series
        self._names = names
        self._shape = shape
        self._make = make

    def __missing__(self, values: Values) -> Row:
        row = self[values] = self._make(LabelSet(self._names, values), self._shape)
        return row

    def is_full(self, spare: int = 0) -> bool:
        """Tell whether there are as many series as there may be."""
        return len(self) >= self.bound + spare

    def fit(self, values: Values, folded: Values) -> Values:
        """Return the values, or the folded ones if there is no room for a new series."""
        return values if values in self or not self.is_full() else folded


def _names(described: Description, shape: Shape) -> tuple[str, ...]:
    labels = shape.histogram_labels if described is DURATION else described.labels
    return tuple(shape.label_names.get(label, label) for label in labels)


def _keyed(values: Mapping[str, int]) -> dict[Values, int]:
    return {(name,): int(value) for name, value in values.items()}


def _merged(how: Callable[[list[int]], int], parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    collected: dict[str, list[int]] = {}
    for part in parts:
        for name, value in part.items():
            collected.setdefault(name, []).append(value)
    return {name: how(values) for name, values in collected.items()}
