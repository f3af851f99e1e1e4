"""Service-level objectives: the share of requests to be answered well, and the meaning of well."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from flask_usage_metrics.records.record import UsageRecord

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")


class Objective(msgspec.Struct, frozen=True):
    """One objective.

    Attributes:
        name: Value of the label ``slo``.
        ratio: The share of requests that are to be good; above 0, below 1.
        seconds: Good is what was answered within so many seconds, whatever the status, just as a
            bucket of the histogram counts it; None: good is what was not answered 5xx.
    """

    name: str
    ratio: float
    seconds: float | None = None

    def event(self, record: UsageRecord) -> tuple[str, str]:
        """Return the labels a request is counted under: name, and ``"good"`` or ``"bad"``."""
        if self.seconds is None:
            good = not record.is_server_error
        else:
            good = record.duration_seconds <= self.seconds
        return self.name, "good" if good else "bad"


def parse_objectives(given: Mapping[str, Any]) -> tuple[Objective, ...]:
    """Return the objectives of a mapping, ``{"availability": 0.999, "latency": (0.99, 0.5)}``.

    Args:
        given: By name the share of good requests, or a pair of it and of seconds.

    Raises:
        TypeError: A value is neither a number nor a pair of numbers.
        ValueError: A name, a share or a number of seconds is out of range.
    """
    return tuple(_parse(name, value) for name, value in given.items())


def _parse(name: str, value: Any) -> Objective:
    ratio, seconds = (value, None) if isinstance(value, int | float | str) else value
    objective = Objective(name, float(ratio), None if seconds is None else float(seconds))
    if _NAME.fullmatch(name) is None or not 0 < objective.ratio < 1:
        raise ValueError
    if objective.seconds is not None and not 0 < objective.seconds < float("inf"):
        raise ValueError
    return objective
