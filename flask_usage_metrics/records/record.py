"""UsageRecord: one request, as every storage, metric and span has it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from flask_usage_metrics.records.urls import url_of

TAKEN_OVER = 101
"""Status of a connection that the app took over, as for a WebSocket. Its duration is the time that
it was open, which is no latency."""


# gc=False: it holds no cycle, and thousands of them would keep the garbage collector busy.
class UsageRecord(msgspec.Struct, frozen=True, gc=False):
    """One request: cleaned, enriched, and after privacy.

    Every text is clean: valid Unicode without NUL, cut to a bound. An unknown value is ``None``.

    Attributes:
        id: UUIDv7 as text; sorts by time; the key that tells a duplicate.
        started_at: When the request reached us; timezone-aware UTC, microseconds.
        duration_seconds: Seconds from the first byte of our wrapper until the last byte was
            handed to the server; >= 0.
        method: In capitals, as Flask takes it, at most 32 characters; not checked against a list.
        scheme: ``"http"`` or ``"https"``, as the server saw it.
        host: Host and port as the client named them.
        root_path: Prefix the app is mounted under, without a trailing slash; ``""`` if none.
        path: Path below `root_path`, without the query string; decoded, but for control characters.
        query: Query string without ``?``, still percent-encoded, and so what came raw and is no
            text; ``""`` if none.
        protocol: Such as ``"HTTP/1.1"``.
        endpoint: Flask's endpoint; None when no route matched.
        rule: URL rule, such as ``"/user/<name>"``; None when no route matched.
        blueprint: Name of the blueprint, dotted when nested.
        view_args: Arguments of the view, as JSON values; None when no route matched.
        status: HTTP status code that was sent; 0 when it is not a number.
        exception: Class name of the exception that no error handler answered.
        bytes_sent: Bytes of the response's body handed to the server. A file that the server sends
            by itself (``wsgi.file_wrapper``) counts whole, however much of it the client takes.
        bytes_received: Bytes of the request's body that were read, whatever its Content-Length
            claims; None when no body was announced, nor read.
        remote_addr: Normalised address of the client.
        forwarded_for: The X-Forwarded-For header as it came.
        country: ISO 3166-1 alpha-2 code, upper case.
        ip_info: Answer of the HTTP country service, as JSON values.
        user_agent: The User-Agent header, at most 512 characters.
        browser: Such as ``"Chrome"``.
        browser_version: Major version, such as ``"126"``.
        platform: Operating system, such as ``"Windows"``.
        language: First choice of Accept-Language, such as ``"en-US"``.
        client: Kind of client: human, prefetch, search-bot, ai-training, ai-search, ai-agent,
            preview, feed, monitor, script or other-bot.
        referrer: The Referer header.
        authorization: Whether an Authorization header came that can be parsed.
        username: User's name, as the app, Flask-Login or Basic authentication has it.
        visitor: Identifier of the visitor.
        track_var: Contents of ``g.track_var``, as JSON values; empty if none.
        trace_id: Trace the request belongs to, 32 hexadecimal digits.
        span_id: Span of the request, 16 hexadecimal digits.
        queue_seconds: Seconds the request waited in front of the app, by the X-Request-Start
            header of a trusted proxy.
        app: Name of the Flask app.
        process: ``"host:pid"`` of the process that answered.
        consumer: Name of the API client on whose behalf the request was made.
        parent_span_id: Span of the caller, if it sent one.
        first_byte_seconds: Seconds until the first byte of the body was handed to the server, of a
            stream: a response that was handed over piece by piece. None of any other.
        utm_source: What sent the visitor, such as ``"newsletter"``: the parameter of that name in
            the query string, decoded, at most 256 characters.
        utm_medium: Kind of what sent them, such as ``"email"``; likewise.
        utm_campaign: Name of the campaign; likewise.
        ref: The parameter ``ref``, such as ``"producthunt"``; likewise.
    """

    id: str
    started_at: datetime
    duration_seconds: float
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
    view_args: dict[str, Any] | None
    status: int
    exception: str | None
    bytes_sent: int
    bytes_received: int | None
    remote_addr: str | None
    forwarded_for: str | None
    country: str | None
    ip_info: dict[str, Any] | None
    user_agent: str | None
    browser: str | None
    browser_version: str | None
    platform: str | None
    language: str | None
    client: str
    referrer: str | None
    authorization: bool
    username: str | None
    visitor: str | None
    track_var: dict[str, Any]
    trace_id: str | None
    span_id: str | None
    queue_seconds: float | None
    app: str
    process: str
    # With a default, so that what older versions wrote can be read.
    consumer: str | None = None
    parent_span_id: str | None = None
    first_byte_seconds: float | None = None
    utm_source: str | None = None
    utm_medium: str | None = None
    utm_campaign: str | None = None
    ref: str | None = None

    @property
    def is_server_error(self) -> bool:
        """Whether the status is a 5xx: 500 to 599."""
        return 500 <= self.status < 600

    @property
    def url(self) -> str:
        """The whole URL, as Flask's ``request.url``: see `url_of`."""
        return url_of(self.scheme, self.host, self.root_path, self.path, self.query)
