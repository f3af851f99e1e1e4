"""A request -> one Observation, taken at the WSGI boundary, where what was sent is final.

No Flask hook or signal takes part in an ordinary request. Flask calls ``start_response`` while the
request's context is alive, so that is where the route and the user are learned; hooks can be
skipped, run twice or be overruled by others, and cost 5 000 to 13 000 instructions each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain, count
from time import perf_counter_ns, time_ns
from types import TracebackType
from typing import TYPE_CHECKING, Any

from flask import Flask, Request, got_request_exception, request, request_finished
from werkzeug.wsgi import ClosingIterator, FileWrapper

from flask_usage_metrics.faults import Faults
from flask_usage_metrics.observation import (
    MAX_JSON_BYTES,
    Observation,
    encode_json,
    environ_texts,
)
from flask_usage_metrics.scope import Scope
from flask_usage_metrics.track_var import TRACK_VAR
from flask_usage_metrics.users import Users
from flask_usage_metrics.visitor_cookie import VisitorCookie

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from werkzeug.routing import Rule

    from flask_usage_metrics.tracing import RequestTrace, Tracing

Headers = list[tuple[str, str]]
ExcInfo = tuple[type[BaseException], BaseException, TracebackType]


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
        users: Who knows who makes a request.
        cookie: What tells visitors apart; None: nothing does.
        tracing: Who makes spans of requests; None: nobody does.
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
        users: Users,
        cookie: VisitorCookie | None,
        tracing: Tracing | None,
        headers: tuple[str, ...],
        faults: Faults,
    ) -> None:
        self.scope = scope
        self._begin = begin
        self._has_begun = False
        self._notice: Callable[[], None] | None = None
        self.asks = cookie is not None or tracing is not None
        self.submit = submit
        self.lose = lose
        self.users = users
        self.cookie = cookie
        self.tracing = tracing
        self.headers = headers
        self.faults = faults
        self.key = f"flask_usage_metrics.{id(self)}"
        self.live: set[Exchange] = set()
        self.sequence = count()
        self._app = app
        self._wsgi_app: WSGIApplication = app.wsgi_app
        got_request_exception.connect(self._on_exception, app)
        if getattr(app.wsgi_app, "__func__", None) is not Flask.wsgi_app:
            # What is between us and Flask may hold start_response back until the context is gone.
            request_finished.connect(self._on_finished, app)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request as the app does (PEP 3333)."""
        if self.key in environ:
            if environ[self.key].is_of(environ):  # the app called itself with the same request
                return self._wsgi_app(environ, start_response)
            environ.pop(TRACK_VAR, None)  # a nested request, made from a copy of the outer one
        exchange = Exchange(self, environ, start_response)
        environ[self.key] = exchange
        self.live.add(exchange)
        if not self._has_begun:
            self._get_ready(environ)
        if self._notice is not None:
            self._notice()
        trace = exchange.begin_trace() if self.tracing is not None else None
        try:
            if trace is None:
                body = self._wsgi_app(environ, exchange.start_response)
            else:
                body = trace.run(self._wsgi_app, environ, exchange.start_response)
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
        self.asks = self.asks or self.users.are_known
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
        "_environ",
        "_expected",
        "_given",
        "_names",
        "_next",
        "_request",
        "_sent",
        "_start_response",
        "_started_ns",
        "_status",
        "_taken",
        "_trace",
        "_visitor",
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
        self._names: tuple[str | None, str | None] | None = None
        self._visitor: str | None = None
        self._given: str | None = None
        self._trace: RequestTrace | None = None
        self._status = ""
        self._expected: int | None = None
        self._sent = 0
        self._taken: tuple[bytes, ...] | None = None
        self.exception: str | None = None

    def begin_trace(self) -> RequestTrace | None:
        """Join or start the request's span."""
        tracing, environ = self._capture.tracing, self._environ
        if tracing is not None and environ is not None:
            self._trace = tracing.begin(environ, self._started_ns)
        return self._trace

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
            if len(name) == 14 and name.lower() == "content-length":
                self._expected = _NUMBERS[value]
                break
        environ = self._environ
        if environ is not None:
            learned = environ.get("werkzeug.request")
            if isinstance(learned, Request):  # Werkzeug's test client leaves one of its own there
                self._request = learned
                if self._capture.asks:
                    self.learn(learned)
                    self._greet(environ, headers)
            if self._given is not None:
                headers = [*headers, VisitorCookie.header(self._given, environ)]
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
        users = self._capture.users
        if self._names is None and users.are_known and self.is_tracked():
            self._names = users.ask()
        trace = self._trace
        if trace is not None and self._environ is not None and self.is_tracked():
            rule = learned.url_rule
            trace.learn(self._environ, None if rule is None else rule.endpoint)

    def _greet(self, environ: WSGIEnvironment, headers: Headers) -> None:
        """Recognise the visitor by the cookie, or choose one to be given with these headers."""
        cookie = self._capture.cookie
        if cookie is None or self._visitor is not None or not self.is_tracked():
            return
        try:
            self._visitor = cookie.read(environ)
            if self._visitor is None:
                self._visitor = self._given = cookie.choose(environ, headers)
        except Exception as error:  # noqa: BLE001 - a visitor must never see a failure of ours
            self._capture.faults.report("cookie", error, "a visitor is not recognised")

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
        self._next = chunks.__next__
        if self._trace is not None:
            self._next = partial(self._trace.run, self._next)
        if self._expected is None:
            return self
        try:
            chunk = self._next()
        except StopIteration:
            self._taken = ()
            self.finish()
        except BaseException as error:
            self.fail(error)
            self.close()
            raise
        else:
            self._taken = (chunk,)
            self._sent += len(chunk)
            if self._sent >= self._expected:
                self.finish()
        return self

    def __iter__(self) -> Iterator[bytes]:
        taken, self._taken = self._taken, None
        if taken is None:
            return self
        return iter(taken) if self._environ is None else chain(taken, self)

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
        close = getattr(self._body, "close", None)
        if close is not None:
            if self._trace is None:
                close()
            else:
                self._trace.run(close)

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
            learned = self._request
            if learned is None:
                learned = capture.match(environ)
            rule = None if learned is None else learned.url_rule
            endpoint = None if rule is None else rule.endpoint
            if capture.scope.tracks(endpoint, environ):
                capture.submit(self._observe(environ, duration_ns, learned, rule))
        except Exception as error:  # noqa: BLE001 - a visitor must never see a failure of ours
            capture.faults.report("capture", error, "a request was not counted")
            capture.lose()
        finally:
            capture.live.discard(self)
            # A cycle through the environ would keep every request until the garbage collector.
            self._environ = self._request = None

    def _observe(
        self,
        environ: WSGIEnvironment,
        duration_ns: int,
        learned: Request | None,
        rule: Rule | None,
    ) -> Observation:
        capture = self._capture
        peer = endpoint = path = view_args = username = consumer = track_var = None
        authorization = False
        if rule is not None:
            endpoint, path = rule.endpoint, rule.rule
        if learned is not None:
            if learned.view_args:
                view_args = self._json("view_args", learned.view_args)
            if "HTTP_AUTHORIZATION" in environ:
                authorization, username = capture.users.authorized(learned)
        if self._names is not None:
            known, consumer = self._names
            username = username if known is None else known
        if "werkzeug.proxy_fix.orig" in environ:
            peer = (environ["werkzeug.proxy_fix.orig"] or {}).get("REMOTE_ADDR")
        if TRACK_VAR in environ:
            track_var = self._json("track_var", environ[TRACK_VAR])
        number = next(capture.sequence)
        return Observation(
            self._started_ns,
            duration_ns,
            number,
            environ_texts(environ, capture.headers),
            peer,
            endpoint,
            path,
            view_args,
            _NUMBERS[self._status[:3]] or 0,
            self.exception,
            self._sent,
            authorization,
            username,
            track_var,
            self._visitor,
            consumer,
            None if self._trace is None else self._trace.end(number),
        )

    def _json(self, what: str, value: dict[str, Any]) -> bytes | None:
        encoded = encode_json(value)
        if len(encoded) <= MAX_JSON_BYTES:
            return encoded
        error = f"larger than {MAX_JSON_BYTES} bytes as JSON"
        self._capture.faults.report(what, error, "it is left out of a record")
        return None


def _is_file(body: Iterable[bytes], environ: WSGIEnvironment) -> bool:
    """Tell whether the server may send the body by itself (PEP 3333, wsgi.file_wrapper)."""
    wrapper = environ.get("wsgi.file_wrapper")
    if isinstance(body, FileWrapper) or (isinstance(wrapper, type) and isinstance(body, wrapper)):
        return True
    # uWSGI's wrapper is a function that returns the file object it was given.
    return wrapper is not None and hasattr(body, "read")


class _Numbers(dict[str, "int | None"]):
    """By a text, the number it is; None if it is none.

    At 440 instructions, where `int` costs 1 130 and `lru_cache` 710.
    """

    def __missing__(self, text: str) -> int | None:
        number = int(text) if text.isdecimal() and text.isascii() else None
        if len(self) < _MOST_NUMBERS and len(text) < _MOST_DIGITS:
            self[text] = number
        return number


_MOST_NUMBERS = 4096
_MOST_DIGITS = 16

_NUMBERS = _Numbers()
