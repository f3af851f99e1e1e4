"""The WSGI middleware around an app: makes an Exchange of each request.

No Flask hook or signal takes part in an ordinary request: hooks can be skipped, run twice or be
overruled by others, and cost more than all of this. Flask calls ``start_response`` while the
request's context is alive, so that is where route and user are learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from flask import Flask, got_request_exception, request, request_finished, request_started

from flask_usage_metrics.capture.context import RequestContext
from flask_usage_metrics.capture.exchange import Exchange
from flask_usage_metrics.capture.http_errors import is_refusal
from flask_usage_metrics.capture.observer import Observer
from flask_usage_metrics.capture.track_var import TRACK_VAR
from flask_usage_metrics.runtime.forks import FORKS

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


_around: ContextVar[Exchange | None] = ContextVar("flask_usage_metrics.around", default=None)
"""The exchange of an app that may answer by another app mounted in it. Not in the environ: a
dispatcher or a middleware may hand on another one, with or without our keys."""


class Middleware:
    """Wraps an app's ``wsgi_app``; the app's responses and exceptions pass through unchanged.

    Args:
        app: The app whose ``wsgi_app`` is wrapped.
        observer: Of the app.
        start: Called before the first request of a process. Takes ``wsgi.multiprocess`` and
            whether the process ends after this request; returns a function to call at the start
            of each request, or None.
        beside: The middlewares of all apps whose totals are the same, this one from now on too.
    """

    def __init__(
        self,
        app: Flask,
        observer: Observer,
        *,
        start: Callable[[bool, bool], Callable[[], None] | None],
        beside: WeakSet[Middleware],
    ) -> None:
        self.observer = observer
        self._beside = beside
        beside.add(self)
        self.key = f"flask_usage_metrics.{id(self)}"
        self._start = start
        self._is_started = False
        self._notice: Callable[[], None] | None = None
        self._reads_context = False
        self._inner_app: WSGIApplication = app.wsgi_app
        got_request_exception.connect(self._on_exception, app)
        self._wsgi_app: WSGIApplication = app.wsgi_app
        if getattr(app.wsgi_app, "__func__", None) is not Flask.wsgi_app:
            self._wsgi_app = self._call_around
            # What lies between us and Flask may hand on another environ, call start_response when
            # the context is gone, or have another app answer.
            request_started.connect(self._on_started, app)
            request_finished.connect(self._on_finished, app)
        FORKS.register(self)

    # A method instead of __call__, which is slower to call: see tests/benchmarks/README.md.
    def wsgi_app(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request as the app does (PEP 3333)."""
        key = self.key
        if key in environ:
            if environ[key].is_of(environ):  # the app called itself with the same request
                return self._wsgi_app(environ, start_response)
            environ.pop(TRACK_VAR, None)  # a nested request, made from a copy of the outer one
        observer = self.observer
        exchange = Exchange(observer, environ, start_response)
        environ[key] = exchange
        context = self.enter(exchange, environ)
        try:
            if context is None:
                body = self._wsgi_app(environ, exchange.start_response)
            else:
                body = context.run(self._wsgi_app, environ, exchange.start_response)
        except BaseException as error:
            exchange.fail(error)
            raise
        return exchange.attach(body)

    def enter(self, exchange: Exchange, environ: WSGIEnvironment) -> RequestContext | None:
        """Count a request from now on, by the exchange that has begun for it.

        Returns:
            Where the facts are kept that need Flask's context; None if the app asks for none.
        """
        if (
            "CONTENT_LENGTH" in environ
            or "HTTP_TRANSFER_ENCODING" in environ
            or environ.get("REQUEST_METHOD") != "GET"
        ):
            exchange.count_input(environ)
        around = _around.get()
        if around is not None:
            around.leave_to_another()
        self.observer.live.add(exchange)
        if not self._is_started:
            self.get_ready(environ)
        if self._notice is not None:
            self._notice()
        if not self._reads_context:
            return None
        context = exchange.read_context(environ)
        if around is not None:
            around.hand_trace_to(context)
        return context

    def exchange_of(self, environ: WSGIEnvironment) -> Exchange | None:
        """Return the exchange of the app's request that has this environ; None if it has none.

        A middleware may have handed on an environ of its own, with or without our key.
        """
        exchange: Exchange | None = environ.get(self.key)
        if exchange is None:
            exchange = _around.get()
            if exchange is not None and not exchange.is_by(self.observer):
                return None
        return exchange

    def _call_around(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        token = _around.set(environ[self.key])
        try:
            return self._inner_app(environ, start_response)
        finally:
            _around.reset(token)

    def reset_after_fork(self) -> None:
        """Start anew in a forked child, whose first request is still to come."""
        self._is_started = False
        self._notice = None

    def get_ready(self, environ: WSGIEnvironment) -> None:
        """Start what works in this process, before its first request. Later calls do nothing.

        For the apps beside this one as well: what a killed worker left of them would wait on disk
        for a request to each of them, counted in part, and pending nowhere.
        """
        if self._is_started:
            return
        self._start_alone(environ)
        for other in list(self._beside):
            if not other._is_started:
                other._start_alone(environ)
                if other._notice is not None:
                    other._notice()

    def _start_alone(self, environ: WSGIEnvironment) -> None:
        observer = self.observer
        multiprocess = bool(environ.get("wsgi.multiprocess"))
        # Werkzeug's server with processes=3 forks for each request, and ends the child by
        # os._exit.
        software = str(environ.get("SERVER_SOFTWARE", ""))
        # Only now: the app may have been given Flask-Login after us.
        self._reads_context = observer.context_reader.is_needed()
        with observer.faults.caught("state", "what is captured does not survive a kill"):
            self._notice = self._start(multiprocess, multiprocess and software[:9] == "Werkzeug/")
        # Last: concurrent first requests come here too, and wait in start() for the journal.
        self._is_started = True

    def _on_started(self, _app: Flask, **_: Any) -> None:
        exchange = self.exchange_of(request.environ)
        if exchange is not None:
            exchange.route(request._get_current_object())  # type: ignore[attr-defined]

    def _on_exception(self, _app: Flask, exception: BaseException, **_: Any) -> None:
        exchange = self.exchange_of(request.environ)
        if exchange is not None:
            # Some extensions send the signal for each 404 they answer.
            if not is_refusal(exception):
                exchange.exception = type(exception).__name__
            exchange.learn(request._get_current_object())  # type: ignore[attr-defined]

    def _on_finished(self, _app: Flask, **_: Any) -> None:
        exchange = self.exchange_of(request.environ)
        if exchange is not None:
            exchange.learn(request._get_current_object())  # type: ignore[attr-defined]


def uncounted(wsgi_app: WSGIApplication) -> WSGIApplication:
    """Return a WSGI app whose requests do not count for a tracked app that it is mounted in."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        around = _around.get()
        if around is not None:
            around.leave_to_another()
        return wsgi_app(environ, start_response)

    return answer
