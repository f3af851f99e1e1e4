"""An Observation -> the UsageRecord: texts cleaned; country, client and visitor found; privacy."""

from __future__ import annotations

import os
import secrets
import socket
import struct
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

import msgspec

from flask_usage_metrics import clients
from flask_usage_metrics.address import TrustedProxies, normalise
from flask_usage_metrics.country import Locator
from flask_usage_metrics.journal import Origin
from flask_usage_metrics.observation import ENVIRON_TEXTS, Observation
from flask_usage_metrics.privacy import Policy
from flask_usage_metrics.record import UsageRecord
from flask_usage_metrics.visitors import VisitorIds

_pack = struct.Struct(">QQ").pack
_MAX_INT = 2**63 - 1
_MAX_QUEUE_SECONDS = 3600.0


class Enricher:
    """Makes records of one app's observations; for one caller at a time.

    Args:
        app: Name of the app.
        key: What no other app on the same registry has.
        locator: Where countries are looked up.
        trusted: Which proxies are believed.
        visitors: Who tells visitors without a cookie apart; None: nobody does.
        policy: What is kept.

    Attributes:
        headers: WSGI names of the headers that observations are to hold beside the usual texts.
        origin: Of what this process captures.
    """

    def __init__(
        self,
        app: str,
        key: str,
        *,
        locator: Locator,
        trusted: TrustedProxies,
        visitors: VisitorIds | None,
        policy: Policy,
    ) -> None:
        self._app = _clean(app, 128)
        self._key = key
        self._locator = locator
        self._trusted = trusted
        self._visitors = visitors
        self._policy = policy
        self.headers = (*locator.headers, *policy.headers)
        self._sources = len(locator.headers)
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Take another process' identity."""
        self.origin = Origin(
            app=self._key,
            process=_clean(f"{socket.gethostname()}:{os.getpid()}", 128),
            nonce=secrets.randbits(62),
            headers=self.headers,
        )

    def enrich(self, seen: Observation, origin: Origin) -> UsageRecord | None:
        """Return the record of an observation; None while its country is being asked for.

        Args:
            seen: The observation.
            origin: Of the process that captured it, which may have been another one.

        Raises:
            Exception: The observation holds something nobody thought of.
        """
        (
            method,
            scheme,
            host,
            server_name,
            server_port,
            root_path,
            path,
            query,
            protocol,
            content_length,
            remote_addr,
            forwarded_for,
            user_agent,
            accept_language,
            referrer,
            request_start,
            queue_start,
        ) = seen.environ[:ENVIRON_TEXTS]
        address, is_trusted = self._client(remote_addr, forwarded_for, seen.peer)
        headers = seen.environ[ENVIRON_TEXTS:]
        if origin.headers != self.headers:  # it was configured otherwise
            named = dict(zip(origin.headers, headers, strict=False))
            headers = tuple([named.get(name, "") for name in self.headers])
        answer = self._locator.locate(address, headers[: self._sources], is_trusted)
        if answer is None:
            return None
        host = host or _host(scheme, server_name, server_port)
        refused = self._policy.is_refused(headers[self._sources :])
        visitor = seen.visitor
        if visitor is None and self._visitors is not None and not refused:
            visitor = self._visitors.identify(seen.started_ns / 1e9, address, user_agent, host)
        client = clients.describe(user_agent)
        trace = seen.trace
        # By position, in the order of the fields: 38 keywords cost 17 000 instructions more.
        record = UsageRecord(
            _id(seen, origin.nonce),
            datetime.fromtimestamp(seen.started_ns // 1000 / 1e6, timezone.utc),
            seen.duration_ns / 1e9,
            _clean(method, 32),
            _clean(scheme, 8),
            _clean(host, 255),
            _clean(root_path, 1024).rstrip("/"),
            _clean(path, 2048),
            _clean(query, 4096),
            _clean(protocol, 16),
            _label(seen.endpoint),
            _label(seen.rule),
            blueprint_of(seen.endpoint),
            _arguments(seen),
            seen.status,
            _label(seen.exception),
            min(seen.bytes_sent, _MAX_INT),
            _count(content_length),
            address,
            _clean(forwarded_for, 512) or None,
            answer.country,
            answer.ip_info,
            _clean(user_agent, 512) or None,
            client.browser,
            client.version,
            client.platform,
            clients.language(accept_language),
            client.kind,
            _clean(referrer, 2048) or None,
            seen.authorization,
            None if seen.username is None else _unicode(seen.username),
            visitor,
            _json(seen.track_var) if seen.track_var else {},
            None if trace is None else trace.trace_id,
            None if trace is None else trace.span_id,
            _queue_seconds(request_start or queue_start, seen.started_ns),
            self._app,
            origin.process,
            None if seen.consumer is None else _unicode(seen.consumer),
            None if trace is None else trace.parent_span_id,
        )
        return self._policy.clean(record, refused=refused)

    def country_now(self, environ: Mapping[str, Any]) -> str | None:
        """Return the country of a request under way, if it is known at once; for any thread."""
        proxied = environ.get("werkzeug.proxy_fix.orig")
        address, is_trusted = self._client(
            str(environ.get("REMOTE_ADDR", "")),
            str(environ.get("HTTP_X_FORWARDED_FOR", "")),
            None if proxied is None else proxied.get("REMOTE_ADDR"),
        )
        headers = tuple([str(environ.get(name, "")) for name in self._locator.headers])
        return self._locator.locate_now(address, headers, is_trusted)

    def _client(
        self, remote_addr: str, forwarded_for: str, proxied: str | None
    ) -> tuple[str | None, bool]:
        """Return the client's address, and whether a trusted proxy sent the request."""
        direct = normalise(remote_addr)
        if proxied is not None:
            # ProxyFix has replaced the address: it has read the header already.
            return direct, normalise(proxied) in self._trusted
        if self._trusted and forwarded_for:
            return self._trusted.client(remote_addr, forwarded_for), direct in self._trusted
        return direct, direct in self._trusted


def _id(seen: Observation, nonce: int) -> str:
    """Return a UUIDv7 (RFC 9562, section 5.7): the same one whenever it is made.

    The 12 bits after the milliseconds hold their fraction (method 3 of section 6.2); the rest
    is a random number of the process plus the number of the request.
    """
    milliseconds, rest = divmod(seen.started_ns, 1_000_000)
    front = milliseconds << 16 | 7 << 12 | rest * 4096 // 1_000_000
    back = 2 << 62 | (nonce + seen.sequence) & (2**62 - 1)
    # Not str(UUID(int=...)), which costs 10 000 instructions more.
    digits = _pack(front & (2**64 - 1), back).hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def _clean(text: str, length: int) -> str:
    """Return what came as Latin-1 (PEP 3333) as the UTF-8 text it is, without NUL, cut."""
    if len(text) <= length and text.isascii() and "\0" not in text:
        return text
    text = text[: 4 * length]
    if not text.isascii():
        # A surrogate can come from a server that decodes otherwise, or from a test client.
        text = text.encode("latin-1", "replace").decode("utf-8", "replace")
    return (text.replace("\0", "") if "\0" in text else text)[:length]


def _unicode(text: str) -> str:
    """Return a text of the app's own with only valid Unicode, without NUL."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "")


@lru_cache(4096)
def _label(text: str | None) -> str | None:
    return None if text is None else _unicode(text)[:512]


@lru_cache(4096)
def blueprint_of(endpoint: str | None) -> str | None:
    """Return the blueprint of an endpoint, dotted when nested."""
    if endpoint is None or "." not in endpoint:
        return None
    return _label(endpoint.rpartition(".")[0])


def _host(scheme: str, name: str, port: str) -> str:
    return name if (scheme, port) in (("http", "80"), ("https", "443")) else f"{name}:{port}"


def _count(text: str) -> int | None:
    """Return the Content-Length; None if it is none."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 19):
        return None
    return min(int(text), _MAX_INT)


def _arguments(seen: Observation) -> dict[str, Any] | None:
    if seen.view_args is not None:
        return _json(seen.view_args)
    return None if seen.endpoint is None else {}


def _json(encoded: bytes) -> dict[str, Any]:
    value = msgspec.json.decode(encoded)
    if b"\\u0000" in encoded:
        value = _without_nul(value)
    # The app may have put something else in place of the dict.
    return value if isinstance(value, dict) else {"value": value}


def _without_nul(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\0", "")
    if isinstance(value, list):
        return [_without_nul(inner) for inner in value]
    if isinstance(value, dict):
        return {key.replace("\0", ""): _without_nul(inner) for key, inner in value.items()}
    return value


def _queue_seconds(text: str, started_ns: int) -> float | None:
    """Return how long a request waited, by what the proxy says of when it came.

    X-Request-Start holds ``t=`` and seconds (nginx), milliseconds (Heroku) or microseconds
    (Apache) since the epoch; which of these, its size tells.
    """
    if not text:
        return None
    text = text.strip().removeprefix("t=")
    try:
        came = float(text)
    except ValueError:
        return None
    for scale in (1.0, 1e3, 1e6, 1e9):
        waited = started_ns / 1e9 - came / scale
        if -1.0 <= waited <= _MAX_QUEUE_SECONDS:
            return max(waited, 0.0)  # two machines' clocks differ
    return None
