"""A source that could not be made for now, since the machine was short of something."""

from __future__ import annotations

from collections.abc import Callable
from importlib import invalidate_caches
from importlib.metadata import MetadataPathFinder

from flask_usage_metrics.enrich.country.answer import UNKNOWN, Answer, CountrySource
from flask_usage_metrics.enrich.country.limits import Limits
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.passing import is_passing


class Later:
    """Makes the source when it is asked; until it can, records wait, though not for long.

    Args:
        make: Returns the source; None: there is none. What it raises is tried again while it is a
            passing fault, such as too many open files.
        limits: How long records wait, and how often it is tried.
        faults: Where it is reported that it fails.
    """

    is_static = False

    def __init__(
        self, make: Callable[[], CountrySource | None], limits: Limits, faults: Faults
    ) -> None:
        self._make = make
        self._limits = limits
        self._faults = faults
        self._source: CountrySource | None = None
        self._is_given_up = False
        self._retry_at = float("-inf")
        self._deadline = float("inf")

    def locate(self, address: str | None, headers: tuple[str, ...], trusted: bool) -> Answer | None:
        """Answer from the source; None while there is hope for one."""
        if self._source is None and not self._is_given_up:
            self._try(self._limits.clock())
        if self._source is not None:
            return self._source.locate(address, headers, trusted)
        if self._is_given_up or self._limits.clock() >= self._deadline:
            return UNKNOWN
        return None

    def _try(self, now: float) -> None:
        if now < self._retry_at:
            return
        # A folder that could not be listed is remembered as empty, and a package in it as missing.
        invalidate_caches()
        MetadataPathFinder().invalidate_caches()  # the former's part since CPython 3.12
        try:
            self._source = self._make()
        except Exception as error:  # noqa: BLE001 - whatever reading a file or a package raises
            self._is_given_up = not is_passing(error)
            self._retry_at = now + self._limits.retry_seconds
            self._deadline = min(self._deadline, now + self._limits.deadline_seconds)
            self._faults.report("country", error, "a country is known later, or unknown")
        else:
            self._is_given_up = self._source is None
