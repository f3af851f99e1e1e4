"""The families of several workers' apps as one: what was counted is added, gauges by their mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import fsum, isfinite

from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Exemplar

from flask_usage_metrics.metrics.app_families import (
    CUMULATIVE,
    AppExemplar,
    AppFamily,
    AppSample,
)

_MOST_PARTS = 40

_Labels = tuple[str, ...]


def shown(families: Mapping[int, AppFamily], *, own: int, is_several: bool) -> Metric:
    """Return a family as all workers together see it.

    Args:
        families: As each process has it, by process id; 0: what the dead had counted. At least one.
        own: Id of this process.
        is_several: Whether each worker's gauge is shown where none was asked to be combined.
    """
    newest = families[own] if own in families else max(families.items())[1]
    workers = {pid: family for pid, family in families.items() if pid}
    dead = families.get(0)
    # Another version of the app may have another type under the name, and there is room for one.
    living = {pid: workers[pid] for pid in sorted(workers) if workers[pid].type == newest.type}
    if newest.type in CUMULATIVE:
        former = [] if dead is None or dead.type != newest.type else [dead]
        samples = added([*former, *living.values()]).samples
    elif newest.type == "gauge":
        mode = newest.mode.removeprefix("live")
        if mode in _COMBINE:
            samples = _combined(living.values(), _COMBINE[mode])
        elif is_several:
            samples = _of_each(living)
        else:
            samples = newest.samples
    else:
        samples = _newest(living, newest)
    return _metric(newest, samples)


def added(families: Sequence[AppFamily], *, exactly: bool = False) -> AppFamily:
    """Return the sums of counters, histograms or summaries; the last family describes them.

    Args:
        families: At least one.
        exactly: Whether sums can be added to without rounding twice. In which order numbers are
            added must never show: an ulp less is a reset to Prometheus.
    """
    if len(families) == 1:
        return families[0]
    name = f"{families[-1].name}_created"

    def add(samples: list[AppSample]) -> AppSample:
        first = samples[0]
        if len(samples) == 1:
            return first
        if first.name == name:
            return min(samples, key=lambda sample: sample.value)
        numbers = [part for one in samples for part in (one.parts or (one.value,))]
        total = _sum(numbers)
        parts = _parts(numbers, total) if exactly else ()
        exemplar = _newest_exemplar(samples)
        return AppSample(first.name, first.labels, total, first.bound, exemplar, 0.0, parts)

    return _merged(families, add)


def larger(one: AppFamily, other: AppFamily) -> AppFamily:
    """Return the larger of each two samples: both are of one process, or one history."""
    return _merged([one, other], lambda samples: max(samples, key=lambda sample: sample.value))


def _merged(
    families: Sequence[AppFamily], combine: Callable[[list[AppSample]], AppSample]
) -> AppFamily:
    last = families[-1]
    samples = _combined(families, combine)
    return AppFamily(last.name, last.documentation, last.type, last.unit, last.mode, samples)


def _combined(
    families: Iterable[AppFamily], combine: Callable[[list[AppSample]], AppSample]
) -> list[AppSample]:
    # OpenMetrics wants the samples of one label set side by side.
    groups: dict[_Labels, dict[tuple[str, str], list[AppSample]]] = {}
    for family in families:
        for sample in family.samples:
            group = groups.get(sample.labels)
            if group is None:
                group = groups[sample.labels] = {}
            known = group.get((sample.name, sample.bound))
            if known is None:
                group[sample.name, sample.bound] = [sample]
            else:
                known.append(sample)
    return [combine(samples) for group in groups.values() for samples in group.values()]


def _of_each(workers: Mapping[int, AppFamily]) -> list[AppSample]:
    return [
        AppSample(sample.name, (*sample.labels, "pid", str(pid)), sample.value)
        for pid, family in workers.items()
        for sample in family.samples
    ]


def _newest(workers: Mapping[int, AppFamily], default: AppFamily) -> list[AppSample]:
    """Return the label sets of an info or a state as the worker has them that set them last."""
    own = default.name if default.type == "stateset" else None
    best: dict[_Labels, tuple[float, list[AppSample]]] = {}
    for family in workers.values():
        groups: dict[_Labels, list[AppSample]] = {}
        for sample in family.samples:
            groups.setdefault(_without(sample.labels, own), []).append(sample)
        for labels, samples in groups.items():
            at = max(sample.at for sample in samples)
            if labels not in best or at >= best[labels][0]:
                best[labels] = at, samples
    return [sample for _, samples in best.values() for sample in samples]


def _without(labels: _Labels, name: str | None) -> _Labels:
    """Return labels without one; none at all where every label is part of the value."""
    if name is None:
        return ()
    at = labels.index(name)
    return labels[:at] + labels[at + 2 :]


def _gauge(combine: Callable[[list[float]], float]) -> Callable[[list[AppSample]], AppSample]:
    def combined(samples: list[AppSample]) -> AppSample:
        value = combine([sample.value for sample in samples])
        return AppSample(samples[0].name, samples[0].labels, value)

    return combined


def _sum(numbers: list[float]) -> float:
    try:
        return fsum(numbers)
    except (OverflowError, ValueError):  # infinite
        return sum(numbers)


_COMBINE = {
    "sum": _gauge(_sum),
    "min": _gauge(min),
    "max": _gauge(max),
    "mostrecent": lambda samples: max(samples, key=lambda sample: sample.at),
}


def _parts(numbers: list[float], total: float) -> tuple[float, ...]:
    """Return a few numbers whose sum is exactly that of these; none if the total is it."""
    if not isfinite(total):
        return ()
    parts = [total]
    while len(parts) < _MOST_PARTS:
        rest = fsum([*numbers, *(-part for part in parts)])
        if not rest:
            break
        parts.append(rest)
    return tuple(parts) if len(parts) > 1 else ()


def _newest_exemplar(samples: list[AppSample]) -> AppExemplar | None:
    found = [sample.exemplar for sample in samples if sample.exemplar is not None]
    return max(found, key=lambda exemplar: exemplar.timestamp) if found else None


def _metric(family: AppFamily, samples: Sequence[AppSample]) -> Metric:
    metric = Metric(family.name, family.documentation, family.type, family.unit)
    if family.type == "histogram":
        _add_histogram(metric, samples)
        return metric
    for sample in samples:
        labels = _labels(sample.labels)
        metric.add_sample(sample.name, labels, sample.value, None, _exemplar(sample.exemplar))
    return metric


def _add_histogram(metric: Metric, samples: Sequence[AppSample]) -> None:
    # Two versions of the app may have buckets of different bounds.
    groups: dict[_Labels, list[AppSample]] = {}
    for sample in samples:
        groups.setdefault(sample.labels, []).append(sample)
    for flat, group in groups.items():
        buckets = sorted(
            [(float(sample.bound), sample) for sample in group if sample.bound],
            key=lambda bucket: bucket[0],
        )
        total = 0.0
        labels = _labels(flat)
        for _, sample in buckets:
            total += sample.value
            exemplar = _exemplar(sample.exemplar)
            metric.add_sample(sample.name, {**labels, "le": sample.bound}, total, None, exemplar)
        for sample in group:
            if not sample.bound:
                metric.add_sample(sample.name, labels, sample.value)


def _labels(flat: _Labels) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _exemplar(exemplar: AppExemplar | None) -> Exemplar | None:
    if exemplar is None:
        return None
    return Exemplar(_labels(exemplar.labels), exemplar.value, exemplar.timestamp or None)
