"""The totals behind the metrics: of all apps on one registry, and of their sibling workers."""

from __future__ import annotations

import os
import sqlite3
import threading
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from time import monotonic
from typing import Protocol
from weakref import WeakSet

from flask_usage_metrics.metrics.exemplars import pack
from flask_usage_metrics.metrics.names import (
    BUILD_INFO,
    CLIENT_REQUESTS,
    CONSUMER_REQUESTS,
    DESCRIPTIONS,
    DURATION,
    EXCEPTIONS,
    FAULTS,
    FOLDED,
    IN_PROGRESS,
    JOURNALED,
    METHODS,
    OBJECTIVE_EVENTS,
    OBJECTIVES,
    OTHER_METHOD,
    OTHER_STATUS,
    OVERFLOW,
    PENDING,
    RECORDS,
    REQUEST_BYTES,
    REQUEST_LABELS,
    REQUESTS,
    RESPONSE_BYTES,
    SHARED,
    SINK_UP,
    UNKNOWN_COUNTRY,
    UNMATCHED,
    VISITORS,
    WORKERS,
    Description,
    Family,
    LabelSet,
    Shape,
)
from flask_usage_metrics.metrics.series import Series, Table, Values
from flask_usage_metrics.metrics.shared_totals import Gauges, Numbers, SharedTotals
from flask_usage_metrics.metrics.sink_counters import SinkCounters
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.private_files import StateUnavailable
from flask_usage_metrics.runtime.state_dir import StateDir

_PAUSE_SECONDS = 1.0
"""The siblings' file is left alone for so long when a sync failed."""

_Combination = tuple[str, str | None, int, str | None, str]
"""Method, endpoint, status, country and client of a record."""

_STATUSES = {status: str(status) for status in range(100, 600)}


class CountedJournal(Protocol):
    """A journal that notes how far it was counted; what of a `JournalFile` the totals know.

    Attributes:
        id: Unique name.
        committed: Number of the last commit that is in the totals.
    """

    id: str
    committed: int


class Source(Protocol):
    """What the gauges of one app are read from, at each scrape."""

    def drain(self) -> None:
        """Process what is buffered; for a bounded time, without waiting for anything remote."""

    def in_progress(self) -> int:
        """Return the number of requests being answered."""

    def pending(self) -> dict[str, int]:
        """Return the number of records each sink has yet to write."""

    def up(self) -> dict[str, bool]:
        """Return whether each sink's last write went well."""

    def is_journaled(self) -> bool:
        """Return whether what is captured survives a kill."""

    def visitors(self) -> int | None:
        """Return how many visitors there were today, in all processes; None: not told apart."""


class Totals:
    """Adds up the records of the apps on one registry.

    Args:
        shape: Labels, buckets and bound of the families.
        version: Version of the package.

    Attributes:
        apps: Names of the apps that are added up, in the order of their set-up.
        state: Where they keep what they share with their siblings; the first app decides.
    """

    def __init__(self, shape: Shape, version: str) -> None:
        self.shape = shape
        self.apps: list[str] = []
        self.state: StateDir | None = None
        self._version = version
        self._sources: WeakSet[Source] = WeakSet()
        self._sink_counters: list[SinkCounters] = []
        self._faults: list[Faults] = []
        self._names = {described: _names(described, shape) for described in DESCRIPTIONS}
        self._picked = [REQUEST_LABELS.index(label) for label in shape.histogram_labels]
        self._file: SharedTotals | None = None
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Start at zero: the parent process keeps counting its own."""
        self._file = None
        self._is_shared = True
        self._retry_at = 0.0
        self._lock = threading.Lock()
        latencies = len(self.shape.buckets) + 2  # the buckets' counts, and the sum of seconds
        self._tables: dict[str, Table] = {}
        self._requests = self._table(REQUESTS, latencies)
        # With the same labels the counter and the histogram are the same numbers, kept once.
        same = self.shape.histogram_labels == REQUEST_LABELS
        self._durations = self._requests if same else self._table(DURATION, latencies)
        self._exceptions = self._table(EXCEPTIONS, 1)
        self._sizes = self._table(RESPONSE_BYTES, 2)  # sent, received
        self._clients = self._table(CLIENT_REQUESTS, 1)
        self._consumers = self._table(CONSUMER_REQUESTS, 1)
        self._events = self._table(OBJECTIVE_EVENTS, 1)
        self._overflow = self._table(OVERFLOW, 1)
        self._results = self._table(RECORDS, 1)
        self._failures = self._table(FAULTS, 1)
        for label in ("country", "endpoint", "exception", "consumer"):
            self._overflow.row((label,))
        for objective in self.shape.objectives:
            for result in ("good", "bad"):
                self._events.row((objective.name, result))
        self._known: dict[_Combination, tuple[Series, Series, Series, Series]] = {}
        self._published: dict[tuple[int, str], int] = {}
        self._commits: dict[CountedJournal, int] = {}
        for counters in self._sink_counters:
            counters.reset()

    # ------------------------------------------------------------------------ writing

    def add(
        self,
        records: Iterable[UsageRecord],
        commits: Mapping[CountedJournal, int],
        sampled: Collection[str] = frozenset(),
    ) -> None:
        """Count records; each is in exactly one series of each family it belongs to.

        Args:
            records: To be counted.
            commits: For the journals they come from, the number of this commit.
            sampled: Ids of those records whose span is exported: they may become exemplars.
        """
        with self._lock:
            self._add(records, sampled)
            self._commits.update(commits)
            if self._file is None:
                self._commit()

    def sink_counters(self, sink: str) -> SinkCounters:
        """Return new counters; those of the same sink are added up."""
        counters = SinkCounters(sink)
        with self._lock:
            self._sink_counters.append(counters)
        return counters

    def watch(self, source: Source, faults: Faults) -> None:
        """Read gauges from a source for as long as it lives, and its faults for ever."""
        self._sources.add(source)
        self._faults.append(faults)

    def _add(self, records: Iterable[UsageRecord], sampled: Collection[str]) -> None:
        # Of a combination that is known this calls nothing of ours: a call costs as much as finding
        # all four series does.
        known, bounds, objectives = self._known, self.shape.buckets, self.shape.objectives
        for record in records:
            key = (record.method, record.endpoint, record.status, record.country, record.client)
            requests, durations, sizes, clients = known.get(key) or self._find(key)
            seconds = record.duration_seconds
            bucket = bisect_left(bounds, seconds)
            row = requests.new or requests.start()
            row[bucket] += 1
            row[-1] += seconds
            if durations is not requests:
                row = durations.new or durations.start()
                row[bucket] += 1
                row[-1] += seconds
            if sampled and record.id in sampled:
                durations.keep(pack(record), bucket)
            row = sizes.new or sizes.start()
            row[0] += record.bytes_sent
            if record.bytes_received:
                row[1] += record.bytes_received
            row = clients.new or clients.start()
            row[0] += 1
            for objective in objectives:
                self._events.row(objective.event(record))[0] += 1
            if record.consumer is not None:
                status = requests.values[2]
                self._count(self._consumers, (record.consumer, status), (FOLDED, status))
            if record.exception is not None:
                raised = (*sizes.values, record.exception)
                self._count(self._exceptions, raised, (FOLDED, FOLDED))

    def _count(self, table: Table, values: Values, folded: Values) -> None:
        """Count one; a full table folds what was not seen before."""
        series = table.fit(values, folded)
        if series.values != values:
            label = "consumer" if table is self._consumers else "exception"
            self._overflow.row((label,))[0] += 1
        (series.new or series.start())[0] += 1

    def _find(self, key: _Combination) -> tuple[Series, Series, Series, Series]:
        """Return the series of requests, durations, sizes and clients that a request counts in.

        They are the same for ever, and remembered, unless a full table folded something: that is
        counted each time, and ends where a sibling knows the series.
        """
        method, endpoint, status, country, client = key
        values = (
            method if method in METHODS else OTHER_METHOD,
            UNMATCHED if endpoint is None else endpoint,
            _STATUSES.get(status, OTHER_STATUS),
            country or UNKNOWN_COUNTRY,
        )
        requests = self._requests.series.get(values) or self._first_seen(values)
        durations = requests
        if self._durations is not self._requests:
            observed = tuple([requests.values[place] for place in self._picked])
            durations = self._durations.find(observed)
        sizes = self._sizes.fit(values[1:2], (FOLDED,))
        found = (requests, durations, sizes, self._clients.find((client,)))
        is_exact = (requests.values, sizes.values) == (values, values[1:2])
        # Methods and numbers of status are up to whoever asks: there is no end of them.
        is_usual = method in METHODS and status in _STATUSES
        if is_exact and is_usual and len(self._known) < self.shape.max_series:
            self._known[key] = found
        return found

    def _first_seen(self, values: tuple[str, str, str, str]) -> Series:
        """Return what to count labels under that were not seen before; a full table folds them."""
        table = self._requests
        if not table.is_full():
            return table.find(values)
        method, endpoint, status, _ = values
        self._overflow.row(("country",))[0] += 1
        values = (method, endpoint, status, FOLDED)
        # Some room beyond the bound keeps the endpoints apart for a while longer.
        if values not in table.series and table.is_full(spare=table.bound // 10):
            self._overflow.row(("endpoint",))[0] += 1
            values = (method, FOLDED, status, FOLDED)
        return table.find(values)

    def _table(self, described: Description, width: int) -> Table:
        table = Table(self._names[described], self.shape.max_series, width)
        self._tables[described.name] = table
        return table

    # ------------------------------------------------------------------------ sharing

    def share(self, path: Path) -> None:
        """Add what is counted here to the file of the siblings, and read theirs from it."""
        with self._lock:
            if self._file is None:
                self._file = SharedTotals(path)
                for table in self._tables.values():
                    table.resend()

    def stay_alone(self) -> None:
        """Take note that there are siblings, and no place to share totals with them."""
        self._is_shared = False

    def sync(self) -> None:
        """Visit the siblings' file, if there is one; it never raises, and tries again later."""
        with self._lock:
            self._sync()

    def last_commit(self, journal: CountedJournal) -> int | None:
        """Return the number of the last commit of an adopted journal that was counted.

        Returns:
            None if the siblings' file cannot be asked now: what is in the journal must wait.
        """
        number = None
        with self._lock:
            if self._file is not None:
                try:
                    number = self._file.last_commit(journal.id)
                except (sqlite3.Error, OSError, StateUnavailable) as error:
                    self._complain(error)
                    return None
        if number is None:  # of another generation, or of a process that was alone
            return journal.committed
        journal.committed = number
        return number

    def forget(self, journal: CountedJournal) -> None:
        """Forget a journal that is about to be closed."""
        with self._lock:
            self._commits.pop(journal, None)
            if self._file is not None:
                self._file.forget([journal.id])

    def close(self) -> None:
        """Add what is left to the siblings' file and close it."""
        with self._lock:
            if self._file is not None:
                self._sync()
                self._file.release()

    def in_progress(self) -> int:
        """Return the number of requests being answered in this process."""
        return sum(source.in_progress() for source in list(self._sources))

    def workers(self) -> list[int]:
        """Return the process ids of this process and its living siblings, as of the last sync."""
        file = self._file
        return [os.getpid()] if file is None else sorted({os.getpid(), *file.workers})

    def _sync(self) -> None:
        # A file that is locked costs a second, which not every scrape and batch should wait.
        if self._file is None or monotonic() < self._retry_at:
            return
        self._count_results()
        dirty = [(name, series) for name, table in self._tables.items() for series in table.dirty]
        new = {
            (name, series.values): series.new for name, series in dirty if series.new is not None
        }
        exemplars = {
            (name, series.values): series.exemplars
            for name, series in dirty
            if series.exemplars is not None
        }
        commits = {journal.id: number for journal, number in self._commits.items()}
        gauges = self._gauges(list(self._sources))
        try:
            changes = self._file.sync(new, commits, gauges, exemplars)
        except (sqlite3.Error, OSError, StateUnavailable) as error:
            self._complain(error)
            return
        self._is_shared = True
        for table in self._tables.values():
            table.clear_new()
        self._commit()
        for key, sums in changes.sums.items():
            name, values = key
            known = self._tables.get(name)  # None: of a sibling that is newer
            if known is not None:
                known.apply(values, sums, changes.exemplars.get(key))

    def _complain(self, error: Exception) -> None:
        self._is_shared = False
        self._retry_at = monotonic() + _PAUSE_SECONDS
        if self._faults:
            self._faults[0].report("totals", error, "workers are added together later")

    def _commit(self) -> None:
        for journal, number in self._commits.items():
            with suppress(ValueError, TypeError):  # it was closed meanwhile
                journal.committed = number
        self._commits.clear()

    # ------------------------------------------------------------------------ reading

    def families(self) -> list[Family]:
        """Return all families, after folding what the apps have buffered."""
        sources = list(self._sources)
        for source in sources:
            source.drain()
        with self._lock:
            self._sync()
            self._count_results()
            for table in self._tables.values():
                if self._file is None:
                    table.merge_local()
                else:
                    table.show_new()
            families = {
                described: self._tables[described.name].family(described)
                for described in DESCRIPTIONS
                if described.name in self._tables
            }
            families[REQUESTS] = self._requests.family(REQUESTS, value=_count_of)
            families[REQUEST_BYTES] = self._sizes.family(REQUEST_BYTES, value=itemgetter(1))
            families[DURATION] = self._durations.family(DURATION, buckets=self.shape.buckets)
            siblings = {} if self._file is None else dict(self._file.workers)
        siblings[os.getpid()] = self._gauges(sources)
        gauges = self._sampled(list(siblings.values()))
        visitors = [count for source in sources if (count := source.visitors()) is not None]
        gauges[VISITORS] = {("1d",): sum(visitors)} if visitors else {}
        for described, values in gauges.items():
            families[described] = self._gauge_family(described, values)
        return [families[described] for described in DESCRIPTIONS]

    def descriptions(self) -> list[Family]:
        """Return all families without samples; nothing is folded for it."""
        return [
            Family(described, self._names[described], buckets=self.shape.buckets)
            for described in DESCRIPTIONS
        ]

    def _count_results(self) -> None:
        """Bring the tables of results and faults up to what the counters have come to."""
        counts: list[tuple[Table, Values, int, int]] = [
            (
                self._results,
                (counters.sink, result),
                id(counters),
                getattr(counters, result),
            )
            for counters in self._sink_counters
            for result in ("written", "dropped", "failed")
        ]
        counts += [
            (self._failures, (part,), id(faults), count)
            for faults in self._faults
            for part, count in faults.counts().items()
        ]
        for table, values, owner, count in counts:
            key = (owner, values[-1])
            published = self._published.get(key)
            if count != published:
                table.row(values)[0] += count - (published or 0)
                self._published[key] = count

    def _gauges(self, sources: list[Source]) -> Gauges:
        return Gauges(
            self.in_progress(),
            _merged(sum, [source.pending() for source in sources]),
            {
                sink: bool(up)
                for sink, up in _merged(min, [source.up() for source in sources]).items()
            },
            all(source.is_journaled() for source in sources),
        )

    def _sampled(self, workers: list[Gauges]) -> dict[Description, dict[Values, float]]:
        return {
            OBJECTIVES: {(objective.name,): objective.ratio for objective in self.shape.objectives},
            IN_PROGRESS: {(): sum(worker.in_progress for worker in workers)},
            PENDING: _keyed(_merged(sum, [worker.pending for worker in workers])),
            SINK_UP: _keyed(_merged(min, [worker.up for worker in workers])),
            WORKERS: {(): len(workers)},
            SHARED: {(): int(self._is_shared)},
            JOURNALED: {(): int(all(worker.journaled for worker in workers))},
            BUILD_INFO: {(self._version,): 1},
        }

    def _gauge_family(self, described: Description, values: dict[Values, float]) -> Family:
        names = self._names[described]
        series = [LabelSet(names, key) for key in sorted(values)]
        return Family(described, names, series, [[values[labels.values]] for labels in series])


def _count_of(row: Numbers) -> float:
    return sum(row[:-1])


def _names(described: Description, shape: Shape) -> tuple[str, ...]:
    labels = shape.histogram_labels if described is DURATION else described.labels
    return tuple(shape.label_names.get(label, label) for label in labels)


def _keyed(values: Mapping[str, int]) -> dict[Values, float]:
    return {(name,): int(value) for name, value in values.items()}


def _merged(how: Callable[[list[int]], int], parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    collected: dict[str, list[int]] = {}
    for part in parts:
        for name, value in part.items():
            collected.setdefault(name, []).append(value)
    return {name: how(values) for name, values in collected.items()}
