"""Exports spans: through the app's tracer provider, or by one of ours over OTLP/HTTP."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from opentelemetry import context as otel_context
from opentelemetry import trace

# Private, but the SDK's processors and all instrumentations import it: older instrumentations know
# no other way to be told that an exporter's own requests are not to be traced.
from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY

from flask_usage_metrics.errors import ConfigError, StorageUnavailable
from flask_usage_metrics.runtime.forks import FORKS
from flask_usage_metrics.traces.live import SCOPE

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter

_FLUSH_SECONDS = 1.0
"""Seconds that a flush waits at most for the SDK to export other libraries' spans."""


class TraceExport:
    """The provider of our spans, resolved when the first span is started; for any thread.

    It is the given one; else the global one, if the app has configured it by then; else one of
    ours, made global so that spans of other libraries nest and are exported by it, too.

    Args:
        provider: Given by the app, or None.
        exporter: Given by the app for a provider of ours; None: the one that
            OTEL_TRACES_EXPORTER names.
        service: Value of ``service.name`` of a provider of ours, unless OTEL_SERVICE_NAME or
            OTEL_RESOURCE_ATTRIBUTES have one.

    Raises:
        ConfigError: A provider of ours is needed, but its exporter is not installed, or
            OpenTelemetry's variables name one that we do not have.
    """

    def __init__(
        self, provider: trace.TracerProvider | None, exporter: SpanExporter | None, service: str
    ) -> None:
        self._given = provider
        self._exporter = exporter
        self._service = service
        self._lock = threading.Lock()
        self._provider: trace.TracerProvider | None = None
        self._own: _OwnProvider | None = None
        if provider is None and exporter is None and not _is_configured():
            _exporter_class()
        FORKS.register(self)

    def provider(self) -> trace.TracerProvider:
        """Return the provider, the same one for the life of the process."""
        with self._lock:
            if self._provider is None:
                self._provider = self._resolve()
            return self._provider

    def collecting(self) -> AbstractContextManager[list[ReadableSpan]]:
        """Collect our spans that end in this thread inside the returned context manager.

        Returns:
            A context manager that yields the list they are appended to. It stays empty if the
            provider is not ours: its own processors export them.
        """
        if self._provider is None:
            self.provider()
        if self._own is None:
            return nullcontext([])
        collecting: AbstractContextManager[list[ReadableSpan]] = self._own.processor.collecting()
        return collecting

    def export(self, spans: Sequence[ReadableSpan]) -> None:
        """Send collected spans to the collector; blocks as long as the exporter does.

        Does nothing if the provider is not ours.

        Raises:
            StorageUnavailable: The exporter failed or raised.
        """
        if spans and self._own is not None:
            self._own.export(spans)

    def flush(self) -> None:
        """Export other libraries' spans that still wait in a provider of ours.

        Blocks for a second at most, while the export goes on in a thread of its own.
        """
        if self._own is not None:
            self._own.flush()

    def reset_after_fork(self) -> None:
        """Leave the parent's connections to the parent; the SDK restarts its threads by itself."""
        self._lock = threading.Lock()
        if self._own is not None:
            self._own.reset_after_fork()

    def _resolve(self) -> trace.TracerProvider:
        if self._given is not None:
            return self._given
        is_configured = _is_configured()
        if is_configured and self._exporter is None:
            return trace.get_tracer_provider()
        given = self._exporter
        # An exporter that was given cannot be made again in a forked child.
        make = _exporter_class() if given is None else (lambda: given)
        self._own = _OwnProvider(make, self._service)
        if not is_configured:
            trace.set_tracer_provider(self._own.provider)
        return self._own.provider


class _OwnProvider:
    """A provider of ours: `export` sends spans of requests, the SDK's batch processor all others.

    Args:
        make_exporter: Makes the exporter of a process; called when there is something to export.
            It may return None: export nothing.
        service: See `TraceExport`.
    """

    def __init__(self, make_exporter: Callable[[], SpanExporter | None], service: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        resource = Resource.create()
        if str(resource.attributes["service.name"]).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": service}))
        # No exit handler of the SDK: it would shut down before ours has sent the last spans.
        self.provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self.processor = _make_processor(self._send, self._shut_down)
        self.provider.add_span_processor(self.processor)
        self._make_exporter = make_exporter
        self._is_up = True
        self._start_anew()

    def _start_anew(self) -> None:
        # An exporter must not be called by two threads at once (OpenTelemetry's specification).
        self._exporting = threading.Lock()
        self._exporter: SpanExporter | None = None
        self._flushing: threading.Thread | None = None

    def export(self, spans: Sequence[ReadableSpan]) -> None:
        token = otel_context.attach(otel_context.set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))
        try:
            self._is_up = self._send(spans)
        except Exception as error:  # noqa: BLE001 - exporters of the app raise anything
            self._is_up = False
            raise StorageUnavailable(reason=f"traces: {type(error).__name__}") from None
        finally:
            otel_context.detach(token)
        if not self._is_up:
            raise StorageUnavailable(reason="traces: the collector did not take the spans")

    def _send(self, spans: Sequence[ReadableSpan]) -> bool:
        from opentelemetry.sdk.trace.export import SpanExportResult

        with self._exporting:
            if self._exporter is None:
                self._exporter = self._make_exporter()
            # No exporter: OTEL_TRACES_EXPORTER is none.
            return self._exporter is None or (
                self._exporter.export(spans) is SpanExportResult.SUCCESS
            )

    def _shut_down(self) -> None:
        if self._exporter is not None:
            self._exporter.shutdown()

    def flush(self) -> None:
        if not (self._is_up and self.processor.has_others()):
            return
        if self._flushing is None or not self._flushing.is_alive():
            self._flushing = threading.Thread(target=self.processor.force_flush, daemon=True)
            try:
                self._flushing.start()
            except RuntimeError:  # since Python 3.12 none can be started at exit
                self._flushing = None
                self.processor.force_flush(int(_FLUSH_SECONDS * 1000))
                return
        self._flushing.join(_FLUSH_SECONDS)

    def reset_after_fork(self) -> None:
        self._start_anew()
        self.processor.reset_after_fork()


def _make_processor(
    send: Callable[[Sequence[ReadableSpan]], bool], shut_down: Callable[[], None]
) -> Any:
    from opentelemetry.sdk.trace.export import (
        BatchSpanProcessor,
        SpanExporter,
        SpanExportResult,
    )

    class Shared(SpanExporter):
        """Hands batches of other libraries' spans to the one exporter of this process."""

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            return SpanExportResult.SUCCESS if send(spans) else SpanExportResult.FAILURE

        def shutdown(self) -> None:
            shut_down()

    class Processor(BatchSpanProcessor):
        """Gives our spans to the thread that collects them, and all others to the SDK's batches."""

        def __init__(self) -> None:
            super().__init__(Shared())
            self.reset_after_fork()

        def reset_after_fork(self) -> None:
            self._collecting = threading.local()
            self._others = False

        @contextmanager
        def collecting(self) -> Iterator[list[ReadableSpan]]:
            spans: list[ReadableSpan] = []
            self._collecting.spans = spans
            try:
                yield spans
            finally:
                self._collecting.spans = None

        def has_others(self) -> bool:
            return self._others

        def on_end(self, span: ReadableSpan) -> None:
            collecting = getattr(self._collecting, "spans", None)
            scope = span.instrumentation_scope
            if collecting is not None and scope is not None and scope.name == SCOPE:
                collecting.append(span)
            else:
                self._others = True
                super().on_end(span)

    return Processor()


def _is_configured() -> bool:
    """Tell whether the app or another library has set the global provider."""
    return not isinstance(
        trace.get_tracer_provider(), trace.ProxyTracerProvider | trace.NoOpTracerProvider
    )


def _exporter_class() -> Callable[[], SpanExporter | None]:
    """Return a function that makes the exporter that OTEL_TRACES_EXPORTER names.

    Raises:
        ConfigError: It is not installed, or is none of otlp, console and none.
    """
    wanted = _environment("OTEL_TRACES_EXPORTER") or "otlp"
    if wanted == "none":
        return lambda: None
    try:
        if wanted == "console":
            from opentelemetry.sdk.trace.export import ConsoleSpanExporter

            return ConsoleSpanExporter
        if wanted == "otlp":
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            _check_protocol()
            return OTLPSpanExporter
    except ImportError:
        raise ConfigError(
            "TRACK_USAGE_TRACES needs an exporter: pip install 'flask-usage-metrics[otlp]', "
            "or set up OpenTelemetry's tracer provider before init_app"
        ) from None
    raise ConfigError(
        f"OTEL_TRACES_EXPORTER must be otlp, console or none for us, not {wanted!r}: "
        "set up OpenTelemetry's tracer provider before init_app, or pass tracer_provider"
    )


def _check_protocol() -> None:
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = _environment(name)
        if protocol == "http/protobuf":
            return
        if protocol:
            raise ConfigError(
                f"{name} must be http/protobuf for us, not {protocol!r}: "
                "set TRACK_USAGE_TRACES to an exporter that speaks it"
            )


def _environment(name: str) -> str:
    return os.environ.get(name, "").strip().lower()
