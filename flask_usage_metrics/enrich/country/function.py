"""The country from a function of the app's own: ``TrackUsage(country=function)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flask_usage_metrics.enrich.country.answer import as_answer
from flask_usage_metrics.enrich.country.background import Reply
from flask_usage_metrics.enrich.country.limits import Limits
from flask_usage_metrics.runtime.faults import Faults


class Function:
    """Calls the function with any address, private ones too: its owner may know them.

    Args:
        function: Takes an address, returns a country code or None.
        limits: How long what it returns is kept.
        faults: Where it is reported that it returned something else.
    """

    is_local = True

    def __init__(self, function: Callable[[str], object], limits: Limits, faults: Faults) -> None:
        self._function = function
        self._limits = limits
        self._faults = faults

    def accepts(self, address: str) -> bool:
        """Take every address."""
        return True

    @contextmanager
    def asking(self) -> Iterator[Callable[[str], Reply]]:
        """Return a context manager that yields the function to ask with; errors pass through."""
        yield self._ask

    def _ask(self, address: str) -> Reply:
        code = self._function(address)
        if code is not None and not isinstance(code, str):
            self._faults.report(
                "country",
                f"the function given as country= returned {type(code).__name__}, not str or None",
                "a country is unknown",
            )
        return Reply(as_answer(code).country, self._limits.keep_function_seconds)
