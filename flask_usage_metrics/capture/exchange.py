"""One request and its response: the Exchange wraps start_response and the body, and ends once.

The status, the bytes and the exception are final only at the WSGI boundary: another hook may
replace the response after ours, and the server may take only a part of the body.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from time import perf_counter_ns, time_ns
from types import TracebackType
from typing import TYPE_CHECKING

from flask import Request
from werkzeug.wsgi import ClosingIterator, FileWrapper

from flask_usage_metrics.capture import takeover
from flask_usage_metrics.capture.context import RequestContext
from flask_usage_metrics.capture.observer import Observer
from flask_usage_metrics.capture.prefetch import is_prefetch
from flask_usage_metrics.capture.reading import MAX_JSON_BYTES, environ_texts
from flask_usage_metrics.capture.request_body import CountedInput, count_input, is_announced
from flask_usage_metrics.capture.response_head import LENGTHS, STATUSES
from flask_usage_metrics.capture.track_var import TRACK_VAR
from flask_usage_metrics.capture.visitor_cookie import Headers
from flask_usage_metrics.records.observation import Extras, Observation
from flask_usage_metrics.runtime.json_values import encode_json

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

ExcInfo = tuple[type[BaseException], BaseException, TracebackType]

_PROXY_FIX = "werkzeug.proxy_fix.orig"
"""Where Werkzeug's ProxyFix keeps the environ's values that it has replaced."""


class Exchange:
    """One request and its response; also the body's iterable, unless the server gets that itself.

    Hands one `Observation` to the observer if the request is tracked, and takes itself out of the
    observer's live set, when the first of these happens: all announced bytes were handed to the
    server, the body ended, was closed, or raised. Never raises an error of its own.

    Args:
        observer: Of the app.
        environ: The WSGI environ of the request, which is not routed yet.
        start_response: The function of the server that takes status and headers (PEP 3333).

    Attributes:
        exception: Class name of the exception that no error handler answered; None: none.
    """

    # Slots without class defaults are the fastest to read: see tests/benchmarks/README.md.
    __slots__ = (
        "_body",
        "_clock",
        "_context",
        "_environ",
        "_expected",
        "_first_ns",
        "_input",
        "_is_left",
        "_next",
        "_observer",
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
        self, observer: Observer, environ: WSGIEnvironment, start_response: StartResponse
    ) -> None:
        self._started_ns = time_ns()
        self._clock = perf_counter_ns()
        self._observer = observer
        self._environ: WSGIEnvironment | None = environ
        self._start_response = start_response
        self._request: Request | None = None
        self._context: RequestContext | None = None
        # Whether another app, mounted in ours, answers; None: not known yet.
        self._is_left: bool | None = None
        self._status = ""
        self._expected: int | None = None
        self._sent = 0
        # Nanoseconds until the first byte of a body that is handed over piece by piece.
        self._first_ns: int | None = None
        self._input: CountedInput | None = None
        self._ready: Iterator[bytes] | None = None
        self.exception: str | None = None

    def read_context(self, environ: WSGIEnvironment) -> RequestContext:
        """Begin to read the facts that need Flask's request context; return where they are kept."""
        self._context = RequestContext(self._observer.context_reader, environ, self._started_ns)
        return self._context

    def count_input(self, environ: WSGIEnvironment) -> None:
        """Count what is read of the request's body."""
        self._input = count_input(environ)

    # ---------------------------------------------------------------- called by Flask

    def start_response(
        self,
        status: str,
        headers: Headers,
        exc_info: ExcInfo | tuple[None, None, None] | None = None,
    ) -> Callable[[bytes], object]:
        """Pass status and headers on to the server (PEP 3333); note status, length and route.

        Flask calls it while the request's context is alive. Adds the visitor's cookie to the
        headers where the app asks for one.
        """
        self._status = status
        self._expected = None
        for name, value in headers:
            # The usual spelling first: it needs no call.
            if len(name) == 14 and (name == "Content-Length" or name.lower() == "content-length"):
                self._expected = LENGTHS[value]
                break
        environ = self._environ
        if environ is not None:
            if "werkzeug.request" in environ:
                routed = environ["werkzeug.request"]
                # Werkzeug's test client leaves a request of another class there.
                if isinstance(routed, Request):
                    self._request = routed
            if self._context is not None:
                headers = self._with_cookie(self._context, environ, headers)
        if exc_info is None:
            self._write = self._start_response(status, headers)
        else:
            self._write = self._start_response(status, headers, exc_info)
        return self.write

    def write(self, data: bytes) -> object:
        """Pass bytes on to the server (PEP 3333, the write callable of old applications)."""
        if data and not self._sent:
            self._first_ns = perf_counter_ns() - self._clock
        self._sent += len(data)
        return self._write(data)

    def route(self, routed: Request) -> None:
        """Keep the routed request, which our app answers; it may have another environ."""
        self._request = routed
        self._is_left = False

    def learn(self, routed: Request) -> None:
        """Keep the routed request and read the facts of its context, which must be alive."""
        self.route(routed)
        context, environ = self._context, self._environ
        if context is not None and environ is not None and self.is_tracked():
            context.learn(routed, environ)

    def _with_cookie(
        self, context: RequestContext, environ: WSGIEnvironment, headers: Headers
    ) -> Headers:
        """Read the facts of the context; return the headers, with the visitor's cookie if new."""
        if self._request is not None and self.is_tracked():
            context.learn(self._request, environ)
            context.identify_visitor(environ, headers)
        return context.headers(headers, environ)

    # ---------------------------------------------------------------- called by the server

    def attach(self, body: Iterable[bytes]) -> Iterable[bytes]:
        """Return the iterable for the server: the body itself if it is complete, else ourselves.

        Where a Content-Length was announced, the first chunk is fetched here. If it is the whole
        body, the exchange ends before the server sends it: the server then iterates over a plain
        iterator, and a client that reads no further is counted all the same.
        """
        environ = self._environ
        if environ is None:
            return body
        if type(body) is not ClosingIterator:  # Werkzeug's class for all bodies but files
            if isinstance(body, (list, tuple)):
                self._sent += sum(map(len, body))
                self.finish()
                return body
            if is_sent_as_file(body, environ):
                # Not wrapped, so that the server recognises its own class and uses sendfile.
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
            elif sent and self._first_ns is None:
                self._first_ns = perf_counter_ns() - self._clock
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
            else:  # not even the status was sent (PEP 3333), so the server answers 500
                self.fail(error)
            raise
        sent = self._sent
        if not sent and chunk:
            self._first_ns = perf_counter_ns() - self._clock
        self._sent = sent = sent + len(chunk)
        if self._expected is not None and sent >= self._expected:
            self.finish()
        return chunk

    def close(self) -> None:
        """End the exchange, whether or not all was sent, and close the body."""
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
        """Tell whether this exchange has this very environ: a copy refers to the original's."""
        return self._environ is environ

    def is_by(self, observer: Observer) -> bool:
        """Tell whether this is an exchange of the observer's app."""
        return self._observer is observer

    def is_routed(self) -> bool:
        """Tell whether Flask has begun to answer the request, or has ended."""
        environ = self._environ
        return (
            environ is None
            or self._request is not None
            # Werkzeug's test client leaves a request of another class there.
            or isinstance(environ.get("werkzeug.request"), Request)
        )

    def leave_to_another(self) -> None:
        """Count nothing here, as an app mounted in ours is called; unless ours answers as well."""
        if self._is_left is None:
            self._is_left = True

    def hand_trace_to(self, context: RequestContext) -> None:
        """Give our span, if the request is left to another app, to the context of that app."""
        if self._is_left and self._context is not None:
            context.take_trace_of(self._context)

    def is_tracked(self) -> bool:
        """Tell whether the request is tracked, by the route known so far; False once ended."""
        environ = self._environ
        if environ is None or self._is_left:
            return False
        routed = self._request or environ.get("werkzeug.request")
        rule = routed.url_rule if isinstance(routed, Request) else None
        return self._observer.scope.tracks(None if rule is None else rule.endpoint, environ)

    def fail(self, error: BaseException) -> None:
        """End the exchange with the status that is answered to an exception: mostly 500."""
        environ = self._environ
        if environ is not None and not self._status and takeover.has_raised(error, environ):
            self._status = takeover.STATUS
            self.finish()
            return
        status = self._observer.status_of(error)
        self._status = str(status)
        self._sent = 0
        self._first_ns = None
        self.exception = None if status < 500 else type(error).__name__
        self.finish()

    def finish(self) -> None:
        """End the exchange: submit its observation if it is tracked. Later calls do nothing."""
        environ = self._environ
        if environ is None:
            return
        duration_ns = perf_counter_ns() - self._clock
        observer = self._observer
        try:
            if self._is_left:
                if self._context is not None:
                    self._context.abandon_trace()
                return
            routed = self._request or observer.match(environ)
            if routed is not None:
                environ = routed.environ
            if "HTTP_UPGRADE" in environ and takeover.has_answered(environ, self._status, routed):
                self._status, self._sent = takeover.STATUS, 0
            rule = None if routed is None else routed.url_rule
            endpoint = None if rule is None else rule.endpoint
            scope = observer.scope
            # The set first: it saves a call.
            if endpoint in scope.tracked or scope.tracks(endpoint, environ):
                view_args = extras = None
                if routed is not None and routed.view_args:
                    view_args = encode_json(routed.view_args)
                    if len(view_args) > MAX_JSON_BYTES:
                        view_args = None
                        self._report_too_large("view_args")
                # Written out, as a call is slower: see tests/benchmarks/README.md.
                prefetched = (
                    "HTTP_SEC_PURPOSE" in environ
                    or "HTTP_PURPOSE" in environ
                    or "HTTP_X_PURPOSE" in environ
                    or "HTTP_X_MOZ" in environ
                ) and is_prefetch(environ)
                if (
                    prefetched
                    or self._context is not None
                    or self._input is not None
                    or self._first_ns is not None
                    or self.exception is not None
                    or "HTTP_AUTHORIZATION" in environ
                    or TRACK_VAR in environ
                    or _PROXY_FIX in environ
                ):
                    extras = self._extras(environ, routed, prefetched)
                observer.submit(
                    Observation(
                        self._started_ns,
                        duration_ns,
                        environ_texts(environ, observer.headers),
                        endpoint,
                        None if rule is None else rule.rule,
                        view_args,
                        STATUSES[self._status],
                        self._sent,
                        extras,
                    )
                )
        except Exception as error:  # noqa: BLE001 - a visitor must never see a failure of ours
            observer.faults.report("capture", error, "a request was not counted")
            observer.lose()
        finally:
            observer.live.discard(self)
            # The environ refers to us: the cycle would live until the garbage collector runs.
            self._environ = self._request = None

    def _extras(self, environ: WSGIEnvironment, routed: Request | None, prefetched: bool) -> Extras:
        peer = username = consumer = track_var = visitor = trace = received = None
        authorization = False
        if routed is not None and "HTTP_AUTHORIZATION" in environ:
            authorization, username = self._observer.context_reader.users.authorized(routed)
        if self._context is not None:
            known = self._context
            consumer, visitor, trace = known.consumer, known.visitor, known.end_trace()
            username = username if known.username is None else known.username
        if _PROXY_FIX in environ:
            peer = str((environ[_PROXY_FIX] or {}).get("REMOTE_ADDR") or "")
        if TRACK_VAR in environ:
            track_var = encode_json(environ[TRACK_VAR])
            if len(track_var) > MAX_JSON_BYTES:
                track_var = None
                self._report_too_large("track_var")
        if self._input is not None:
            received = self._input.count or (0 if is_announced(environ) else None)
        return Extras(
            peer,
            self.exception,
            authorization,
            username,
            track_var,
            visitor,
            consumer,
            trace,
            received,
            self._first_ns,
            prefetched,
        )

    def _report_too_large(self, part: str) -> None:
        error = f"larger than {MAX_JSON_BYTES} bytes as JSON"
        self._observer.faults.report(part, error, "it is left out of a record")


def is_sent_as_file(body: Iterable[bytes], environ: WSGIEnvironment) -> bool:
    """Tell whether the server may send the body from a file (PEP 3333, wsgi.file_wrapper)."""
    wrapper = environ.get("wsgi.file_wrapper")
    if isinstance(body, FileWrapper) or (isinstance(wrapper, type) and isinstance(body, wrapper)):
        return True
    # uWSGI's wrapper is a function that returns the file object it was given.
    return wrapper is not None and hasattr(body, "read")
