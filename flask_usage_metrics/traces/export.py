"""Where spans go: to the provider the app has, or over OTLP/HTTP to a collector."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from opentelemetry import context as otel_context
from opentelemetry import trace

# Private, and what the SDK's own processors and all instrumentations import: nothing else tells
# older ones not to trace in turn what an exporter does.
from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY

from flask_usage_metrics.errors import ConfigError, StorageUnavailable
from flask_usage_metrics.traces.live import SCOPE

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter

_REST_SECONDS = 1.0


class TraceExport:
    """The provider of our spans, resolved when the first is started.

    That is the given one; else the global one, if the app has configured it by then; else one of
    ours, made global so that spans of other libraries nest and go the same way.

    Args:
        provider: Given by the app, or None.
        exporter: Given by the app for a provider of ours, or None: as OTEL_TRACES_EXPORTER says.
        service: Value of ``service.name`` unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES
            have one.

    Raises:
        ConfigError: There is neither, and what ours is made of is not installed.
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

    def provider(self) -> trace.TracerProvider:
        """Return the provider, of which there is one a process."""
        with self._lock:
            if self._provider is None:
                self._provider = self._resolve()
            return self._provider

    def collecting(self) -> AbstractContextManager[list[ReadableSpan]]:
        """Return what yields a list of our spans that end meanwhile in this thread.

        It stays empty if the provider is not ours: its own processors have them.
        """
        if self._provider is None:
            self.provider()
        if self._own is None:
            return nullcontext([])
        collecting: AbstractContextManager[list[ReadableSpan]] = self._own.processor.collecting()
        return collecting

    def export(self, spans: Sequence[ReadableSpan]) -> None:
        """Send spans to the collector; blocks as long as the exporter does.

        Raises:
            StorageUnavailable: It did not take them.
        """
        if spans and self._own is not None:
            self._own.export(spans)

    def flush(self) -> None:
        """Send what other libraries have left; waits a second at most, where there are threads."""
        if self._own is not None:
            self._own.flush()

    def reset_after_fork(self) -> None:
        """Leave the parent's connections to the parent; an SDK restarts its threads by itself."""
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
    """A provider of the SDK whose spans of requests are exported by us, all others by its batches.

    Args:
        make_exporter: Called in each process, when there is something to export.
        service: See `TraceExport`.
    """

    def __init__(self, make_exporter: Callable[[], SpanExporter | None], service: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        resource = Resource.create()
        if str(resource.attributes["service.name"]).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": service}))
        # Not shut down by the SDK's own exit handler, which would come before ours.
        self.provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self.processor = _make_processor(self._send, self._shut_down)
        self.provider.add_span_processor(self.processor)
        self._make_exporter = make_exporter
        self._is_up = True
        self._start_anew()

    def _start_anew(self) -> None:
        # No exporter is called by two threads at once (OpenTelemetry's specification of them).
        self._exporting = threading.Lock()
        self._exporter: SpanExporter | None = None
        self._flushing: threading.Thread | None = None

    def export(self, spans: Sequence[ReadableSpan]) -> None:
        token = otel_context.attach(otel_context.set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))
        try:
            self._is_up = self._send(spans)
        except Exception as error:  # noqa: BLE001 - it may be anybody's
            self._is_up = False
            raise StorageUnavailable(f"traces: {type(error).__name__}") from None
        finally:
            otel_context.detach(token)
        if not self._is_up:
            raise StorageUnavailable("traces: the collector did not take the spans")

    def _send(self, spans: Sequence[ReadableSpan]) -> bool:
        from opentelemetry.sdk.trace.export import SpanExportResult

        with self._exporting:
            if self._exporter is None:
                self._exporter = self._make_exporter()
            # Without one they are to go nowhere.
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
                self.processor.force_flush(int(_REST_SECONDS * 1000))
                return
        self._flushing.join(_REST_SECONDS)

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
        """The exporter of this process, which sends spans of ours as well."""

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            return SpanExportResult.SUCCESS if send(spans) else SpanExportResult.FAILURE

        def shutdown(self) -> None:
            shut_down()

    class Processor(BatchSpanProcessor):
        """Lays our spans aside for the thread that ends them, and batches all others."""

        def __init__(self) -> None:
            super().__init__(Shared())
            self.reset_after_fork()

        def reset_after_fork(self) -> None:
            self._aside = threading.local()
            self._others = False

        @contextmanager
        def collecting(self) -> Iterator[list[ReadableSpan]]:
            spans: list[ReadableSpan] = []
            self._aside.spans = spans
            try:
                yield spans
            finally:
                self._aside.spans = None

        def has_others(self) -> bool:
            return self._others

        def on_end(self, span: ReadableSpan) -> None:
            aside = getattr(self._aside, "spans", None)
            scope = span.instrumentation_scope
            if aside is not None and scope is not None and scope.name == SCOPE:
                aside.append(span)
            else:
                self._others = True
                super().on_end(span)

    return Processor()


def _is_configured() -> bool:
    """Tell whether somebody has set the global provider."""
    return not isinstance(
        trace.get_tracer_provider(), trace.ProxyTracerProvider | trace.NoOpTracerProvider
    )


def _exporter_class() -> Callable[[], SpanExporter | None]:
    """Return what makes the exporter that OTEL_TRACES_EXPORTER names.

    Raises:
        ConfigError: It is not installed, or not one of these.
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
