"""What the request's own thread saw: plain values, taken as they came, cleaned later."""

from __future__ import annotations

from typing import Any

import msgspec

MAX_JSON_BYTES = 65_536
"""Arguments or a ``g.track_var`` that are larger as JSON are not kept."""

_MAX_DEPTH = 20


ENVIRON_KEYS = (
    "REQUEST_METHOD",
    "wsgi.url_scheme",
    "HTTP_HOST",
    "SERVER_NAME",
    "SERVER_PORT",
    "SCRIPT_NAME",
    "PATH_INFO",
    "QUERY_STRING",
    "SERVER_PROTOCOL",
    "CONTENT_LENGTH",
    "REMOTE_ADDR",
    "HTTP_X_FORWARDED_FOR",
    "HTTP_USER_AGENT",
    "HTTP_ACCEPT_LANGUAGE",
    "HTTP_REFERER",
    "HTTP_X_REQUEST_START",
    "HTTP_X_QUEUE_START",
)
"""What is kept of the WSGI environ, whose headers else are never looked at."""


class Observation(msgspec.Struct, frozen=True):
    """One request, as captured; `enrichment` makes the record of it.

    Attributes:
        started_ns: Nanoseconds since the epoch.
        duration_ns: Nanoseconds by the monotonic clock; >= 0.
        sequence: Number of the request in its process, part of the record's id.
        environ: Values of `ENVIRON_KEYS`, then of the headers the country sources asked for; as
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
