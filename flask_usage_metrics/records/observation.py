"""Observation: one request as its own thread saw it, in plain values that are not cleaned yet."""

from __future__ import annotations

import msgspec

ENVIRON_KEYS = (
    "REQUEST_METHOD",
    "wsgi.url_scheme",
    "HTTP_HOST",
    "SCRIPT_NAME",
    "PATH_INFO",
    "QUERY_STRING",
    "SERVER_PROTOCOL",
    "REMOTE_ADDR",
    "HTTP_X_FORWARDED_FOR",
    "HTTP_USER_AGENT",
    "HTTP_ACCEPT_LANGUAGE",
    "HTTP_REFERER",
    "HTTP_X_REQUEST_START",
)
"""Keys of a WSGI environ whose values begin `Observation.environ`, in this order. In place of an
empty Host it has the server's own name, and X-Queue-Start if there is no X-Request-Start; behind
the User-Agent the lines of Sec-CH-UA and Sec-CH-UA-Platform, if the former came: no header has a
line feed."""


class Trace(msgspec.Struct, frozen=True, array_like=True):
    """Where a request belongs in a trace.

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: 16 hexadecimal digits; None if only the caller has a span.
        parent_span_id: Span that the request's span is part of, 16 hexadecimal digits; None if
            there is none or it is not known.
        is_own: Whether the span is ours, so that we have to end it.
        is_sampled: Whether the span is exported.
    """

    trace_id: str
    span_id: str | None
    parent_span_id: str | None
    is_own: bool
    is_sampled: bool


class Extras(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Values that only some requests have; None each where this one has none.

    Attributes:
        peer: Address of whoever opened the connection, where ProxyFix replaced REMOTE_ADDR.
        exception: Class name of the exception that no error handler answered.
        authorization: Whether an Authorization header came that can be parsed.
        username: User's name, as the app, Flask-Login or Basic authentication has it.
        track_var: ``g.track_var`` as JSON; None if no code asked for it, or it is too large.
        visitor: Identifier in the visitor's cookie, brought or set: 32 hexadecimal digits.
        consumer: Name of the API client.
        trace: Trace and span; None if not traced.
        bytes_received: Bytes that were read of the request's body; None where there was none.
        first_byte_ns: Nanoseconds until the first byte of the body was handed to the server, of a
            response that was handed over piece by piece.
        is_prefetch: Whether the browser made the request of itself, before anybody asked for it.
    """

    peer: str | None = None
    exception: str | None = None
    authorization: bool = False
    username: str | None = None
    track_var: bytes | None = None
    visitor: str | None = None
    consumer: str | None = None
    trace: Trace | None = None
    bytes_received: int | None = None
    first_byte_ns: int | None = None
    is_prefetch: bool = False


# gc=False: it holds no cycle, and thousands of them would keep the garbage collector busy.
class Observation(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request, as captured; the `Enricher` makes a `UsageRecord` of it.

    Attributes:
        started_ns: When the request reached us, in nanoseconds since the epoch.
        duration_ns: Nanoseconds by the monotonic clock; >= 0.
        environ: Texts of `ENVIRON_KEYS`, then those of `Origin.headers`; as WSGI gives them (bytes
            decoded as Latin-1), ``""`` if absent, together bounded.
        endpoint: Flask's endpoint; None when no route matched.
        rule: URL rule; None when no route matched.
        view_args: JSON; None when there are none, or they are too large.
        status: HTTP status code; 0 when it is not a number.
        bytes_sent: Bytes of the body handed to the server.
        extras: Values that only some requests have; None if this one has none of them.
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
    """The process that captured observations: the part of their records that is the same for all.

    Attributes:
        app: Name of the app.
        process: ``"host:pid"``.
        nonce: Random number of the process, part of the records' ids.
        headers: WSGI names of the headers whose texts follow those of `ENVIRON_KEYS` in
            `Observation.environ`.
    """

    app: str
    process: str
    nonce: int
    headers: tuple[str, ...]
