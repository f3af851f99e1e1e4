"""Replays stored records as spans, with their ids, to a collector."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec

from flask_usage_metrics.errors import ConfigError
from flask_usage_metrics.records.record import UsageRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from flask_usage_metrics.traces.writer import SpanWriter


class NotTaken(Exception):
    """The collector did not take spans after all retries; the message says why, without its URL."""


class Replay:
    """Makes the spans of records again and sends them to a collector; a context manager.

    Not by the app's provider, whose sampler would drop some and whose processors may send them
    elsewhere. For one caller at a time.

    Args:
        service: ``service.name`` of records that name no app, unless OTEL_SERVICE_NAME or
            OTEL_RESOURCE_ATTRIBUTES have one for all.
        user: Whether spans name the user.
        version: Version of the package, which the instrumentation scope names.

    Raises:
        ConfigError: The exporter is not installed, or OpenTelemetry's variables ask for no spans,
            for another protocol, or are not understood.
    """

    def __init__(self, service: str, *, user: bool, version: str) -> None:
        try:
            # Not at the top: every `flask` command imports this file.
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
        except ImportError:
            raise ConfigError(
                "OpenTelemetry's exporter is not installed: pip install 'flask-usage-metrics[otlp]'"
            ) from None
        _check_environment()
        self._service = service
        self._user = user
        self._version = version
        self._writers: dict[str, SpanWriter] = {}
        self._ended = InMemorySpanExporter()
        with _Reasons() as reasons:
            self._reasons = reasons
            try:
                self._exporter: Any = OTLPSpanExporter()
                self._resource = Resource.create()
            except Exception as error:  # noqa: BLE001 - a wrong variable makes it raise anything
                # Only the class: the text may hold a URL or a key.
                raise ConfigError(
                    f"OpenTelemetry's variables OTEL_… are not understood: {type(error).__name__}"
                ) from None

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(Exception):
            self._exporter.shutdown()

    def send(self, batch: Sequence[UsageRecord]) -> int:
        """Send the spans of records; blocks as long as the exporter tries.

        Returns:
            Number of spans sent; fewer than records if some cannot be spans.

        Raises:
            NotTaken: The collector took none, or some and it is not known which.
        """
        for record in batch:
            # A storage of the app may return a broken record, which must not stop all others.
            with suppress(Exception):
                self._writer(record.app or self._service).write([with_ids(record)])
        spans = [span for span in self._ended.get_finished_spans() if _fits(span)]
        self._ended.clear()
        if spans:
            self._export(spans)
        return len(spans)

    def _export(self, spans: Sequence[ReadableSpan]) -> None:
        from opentelemetry.context import (
            _SUPPRESS_INSTRUMENTATION_KEY,  # private, but all instrumentations import it
            attach,
            detach,
            set_value,
        )
        from opentelemetry.sdk.trace.export import SpanExportResult

        # An app with an instrumented HTTP client must not trace the export in turn.
        token = attach(set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))
        try:
            with self._reasons:
                result = self._exporter.export(spans)
        except Exception as error:  # noqa: BLE001 - before 1.25 it raised what requests raises
            raise NotTaken(_reason(error)) from None
        finally:
            detach(token)
        if result is not SpanExportResult.SUCCESS:
            raise NotTaken(self._reasons.last)

    def _writer(self, app: str) -> SpanWriter:
        """Return the writer of an app's spans; several apps may share a storage."""
        if app not in self._writers:
            self._writers[app] = self._make_writer(app)
        return self._writers[app]

    def _make_writer(self, app: str) -> SpanWriter:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON

        from flask_usage_metrics.traces.export import TraceExport
        from flask_usage_metrics.traces.live import LiveSpans
        from flask_usage_metrics.traces.writer import SpanWriter

        resource = self._resource
        if str(resource.attributes.get("service.name")).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": app}))
        provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._ended))
        return SpanWriter(
            TraceExport(provider, None, app),
            LiveSpans(0),
            user=self._user,
            version=self._version,
        )


def with_ids(record: UsageRecord) -> UsageRecord:
    """Return the record with ids that OpenTelemetry accepts: its own, else made of the record's.

    A request that was never in a trace gets the digits of its record's UUID, as `SpanWriter` gives
    them. A record without a UUID, such as a row of flask-track-usage, gets digits of a SHA-256 of
    app, time and id: the rows of every such table are numbered from 1.
    """
    digits = record.id.replace("-", "")
    if not (_is_id(digits, 32) and _is_id(digits[:16], 16) and _is_id(digits[16:], 16)):
        text = f"{record.app} {record.started_at.isoformat()} {record.id}"
        digits = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:32]
    is_in_trace = _is_id(record.trace_id, 32)
    return msgspec.structs.replace(
        record,
        trace_id=record.trace_id if is_in_trace else digits,
        span_id=record.span_id if _is_id(record.span_id, 16) else digits[16:],
        parent_span_id=(
            record.parent_span_id if is_in_trace and _is_id(record.parent_span_id, 16) else None
        ),
    )


def _is_id(text: str | None, length: int) -> bool:
    """Tell whether a text is an id of so many hexadecimal digits, not all zero (W3C)."""
    return (
        text is not None
        and re.fullmatch(f"[0-9a-fA-F]{{{length}}}", text) is not None
        and text.strip("0") != ""
    )


def _fits(span: ReadableSpan) -> bool:
    """Tell whether a span's times can be sent: nanoseconds since 1970, in 64 bits."""
    times = (span.start_time, span.end_time)
    return all(time is not None and 0 <= time < 2**64 for time in times)


def _check_environment() -> None:
    """Check OpenTelemetry's environment variables before anything is sent.

    Raises:
        ConfigError: They disable spans, or ask for another protocol.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        raise ConfigError("OTEL_SDK_DISABLED is set, so there would be no spans: unset it")
    own, general = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"
    name = own if os.environ.get(own) else general
    protocol = os.environ.get(name, "").strip().lower()
    if protocol not in ("", "http/protobuf"):
        raise ConfigError(
            f"{name} must be http/protobuf for replay-spans, not {protocol!r}: set {own} to it, "
            "and OTEL_EXPORTER_OTLP_TRACES_ENDPOINT to where the collector takes that, such as "
            "http://localhost:4318/v1/traces"
        )


class _Reasons(logging.Handler):
    """Reads from the exporter's log why it failed, and keeps the log off the terminal.

    Only the HTTP status or the class of an exception is taken: the texts may hold the URL.

    Attributes:
        last: The latest reason, such as ``"HTTP 503"``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.last = ""

    def __enter__(self) -> _Reasons:
        # Stays if the exporter gives up before it logs why.
        self.last = "not in the time that OTEL_EXPORTER_OTLP_TIMEOUT gives"
        logger = logging.getLogger("opentelemetry")
        self._propagated = logger.propagate
        logger.propagate = False
        logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logger = logging.getLogger("opentelemetry")
        logger.removeHandler(self)
        logger.propagate = self._propagated

    def emit(self, record: logging.LogRecord) -> None:
        for argument in record.args if isinstance(record.args, tuple) else ():
            if isinstance(argument, Exception):
                self.last = _reason(argument)
            else:
                for status in HTTPStatus:
                    if argument in (status.value, status.phrase):
                        self.last = f"HTTP {status.value}"


def _reason(error: BaseException) -> str:
    """Return the operating system's text for the error behind a failure, else its class."""
    reason = type(error).__name__
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            reason = cause.strerror
        cause = cause.__cause__ or cause.__context__
    return reason
