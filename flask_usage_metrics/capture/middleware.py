"""The WSGI middleware around an app: makes an Exchange of each request.

No Flask hook or signal takes part in an ordinary request: hooks can be skipped, run twice or be
overruled by others, and cost more than all of this. Flask calls ``start_response`` while the
request's context is alive, so that is where route and user are learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from flask import Flask, got_request_exception, request, request_finished

from flask_usage_metrics.capture.exchange import Exchange
from flask_usage_metrics.capture.observer import Observer
from flask_usage_metrics.capture.track_var import TRACK_VAR
from flask_usage_metrics.runtime.forks import FORKS

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


class Middleware:
    """Wraps an app's ``wsgi_app``; the app's responses and exceptions pass through unchanged.

    Args:
        app: The app whose ``wsgi_app`` is wrapped.
        observer: Of the app.
        start: Called before the first request of a process. Takes ``wsgi.multiprocess`` and
            whether the process ends after this request; returns a function to call at the start
            of each request, or None.
    """

    def __init__(
        self,
        app: Flask,
        observer: Observer,
        *,
        start: Callable[[bool, bool], Callable[[], None] | None],
    ) -> None:
        self.observer = observer
        self.key = f"flask_usage_metrics.{id(self)}"
        self._start = start
        self._is_started = False
        self._notice: Callable[[], None] | None = None
        self._reads_context = False
        self._wsgi_app: WSGIApplication = app.wsgi_app
        got_request_exception.connect(self._on_exception, app)
        if getattr(app.wsgi_app, "__func__", None) is not Flask.wsgi_app:
            # What lies between us and Flask may call start_response when the context is gone.
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
        observer.live.add(exchange)
        if not self._is_started:
            self._get_ready(environ)
        if self._notice is not None:
            self._notice()
        try:
            if self._reads_context:
                context = exchange.read_context(environ)
                body = context.run(self._wsgi_app, environ, exchange.start_response)
            else:
                body = self._wsgi_app(environ, exchange.start_response)
        except BaseException as error:
            exchange.fail(error)
            raise
        return exchange.attach(body)

    def reset_after_fork(self) -> None:
        """Start anew in a forked child, whose first request is still to come."""
        self._is_started = False
        self._notice = None

    def _get_ready(self, environ: WSGIEnvironment) -> None:
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

    def _on_exception(self, _app: Flask, exception: BaseException, **_: Any) -> None:
        exchange = request.environ.get(self.key)
        if exchange is not None:
            exchange.exception = type(exception).__name__
            exchange.learn(request._get_current_object())  # type: ignore[attr-defined]

    def _on_finished(self, _app: Flask, **_: Any) -> None:
        exchange = request.environ.get(self.key)
        if exchange is not None:
            exchange.learn(request._get_current_object())  # type: ignore[attr-defined]
