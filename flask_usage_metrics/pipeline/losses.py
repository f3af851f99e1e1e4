"""Counts of requests that never become records, for the worker to add to the sinks' counters."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

import msgspec

from flask_usage_metrics.pipeline.delivery.sink import Accepts
from flask_usage_metrics.records.observation import Observation


class Lost(msgspec.Struct):
    """How many requests a sink will get no record of.

    Attributes:
        dropped: Requests there was no room for.
        failed: Requests that no record can be made of.
    """

    dropped: int = 0
    failed: int = 0


class Losses:
    """Counts lost requests for each sink that would have taken them; for any thread.

    The sinks' own counters are for one caller at a time, behind a lock that is held while a disk
    is written to: no request waits for that.

    Args:
        accepts: For each sink, by its name, which requests it takes; None: all.
    """

    def __init__(self, accepts: Mapping[str, Accepts | None]) -> None:
        self._accepts = accepts
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Start at zero: the parent process has its own counts."""
        self._lock = threading.Lock()
        self._lost = {sink: Lost() for sink in self._accepts}

    def drop(self, observation: Observation) -> None:
        """Count a request there was no room for."""
        sinks = list(self._sinks_of(observation))
        with self._lock:
            for sink in sinks:
                self._lost[sink].dropped += 1

    def fail(self, observation: Observation | None) -> None:
        """Count a request that no record can be made of.

        Args:
            observation: Of the request; None: there is none. Then the request is not counted for
                sinks that take only some requests, as they cannot tell.
        """
        sinks = list(self._sinks_of(observation))
        with self._lock:
            for sink in sinks:
                self._lost[sink].failed += 1

    def pending(self, sink: str) -> int:
        """Return how many losses of a sink `take` has not returned yet."""
        lost = self._lost[sink]
        return lost.dropped + lost.failed

    def take(self) -> dict[str, Lost]:
        """Return the losses of each sink, by its name, since the last call."""
        with self._lock:
            lost, self._lost = self._lost, {sink: Lost() for sink in self._accepts}
        return lost

    def _sinks_of(self, observation: Observation | None) -> Iterator[str]:
        for sink, accepts in self._accepts.items():
            if accepts is None or (observation is not None and accepts(observation)):
                yield sink
