"""What only some apps have us find out of a request: its span, its user, its visitor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from flask import Request

from flask_usage_metrics.capture.users import Users
from flask_usage_metrics.capture.visitor_cookie import Headers, VisitorCookie
from flask_usage_metrics.records.observation import Trace
from flask_usage_metrics.runtime.faults import Faults

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from flask_usage_metrics.traces.live import RequestTrace, Tracing

Result = TypeVar("Result")


class ContextReader:
    """Finds out of one app's requests what it asks for; never raises.

    Args:
        users: Who knows who makes a request.
        cookie: What tells visitors apart; None: nothing does.
        tracing: Who makes spans of requests; None: nobody does.
        faults: Where failures of our own are reported.
    """

    def __init__(
        self,
        users: Users,
        cookie: VisitorCookie | None,
        tracing: Tracing | None,
        faults: Faults,
    ) -> None:
        self.users = users
        self.cookie = cookie
        self.tracing = tracing
        self.faults = faults

    def is_needed(self) -> bool:
        """Tell whether the app asks for anything."""
        return self.cookie is not None or self.tracing is not None or self.users.are_known


class RequestContext:
    """What was found out of one request.

    Args:
        context_reader: Of the app.
        environ: Of the request, nothing of which is routed yet.
        started_ns: When the request started, in nanoseconds since the epoch.

    Attributes:
        username: Who makes the request, as the app knows it.
        consumer: Name of the API client.
        visitor: Identifier in the visitor's cookie, brought or given.
    """

    __slots__ = ("_given", "_has_asked", "_reader", "_trace", "consumer", "username", "visitor")

    def __init__(
        self, context_reader: ContextReader, environ: WSGIEnvironment, started_ns: int
    ) -> None:
        self._reader = context_reader
        self._trace: RequestTrace | None = None
        self._has_asked = False
        self._given: str | None = None
        self.username: str | None = None
        self.consumer: str | None = None
        self.visitor: str | None = None
        if context_reader.tracing is not None:
            self._trace = context_reader.tracing.begin(environ, started_ns)

    def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function of the app within the request's span."""
        return work(*arguments) if self._trace is None else self._trace.run(work, *arguments)

    def learn(self, learned: Request, environ: WSGIEnvironment) -> None:
        """Take what can be known only while the context of a tracked request lives."""
        users = self._reader.users
        if not self._has_asked and users.are_known:
            self._has_asked = True
            self.username, self.consumer = users.ask()
        if self._trace is not None:
            rule = learned.url_rule
            self._trace.learn(environ, None if rule is None else rule.endpoint)

    def greet(self, environ: WSGIEnvironment, headers: Headers) -> None:
        """Recognise the visitor by the cookie, or choose one to be given with these headers."""
        cookie = self._reader.cookie
        if cookie is None or self.visitor is not None:
            return
        try:
            self.visitor = cookie.read(environ)
            if self.visitor is None:
                self.visitor = self._given = cookie.choose(environ, headers)
        except Exception as error:  # noqa: BLE001 - a visitor must never see a failure of ours
            self._reader.faults.report("cookie", error, "a visitor is not recognised")

    def headers(self, headers: Headers, environ: WSGIEnvironment) -> Headers:
        """Return the headers of the response, with the cookie if one is to be given."""
        if self._given is None:
            return headers
        return [*headers, VisitorCookie.header(self._given, environ)]

    def end_trace(self) -> Trace | None:
        """Return what an observation has of the trace, when the request is over."""
        return None if self._trace is None else self._trace.end()
