"""What the request's own thread saw: plain values, taken as they came, cleaned later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

MAX_JSON_BYTES = 65_536
"""Arguments or a ``g.track_var`` that are larger as JSON are not kept."""

_MAX_DEPTH = 20


def environ_texts(get: Callable[[str, str], str]) -> tuple[str, ...]:
    """Return what is kept of a WSGI environ, whose headers else are never looked at.

    Args:
        get: The environ's ``get``; each key by itself costs 2 500 instructions less than a loop.
    """
    return (
        get("REQUEST_METHOD", ""),
        get("wsgi.url_scheme", ""),
        get("HTTP_HOST", ""),
        get("SERVER_NAME", ""),
        get("SERVER_PORT", ""),
        get("SCRIPT_NAME", ""),
        get("PATH_INFO", ""),
        get("QUERY_STRING", ""),
        get("SERVER_PROTOCOL", ""),
        get("CONTENT_LENGTH", ""),
        get("REMOTE_ADDR", ""),
        get("HTTP_X_FORWARDED_FOR", ""),
        get("HTTP_USER_AGENT", ""),
        get("HTTP_ACCEPT_LANGUAGE", ""),
        get("HTTP_REFERER", ""),
        get("HTTP_X_REQUEST_START", ""),
        get("HTTP_X_QUEUE_START", ""),
    )


ENVIRON_TEXTS = 17
"""How many texts `environ_texts` returns."""


class Trace(msgspec.Struct, frozen=True, array_like=True):
    """Where a request belongs in a trace.

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: 16 hexadecimal digits; None if it has no span, only a caller that has.
        parent_span_id: Of the span it is part of.
        is_own: Whether the span is ours, so that we have to end it.
        is_sampled: Whether the span is exported.
    """

    trace_id: str
    span_id: str | None
    parent_span_id: str | None
    is_own: bool
    is_sampled: bool


class Observation(msgspec.Struct, frozen=True, array_like=True):
    """One request, as captured; `enrichment` makes the record of it.

    Attributes:
        started_ns: Nanoseconds since the epoch.
        duration_ns: Nanoseconds by the monotonic clock; >= 0.
        sequence: Number of the request in its process, part of the record's id.
        environ: What `environ_texts` returns, then the headers the country sources asked for; as
            WSGI gives them (bytes decoded as Latin-1), ``""`` if absent, together bounded.
        peer: Address of whoever opened the connection, where ProxyFix replaced REMOTE_ADDR.
        endpoint: Flask's endpoint; None when no route matched.
        rule: URL rule; None when no route matched.
        view_args: JSON; None when there are none.
        status: HTTP status code; 0 when it is not a number.
        exception: Class name of the exception nobody handled.
        bytes_sent: Bytes of the body handed to the server.
        authorization: Whether an Authorization header came that can be parsed.
        username: Who made the request.
        track_var: JSON; None when empty.
        visitor: Identifier in the visitor's cookie, brought or set.
        consumer: Name of the API client.
        trace: Trace and span; None if not traced.
    """

    started_ns: int
    duration_ns: int
    sequence: int
    environ: tuple[str, ...]
    peer: str | None
    endpoint: str | None
    rule: str | None
    view_args: bytes | None
    status: int
    exception: str | None
    bytes_sent: int
    authorization: bool
    username: str | None
    track_var: bytes | None
    visitor: str | None = None
    consumer: str | None = None
    trace: Trace | None = None


def encode_json(value: dict[Any, Any]) -> bytes:
    """Return a dict of anything as JSON; what JSON has no word for becomes text.

    Raises:
        ValueError: The JSON is larger than `MAX_JSON_BYTES`.
    """
    try:
        encoded = _encode(value)
    except Exception:  # noqa: BLE001 - odd keys, lone surrogates, cycles, a raising __str__
        encoded = _encode(_plain(value, _MAX_DEPTH))
    if len(encoded) > MAX_JSON_BYTES:
        raise ValueError(f"larger than {MAX_JSON_BYTES} bytes as JSON")
    return encoded


_encode = msgspec.json.Encoder(enc_hook=str).encode


def _plain(value: Any, depth: int) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**64:
        return _text(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if depth and isinstance(value, dict):
        return {_text(key): _plain(inner, depth - 1) for key, inner in list(value.items())}
    if depth and isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner, depth - 1) for inner in list(value)]
    return _text(value)


def _text(value: Any) -> str:
    try:
        return str(value).encode("utf-8", "replace").decode()
    except Exception:  # noqa: BLE001 - the __str__ is the app's
        return f"<{type(value).__name__}>"
