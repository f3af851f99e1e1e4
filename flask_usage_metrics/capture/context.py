"""Facts that need Flask's request context and that only some apps ask for.

They are the span, the user, the API client and the visitor's cookie.
"""

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
    """Reads the facts for all requests of one app; for any thread.

    Args:
        users: Names users and API clients.
        cookie: Tells visitors apart; None: not asked for.
        tracing: Makes or joins the spans of requests; None: not asked for.
        faults: Takes failures of our own.
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
        """Tell whether the app asks for any of the facts; that changes if it gets Flask-Login."""
        return self.cookie is not None or self.tracing is not None or self.users.are_known


class RequestContext:
    """The facts of one request, read while its context is alive; never raises errors of its own.

    Args:
        context_reader: Of the app.
        environ: The WSGI environ of the request, which is not routed yet.
        started_ns: When the request started, in nanoseconds since the epoch.

    Attributes:
        username: The user's name, by the app or Flask-Login; None: not known.
        consumer: Name of the API client; None: not known.
        visitor: Identifier in the visitor's cookie, brought or given: 32 hexadecimal digits; None
            if there is none.
    """

    __slots__ = ("_asked_users", "_given", "_reader", "_trace", "consumer", "username", "visitor")

    def __init__(
        self, context_reader: ContextReader, environ: WSGIEnvironment, started_ns: int
    ) -> None:
        self._reader = context_reader
        self._trace: RequestTrace | None = None
        self._asked_users = False
        self._given: str | None = None
        self.username: str | None = None
        self.consumer: str | None = None
        self.visitor: str | None = None
        if context_reader.tracing is not None:
            self._trace = context_reader.tracing.start(environ, started_ns)

    def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function of the app with the request's span current; return its result."""
        return work(*arguments) if self._trace is None else self._trace.run(work, *arguments)

    def enter(self) -> Callable[[], None] | None:
        """Make the request's span the current one; return what ends that, None if nothing need."""
        return None if self._trace is None else self._trace.enter()

    def learn(self, routed: Request, environ: WSGIEnvironment) -> None:
        """Read user and API client, once, and join a span that was started meanwhile.

        Args:
            routed: The routed request, whose context is alive; tracked.
            environ: Of the request.
        """
        users = self._reader.users
        if not self._asked_users and users.are_known:
            self._asked_users = True
            self.username, self.consumer = users.ask()
        if self._trace is not None:
            rule = routed.url_rule
            self._trace.learn(environ, None if rule is None else rule.endpoint)

    def identify_visitor(self, environ: WSGIEnvironment, headers: Headers) -> None:
        """Recognise the visitor by the cookie; choose an identifier for one who has none.

        Args:
            environ: Of the request.
            headers: Of the response, which tell whether it may be kept by shared caches.
        """
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
        """Return the response's headers, with a cookie if `identify_visitor` chose a new number."""
        if self._given is None:
            return headers
        return [*headers, VisitorCookie.header(self._given, environ)]

    def take_trace_of(self, around: RequestContext) -> None:
        """Take over the span of the app that this one is mounted in, if it has started one."""
        tracing = self._reader.tracing
        if tracing is not None and around._trace is not None and around._trace.is_own:
            self._trace, around._trace = around._trace.handed_to(tracing), None

    def abandon_trace(self) -> None:
        """End a span of ours of a request that has no record here."""
        if self._trace is not None:
            self._trace.abandon()

    def end_trace(self) -> Trace | None:
        """End the span; return the request's place in its trace, None if it is not traced."""
        return None if self._trace is None else self._trace.end()
