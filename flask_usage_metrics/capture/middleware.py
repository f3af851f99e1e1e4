"""A request -> one Observation, taken at the WSGI boundary, where what was sent is final.

No Flask hook or signal takes part in an ordinary request. Flask calls ``start_response`` while the
request's context is alive, so that is where the route and the user are learned; hooks can be
skipped, run twice or be overruled by others, and cost 5 000 to 13 000 instructions each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain
from time import perf_counter_ns, time_ns
from types import TracebackType
from typing import TYPE_CHECKING, Any

from flask import Flask, Request, got_request_exception, request, request_finished
from werkzeug.wsgi import ClosingIterator, FileWrapper

from flask_usage_metrics.capture.context import ContextReader, RequestContext
from flask_usage_metrics.capture.response_head import LENGTHS, STATUSES
from flask_usage_metrics.capture.scope import Scope
from flask_usage_metrics.capture.track_var import TRACK_VAR
from flask_usage_metrics.capture.visitor_cookie import Headers
from flask_usage_metrics.records.observation import (
    MAX_JSON_BYTES,
    Extras,
    Observation,
    encode_json,
    environ_texts,
)
from flask_usage_metrics.runtime.faults import Faults

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

ExcInfo = tuple[type[BaseException], BaseException, TracebackType]

_PROXY_FIX = "werkzeug.proxy_fix.orig"
"""Where Werkzeug's middleware leaves what it has replaced."""


class Capture:
    """WSGI middleware of one app: hands an `Observation` to `submit` for each tracked request.

    Args:
        app: The app whose ``wsgi_app`` is wrapped.
        scope: Which requests are tracked.
        begin: Called before the first request of the process, with ``wsgi.multiprocess`` and with
            whether the process ends after it; returns what to call at the beginning of each
            request, or None.
        submit: Takes the observation; called in the request's thread when its last byte is handed
            to the server.
        lose: Called instead where none could be made.
        context_reader: Finds out what else the app asks for.
        headers: WSGI names of further headers that are kept.
        faults: Where failures of our own are reported.
    """

    def __init__(
        self,
        app: Flask,
        *,
        scope: Scope,
        begin: Callable[[bool, bool], Callable[[], None] | None],
        submit: Callable[[Observation], None],
        lose: Callable[[], None],
        context_reader: ContextReader,
        headers: tuple[str, ...],
        faults: Faults,
    ) -> None:
        self.scope = scope
        self._begin = begin
        self._has_begun = False
        self._notice: Callable[[], None] | None = None
        self._reads_context = False
        self.submit = submit
        self.lose = lose
        self.context_reader = context_reader
        self.headers = headers
        self.faults = faults
        self.key = f"flask_usage_metrics.{id(self)}"
        self.live: set[Exchange] = set()
        self._app = app
        self._wsgi_app: WSGIApplication = app.wsgi_app
        got_request_exception.connect(self._on_exception, app)
        if getattr(app.wsgi_app, "__func__", None) is not Flask.wsgi_app:
            # What is between us and Flask may hold start_response back until the context is gone.
            request_finished.connect(self._on_finished, app)

    def wsgi_app(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request as the app does (PEP 3333).

        Not ``__call__``: to call an object as a function costs 650 instructions more.
        """
        key = self.key
        if key in environ:
            if environ[key].is_of(environ):  # the app called itself with the same request
                return self._wsgi_app(environ, start_response)
            environ.pop(TRACK_VAR, None)  # a nested request, made from a copy of the outer one
        exchange = Exchange(self, environ, start_response)
        environ[key] = exchange
        self.live.add(exchange)
        if not self._has_begun:
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

    def in_progress(self) -> int:
        """Return how many tracked requests have not been answered yet."""
        return sum(exchange.is_tracked() for exchange in list(self.live))

    def reset_after_fork(self) -> None:
        """Forget the requests the parent process is answering."""
        self.live = set()
        self._has_begun = False
        self._notice = None

    def _get_ready(self, environ: WSGIEnvironment) -> None:
        multiprocess = bool(environ.get("wsgi.multiprocess"))
        # Werkzeug's server with processes=3 forks for each request, and ends the child without
        # further ado.
        software = str(environ.get("SERVER_SOFTWARE", ""))
        # So late, for the app may have been given Flask-Login after us.
        self._reads_context = self.context_reader.is_needed()
        try:
            self._notice = self._begin(multiprocess, multiprocess and software[:9] == "Werkzeug/")
        except Exception as error:  # noqa: BLE001 - a visitor must never see a failure of ours
            self.faults.report("state", error, "what is captured does not survive a kill")
        # Last: requests beside the very first one wait until there is a journal for them.
        self._has_begun = True

    def match(self, environ: WSGIEnvironment) -> Request | None:
        """Route a request again that ended before anything could be learned of it."""
        with suppress(Exception):  # not routable: by whatever made it end, too
            again = self._app.request_class(environ, populate_request=False)
            adapter = self._app.create_url_adapter(again)
            if adapter is not None:
                again.url_rule, arguments = adapter.match(return_rule=True)
                again.view_args = dict(arguments)
            return again
        return None

    def _on_exception(self, _app: Flask, exception: BaseException, **_: Any) -> None:
        exchange = request.environ.get(self.key)
        if exchange is not None:
            exchange.exception = type(exception).__name__
            exchange.learn(request._get_current_object())  # type: ignore[attr-defined]

    def _on_finished(self, _app: Flask, **_: Any) -> None:
        exchange = request.environ.get(self.key)
        if exchange is not None:
            exchange.learn(request._get_current_object())  # type: ignore[attr-defined]


class Exchange:
    """One request and its response under way; also the iterable of the response's body."""

    # To read a default from the class would cost 200 instructions more each time.
    __slots__ = (
        "_body",
        "_capture",
        "_clock",
        "_context",
        "_environ",
        "_expected",
        "_next",
        "_ready",
        "_request",
        "_sent",
        "_start_response",
        "_started_ns",
        "_status",
        "_write",
        "exception",
    )

    def __init__(
        self, capture: Capture, environ: WSGIEnvironment, start_response: StartResponse
    ) -> None:
        self._started_ns = time_ns()
        self._clock = perf_counter_ns()
        self._capture = capture
        self._environ: WSGIEnvironment | None = environ
        self._start_response = start_response
        self._request: Request | None = None
        self._context: RequestContext | None = None
        self._status = ""
        self._expected: int | None = None
        self._sent = 0
        self._ready: Iterator[bytes] | None = None
        self.exception: str | None = None

    def read_context(self, environ: WSGIEnvironment) -> RequestContext:
        """Begin to find out what the app asks for."""
        self._context = RequestContext(self._capture.context_reader, environ, self._started_ns)
        return self._context

    # ---------------------------------------------------------------- what Flask tells

    def start_response(
        self,
        status: str,
        headers: Headers,
        exc_info: ExcInfo | tuple[None, None, None] | None = None,
    ) -> Callable[[bytes], object]:
        """Note the status and length, learn while the context lives, pass on to the server."""
        self._status = status
        self._expected = None
        for name, value in headers:
            # Mostly it is spelled so, and no call needed.
            if len(name) == 14 and (name == "Content-Length" or name.lower() == "content-length"):
                self._expected = LENGTHS[value]
                break
        environ = self._environ
        if environ is not None:
            if "werkzeug.request" in environ:
                learned = environ["werkzeug.request"]
                # Werkzeug's test client leaves one of its own there.
                if isinstance(learned, Request):
                    self._request = learned
            if self._context is not None:
                headers = self._inform(self._context, environ, headers)
        if exc_info is None:
            self._write = self._start_response(status, headers)
        else:
            self._write = self._start_response(status, headers, exc_info)
        return self.write

    def write(self, data: bytes) -> object:
        """Count and pass on what an old-style application writes."""
        self._sent += len(data)
        return self._write(data)

    def learn(self, learned: Request) -> None:
        """Take what can be known only while the request's context lives."""
        self._request = learned
        context, environ = self._context, self._environ
        if context is not None and environ is not None and self.is_tracked():
            context.learn(learned, environ)

    def _inform(
        self, context: RequestContext, environ: WSGIEnvironment, headers: Headers
    ) -> Headers:
        """Have all that is asked for found out; return the headers of the response."""
        if self._request is not None and self.is_tracked():
            context.learn(self._request, environ)
            context.greet(environ, headers)
        return context.headers(headers, environ)

    # ---------------------------------------------------------------- what the server takes

    def attach(self, body: Iterable[bytes]) -> Iterable[bytes]:
        """Return what the server shall iterate over: the body, or ourselves around it.

        If the first chunk is the whole body, the exchange is over before it is sent: so no
        iteration of ours is needed, and a client that reads no further loses nothing.
        """
        environ = self._environ
        if environ is None:
            return body
        if type(body) is not ClosingIterator:  # as which Werkzeug sends all but files
            if isinstance(body, (list, tuple)):
                self._sent += sum(map(len, body))
                self.finish()
                return body
            if _is_file(body, environ):
                # The server recognises its own wrapper and uses sendfile, unless we wrap it.
                self._sent = self._expected or 0
                self.finish()
                return body
            chunks = iter(body)
        else:
            chunks = body
        self._body = body
        proceed = chunks.__next__
        if self._context is not None:
            proceed = partial(self._context.run, proceed)
        self._next = proceed
        expected = self._expected
        if expected is None:
            return self
        try:
            chunk = proceed()
        except StopIteration:
            self._ready = iter(())
            self.finish()
        except BaseException as error:
            self.fail(error)
            self.close()
            raise
        else:
            sent = self._sent + len(chunk)
            self._sent = sent
            self._ready = iter((chunk,))
            if sent >= expected:
                self.finish()
        return self

    def __iter__(self) -> Iterator[bytes]:
        ready = self._ready
        if ready is None:
            return self
        self._ready = None
        return ready if self._environ is None else chain(ready, self)

    def __next__(self) -> bytes:
        try:
            chunk = self._next()
        except StopIteration:
            self.finish()
            raise
        except BaseException as error:
            if self._sent:
                self.exception = type(error).__name__
                self.finish()
            else:  # nothing was sent yet, not even the status (PEP 3333): the server answers 500
                self.fail(error)
            raise
        self._sent += len(chunk)
        if self._expected is not None and self._sent >= self._expected:
            self.finish()
        return chunk

    def close(self) -> None:
        """End the exchange, whether or not all was sent."""
        if self._environ is not None:
            self.finish()
        try:
            close = self._body.close  # type: ignore[attr-defined]
        except AttributeError:
            return
        if self._context is None:
            close()
        else:
            self._context.run(close)

    # ---------------------------------------------------------------- the end, once

    def is_of(self, environ: WSGIEnvironment) -> bool:
        """Tell whether this is the exchange of an environ, rather than of one it is a copy of."""
        return self._environ is environ

    def is_tracked(self) -> bool:
        """Tell whether the request counts, as far as is known by now."""
        environ = self._environ
        if environ is None:
            return False
        learned = self._request or environ.get("werkzeug.request")
        rule = learned.url_rule if isinstance(learned, Request) else None
        return self._capture.scope.tracks(None if rule is None else rule.endpoint, environ)

    def fail(self, error: BaseException) -> None:
        """End the exchange with an exception that reaches the server, which answers 500."""
        self._status = "500"
        self._sent = 0
        self.exception = type(error).__name__
        self.finish()

    def finish(self) -> None:
        """Hand over the observation; the first call only."""
        environ = self._environ
        if environ is None:
            return
        duration_ns = perf_counter_ns() - self._clock
        capture = self._capture
        try:
            learned = self._request or capture.match(environ)
            matched = None if learned is None else learned.url_rule
            endpoint = None if matched is None else matched.endpoint
            scope = capture.scope
            # The first for speed: a call less.
            if endpoint in scope.tracked or scope.tracks(endpoint, environ):
                view_args = extras = None
                if learned is not None and learned.view_args:
                    view_args = encode_json(learned.view_args)
                    if len(view_args) > MAX_JSON_BYTES:
                        view_args = None
                        self._leave_out("view_args")
                if (
                    self._context is not None
                    or self.exception is not None
                    or "HTTP_AUTHORIZATION" in environ
                    or TRACK_VAR in environ
                    or _PROXY_FIX in environ
                ):
                    extras = self._extras(environ, learned)
                capture.submit(
                    Observation(
                        self._started_ns,
                        duration_ns,
                        environ_texts(environ, capture.headers),
                        endpoint,
                        None if matched is None else matched.rule,
                        view_args,
                        STATUSES[self._status],
                        self._sent,
                        extras,
                    )
                )
        except Exception as error:  # noqa: BLE001 - a visitor must never see a failure of ours
            capture.faults.report("capture", error, "a request was not counted")
            capture.lose()
        finally:
            capture.live.discard(self)
            # A cycle through the environ would keep every request until the garbage collector.
            self._environ = self._request = None

    def _extras(self, environ: WSGIEnvironment, learned: Request | None) -> Extras:
        peer = username = consumer = track_var = visitor = trace = None
        authorization = False
        if learned is not None and "HTTP_AUTHORIZATION" in environ:
            authorization, username = self._capture.context_reader.users.authorized(learned)
        if self._context is not None:
            known = self._context
            consumer, visitor, trace = known.consumer, known.visitor, known.end_trace()
            username = username if known.username is None else known.username
        if _PROXY_FIX in environ:
            peer = (environ[_PROXY_FIX] or {}).get("REMOTE_ADDR")
        if TRACK_VAR in environ:
            track_var = encode_json(environ[TRACK_VAR])
            if len(track_var) > MAX_JSON_BYTES:
                track_var = None
                self._leave_out("track_var")
        return Extras(
            peer, self.exception, authorization, username, track_var, visitor, consumer, trace
        )

    def _leave_out(self, what: str) -> None:
        error = f"larger than {MAX_JSON_BYTES} bytes as JSON"
        self._capture.faults.report(what, error, "it is left out of a record")


def _is_file(body: Iterable[bytes], environ: WSGIEnvironment) -> bool:
    """Tell whether the server may send the body by itself (PEP 3333, wsgi.file_wrapper)."""
    wrapper = environ.get("wsgi.file_wrapper")
    if isinstance(body, FileWrapper) or (isinstance(wrapper, type) and isinstance(body, wrapper)):
        return True
    # uWSGI's wrapper is a function that returns the file object it was given.
    return wrapper is not None and hasattr(body, "read")
