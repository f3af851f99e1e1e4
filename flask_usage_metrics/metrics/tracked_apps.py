"""The apps behind the totals: whose gauges are read, and who counts what became of records."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from weakref import WeakSet, finalize

from flask_usage_metrics.metrics.counts import Counts
from flask_usage_metrics.metrics.gauges import Gauges, GaugeSource, read_gauges
from flask_usage_metrics.metrics.sink_counters import SinkCounters
from flask_usage_metrics.runtime.faults import Faults


class TrackedApps:
    """The apps of one registry in this process; one that is gone leaves what it counted.

    Not thread-safe: `Totals` has a lock.
    """

    def __init__(self) -> None:
        self._sources: WeakSet[GaugeSource] = WeakSet()
        self._sink_counters: list[SinkCounters] = []
        self._faults: list[Faults] = []
        # Of apps that are gone, until what they counted last is taken.
        self._departed: deque[tuple[Collection[SinkCounters], Faults]] = deque()

    def reset(self) -> None:
        """Have the sinks count from zero, in a forked child."""
        for counters in self._sink_counters:
            counters.reset()

    def sink_counters(self, sink: str) -> SinkCounters:
        """Return new counters; those of the same sink are added up."""
        counters = SinkCounters(sink)
        self._sink_counters.append(counters)
        return counters

    def add(self, source: GaugeSource, counters: Collection[SinkCounters], faults: Faults) -> None:
        """Add an app, until the source of its gauges is gone.

        Args:
            source: Of its gauges.
            counters: Of its sinks, which `sink_counters` made.
            faults: Of the app.
        """
        self._sources.add(source)
        self._faults.append(faults)
        # A finalizer must not lock.
        finalize(source, self._departed.append, (counters, faults)).atexit = False

    def sources(self) -> list[GaugeSource]:
        """Return the sources of the gauges of the living."""
        return list(self._sources)

    def gauges(self) -> Gauges:
        """Return the gauges of all together."""
        return read_gauges(self.sources())

    def update(self, counts: Counts) -> None:
        """Add what the sinks and faults of all apps counted since the last call."""
        departed = [self._departed.popleft() for _ in range(len(self._departed))]
        counts.update(self._sink_counters, self._faults)
        for sink_counters, faults in departed:
            for counters in sink_counters:
                self._sink_counters.remove(counters)
                counts.forget(counters)
            self._faults.remove(faults)
            counts.forget(faults)

    def report(self, error: Exception, consequence: str) -> None:
        """Report a failure of the totals, to the first of the apps."""
        if self._faults:
            self._faults[0].report("totals", error, consequence)
