"""Makes the sources of countries that the settings name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from inspect import iscoroutinefunction
from pathlib import Path
from threading import Condition
from typing import NamedTuple
from urllib.parse import urlsplit

from flask_usage_metrics.enrich.country.answer import CountrySource
from flask_usage_metrics.enrich.country.background import BackgroundLookup, BlockingSource
from flask_usage_metrics.enrich.country.function import Function
from flask_usage_metrics.enrich.country.header import Header, wsgi_name
from flask_usage_metrics.enrich.country.later import Later
from flask_usage_metrics.enrich.country.limits import Limits
from flask_usage_metrics.enrich.country.lookup import CountryLookup
from flask_usage_metrics.errors import ConfigError
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.passing import is_passing
from flask_usage_metrics.runtime.shown_values import shown

logger = logging.getLogger("flask_usage_metrics")

FREEGEOIP_ENDPOINT = "http://extreme-ip-lookup.com/json/{ip}"
"""The default of flask-track-usage; that service has come to want a key."""

_EXPECTED = (
    "'auto', 'header:NAME', 'mmdb:/file', 'iptocc', 'http://host/{ip}', None or a list of these"
)


class Shared(NamedTuple):
    """Things that the sources of one lookup share.

    Attributes:
        trusted_proxies: Whether there are proxies whose headers are believed.
        headers: WSGI names of the headers that sources read; each adds its own.
        answered: Notified when a source that is asked in the background answered.
        limits: Bounds of blocking sources.
        faults: Where failures are reported.
    """

    trusted_proxies: bool
    headers: list[str]
    answered: Condition
    limits: Limits
    faults: Faults

    def in_background(self, source: BlockingSource) -> BackgroundLookup:
        """Return a source that asks one that may block, on a thread of its own."""
        return BackgroundLookup(source, self.answered, self.limits, self.faults)


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
        limits: None: the usual ones; for tests.

    Raises:
        ConfigError: A value is not understood, a package is missing, or a header could never be
            believed.
    """
    shared = Shared(trusted_proxies, [], Condition(), limits or Limits(), faults)
    sources: list[CountrySource] = []
    if use_freegeoip:
        url = FREEGEOIP_ENDPOINT if freegeoip_endpoint is None else freegeoip_endpoint
        # Two keys that flask-track-usage did not keep either.
        without = ("businessWebsite", "status")
        sources.append(_service("TRACK_USAGE_FREEGEOIP_ENDPOINT", url, without, shared))
    if function is not None:
        sources.append(_function(function, shared))
    else:
        for one in given if isinstance(given, list | tuple) else () if given is None else (given,):
            source = _source(one, shared)
            if source is not None:
                sources.append(source)
    return CountryLookup(sources, tuple(shared.headers), shared.answered, shared.limits, faults)


def _source(given: object, shared: Shared) -> CountrySource | None:
    """Return the source that one value of TRACK_USAGE_COUNTRY names."""
    if not isinstance(given, str):
        raise _not_understood(given)
    scheme, colon, rest = given.partition(":")
    kind = scheme + colon
    # The scheme of a URL may be in upper case (RFC 3986, 3.1).
    maker = MAKERS.get(kind.lower() if kind.lower() in ("http:", "https:") else kind)
    if maker is None:
        raise _not_understood(given)
    try:
        return maker(given, rest, shared)
    except Exception as error:
        if kind not in READ or not is_passing(error):
            raise
        shared.faults.report("country", error, "it is tried again with the first requests")
        return Later(partial(maker, given, rest, shared), shared.limits, shared.faults)


def _auto(given: str, rest: str, shared: Shared) -> CountrySource | None:
    try:
        return _iptocc(given, rest, shared)
    except ConfigError:
        logger.info(
            "countries are unknown: pip install 'flask-usage-metrics[country]', or set"
            " TRACK_USAGE_COUNTRY"
        )
        return None


def _iptocc(_given: str, _rest: str, _shared: Shared) -> CountrySource:
    try:
        from flask_usage_metrics.enrich.country.offline import Offline
    except ImportError as error:
        if is_passing(error):
            raise
        raise _not_installed("iptocc") from error
    return Offline()


def _mmdb(given: str, path: str, shared: Shared) -> CountrySource:
    if not path:
        raise _not_understood(given)
    try:
        from flask_usage_metrics.enrich.country.mmdb import CountryFile
    except ImportError as error:
        if is_passing(error):
            raise
        raise _not_installed("maxminddb") from error
    return CountryFile(Path(path), shared.limits, shared.faults)


def _header(given: str, name: str, shared: Shared) -> CountrySource:
    key = wsgi_name(name)
    if key is None:
        raise _not_understood(given)
    if not shared.trusted_proxies:
        raise ConfigError(
            f"TRACK_USAGE_COUNTRY is {given!r}, but a header is believed only when a trusted"
            " proxy sent it, and there is none: name yours in TRACK_USAGE_TRUSTED_PROXIES"
        )
    if key not in shared.headers:
        shared.headers.append(key)
    return Header(shared.headers.index(key))


def _url(given: str, _rest: str, shared: Shared) -> CountrySource:
    return _service("TRACK_USAGE_COUNTRY", given, (), shared)


def _service(setting: str, url: object, without: tuple[str, ...], shared: Shared) -> CountrySource:
    # The URL may hold a key: no message shows it.
    if not isinstance(url, str) or not _is_url(url):
        raise ConfigError(
            f"{setting} must be a URL like 'http://host/{{ip}}', not one without a host,"
            " with {ip} in the host or with white space"
        )
    if "{ip}" not in url:
        url += "{ip}" if urlsplit(url).path else "/{ip}"
    # Imported here: requests takes 50 ms.
    from flask_usage_metrics.enrich.country.service import Service

    return shared.in_background(Service(url, without, shared.limits, shared.faults))


def _function(function: object, shared: Shared) -> CountrySource:
    if not callable(function) or iscoroutinefunction(function):
        kind = "an async function" if callable(function) else type(function).__name__
        raise ConfigError(
            f"TrackUsage(country=...) must be a function that takes an address, not {kind}"
        )
    return shared.in_background(Function(function, shared.limits, shared.faults))


Maker = Callable[[str, str, Shared], CountrySource | None]
"""Makes a source from a value of TRACK_USAGE_COUNTRY, its part after the colon, and the objects
that all sources share. Returns None if there is no such source; raises ConfigError if the value is
wrong."""

MAKERS: dict[str, Maker] = {
    "auto": _auto,
    "iptocc": _iptocc,
    "header:": _header,
    "mmdb:": _mmdb,
    "http:": _url,
    "https:": _url,
}
"""The sources there are, by the word or the scheme that names them. Another one is a module with a
`CountrySource`, or a `BlockingSource` if it may block, and an entry here."""

READ = ("auto", "iptocc", "mmdb:")
"""Those that read files when they are made; they may be made later."""


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
    return ConfigError(f"TRACK_USAGE_COUNTRY must be {_EXPECTED}, not {shown(given)}")


def _not_installed(package: str) -> ConfigError:
    return ConfigError(f"{package} is not installed: pip install 'flask-usage-metrics[country]'")
