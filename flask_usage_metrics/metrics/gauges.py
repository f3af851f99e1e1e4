"""Gauges: read from the apps of a worker, and combined over all workers of a server."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Protocol

import msgspec

from flask_usage_metrics.metrics.families import Family, LabelSet, LabelValues
from flask_usage_metrics.metrics.names import (
    BUILD_INFO,
    IN_PROGRESS,
    JOURNALED,
    OBJECTIVES,
    PENDING,
    SHARED,
    SINK_UP,
    VISITORS,
    WORKERS,
    Description,
)
from flask_usage_metrics.metrics.shape import Shape


class GaugeSource(Protocol):
    """An app whose gauges are read at each scrape."""

    def drain(self) -> None:
        """Process what is buffered; for a bounded time, without waiting for anything remote."""

    def in_progress(self) -> int:
        """Return the number of requests being answered."""

    def pending(self) -> dict[str, int]:
        """Return the number of records each sink has yet to write."""

    def up(self) -> dict[str, bool]:
        """Return whether each sink's last write went well."""

    def is_journaled(self) -> bool:
        """Return whether captured requests survive a kill of the process."""

    def visitors(self) -> int | None:
        """Return how many visitors all processes saw today; None: they are not told apart."""


class Gauges(msgspec.Struct, frozen=True):
    """The gauges of one worker, or of several, at one moment.

    Attributes:
        in_progress: Requests being answered.
        pending: For each sink, records that it has yet to write, drop or reject.
        up: For each sink, whether its last write went well.
        journaled: Whether captured requests survive a kill of the process.
    """

    in_progress: int
    pending: dict[str, int]
    up: dict[str, bool]
    journaled: bool


def read_gauges(sources: Iterable[GaugeSource]) -> Gauges:
    """Return the gauges of this worker, of all its apps together."""
    return combined(
        [
            Gauges(source.in_progress(), source.pending(), source.up(), source.is_journaled())
            for source in sources
        ]
    )


def combined(parts: Collection[Gauges]) -> Gauges:
    """Return sums; a sink is up, and requests are journaled, where no part says otherwise."""
    return Gauges(
        sum(part.in_progress for part in parts),
        _by_sink(sum, [part.pending for part in parts]),
        {sink: bool(up) for sink, up in _by_sink(min, [part.up for part in parts]).items()},
        all(part.journaled for part in parts),
    )


def gauge_families(
    shape: Shape,
    workers: Collection[Gauges],
    *,
    visitors: int | None,
    is_shared: bool,
    version: str,
) -> dict[Description, Family]:
    """Return the families of all gauges of a server.

    Args:
        shape: Of the families.
        workers: The gauges of each of its workers.
        visitors: How many came today; None: they are not told apart.
        is_shared: Whether the workers are added together.
        version: Of the package.
    """
    server = combined(workers)
    values: dict[Description, dict[LabelValues, float]] = {
        IN_PROGRESS: {(): server.in_progress},
        PENDING: {(sink,): pending for sink, pending in server.pending.items()},
        SINK_UP: {(sink,): int(up) for sink, up in server.up.items()},
        WORKERS: {(): len(workers)},
        JOURNALED: {(): int(server.journaled)},
        OBJECTIVES: {(objective.name,): objective.ratio for objective in shape.objectives},
        VISITORS: {} if visitors is None else {("1d",): visitors},
        SHARED: {(): int(is_shared)},
        BUILD_INFO: {(version,): 1},
    }
    families = {}
    for description, samples in values.items():
        names = shape.labels_of(description)
        series = [LabelSet(names, key) for key in sorted(samples)]
        numbers = [[samples[labels.values]] for labels in series]
        families[description] = Family(description, names, series, numbers)
    return families


def _by_sink(
    combine: Callable[[list[int]], int], parts: Iterable[Mapping[str, int]]
) -> dict[str, int]:
    collected: dict[str, list[int]] = {}
    for part in parts:
        for sink, value in part.items():
            collected.setdefault(sink, []).append(value)
    return {sink: combine(values) for sink, values in collected.items()}
