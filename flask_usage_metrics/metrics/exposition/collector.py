"""Our families in a client_python registry, for every exporter of it; one collector a registry."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from flask_usage_metrics.errors import ConfigError
from flask_usage_metrics.metrics.exemplars import unpack
from flask_usage_metrics.metrics.families import Family
from flask_usage_metrics.metrics.shape import Shape
from flask_usage_metrics.metrics.shared_app_metrics import SharedAppMetrics
from flask_usage_metrics.metrics.totals import Totals

_Bucket = tuple[str, float] | tuple[str, float, Exemplar]
"""Upper bound as text, and count; with the newest exemplar if there is one."""


class UsageCollector(Collector):
    """Gives client_python the totals of the apps on one registry.

    Attributes:
        totals: The totals.
        app_metrics: The app's own metrics in the same registry.
        middlewares: Of these apps: when one of them starts in a process, so do the others.
    """

    def __init__(self, totals: Totals, app_metrics: SharedAppMetrics) -> None:
        self.totals = totals
        self.app_metrics = app_metrics
        self.middlewares: WeakSet[Any] = WeakSet()
        self._muted = threading.local()

    def collect(self) -> Iterator[Metric]:
        """Yield the families with their samples, after processing what the apps have buffered.

        Raises:
            TimeoutError: The totals cannot be had now.
        """
        if not getattr(self._muted, "on", False):
            yield from map(_metric, self.totals.families())

    def describe(self) -> Iterator[Metric]:
        """Yield the families without samples: a registry checks their names."""
        return map(_metric, self.totals.descriptions())

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Collect nothing in this thread meanwhile: our own encoder writes our families."""
        self._muted.on = True
        try:
            yield
        finally:
            self._muted.on = False


_collectors: WeakKeyDictionary[CollectorRegistry, UsageCollector] = WeakKeyDictionary()
"""The collector of each registry, which all its apps share: a registry refuses a second one with
the same families, and has no place of its own to find the first."""

_lock = threading.Lock()


def collector_of(registry: CollectorRegistry, shape: Shape, version: str) -> UsageCollector:
    """Return the collector of a registry, made and registered when first asked for.

    Args:
        registry: The registry.
        shape: Labels, buckets, bound and objectives, as the app has them.
        version: Version of the package.

    Raises:
        ConfigError: Another app on the registry has another shape.
        ValueError: The registry holds a metric of the same name that is not ours.
    """
    with _lock:
        collector = _collectors.get(registry)
        if collector is None:
            collector = UsageCollector(Totals(shape, version), SharedAppMetrics(registry))
            registry.register(collector)
            _collectors[registry] = collector
    if collector.totals.shape != shape:
        raise ConfigError(
            "apps on one registry must agree on TRACK_USAGE_MAX_SERIES, "
            "TRACK_USAGE_LABELS, TRACK_USAGE_HISTOGRAM_LABELS, TRACK_USAGE_BUCKETS, "
            "TRACK_USAGE_LABEL_NAMES and TRACK_USAGE_SLO: "
            "give them the same values, or TrackUsage(registry=CollectorRegistry())"
        )
    return collector


def number(value: float) -> str:
    """Return a number as client_python spells it; another spelling of ``le`` splits series."""
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]


def _metric(family: Family) -> Metric:
    description = family.description
    if description.kind == "histogram":
        histogram = HistogramMetricFamily(description.name, description.help, labels=family.labels)
        bounds = [*map(number, family.buckets), "+Inf"]
        for labels, counts, seconds in family.histograms:
            buckets: list[_Bucket] = [*zip(bounds, map(float, counts), strict=True)]
            for index, packed in enumerate(family.exemplars.get(labels.values, ())):
                if packed:
                    buckets[index] = (bounds[index], float(counts[index]), _exemplar(packed))
            histogram.add_metric(labels.values, buckets, seconds)
        return histogram
    make = CounterMetricFamily if description.kind == "counter" else GaugeMetricFamily
    metric = make(description.name, description.help, labels=family.labels)
    for labels, value in family.samples:
        metric.add_metric(labels.values, value)
    return metric


def _exemplar(packed: bytes) -> Exemplar:
    found = unpack(packed)
    ids = {"trace_id": found.trace_id, "span_id": found.span_id}
    return Exemplar(ids, found.value, found.timestamp)
