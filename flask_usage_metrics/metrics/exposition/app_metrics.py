"""The app's own client_python metrics, of all workers together: files merged, processes summed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flask_usage_metrics.metrics.exposition.app_metrics_files import MultiprocessFiles

_GARBAGE_COLLECTOR = frozenset(
    ("python_gc_objects_collected", "python_gc_objects_uncollectable", "python_gc_collections")
)


class ReadableRegistry(Protocol):
    """The part of `CollectorRegistry` that encoders and the filter by name need."""

    def collect(self) -> Iterable[Metric]:
        """Return the families."""
        ...

    def restricted_registry(self, names: Iterable[str]) -> Collector:
        """Return a collector of the samples of these names only."""
        ...


def merged_registry(
    registry: CollectorRegistry,
    files: MultiprocessFiles | None,
    pids: Sequence[int],
    shared: Mapping[str, Metric] = {},
) -> ReadableRegistry:
    """Return a registry as all workers together see it.

    A family that is shared or in the files is taken from there only: the registry's own holds the
    part of this process. Custom collectors are this process' own, and so are `Info` and `Enum` in
    client_python's multiprocess mode, as they have no files.
    With several workers the default ``process_*`` families are replaced by those of
    `process_metrics`, and ``python_gc_*``, which says nothing when each scrape meets another
    process, is left out. Whatever is not in the registry is not added, except from the files.

    Args:
        registry: Of this process.
        files: Those of client_python's multiprocess mode; None: it is not in force.
        pids: Of all live workers, this one among them; may be empty when unknown.
        shared: The families that the workers share without it, by name.

    Returns:
        The registry itself when there is nothing to merge.
    """
    if files is None and len(pids) < 2 and not shared:
        return registry
    return _MergedRegistry(registry, files, pids, shared)


def process_metrics(pids: Iterable[int]) -> Iterator[Metric]:
    """Yield the ``process_*`` families of several processes as if they were one.

    CPU time, memory and open files are summed; the start time is the oldest; the limit of open
    files, which holds for each process, is the smallest. A process that ended meanwhile is left
    out, so the CPU time falls when a worker ends; Prometheus takes that for a reset of the counter,
    as it is one. Nothing comes from a system without ``/proc``.

    Args:
        pids: Of the processes; those of other users give a part of the families only.
    """
    pid = 0
    # One for all of them, because each one made reads the boot time from a file that is long on
    # machines of many cores.
    collector = ProcessCollector(pid=lambda: pid, registry=None)
    found: dict[str, Metric] = {}
    measured: dict[str, list[float]] = {}
    for pid in pids:  # noqa: B007 - the collector reads it
        try:
            metrics = list(collector.collect())
        except Exception:  # noqa: BLE001 - such as a limit that is no number; it is one of many
            continue
        for metric in metrics:
            found.setdefault(metric.name, metric)
            measured.setdefault(metric.name, []).extend(sample.value for sample in metric.samples)
    for name, metric in found.items():
        combine = min if name == "process_start_time_seconds" else sum
        make = CounterMetricFamily if metric.type == "counter" else GaugeMetricFamily
        yield make(name, metric.documentation, value=combine(measured[name]))


class _MergedRegistry:
    """A registry of this process, merged with the files and processes of all workers."""

    def __init__(
        self,
        registry: CollectorRegistry,
        files: MultiprocessFiles | None,
        pids: Sequence[int],
        shared: Mapping[str, Metric],
    ) -> None:
        self._registry = registry
        self._files = files
        self._pids = pids
        self._shared = shared

    def collect(self) -> Iterator[Metric]:
        return self._merge(self._registry)

    def restricted_registry(self, names: Iterable[str]) -> Collector:
        return _Restricted(self, frozenset(names))

    def collect_restricted(self, names: frozenset[str]) -> Iterator[Metric]:
        """Yield the families that have samples of these names, with these only."""
        for metric in self._merge(self._registry.restricted_registry(names)):
            samples = [sample for sample in metric.samples if sample.name in names]
            if samples:
                metric = copy.copy(metric)  # a collector may yield the same one again
                metric.samples = samples
                yield metric

    def _merge(self, registry: Collector) -> Iterator[Metric]:
        merged = {} if self._files is None else {m.name: m for m in self._files.collect()}
        shared = self._shared
        seen: set[str] = set()
        several = len(self._pids) > 1
        processes: dict[str, Metric] | None = None
        for metric in self._until_failure(registry):
            name = metric.name
            if name in merged or (several and name in _GARBAGE_COLLECTOR):
                continue
            if several and name.startswith("process_"):
                if processes is None:
                    processes = {metric.name: metric for metric in process_metrics(self._pids)}
                metric = processes.get(name, metric)
            seen.add(name)
            yield shared.get(name, metric)
        # Those that no request has made in this process yet.
        yield from (metric for name, metric in shared.items() if name not in seen)
        yield from merged.values()

    def _until_failure(self, registry: Collector) -> Iterator[Metric]:
        try:
            yield from registry.collect()
        except Exception as error:
            if self._files is None:
                raise
            # It may well be client_python's MultiProcessCollector, which an app had before us and
            # which fails at the first bad file.
            self._files.report(error, "a collector of the app's own and those after it are omitted")


class _Restricted(Collector):
    """Some samples of a merged registry, by name."""

    def __init__(self, whole: _MergedRegistry, names: frozenset[str]) -> None:
        self._whole = whole
        self._names = names

    def collect(self) -> Iterator[Metric]:
        return self._whole.collect_restricted(self._names)
