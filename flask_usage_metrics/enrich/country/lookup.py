"""The country of a client: each source is asked in turn, until one knows it."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Condition
from time import monotonic

from flask_usage_metrics.enrich.country.answer import UNKNOWN, Answer, CountrySource
from flask_usage_metrics.enrich.country.background import BackgroundLookup
from flask_usage_metrics.enrich.country.limits import Limits
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.forks import FORKS


class CountryLookup:
    """Asks the sources in order; the first that knows the country wins.

    `locate` is called by one thread at a time.

    Args:
        sources: In the order they are asked.
        headers: WSGI names of the headers that some of them read.
        answered: Notified by the sources that are asked in the background.
        limits: Limits of those sources, whose clock is used here.
        faults: Where it is reported that a source raised.

    Attributes:
        headers: WSGI names of the headers that `locate` is to be given.
        is_static: Whether the answer to an address is the same for ever.
    """

    def __init__(
        self,
        sources: Sequence[CountrySource],
        headers: tuple[str, ...],
        answered: Condition,
        limits: Limits,
        faults: Faults,
    ) -> None:
        self.headers = headers
        self._sources = tuple(sources)
        self.is_static = all(source.is_static for source in sources)
        self._lookups = tuple(source for source in sources if isinstance(source, BackgroundLookup))
        self._local_lookups = tuple(lookup for lookup in self._lookups if lookup.is_local)
        self._answered = answered
        self._clock = limits.clock
        self._faults = faults
        self._seen = 0
        FORKS.register(self)

    def locate(self, address: str | None, headers: tuple[str, ...], trusted: bool) -> Answer | None:
        """Find the country of a client; never blocks, never raises.

        Args:
            address: Normalised; None if not known.
            headers: Values of the headers that `headers` names, ``""`` if absent.
            trusted: Whether a trusted proxy sent the request, so that its headers are believed.

        Returns:
            None while a blocking source is being asked: call again, with the same arguments.
        """
        ip_info = None
        for source in self._sources:
            try:
                answer = source.locate(address, headers, trusted)
            except Exception as error:  # noqa: BLE001 - somebody else's code, or a damaged file
                self._faults.report("country", error, "a country is unknown")
                continue
            if answer is None:
                return None
            if ip_info is None:
                if answer.country is not None:
                    return answer
                ip_info = answer.ip_info
            elif answer.country is not None:
                return Answer(answer.country, ip_info)
        return UNKNOWN if ip_info is None else Answer(None, ip_info)

    def locate_now(
        self, address: str | None, headers: tuple[str, ...], trusted: bool
    ) -> str | None:
        """Find a country without asking a service or function; None if unknown; for any thread.

        Args:
            address: As in `locate`.
            headers: As in `locate`.
            trusted: As in `locate`.
        """
        for source in self._sources:
            if not isinstance(source, BackgroundLookup):
                try:
                    answer = source.locate(address, headers, trusted)
                except Exception as error:  # noqa: BLE001 - perhaps a damaged file
                    self._faults.report("country", error, "a country is unknown")
                else:
                    if answer is not None and answer.country is not None:
                        return answer.country
        return None

    def wait(self, timeout: float) -> None:
        """Block until a blocking source has answered since the last wait, or the first gives up.

        Args:
            timeout: Seconds, at most. It returns at once when no question is under way.
        """
        with self._answered:
            arrived = sum(lookup.arrived for lookup in self._lookups)
            if arrived == self._seen and (left := self._seconds_left(self._lookups)) is not None:
                self._answered.wait(min(timeout, left))
                arrived = sum(lookup.arrived for lookup in self._lookups)
            self._seen = arrived

    def wait_local(self, timeout: float) -> None:
        """Block until no country function of the app is being asked; not for HTTP services.

        Args:
            timeout: Seconds, at most.
        """
        if not self._local_lookups:
            return
        until = monotonic() + timeout
        with self._answered:
            while (left := self._seconds_left(self._local_lookups)) is not None:
                remaining = until - monotonic()
                if remaining <= 0:
                    return
                self._answered.wait(min(remaining, left))

    def reset_after_fork(self) -> None:
        """Start anew in a forked child, which has none of its parent's threads."""
        self._answered = Condition()
        self._seen = sum(lookup.arrived for lookup in self._lookups)
        for lookup in self._lookups:
            lookup.reset_after_fork(self._answered)

    def close(self) -> None:
        """Forget what is being asked and end the threads; the next question starts them again.

        Blocks at most a second for each blocking source that is at work.
        """
        for lookup in self._lookups:
            lookup.close()

    def _seconds_left(self, lookups: tuple[BackgroundLookup, ...]) -> float | None:
        deadlines = [lookup.next_deadline() for lookup in lookups]
        first = min((moment for moment in deadlines if moment is not None), default=None)
        return None if first is None else max(0.0, first - self._clock())
