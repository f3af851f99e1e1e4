"""The country from an HTTP service that answers JSON, as flask-track-usage did."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import quote_plus

import msgspec
import requests

from flask_usage_metrics.enrich.country.answer import as_answer
from flask_usage_metrics.enrich.country.background import THREAD_NAME, Reply
from flask_usage_metrics.enrich.country.limits import Limits
from flask_usage_metrics.records.address import is_global
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.texts import without_nul


class Service:
    """Asks for public addresses only, and not at all for a while after failures in a row.

    Neither an address nor the URL, which may hold a key, is ever logged.

    Args:
        url: Where; ``{ip}`` becomes the address.
        without: Keys of the answer that are not kept.
        limits: Bounds of one answer and of the pauses.
        faults: Where failures are reported.
    """

    is_local = False

    def __init__(self, url: str, without: tuple[str, ...], limits: Limits, faults: Faults) -> None:
        self._url = url
        self._without = without
        self._limits = limits
        self._faults = faults
        self._failures = 0
        self._paused_until = float("-inf")

    def accepts(self, address: str) -> bool:
        """Refuse addresses that are not public, and all of them during a pause after failures."""
        return self._limits.clock() >= self._paused_until and is_global(address)

    @contextmanager
    def asking(self) -> Iterator[Callable[[str], Reply]]:
        """Return a context manager that yields the function to ask with, over one HTTP session."""
        with _quiet_urllib3(), requests.Session() as session:
            # Not compressed: 64 KiB of gzip may be 64 MiB of JSON.
            session.headers.update({"Accept": "application/json", "Accept-Encoding": "identity"})
            session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
            yield lambda address: self._ask(session, address)

    def _ask(self, session: requests.Session, address: str) -> Reply:
        try:
            answered = msgspec.json.decode(self._fetch(session, address))
            if not isinstance(answered, dict):
                raise _Unusable("no JSON object")
            for key in self._without:
                answered.pop(key, None)
            ip_info = msgspec.json.encode(without_nul(answered))
        except Exception as error:  # noqa: BLE001 - requests, urllib3, ssl, http.client, idna, JSON
            return self._fail(error)
        self._failures = 0
        return Reply(_country(answered), self._limits.keep_seconds, ip_info)

    def _fetch(self, session: requests.Session, address: str) -> bytes:
        limits = self._limits
        # A redirect is not followed: it would take the address to somewhere not asked for.
        with session.get(
            self._url.replace("{ip}", quote_plus(address)),
            timeout=(limits.connect_seconds, limits.read_seconds),
            stream=True,
            allow_redirects=False,
        ) as response:
            if response.status_code == 404:  # an address it does not know is no failure of it
                return b"{}"
            if response.status_code != 200:
                raise _Unusable(f"status {response.status_code}")
            until = limits.clock() + limits.answer_seconds
            # read() waits until it has all it was asked for, and for each byte as long as for the
            # whole; read1(), which takes what is there, came with urllib3 2.1.
            raw = response.raw
            read, size = (raw.read1, 4096) if hasattr(raw, "read1") else (raw.read, 1)
            body = bytearray()
            while piece := read(size, decode_content=False):
                body += piece
                if len(body) > limits.answer_bytes:
                    raise _Unusable(f"more than {limits.answer_bytes} bytes")
                if limits.clock() > until:
                    raise _Unusable("too slow")
        return bytes(body)

    def _fail(self, error: Exception) -> Reply:
        # The text of an exception of requests holds the URL, even its traceback must not be logged.
        reason = str(error) if isinstance(error, _Unusable) else type(error).__name__
        limits = self._limits
        self._failures += 1
        consequence = "a country is unknown"
        if self._failures >= limits.pause_after:
            self._paused_until = limits.clock() + limits.pause_seconds
            consequence = f"countries are unknown for {limits.pause_seconds:g} s"
        self._faults.report(
            "country", f"the country service gave no answer ({reason})", consequence
        )
        return Reply(None, limits.keep_failure_seconds)


class _Unusable(Exception):
    """The service answered, but nothing that can be used; the text is ours."""


def _country(answered: dict[str, Any]) -> str | None:
    """Find the country: every service calls it differently."""
    candidates = [
        answered.get(key) for key in ("country_code", "countryCode", "country_iso", "country")
    ]
    for outer, inner in (("country", "iso_code"), ("location", "country_code")):
        nested = answered.get(outer)
        if isinstance(nested, dict):
            candidates.append(nested.get(inner))
    for candidate in candidates:
        if country := as_answer(candidate).country:
            return country
    return None


@contextmanager
def _quiet_urllib3() -> Iterator[None]:
    """Keep urllib3 from logging our URLs: at DEBUG each, at WARNING one with odd headers."""
    # On the loggers rather than the session: requests has no option for it.
    silence = _NotOurThread()
    names = ("connection", "connectionpool", "response", "util.retry")
    loggers = [logging.getLogger(f"urllib3.{name}") for name in names]
    for logger in loggers:
        logger.addFilter(silence)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(silence)


class _NotOurThread(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.threadName != THREAD_NAME
