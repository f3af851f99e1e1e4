"""The OpenTelemetry span of a request, while it lives: joined, or started before all else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from flask import Flask
from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.propagators.textmap import Getter

from flask_usage_metrics.records.observation import Trace
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.traces.conventions import SCHEMA_URL, Attributes

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

SCOPE = "flask_usage_metrics"
"""Name of the instrumentation scope of our spans."""

Result = TypeVar("Result")


class LiveSpans:
    """Spans of requests that are over, until the worker knows what to say of them.

    Args:
        capacity: At most so many; then the oldest is forgotten, and made again of its record.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._spans: dict[str, trace.Span] = {}

    def keep(self, span_id: str, span: trace.Span) -> None:
        """Keep a span under its id."""
        spans = self._spans
        spans[span_id] = span
        if len(spans) > self._capacity:
            with suppress(KeyError, RuntimeError, StopIteration):  # another thread was at it
                del spans[next(iter(spans))]

    def take(self, span_id: str | None) -> trace.Span | None:
        """Return a span and forget it; None if it is not known."""
        return None if span_id is None else self._spans.pop(span_id, None)

    def reset_after_fork(self) -> None:
        """Forget the spans of the parent process."""
        self._spans = {}


class Tracing:
    """Joins the span that is there, or starts one; for any thread.

    Args:
        app: Whose requests are traced.
        provider: Returns where tracers come from; asked at the first request of a process, when
            the app has configured what it wants to.
        live: Where spans of ours wait for the worker.
        hints: Returns what somebody else's span is told of a request: of the environ, the endpoint
            and the blueprint.
        skip: Path of the app that is never traced; None: none.
        version: Version of the package.
        faults: Where failures are reported.
    """

    def __init__(
        self,
        app: Flask,
        provider: Callable[[], trace.TracerProvider],
        *,
        live: LiveSpans,
        hints: Callable[[WSGIEnvironment, str | None], Attributes],
        skip: str | None,
        version: str,
        faults: Faults,
    ) -> None:
        self._app = app
        self._provider = provider
        self._skip = skip
        self._version = version
        self._tracer: trace.Tracer | None = None
        self.live = live
        self.hints = hints
        self.faults = faults

    def begin(self, environ: WSGIEnvironment, started_ns: int) -> RequestTrace | None:
        """Join the span that is current, or start one.

        Args:
            environ: Of the request, nothing of which is routed yet.
            started_ns: When the request started, in nanoseconds since the epoch.

        Returns:
            None if the request is not to be traced, or on a failure.
        """
        if environ.get("PATH_INFO") == self._skip:
            return None
        try:
            current = trace.get_current_span()
            known = current.get_span_context()
            if known.is_valid and not known.is_remote:
                return RequestTrace(self, current, None)
            if getattr(self._app, "_is_instrumented_by_opentelemetry", False):
                # Its span starts later, in a hook; or never, where it was told not to.
                return RequestTrace(self, None, None)
            return self._start(environ, started_ns)
        except Exception as error:  # noqa: BLE001 - a visitor must never see a failure of ours
            self.faults.report("traces", error, "a request has no span")
            return None

    def _start(self, environ: WSGIEnvironment, started_ns: int) -> RequestTrace:
        if self._tracer is None:
            self._tracer = self._provider().get_tracer(SCOPE, self._version, schema_url=SCHEMA_URL)
        around = propagate.extract(environ, getter=_FROM_ENVIRON)
        # What samplers may want to know; the worker says it again, and what is private no more.
        span = self._tracer.start_span(
            environ.get("REQUEST_METHOD", "HTTP"),
            around,
            trace.SpanKind.SERVER,
            {
                "http.request.method": environ.get("REQUEST_METHOD", ""),
                "url.scheme": environ.get("wsgi.url_scheme", ""),
                "url.path": environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", ""),
            },
            start_time=started_ns,
        )
        if not span.get_span_context().is_valid:
            # The no-op tracer of API 1.20 forgets the caller, whose trace goes on all the same.
            span = trace.get_current_span(around)
        caller = trace.get_current_span(around).get_span_context()
        return RequestTrace(self, span, trace.set_span_in_context(span, around), caller)

    def reset_after_fork(self) -> None:
        """Ask for the provider again, and forget the spans of the parent process."""
        self._tracer = None
        self.live.reset_after_fork()


class RequestTrace:
    """One request's place in a trace.

    Args:
        tracing: Whom it belongs to.
        span: Its span, ours or joined; None until somebody else starts one.
        context: In which the app runs if the span is ours.
        caller: The caller's span if the span is ours; invalid if there is none.
    """

    __slots__ = ("_caller", "_context", "_span", "_tracing")

    def __init__(
        self,
        tracing: Tracing,
        span: trace.Span | None,
        context: otel_context.Context | None,
        caller: trace.SpanContext = trace.INVALID_SPAN_CONTEXT,
    ) -> None:
        self._tracing = tracing
        self._span = span
        self._context = context
        self._caller = caller

    def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function of the app with the span current: once for each chunk of a stream."""
        if self._context is None:
            return work(*arguments)
        token = otel_context.attach(self._context)
        try:
            return work(*arguments)
        finally:
            otel_context.detach(token)

    def learn(self, environ: WSGIEnvironment, endpoint: str | None) -> None:
        """Find the span somebody else has started meanwhile, and tell it what we know."""
        if self._context is not None:
            return
        try:
            span = trace.get_current_span() if self._span is None else self._span
            if span.get_span_context().is_valid and not span.get_span_context().is_remote:
                self._span = span
                if span.is_recording():
                    span.set_attributes(self._tracing.hints(environ, endpoint))
        except Exception as error:  # noqa: BLE001 - a visitor must never see a failure of ours
            self._tracing.faults.report("traces", error, "a span lacks attributes")

    def end(self) -> Trace | None:
        """Return what an observation has of the trace, when the request is over."""
        span = self._span
        if span is None:
            return None
        found = span.get_span_context()
        if not found.is_valid:
            return None
        is_own = self._context is not None
        sampled = found.trace_flags.sampled and not found.is_remote
        span_id = trace.format_span_id(found.span_id)
        if is_own and sampled:
            self._tracing.live.keep(span_id, span)
        # A span that is joined knows its parent if it is recorded, by the SDK.
        parent = self._caller if is_own else getattr(span, "parent", None)
        return Trace(
            trace.format_trace_id(found.trace_id),
            # Without an SDK the caller's own span is handed on.
            None if found.is_remote else span_id,
            trace.format_span_id(parent.span_id)
            if parent is not None and parent.is_valid
            else None,
            is_own,
            bool(sampled),
        )


class _FromEnviron(Getter[dict[str, Any]]):
    """Reads the headers that carry a context from a WSGI environ (PEP 3333)."""

    def get(self, carrier: dict[str, Any], key: str) -> list[str] | None:
        value = carrier.get("HTTP_" + key.upper().replace("-", "_"))
        return None if value is None else [value]

    def keys(self, carrier: dict[str, Any]) -> list[str]:
        return [key[5:].lower().replace("_", "-") for key in carrier if key.startswith("HTTP_")]


_FROM_ENVIRON = _FromEnviron()
