"""Requests that reach Flask past our middleware: counted from Flask's own first step to its last.

Who keeps ``app.wsgi_app`` before `TrackUsage` wraps it, as Connexion does and who makes
``DispatcherMiddleware(app.wsgi_app, ...)`` first, calls Flask's bound method ever after. It asks
``app.request_context`` for each request, which is where such a request is noticed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from flask import (
    Flask,
    current_app,
    has_request_context,
    request,
    request_started,
)
from werkzeug.wrappers import Response

from flask_usage_metrics.capture.exchange import Exchange, is_sent_as_file
from flask_usage_metrics.capture.middleware import Middleware
from flask_usage_metrics.capture.track_var import TRACK_VAR
from flask_usage_metrics.capture.visitor_cookie import Headers

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

logger = logging.getLogger("flask_usage_metrics")

_HINT = (
    "requests of %r come in by a way that was made before TrackUsage: they are counted, without "
    "what the middlewares around Flask do. Call TrackUsage(app) before app.wsgi_app is handed to "
    "anybody else; with Connexion, cx.add_wsgi_middleware(lambda _: cx.app.wsgi_app) after it"
)


class Bypass:
    """Notices the requests of one app that did not come through its middleware.

    Args:
        app: The app. Its ``request_context`` is replaced.
        middleware: Of the app; it takes the exchanges that begin here.
    """

    def __init__(self, app: Flask, middleware: Middleware) -> None:
        self._app = app
        self._key = middleware.key
        self._middleware = middleware
        self._is_known = False
        self._make = app.request_context
        app.request_context = self.request_context  # type: ignore[method-assign]

    def request_context(self, environ: WSGIEnvironment) -> Any:
        """Return Flask's context of a request, as ``app.request_context`` did before."""
        # The usual case first, which has to cost next to nothing.
        exchange = environ.get(self._key)
        if exchange is not None and exchange.is_of(environ):
            return self._make(environ)
        context = self._make(environ)
        with self._middleware.observer.faults.caught("capture", "a request is not counted"):
            exchange = self._middleware.exchange_of(environ)
            # Else a middleware handed on an environ of its own, which is no other request, unless
            # ours is in a view by now.
            if exchange is None or (exchange.is_routed() and self._is_answering()):
                self._listen()
                _BypassingExchange(self._middleware, environ, context, self._tell)
        return context

    def _is_answering(self) -> bool:
        return has_request_context() and current_app == self._app

    def _listen(self) -> None:
        if self._is_known:
            return
        self._is_known = True
        request_started.connect(self._on_started, self._app)
        # Not request_finished, which is not sent if a hook raises in the answer to an exception.
        app: Any = self._app
        self._finalize = app.finalize_request
        app.finalize_request = self._finalize_request

    def _on_started(self, _app: Flask, **_: Any) -> None:
        exchange = request.environ.get(self._key)
        if isinstance(exchange, _BypassingExchange):
            exchange.begin()

    def _finalize_request(self, *arguments: Any, **options: Any) -> Response:
        response: Response = self._finalize(*arguments, **options)
        exchange = request.environ.get(self._key)
        # A hook may have put any WSGI app in its place.
        if isinstance(exchange, _BypassingExchange) and isinstance(response, Response):
            exchange.expect(response)
        return response

    def _tell(self) -> None:
        """Say once in a process that there are such requests."""
        self._tell = _nothing  # type: ignore[method-assign]
        logger.warning(_HINT, self._app.name)


def _nothing() -> None:
    pass


class _BypassingExchange(Exchange):
    """The exchange of a request that did not come through the middleware.

    It counts if Flask dispatches it: a context that somebody only pushes is no request. It begins
    with the context, takes status, headers and body from the response as Flask sends it, and lets
    the server have the body when the context is popped by Flask. If no response of Werkzeug's is
    sent, it ends there, with the status of the response that Flask had made.

    Args:
        middleware: Of the app.
        environ: Of the request.
        context: Its context, whose ``push`` and ``pop`` are watched until Flask has popped it.
        tell: Called when it counts.
    """

    __slots__ = (
        "_attached",
        "_before",
        "_context_of_flask",
        "_depth",
        "_expected_status",
        "_has_begun",
        "_headers",
        "_leave",
        "_middleware",
        "_outer",
        "_pop",
        "_push",
        "_tell",
        "_unread",
    )

    def __init__(
        self,
        middleware: Middleware,
        environ: WSGIEnvironment,
        context: Any,
        tell: Callable[[], None],
    ) -> None:
        super().__init__(middleware.observer, environ, self._keep)
        self._middleware = middleware
        self._context_of_flask = context
        self._tell = tell
        self._push, self._pop = context.push, context.pop
        self._depth = 0
        self._has_begun = False
        self._leave: Callable[[], None] | None = None
        self._headers: Headers = []
        self._expected_status = ""
        self._unread: Iterable[bytes] | None = None
        self._attached: Iterable[bytes] = ()
        # What is handled already, such as by a server that calls the app in an except clause.
        self._before = sys.exc_info()[1]
        self._outer = environ.get(middleware.key)
        context.push, context.pop = self.push, self.pop

    # ---------------------------------------------------------------- called by Flask

    def push(self, *arguments: Any) -> None:
        """Push the context; it may be pushed again, by a stream with context."""
        self._depth += 1
        environ = self._environ
        if self._depth == 1 and environ is not None:
            environ[self._middleware.key] = self
            if self._outer is not None:
                environ.pop(TRACK_VAR, None)  # a nested request, made from a copy of the outer one
        try:
            self._push(*arguments)
        except BaseException:
            self.begin()  # Flask answers it; in a with statement it would not be popped
            raise

    def begin(self) -> None:
        """Count the request, as Flask dispatches it. Later calls do nothing."""
        environ = self._environ
        if self._has_begun or environ is None:
            return
        self._has_begun = True
        self._tell()
        context = self._middleware.enter(self, environ)
        if context is not None:
            self._leave = context.enter()

    def expect(self, response: Response) -> None:
        """Keep the status of a response, and have it tell when it is sent."""
        self._expected_status = response.status

        def send(environ: WSGIEnvironment) -> tuple[Iterable[bytes], str, Headers]:
            # Removed at once: a response may be sent to several requests, copied or pickled.
            response.__dict__.pop("get_wsgi_response", None)
            body, status, headers = response.get_wsgi_response(environ)
            exchange = environ.get(self._middleware.key)
            if not isinstance(exchange, _BypassingExchange):
                return body, status, headers
            return exchange.send(body, status, headers)

        response.get_wsgi_response = send  # type: ignore[method-assign]

    def send(
        self, body: Iterable[bytes], status: str, headers: Headers
    ) -> tuple[Iterable[bytes], str, Headers]:
        """Note what Flask is about to send; return what it is to send instead."""
        self.start_response(status, headers)
        self._unread = body
        is_file = self._environ is not None and is_sent_as_file(body, self._environ)
        return body if is_file else self, status, self._headers

    def pop(self, *arguments: Any) -> None:
        """Pop the context; end the exchange if Flask does it, unless there is a body to be sent."""
        self._depth -= 1
        is_over = self._unread is not None or self._expected_status or self.exception
        if self._depth and not is_over:  # a stream with context that was read in the view
            self._pop(*arguments)
            return
        context = self._context_of_flask
        del context.push, context.pop
        raised = sys.exc_info()[1]
        try:
            self._pop(*arguments)
        except BaseException as error:
            raised = error
            raise
        finally:
            self._settle(raised)

    def _settle(self, raised: BaseException | None) -> None:
        """Go on as the middleware does when the app has returned or raised."""
        environ = self._environ
        if self._leave is not None:
            self._leave()
        if environ is None:
            return
        if not self._has_begun:
            del environ[self._middleware.key]
            if self._outer is not None:
                environ[self._middleware.key] = self._outer
        elif raised is not None and raised is not self._before:
            self.fail(raised)
        elif self._unread is not None:
            self._attached = self.attach(self._unread)
        else:
            self._status = self._expected_status or ("500" if self.exception else "")
            self.finish()

    def _keep(self, _status: str, headers: Headers, *_: object) -> Callable[[bytes], object]:
        self._headers = headers
        return _no_write

    # ---------------------------------------------------------------- called by the server

    def __iter__(self) -> Iterator[bytes]:
        return super().__iter__() if self._attached is self else iter(self._attached)


def _no_write(_data: bytes) -> object:
    raise TypeError("Flask's responses are no old applications")
