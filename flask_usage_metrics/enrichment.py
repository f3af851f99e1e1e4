"""An Observation -> the UsageRecord: texts cleaned; country, client and visitor found; privacy."""

from __future__ import annotations

import os
import secrets
import socket
import struct
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

import msgspec

from flask_usage_metrics import clients
from flask_usage_metrics.address import TrustedProxies, normalise
from flask_usage_metrics.country import Locator
from flask_usage_metrics.journal import Origin
from flask_usage_metrics.observation import ENVIRON_KEYS, Observation
from flask_usage_metrics.privacy import Policy
from flask_usage_metrics.record import UsageRecord
from flask_usage_metrics.visitors import VisitorIds

_pack = struct.Struct(">QQ").pack
_MAX_INT = 2**63 - 1
_MAX_QUEUE_SECONDS = 3600.0

# Where in an observation's environ it is.
_TEXTS = len(ENVIRON_KEYS)
_TARGET = slice(ENVIRON_KEYS.index("CONTENT_LENGTH"))
_CONTENT_LENGTH = _TARGET.stop
_CALLER = slice(ENVIRON_KEYS.index("REMOTE_ADDR"), ENVIRON_KEYS.index("HTTP_REFERER"))
_USER_AGENT = ENVIRON_KEYS.index("HTTP_USER_AGENT")
_REFERRER = _CALLER.stop
_REQUEST_START = ENVIRON_KEYS.index("HTTP_X_REQUEST_START")
_QUEUE_START = ENVIRON_KEYS.index("HTTP_X_QUEUE_START")

_CACHED = 1024
_MAX_CACHED_TEXT = 2048


class Target(msgspec.Struct, frozen=True, gc=False):
    """What was asked for, as it is kept: the same for all who ask for the same.

    Attributes:
        asked_host: The host as it came.
        view_args: JSON; None when no route matched.
    """

    asked_host: str
    method: str
    scheme: str
    host: str
    root_path: str
    path: str
    query: str
    protocol: str
    endpoint: str | None
    rule: str | None
    blueprint: str | None
    view_args: bytes | None


class Caller(msgspec.Struct, frozen=True, gc=False):
    """Who asked: the same for all that a client asks for.

    Attributes:
        address: The whole address; what is kept of it is `remote_addr`.
        is_trusted: Whether a trusted proxy sent the request.
    """

    address: str | None
    is_trusted: bool
    remote_addr: str | None
    forwarded_for: str | None
    user_agent: str | None
    client: clients.Client
    language: str | None


class Enricher:
    """Makes records of one app's observations; for one caller at a time.

    Many requests ask for the same, and a client asks for much: what is made of these texts is
    remembered, which takes nearly half off the cost of a record.

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
        # Of the instance: a cache of the class would keep every instance alive.
        self._known_target = lru_cache(_CACHED)(self._target)
        self._known_caller = lru_cache(_CACHED)(self._caller)
        self._known_referrer = lru_cache(_CACHED)(self._referrer)
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
        texts = seen.environ
        # Strangers could fill the memory with long ones.
        is_short = len("".join(texts)) + len(seen.view_args or b"") <= _MAX_CACHED_TEXT
        find_caller: Callable[..., Caller] = self._known_caller if is_short else self._caller
        caller = find_caller(*texts[_CALLER], seen.peer)
        headers: tuple[str, ...] = ()
        if self.headers:
            headers = texts[_TEXTS:]
            if origin.headers != self.headers:  # it was configured otherwise
                named: dict[str, str] = dict(zip(origin.headers, headers, strict=False))
                headers = tuple([named.get(name, "") for name in self.headers])
        answer = self._locator.locate(caller.address, headers[: self._sources], caller.is_trusted)
        if answer is None:
            return None
        find_target: Callable[..., Target] = self._known_target if is_short else self._target
        target = find_target(*texts[_TARGET], seen.endpoint, seen.rule, seen.view_args)
        policy = self._policy
        visitor = username = ip_info = None
        if "1" in headers[self._sources :]:
            caller = msgspec.structs.replace(
                caller, remote_addr=None, forwarded_for=None, user_agent=None
            )
        elif not policy.is_nameless:
            visitor = seen.visitor
            if visitor is None and self._visitors is not None:
                visitor = self._visitors.identify(
                    seen.started_ns / 1e9, caller.address, texts[_USER_AGENT], target.asked_host
                )
            if seen.username is not None:
                username = policy.username(_unicode(seen.username))
            if answer.ip_info is not None:
                ip_info = policy.ip_info(answer.ip_info)
        referrer = None
        if texts[_REFERRER]:
            referrer = (self._known_referrer if is_short else self._referrer)(texts[_REFERRER])
        content_length = texts[_CONTENT_LENGTH]
        queued = texts[_REQUEST_START] or texts[_QUEUE_START]
        client = caller.client
        trace = seen.trace
        # By position, in the order of the fields: 38 keywords cost 17 000 instructions more.
        return UsageRecord(
            _id(seen, origin.nonce),
            datetime.fromtimestamp(seen.started_ns // 1000 / 1e6, timezone.utc),
            seen.duration_ns / 1e9,
            target.method,
            target.scheme,
            target.host,
            target.root_path,
            target.path,
            target.query,
            target.protocol,
            target.endpoint,
            target.rule,
            target.blueprint,
            None if target.view_args is None else _decode(target.view_args),
            seen.status,
            None if seen.exception is None else _label(seen.exception),
            seen.bytes_sent if seen.bytes_sent <= _MAX_INT else _MAX_INT,
            _count(content_length) if content_length else None,
            caller.remote_addr,
            caller.forwarded_for,
            answer.country,
            ip_info,
            caller.user_agent,
            client.browser,
            client.version,
            client.platform,
            caller.language,
            client.kind,
            referrer,
            seen.authorization,
            username,
            visitor,
            policy.variables(_json(seen.track_var)) if seen.track_var else {},
            None if trace is None else trace.trace_id,
            None if trace is None else trace.span_id,
            _queue_seconds(queued, seen.started_ns) if queued else None,
            self._app,
            origin.process,
            None if seen.consumer is None else policy.consumer(_unicode(seen.consumer)),
            None if trace is None else trace.parent_span_id,
        )

    def country_now(self, environ: Mapping[str, Any]) -> str | None:
        """Return the country of a request under way, if it is known at once; for any thread."""
        proxied = environ.get("werkzeug.proxy_fix.orig")
        address, is_trusted = self._whence(
            str(environ.get("REMOTE_ADDR", "")),
            str(environ.get("HTTP_X_FORWARDED_FOR", "")),
            None if proxied is None else proxied.get("REMOTE_ADDR"),
        )
        headers = tuple([str(environ.get(name, "")) for name in self._locator.headers])
        return self._locator.locate_now(address, headers, is_trusted)

    # ------------------------------------------------------------------------ what is remembered

    def _target(
        self,
        method: str,
        scheme: str,
        host: str,
        server_name: str,
        server_port: str,
        root_path: str,
        path: str,
        query: str,
        protocol: str,
        endpoint: str | None,
        rule: str | None,
        arguments: bytes | None,
    ) -> Target:
        host = host or _host(scheme, server_name, server_port)
        endpoint, rule = _label(endpoint), _label(rule)
        view_args: dict[str, Any] | None = None if endpoint is None else {}
        if arguments is not None:
            view_args = _json(arguments)
        path, query, view_args = self._policy.target(
            _clean(path, 2048), _clean(query, 4096), rule, view_args
        )
        return Target(
            host,
            _clean(method, 32),
            _clean(scheme, 8),
            _clean(host, 255),
            _clean(root_path, 1024).rstrip("/"),
            path,
            query,
            _clean(protocol, 16),
            endpoint,
            rule,
            blueprint_of(endpoint),
            None if view_args is None else _encode(view_args),
        )

    def _caller(
        self,
        remote_addr: str,
        forwarded_for: str,
        user_agent: str,
        language: str,
        peer: str | None,
    ) -> Caller:
        address, is_trusted = self._whence(remote_addr, forwarded_for, peer)
        policy = self._policy
        return Caller(
            address,
            is_trusted,
            policy.address(address),
            policy.header(_clean(forwarded_for, 512) or None),
            policy.header(_clean(user_agent, 512) or None),
            clients.describe(user_agent),
            clients.language(language),
        )

    def _referrer(self, text: str) -> str | None:
        return self._policy.referrer(_clean(text, 2048)) or None

    def _whence(
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


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


def _json(encoded: bytes) -> dict[str, Any]:
    value = _decode(encoded)
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
