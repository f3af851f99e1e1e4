"""Service-level objectives: the share of requests to be answered well, and the meaning of well."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import msgspec

from flask_usage_metrics.errors import ConfigError
from flask_usage_metrics.records.record import TAKEN_OVER, UsageRecord

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")

ALL = ("*",)
"""The endpoints of an objective that names none."""


class Objective(msgspec.Struct, frozen=True):
    """One objective.

    Attributes:
        name: Value of the label ``slo``.
        ratio: The share of requests that are to be good; above 0, below 1.
        seconds: Good is what was answered within so many seconds, whatever the status: a stream to
            its first byte, all else to its last. None: good is what was not answered 5xx.
        endpoints: Globs of the endpoints whose requests it is about; with ``"*"`` also requests
            that no route matched.
        exclude: Globs of endpoints among these that it is not about.
    """

    name: str
    ratio: float
    seconds: float | None = None
    endpoints: tuple[str, ...] = ALL
    exclude: tuple[str, ...] = ()

    def event(self, record: UsageRecord) -> tuple[str, str] | None:
        """Return the labels a request is counted under: name, and ``"good"`` or ``"bad"``.

        Returns:
            None: The objective is not about the request, or that took over the connection.
        """
        if record.status == TAKEN_OVER:
            return None
        if (self.exclude or self.endpoints != ALL) and not _is_among(
            record.endpoint, self.endpoints, self.exclude
        ):
            return None
        if self.seconds is None:
            good = not record.is_server_error
        elif record.first_byte_seconds is not None:
            good = record.first_byte_seconds <= self.seconds
        else:
            good = record.duration_seconds <= self.seconds
        return self.name, "good" if good else "bad"


# Endpoints are the app's: there are no more than it has.
@lru_cache(4096)
def _is_among(endpoint: str | None, globs: Iterable[str], excluded: Iterable[str]) -> bool:
    text = "" if endpoint is None else endpoint
    matches = any(fnmatchcase(text, glob) for glob in globs)
    return matches and not any(fnmatchcase(text, glob) for glob in excluded)


def parse_objectives(given: Mapping[str, Any]) -> tuple[Objective, ...]:
    """Return the objectives of a mapping, ``{"availability": 0.999, "latency": (0.99, 0.5)}``.

    Args:
        given: By name the share of good requests, a pair of it and of seconds, or a dict of
            ``ratio``, and perhaps of ``seconds``, ``endpoints`` and ``exclude``.

    Raises:
        ConfigError: An objective is about no request, or is told something that it does not know.
        TypeError: A value is none of these, or a pattern is no text.
        ValueError: A name, a share or a number of seconds is out of range.
        KeyError: A dict has no ratio.
    """
    return tuple(_parse(name, value) for name, value in given.items())


def _parse(name: str, value: Any) -> Objective:
    if _NAME.fullmatch(name) is None:
        raise ValueError
    told = value
    if isinstance(value, int | float | str):
        told = {"ratio": value}
    elif not isinstance(value, Mapping):
        told = dict(zip(("ratio", "seconds"), value, strict=True))
    for key in told:
        if key not in ("ratio", "seconds", "endpoints", "exclude"):
            raise ConfigError(
                f"TRACK_USAGE_SLO: the objective {name!r} has an unknown key {key!r}: "
                "expected ratio, seconds, endpoints or exclude"
            )
    seconds = told.get("seconds")
    objective = Objective(
        name,
        float(told["ratio"]),
        None if seconds is None else float(seconds),
        _globs(told.get("endpoints", ALL)),
        _globs(told.get("exclude", ())),
    )
    if not 0 < objective.ratio < 1:
        raise ValueError
    if objective.seconds is not None and not 0 < objective.seconds < float("inf"):
        raise ValueError
    # A glob that another one matches, as a text, means nothing beyond that one.
    if all(
        any(fnmatchcase(glob, out) for out in objective.exclude) for glob in objective.endpoints
    ):
        raise ConfigError(
            f"TRACK_USAGE_SLO: the objective {name!r} is about no request: "
            f"it leaves out all its endpoints ({', '.join(objective.endpoints) or 'none'})"
        )
    return objective


def _globs(given: Any) -> tuple[str, ...]:
    globs = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(glob, str) and glob for glob in globs):
        raise TypeError
    return globs
