"""The span of a request while it runs: a current span is joined, otherwise one is started."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.propagators.textmap import Getter

from flask_usage_metrics.records.observation import Trace
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.forks import FORKS
from flask_usage_metrics.traces.conventions import SCHEMA_URL, Attributes

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment
    from flask import Flask

SCOPE = "flask_usage_metrics"
"""Name of the instrumentation scope of our spans."""

Result = TypeVar("Result")


class LiveSpans:
    """Sampled spans of requests that are over, kept until the worker ends them; for any thread.

    Args:
        capacity: Spans that are kept at most. Beyond that the oldest is dropped; it is made again
            from its record.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._spans: dict[str, trace.Span] = {}
        FORKS.register(self)

    def keep(self, span_id: str, span: trace.Span) -> None:
        """Keep a span under its id."""
        spans = self._spans
        spans[span_id] = span
        if len(spans) > self._capacity:
            with suppress(KeyError, RuntimeError, StopIteration):  # another thread took it
                del spans[next(iter(spans))]

    def take(self, span_id: str | None) -> trace.Span | None:
        """Remove and return the span of an id; None if there is none."""
        return None if span_id is None else self._spans.pop(span_id, None)

    def reset_after_fork(self) -> None:
        """Forget the spans of the parent process."""
        self._spans = {}


class Tracing:
    """Gives each request of one app its place in a trace; for any thread.

    Args:
        app: The app whose requests are traced.
        provider: Returns the tracer provider; called at the first request of a process, when the
            app has configured OpenTelemetry if it wants to.
        live: Keeps spans of ours until the worker ends them.
        hints: Takes the environ and the endpoint (None when no route matched); returns the
            attributes to add to a span of another instrumentation.
        skip: Path of the app that is never traced; None: none.
        version: Version of the package, which the instrumentation scope names.
        faults: Takes failures of our own and of OpenTelemetry.
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
        FORKS.register(self)

    def start(self, environ: WSGIEnvironment, started_ns: int) -> RequestTrace | None:
        """Join the span that is current, or start one.

        Args:
            environ: The WSGI environ of the request, which is not routed yet.
            started_ns: When the request started, in nanoseconds since the epoch.

        Returns:
            None for the skipped path, and when OpenTelemetry raised.
        """
        if environ.get("PATH_INFO") == self._skip:
            return None
        try:
            current = trace.get_current_span()
            known = current.get_span_context()
            if known.is_valid and not known.is_remote:
                return RequestTrace(self, current, None)
            if getattr(self._app, "_is_instrumented_by_opentelemetry", False):
                # Its span starts later, in a hook; or never, for URLs that it excludes.
                return RequestTrace(self, None, None)
            return self._start(environ, started_ns)
        except Exception as error:  # noqa: BLE001 - a visitor must never see a failure of ours
            self.faults.report("traces", error, "a request has no span")
            return None

    def _start(self, environ: WSGIEnvironment, started_ns: int) -> RequestTrace:
        if self._tracer is None:
            self._tracer = self._provider().get_tracer(SCOPE, self._version, schema_url=SCHEMA_URL)
        around = propagate.extract(environ, getter=_FROM_ENVIRON)
        # For samplers. The worker sets attributes again, and then only those of the record.
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
            # API 1.20's no-op tracer drops the caller's context; its trace goes on all the same.
            span = trace.get_current_span(around)
        caller = trace.get_current_span(around).get_span_context()
        return RequestTrace(self, span, trace.set_span_in_context(span, around), caller)

    def reset_after_fork(self) -> None:
        """Have the next request of a forked child make a tracer."""
        self._tracer = None


class RequestTrace:
    """One request's place in a trace.

    Args:
        tracing: Of the app.
        span: Its span, ours or joined; None until another instrumentation starts one.
        context: Context that has our span as the current one; None if the span is not ours.
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

    @property
    def is_own(self) -> bool:
        """Whether the span is ours, rather than joined."""
        return self._context is not None

    def handed_to(self, tracing: Tracing) -> RequestTrace:
        """Return the same place in the trace, for another app to end the span."""
        return RequestTrace(tracing, self._span, self._context, self._caller)

    def abandon(self) -> None:
        """End a span of ours at once, as it belongs to no record."""
        if self._context is not None and self._span is not None:
            with self._tracing.faults.caught("traces", "a span is not ended"):
                self._span.end()

    def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function of the app with our span current; return its result.

        Called for the app itself, and for each chunk of a stream.
        """
        if self._context is None:
            return work(*arguments)
        token = otel_context.attach(self._context)
        try:
            return work(*arguments)
        finally:
            otel_context.detach(token)

    def enter(self) -> Callable[[], None] | None:
        """Make our span the current one, where there is no function to `run`.

        Returns:
            To be called in the same thread and context when that is over; None if the span is not
            ours.
        """
        return (
            None
            if self._context is None
            else partial(otel_context.detach, otel_context.attach(self._context))
        )

    def learn(self, environ: WSGIEnvironment, endpoint: str | None) -> None:
        """Join the span that another instrumentation has started, and set our attributes on it.

        Does nothing if the span is ours.
        """
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
        """Return the request's place in the trace, when it is over; None if it has none.

        A sampled span of ours is handed to the live spans, for the worker to end it.
        """
        span = self._span
        if span is None:
            return None
        found = span.get_span_context()
        if not found.is_valid:
            return None
        is_own = self.is_own
        sampled = found.trace_flags.sampled and not found.is_remote
        span_id = trace.format_span_id(found.span_id)
        if is_own and sampled:
            self._tracing.live.keep(span_id, span)
        # Of a joined span only the SDK's recording ones know their parent.
        parent = self._caller if is_own else getattr(span, "parent", None)
        return Trace(
            trace.format_trace_id(found.trace_id),
            # Without an SDK the current span is the caller's own, passed through.
            None if found.is_remote else span_id,
            trace.format_span_id(parent.span_id)
            if parent is not None and parent.is_valid
            else None,
            is_own,
            bool(sampled),
        )


class _FromEnviron(Getter[dict[str, Any]]):
    """Reads propagation headers, such as traceparent, from a WSGI environ (PEP 3333)."""

    def get(self, carrier: dict[str, Any], key: str) -> list[str] | None:
        value = carrier.get("HTTP_" + key.upper().replace("-", "_"))
        return None if value is None else [value]

    def keys(self, carrier: dict[str, Any]) -> list[str]:
        return [key[5:].lower().replace("_", "-") for key in carrier if key.startswith("HTTP_")]


_FROM_ENVIRON = _FromEnviron()
