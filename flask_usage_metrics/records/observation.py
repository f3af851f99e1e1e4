"""What the request's own thread saw: plain values, taken as they came, cleaned later."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

MAX_JSON_BYTES = 65_536
"""Arguments or a ``g.track_var`` that are larger as JSON are not kept."""

_MAX_DEPTH = 20


ENVIRON_KEYS = (
    "REQUEST_METHOD",
    "wsgi.url_scheme",
    "HTTP_HOST",
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
)
"""What is kept of a WSGI environ, whose headers else are never looked at: the server's own name
in place of an empty Host, and X-Queue-Start if there is no X-Request-Start."""

_INSTEAD = ("SERVER_NAME", "SERVER_PORT", "HTTP_X_QUEUE_START")

MAX_ENVIRON_CHARACTERS = 16_384
"""What is kept of one environ; common servers refuse a request line longer than 8 190."""

_MAX_CUT = 2048
"""What is kept of each text of an environ that is larger."""


def environ_texts(environ: WSGIEnvironment, headers: tuple[str, ...]) -> tuple[str, ...]:
    """Return the texts of `ENVIRON_KEYS`, then those of some headers, as `Observation` has them.

    Args:
        environ: Of the request.
        headers: WSGI names of further headers.
    """
    try:
        # A loop over the keys costs 7 000 instructions more, calls of ``get`` 1 000.
        texts: tuple[str, ...] = (
            environ["REQUEST_METHOD"],
            environ["wsgi.url_scheme"],
            environ["HTTP_HOST"] or _server(environ),
            environ["SCRIPT_NAME"],
            environ["PATH_INFO"],
            environ["QUERY_STRING"],
            environ["SERVER_PROTOCOL"],
            environ["CONTENT_LENGTH"] if "CONTENT_LENGTH" in environ else "",
            environ["REMOTE_ADDR"],
            environ["HTTP_X_FORWARDED_FOR"] if "HTTP_X_FORWARDED_FOR" in environ else "",
            environ["HTTP_USER_AGENT"] if "HTTP_USER_AGENT" in environ else "",
            environ["HTTP_ACCEPT_LANGUAGE"] if "HTTP_ACCEPT_LANGUAGE" in environ else "",
            environ["HTTP_REFERER"] if "HTTP_REFERER" in environ else "",
            environ["HTTP_X_REQUEST_START"]
            if "HTTP_X_REQUEST_START" in environ
            else environ["HTTP_X_QUEUE_START"]
            if "HTTP_X_QUEUE_START" in environ
            else "",
        )
        if headers:
            texts += tuple([environ.get(name, "") for name in headers])
        if len("".join(texts)) <= MAX_ENVIRON_CHARACTERS:
            return texts
    except (KeyError, TypeError):
        # PEP 3333 lets a server leave some out; and somebody may have put a number there.
        given = (*ENVIRON_KEYS, *_INSTEAD, *headers)
        clean = {key: str(environ[key]) for key in given if key in environ}
        return environ_texts({**dict.fromkeys(ENVIRON_KEYS[:-1], ""), **clean}, headers)
    return tuple([text[:_MAX_CUT] for text in texts])


def _server(environ: WSGIEnvironment) -> str:
    """Return the host as the server knows it (PEP 3333, URL reconstruction)."""
    name, port = str(environ.get("SERVER_NAME", "")), str(environ.get("SERVER_PORT", ""))
    usual = {"http": "80", "https": "443"}.get(environ["wsgi.url_scheme"])
    return name if port in (usual, "") else f"{name}:{port}"


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


class Extras(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What only some requests have.

    Attributes:
        peer: Address of whoever opened the connection, where ProxyFix replaced REMOTE_ADDR.
        exception: Class name of the exception nobody handled.
        authorization: Whether an Authorization header came that can be parsed.
        username: Who made the request.
        track_var: JSON; None when empty.
        visitor: Identifier in the visitor's cookie, brought or set.
        consumer: Name of the API client.
        trace: Trace and span; None if not traced.
    """

    peer: str | None = None
    exception: str | None = None
    authorization: bool = False
    username: str | None = None
    track_var: bytes | None = None
    visitor: str | None = None
    consumer: str | None = None
    trace: Trace | None = None


# Not followed by the garbage collector, which thousands of them keep busy: it holds no cycle.
class Observation(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request, as captured; `enrichment` makes the record of it.

    Attributes:
        started_ns: Nanoseconds since the epoch.
        duration_ns: Nanoseconds by the monotonic clock; >= 0.
        environ: What `environ_texts` returns, then the headers the country sources asked for; as
            WSGI gives them (bytes decoded as Latin-1), ``""`` if absent, together bounded.
        endpoint: Flask's endpoint; None when no route matched.
        rule: URL rule; None when no route matched.
        view_args: JSON; None when there are none.
        status: HTTP status code; 0 when it is not a number.
        bytes_sent: Bytes of the body handed to the server.
        extras: None if it has nothing of that kind.
    """

    started_ns: int
    duration_ns: int
    environ: tuple[str, ...]
    endpoint: str | None
    rule: str | None
    view_args: bytes | None
    status: int
    bytes_sent: int
    extras: Extras | None = None


class Origin(msgspec.Struct, frozen=True):
    """Who captured: what records need to know beside their observation.

    Attributes:
        app: Name of the app.
        process: ``"host:pid"``.
        nonce: Random number of the process, part of the records' ids.
        headers: Names of the headers that follow the usual texts of an observation's environ.
    """

    app: str
    process: str
    nonce: int
    headers: tuple[str, ...]


def encode_json(value: dict[Any, Any]) -> bytes:
    """Return a dict of anything as JSON; what JSON has no word for becomes text."""
    try:
        return _encode(value)
    except Exception:  # noqa: BLE001 - odd keys, lone surrogates, cycles, a raising __str__
        return _encode(_plain(value, _MAX_DEPTH))


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
