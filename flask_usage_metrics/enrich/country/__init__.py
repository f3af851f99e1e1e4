"""address -> ISO code: header, MMDB, iptocc, HTTP service, callable."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from inspect import iscoroutinefunction
from pathlib import Path
from threading import Condition
from time import monotonic
from urllib.parse import urlsplit

from flask_usage_metrics.enrich.country.answer import UNKNOWN, Answer, Source
from flask_usage_metrics.enrich.country.background import BackgroundLookup, BlockingSource
from flask_usage_metrics.enrich.country.header import Header, wsgi_name
from flask_usage_metrics.enrich.country.limits import Limits
from flask_usage_metrics.errors import ConfigError
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.forks import FORKS

__all__ = ["Answer", "CountryLookup", "Limits", "make_country_lookup"]

logger = logging.getLogger("flask_usage_metrics")

FREEGEOIP_ENDPOINT = "http://extreme-ip-lookup.com/json/{ip}"
"""The default of flask-track-usage; that service has come to want a key."""

_EXPECTED = (
    "'auto', 'header:NAME', 'mmdb:/file', 'iptocc', 'http://host/{ip}', None or a list of these"
)


class CountryLookup:
    """Asks one source after the other; the first that knows a country wins.

    `locate` is called by one thread at a time.

    Attributes:
        headers: WSGI names of the headers that `locate` is to be given.
        is_static: Whether the answer to an address is the same for ever.
    """

    def __init__(
        self,
        sources: Sequence[Source],
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
            None while a slow source is being asked: call again, with the same arguments.
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
        """Find a country without asking anybody: no service, no function; for any thread.

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
        """Block until a slow source answered since the last wait, or a question's time is over.

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
        """Block until no question to a function of the app is under way; not for HTTP services.

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

    def outstanding(self) -> bool:
        """Tell whether a slow source is being asked whose answer is still waited for."""
        with self._answered:
            return self._seconds_left(self._lookups) is not None

    def reset_after_fork(self) -> None:
        """Start anew in a forked child, which has none of its parent's threads."""
        self._answered = Condition()
        self._seen = sum(lookup.arrived for lookup in self._lookups)
        for lookup in self._lookups:
            lookup.reset_after_fork(self._answered)

    def close(self) -> None:
        """Forget what is being asked and end the threads; the next question starts them again.

        Blocks at most a second for each slow source that is at work.
        """
        for lookup in self._lookups:
            lookup.close()

    def _seconds_left(self, lookups: tuple[BackgroundLookup, ...]) -> float | None:
        deadlines = [lookup.next_deadline() for lookup in lookups]
        first = min((moment for moment in deadlines if moment is not None), default=None)
        return None if first is None else max(0.0, first - self._clock())


def make_country_lookup(
    given: object,
    *,
    trusted_proxies: bool,
    use_freegeoip: bool,
    freegeoip_endpoint: str | None,
    function: Callable[[str], object] | None,
    faults: Faults,
    limits: Limits | None = None,
) -> CountryLookup:
    """Make the sources that the settings name.

    Args:
        given: The value of TRACK_USAGE_COUNTRY.
        trusted_proxies: Whether there are proxies whose headers are believed.
        use_freegeoip: Whether an HTTP service comes first, for the sake of ``ip_info``.
        freegeoip_endpoint: Its URL; None: that of flask-track-usage.
        function: Takes the place of all that `given` names.
        faults: Where failures are reported.
        limits: None: the usual ones.

    Raises:
        ConfigError: A value is not understood, a package is missing, or a header could never be
            believed.
    """
    maker = _Maker(trusted_proxies, faults, limits or Limits())
    if use_freegeoip:
        url = FREEGEOIP_ENDPOINT if freegeoip_endpoint is None else freegeoip_endpoint
        # Two keys that flask-track-usage did not keep either.
        maker.add_service("TRACK_USAGE_FREEGEOIP_ENDPOINT", url, ("businessWebsite", "status"))
    if function is not None:
        maker.add_function(function)
    else:
        for one in given if isinstance(given, list | tuple) else () if given is None else (given,):
            maker.add(one)
    return CountryLookup(maker.sources, tuple(maker.headers), maker.answered, maker.limits, faults)


class _Maker:
    """Collects the sources of one country_lookup and what they share."""

    def __init__(self, trusted_proxies: bool, faults: Faults, limits: Limits) -> None:
        self.sources: list[Source] = []
        self.headers: list[str] = []
        self.answered = Condition()
        self.limits = limits
        self._trusted_proxies = trusted_proxies
        self._faults = faults

    def add(self, given: object) -> None:
        """Add the source that one value of TRACK_USAGE_COUNTRY names."""
        if not isinstance(given, str):
            raise _not_understood(given)
        scheme, _, rest = given.partition(":")
        if given == "auto":
            self._add_what_is_there()
        elif given == "iptocc":
            self._add_iptocc()
        elif scheme == "header":
            self._add_header(given, rest)
        elif scheme == "mmdb" and rest:
            self._add_mmdb(rest)
        elif scheme.lower() in ("http", "https"):
            self.add_service("TRACK_USAGE_COUNTRY", given, ())
        else:
            raise _not_understood(given)

    def add_service(self, setting: str, url: object, without: tuple[str, ...]) -> None:
        """Add an HTTP service; the URL may hold a key, so that no message shows it."""
        if not isinstance(url, str) or not _is_url(url):
            raise ConfigError(
                f"{setting} must be a URL like 'http://host/{{ip}}', not one without a host,"
                " with {ip} in the host or with white space"
            )
        if "{ip}" not in url:
            url += "{ip}" if urlsplit(url).path else "/{ip}"
        from flask_usage_metrics.enrich.country.service import (
            Service,  # requests takes 50 ms to import
        )

        self._add_slow(Service(url, without, self.limits, self._faults))

    def add_function(self, function: object) -> None:
        """Add a function of the app."""
        if not callable(function) or iscoroutinefunction(function):
            kind = "an async function" if callable(function) else type(function).__name__
            raise ConfigError(
                f"TrackUsage(country=...) must be a function that takes an address, not {kind}"
            )
        from flask_usage_metrics.enrich.country.function import Function

        self._add_slow(Function(function, self.limits, self._faults))

    def _add_slow(self, source: BlockingSource) -> None:
        self.sources.append(BackgroundLookup(source, self.answered, self.limits, self._faults))

    def _add_what_is_there(self) -> None:
        try:
            self._add_iptocc()
        except ConfigError:
            logger.info(
                "countries are unknown: pip install 'flask-usage-metrics[country]', or set"
                " TRACK_USAGE_COUNTRY"
            )

    def _add_iptocc(self) -> None:
        try:
            from flask_usage_metrics.enrich.country.offline import Offline
        except ImportError as error:
            raise _not_installed("iptocc") from error
        self.sources.append(Offline())

    def _add_mmdb(self, path: str) -> None:
        try:
            from flask_usage_metrics.enrich.country.mmdb import CountryFile
        except ImportError as error:
            raise _not_installed("maxminddb") from error
        self.sources.append(CountryFile(Path(path), self.limits, self._faults))

    def _add_header(self, given: str, name: str) -> None:
        key = wsgi_name(name)
        if key is None:
            raise _not_understood(given)
        if not self._trusted_proxies:
            raise ConfigError(
                f"TRACK_USAGE_COUNTRY is {given!r}, but a header is believed only when a trusted"
                " proxy sent it, and there is none: name yours in TRACK_USAGE_TRUSTED_PROXIES"
            )
        if key not in self.headers:
            self.headers.append(key)
        self.sources.append(Header(self.headers.index(key)))


def _is_url(url: str) -> bool:
    if url.split() != [url]:
        return False
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises if it is none
    except ValueError:
        return False
    known = parts.scheme in ("http", "https")
    return known and bool(parts.hostname) and "{ip}" not in parts.netloc


def _not_understood(given: object) -> ConfigError:
    # What comes behind might be a key, if it was to be a URL.
    shown = repr(given.partition("?")[0][:60]) if isinstance(given, str) else repr(given)[:60]
    return ConfigError(f"TRACK_USAGE_COUNTRY must be {_EXPECTED}, not {shown}")


def _not_installed(package: str) -> ConfigError:
    return ConfigError(f"{package} is not installed: pip install 'flask-usage-metrics[country]'")
