"""Records are counted here: each adds to one series of each family that it belongs to."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Set
from operator import itemgetter

from flask_usage_metrics.metrics.exemplars import pack
from flask_usage_metrics.metrics.families import Family, LabelValues, Numbers
from flask_usage_metrics.metrics.label_bounds import Combination, LabelBounds, own_values
from flask_usage_metrics.metrics.names import (
    CLIENT_REQUESTS,
    CONSUMER_REQUESTS,
    DESCRIPTIONS,
    DURATION,
    EXCEPTIONS,
    FAULTS,
    FOLDED,
    OBJECTIVE_EVENTS,
    OVERFLOW,
    RECORDS,
    REQUEST_BYTES,
    REQUEST_LABELS,
    REQUESTS,
    RESPONSE_BYTES,
    Description,
)
from flask_usage_metrics.metrics.series import Table
from flask_usage_metrics.metrics.shape import Shape
from flask_usage_metrics.metrics.sink_counters import SinkCounters
from flask_usage_metrics.records.methods import METHODS
from flask_usage_metrics.records.record import TAKEN_OVER, UsageRecord
from flask_usage_metrics.runtime.faults import Faults


class Counts:
    """The counters and histograms of this process: a table for each family.

    Not thread-safe: `Totals` has a lock.

    Args:
        shape: Labels, buckets and bound of the families.
        methods: See `LabelBounds`.

    Attributes:
        tables: The tables, by name of the family. A counter and the histogram share one if they
            have the same labels.
    """

    def __init__(self, shape: Shape, methods: Set[str] = METHODS) -> None:
        self._shape = shape
        self._buckets = shape.buckets
        self._objectives = shape.objectives
        latencies = len(shape.buckets) + 2  # the buckets' counts, and the sum of seconds
        self.tables: dict[str, Table] = {}
        self._requests = self._table(REQUESTS, latencies)
        # With the same labels the counter and the histogram are the same numbers, kept once.
        same = shape.histogram_labels == shape.request_labels
        self._durations = self._requests if same else self._table(DURATION, latencies)
        self._exceptions = self._table(EXCEPTIONS, 1)
        self._sizes = self._table(RESPONSE_BYTES, 2)  # sent, received
        self._clients = self._table(CLIENT_REQUESTS, 1)
        self._consumers = self._table(CONSUMER_REQUESTS, 1)
        self._events = self._table(OBJECTIVE_EVENTS, 1)
        self._overflow = self._table(OVERFLOW, 1)
        self._results = self._table(RECORDS, 1)
        self._failures = self._table(FAULTS, 1)
        self._labels = LabelBounds(
            shape,
            requests=self._requests,
            durations=self._durations,
            sizes=self._sizes,
            clients=self._clients,
            overflow=self._overflow,
            methods=methods,
        )
        for objective in shape.objectives:
            for result in ("good", "bad"):
                self._events.new_numbers((objective.name, result))
        # By the id of who counts, and what is counted.
        self._taken: dict[int, dict[str, int]] = {}

    def add(self, records: Iterable[UsageRecord], sampled: Collection[str]) -> None:
        """Count records.

        Args:
            records: To be counted.
            sampled: Ids of those records whose span is exported: they may become exemplars.
        """
        # Hot path: see "Figures behind the code" in tests/benchmarks/README.md. A record of a known
        # combination calls nothing of ours.
        known, bounds, objectives = self._labels.known, self._buckets, self._objectives
        own = self._shape.labels
        for record in records:
            key: Combination
            key = (record.method, record.endpoint, record.status, record.country, record.client)
            if own:
                key = (*key, *own_values(record.track_var, own))
            requests, durations, sizes, clients = known.get(key) or self._labels.find(key)
            seconds = record.duration_seconds
            bucket = bisect_left(bounds, seconds)
            new = requests.new or requests.start()
            new[bucket] += 1
            new[-1] += seconds
            if durations is not requests and record.status != TAKEN_OVER:
                new = durations.new or durations.start()
                new[bucket] += 1
                new[-1] += seconds
            if sampled and record.id in sampled and record.status != TAKEN_OVER:
                durations.keep(pack(record), bucket)
            new = sizes.new or sizes.start()
            new[0] += record.bytes_sent
            if record.bytes_received:
                new[1] += record.bytes_received
            new = clients.new or clients.start()
            new[0] += 1
            for objective in objectives:
                event = objective.event(record)
                if event is not None:
                    self._events.new_numbers(event)[0] += 1
            if record.consumer is not None:
                status = requests.values[2]
                labels = (record.consumer, status)
                self._labels.count(self._consumers, "consumer", labels, (FOLDED, status))
            if record.exception is not None:
                raised = (*sizes.values, record.exception)
                self._labels.count(self._exceptions, "exception", raised, (FOLDED, FOLDED))

    def update(self, sink_counters: Iterable[SinkCounters], faults: Iterable[Faults]) -> None:
        """Add to the tables of results and faults what was counted since the last call.

        Args:
            sink_counters: Counters of all sinks; the same objects at each call, but for new ones
                and those that `forget` was told of.
            faults: Faults of all apps; likewise.
        """
        counts: list[tuple[Table, LabelValues, int, int]] = [
            (self._results, (counters.sink, result), id(counters), getattr(counters, result))
            for counters in sink_counters
            for result in ("written", "dropped", "failed")
        ]
        counts += [
            (self._failures, (part,), id(source), count)
            for source in faults
            for part, count in source.counts().items()
        ]
        for table, values, owner, count in counts:
            taken = self._taken.setdefault(owner, {})
            before = taken.get(values[-1])
            if count != before:
                table.new_numbers(values)[0] += count - (before or 0)
                taken[values[-1]] = count

    def forget(self, owner: SinkCounters | Faults) -> None:
        """Forget who counted, as it is gone: `update` has what it counted."""
        self._taken.pop(id(owner), None)

    def widths(self) -> dict[str, tuple[int, int]]:
        """Return, for each table, how many labels and numbers its series have."""
        return {name: (len(table.names), table.width) for name, table in self.tables.items()}

    def families(self) -> dict[Description, Family]:
        """Return the families as they are shown now."""
        families = {
            description: self.tables[description.name].family(description)
            for description in DESCRIPTIONS
            if description.name in self.tables
        }
        families[REQUESTS] = self._requests.family(REQUESTS, value=_count_of)
        families[REQUEST_BYTES] = self._sizes.family(REQUEST_BYTES, value=itemgetter(1))
        families[DURATION] = self._durations.family(
            DURATION,
            buckets=self._buckets,
            leaves_out=_is_taken_over if self._durations is self._requests else None,
        )
        return families

    def _table(self, description: Description, width: int) -> Table:
        table = Table(self._shape.labels_of(description), self._shape.max_series, width)
        self.tables[description.name] = table
        return table


def _count_of(numbers: Numbers) -> float:
    return sum(numbers[:-1])


_STATUS_AT = REQUEST_LABELS.index("status")


def _is_taken_over(values: LabelValues) -> bool:
    """Tell by its labels whether a series counts connections whose lifetimes are no latencies."""
    return values[_STATUS_AT] == str(TAKEN_OVER)
