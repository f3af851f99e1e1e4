"""What the client_python metrics of an app have counted in this process, as plain values."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeGuard
from weakref import ref

import msgspec
from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Info, Summary
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from flask_usage_metrics.runtime.fork_gate import FORK_GATE
from flask_usage_metrics.runtime.texts import encodable

CUMULATIVE = frozenset(("counter", "histogram", "summary"))

_KINDS: tuple[type[MetricWrapperBase], ...] = (Counter, Gauge, Histogram, Summary, Info, Enum)
_METHODS = ("collect", "_samples", "_multi_samples", "_child_samples", "_get_metric")

_Labels = tuple[str, ...]
_Key = tuple[str, str, _Labels, str]
"""Family, name of the sample, labels, bound of the bucket."""


class AppExemplar(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """An exemplar.

    Attributes:
        labels: Names and values, one after the other.
        value: What was observed.
        timestamp: When, in Unix seconds.
    """

    labels: _Labels
    value: float
    timestamp: float


class AppSample(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A sample of a family.

    Attributes:
        name: With its suffix.
        labels: Names and values, one after the other, by name; without ``le``.
        value: Of a bucket: how many observations were in it and in no smaller one.
        bound: ``le`` of a bucket; ``""``: it is none.
        exemplar: The newest.
        at: When a sync first saw that it was set to this, in Unix seconds; 0: it never was set,
            or nobody needs to know.
        parts: Numbers whose sum is exactly the value's; empty: the value is exact.
    """

    name: str
    labels: _Labels
    value: float
    bound: str = ""
    exemplar: AppExemplar | None = None
    at: float = 0.0
    parts: tuple[float, ...] = ()


class AppFamily(msgspec.Struct, array_like=True, frozen=True):
    """A family of an app's own.

    Attributes:
        name: As client_python has it, without a suffix.
        documentation: Its help text.
        type: As client_python has it.
        unit: ``""``: none.
        mode: How the gauges of several processes become one; ``""``: it is no gauge.
        samples: Those of one label set side by side.
    """

    name: str
    documentation: str
    type: str
    unit: str
    mode: str
    samples: list[AppSample]


class OwnFamilies:
    """Reads those metrics of a registry that are client_python's own objects, without callbacks.

    Custom collectors, and gauges with `set_function`, are the app's code and are never called.

    Args:
        registry: Referenced weakly.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = ref(registry)
        self._inherited: dict[_Key, float] = {}
        self._set: dict[_Key, tuple[float, float]] = {}

    def read(self) -> list[AppFamily]:
        """Return the families in the order of the registry, without what a parent has counted."""
        registry = self._registry()
        if registry is None:
            return []
        with FORK_GATE.entered():
            with registry._lock:
                collectors = list(registry._collector_to_names)
            return [
                self._family(metric, collector)
                for collector in collectors
                if _is_plain(collector)
                for metric in collector.collect()
            ]

    def take_inherited(self) -> list[AppFamily]:
        """Note in a forked child that all that is counted now is its parent's; takes no lock.

        Returns:
            What the parent itself had counted.
        """
        registry = self._registry()
        counted = {} if registry is None else dict(_unlocked(registry))
        found: dict[str, AppFamily] = {}
        for key, (value, metric) in counted.items():
            own = value - self._inherited.get(key, 0.0)
            if own:
                name, sample, labels, bound = key
                family = found.setdefault(name, _described(metric, ""))
                family.samples.append(AppSample(sample, labels, own, bound))
        self._inherited = {key: value for key, (value, _) in counted.items() if value}
        return list(found.values())

    def _family(self, metric: Metric, collector: MetricWrapperBase) -> AppFamily:
        family = _described(metric, _mode(collector))
        samples, kind = family.samples, metric.type
        is_dated = family.mode.endswith("mostrecent") or kind in ("info", "stateset")
        first_state = collector._states[0] if isinstance(collector, Enum) else ""
        before = 0.0
        for name, labels, value, _, exemplar, *_ in metric.samples:
            value, bound, at = float(value), "", 0.0
            if kind == "histogram" and (bound := labels.pop("le", "")):
                value, before = value - before, value
            else:
                before = 0.0
            flat = flat_labels(labels)
            if is_dated:
                is_first = not (labels if kind == "info" else value)
                if kind == "stateset":
                    is_first = bool(value) == (labels[metric.name] == first_state)
                at = self._set_at((metric.name, name, flat, ""), value, is_first)
            samples.append(AppSample(name, flat, value, bound, _exemplar(exemplar), at))
        if self._inherited and kind in CUMULATIVE:
            samples[:] = self._without_inherited(metric.name, samples)
        return family

    def _set_at(self, key: _Key, value: float, is_first: bool) -> float:
        """Return when this value was first seen; 0 if it is what a metric begins with."""
        known, at = self._set.get(key, (None, 0.0))
        if known is None:
            at = 0.0 if is_first else time.time()
        elif known != value and not (known != known and value != value):
            at = time.time()
        self._set[key] = value, at
        return at

    def _without_inherited(self, family: str, samples: Sequence[AppSample]) -> Iterator[AppSample]:
        gone: set[_Labels] = set()
        for sample in samples:
            name = sample.name
            parents = self._inherited.get((family, name, sample.labels, sample.bound), 0.0)
            if parents and name != f"{family}_created" and sample.labels not in gone:
                # Removed or reset since, and counted from zero again. A sum may fall by itself.
                if sample.value < parents and not name.endswith("_sum"):
                    gone.add(sample.labels)
                else:
                    sample = msgspec.structs.replace(sample, value=sample.value - parents)
            yield sample


def flat_labels(labels: dict[str, str]) -> _Labels:
    """Return names and values one after the other, by name."""
    if not labels:
        return ()
    pairs = sorted(labels.items()) if len(labels) > 1 else labels.items()
    return tuple([text for pair in pairs for text in pair])


def encodable_family(family: AppFamily) -> AppFamily:
    """Return a family with lone surrogates spelled out, which no encoder takes; no exemplars."""
    samples = [
        msgspec.structs.replace(sample, labels=tuple(map(encodable, sample.labels)), exemplar=None)
        for sample in family.samples
    ]
    text = encodable(family.documentation)
    return msgspec.structs.replace(family, documentation=text, samples=samples)


def _is_plain(collector: object) -> TypeGuard[MetricWrapperBase]:
    """Tell whether a collector is a metric of client_python's that runs no code of the app's."""
    base = next((kind for kind in _KINDS if isinstance(collector, kind)), None)
    if base is None:
        return False
    if any(getattr(type(collector), name) is not getattr(base, name) for name in _METHODS):
        return False
    return base is not Gauge or not any("_child_samples" in vars(one) for one in _all(collector))


def _all(collector: object) -> list[object]:
    """Return a metric and its children: `Gauge.set_function` leaves a trace in either."""
    return [collector, *list(getattr(collector, "_metrics", {}).values())]


def _mode(collector: MetricWrapperBase) -> str:
    if not isinstance(collector, Gauge):
        return ""
    # There is no room for ours beside a label of the app's own.
    return "mostrecent" if "pid" in collector._labelnames else collector._multiprocess_mode


def _described(metric: Metric, mode: str) -> AppFamily:
    return AppFamily(metric.name, metric.documentation, metric.type, metric.unit, mode, [])


def _exemplar(exemplar: Exemplar | None) -> AppExemplar | None:
    if exemplar is None:
        return None
    at = exemplar.timestamp
    return AppExemplar(
        flat_labels(exemplar.labels), float(exemplar.value), 0.0 if at is None else float(at)
    )


def _unlocked(registry: CollectorRegistry) -> Iterator[tuple[_Key, tuple[float, Metric]]]:
    """Yield what counters, histograms and summaries hold, and their families.

    A thread of the parent may have held any lock of theirs at the fork.
    """
    for collector in list(registry._collector_to_names):
        if isinstance(collector, Counter | Histogram | Summary) and _is_plain(collector):
            (metric,) = collector.describe()
            children = getattr(collector, "_metrics", None)
            for values, child in [((), collector)] if children is None else [*children.items()]:
                names = collector._labelnames
                labels = flat_labels(dict(zip(names, values, strict=True)) if values else {})
                for suffix, bound, value in _values(child):
                    yield (metric.name, metric.name + suffix, labels, bound), (value, metric)


def _values(child: MetricWrapperBase) -> Iterator[tuple[str, str, float]]:
    if isinstance(child, Counter):
        yield "_total", "", child._value._value
    elif isinstance(child, Summary):
        yield "_count", "", child._count._value
        yield "_sum", "", child._sum._value
    elif isinstance(child, Histogram):
        counts = [bucket._value for bucket in child._buckets]
        for bound, count in zip(child._upper_bounds, counts, strict=True):
            yield "_bucket", str(floatToGoString(bound)), count  # type: ignore[no-untyped-call]
        yield "_count", "", sum(counts)
        yield "_sum", "", child._sum._value
