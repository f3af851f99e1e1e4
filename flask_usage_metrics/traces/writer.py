"""Ends the span of each record with the record's values: a writer like that of any storage."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.context import Context

from flask_usage_metrics.errors import RecordsRejected, StorageUnavailable
from flask_usage_metrics.records.observation import Observation
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.storage import Writer
from flask_usage_metrics.traces.conventions import SCHEMA_URL, attributes_of, is_error, name_of
from flask_usage_metrics.traces.export import TraceExport
from flask_usage_metrics.traces.live import SCOPE, LiveSpans

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

_AT_ONCE = 512
"""Records whose spans are exported at once, at most: as many spans as the SDK's batches have."""

_FACTOR = 4
"""After a failure an export has so many times fewer records; after a success so many more."""

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND = timedelta(microseconds=1)


def has_own_span(observation: Observation) -> bool:
    """Tell whether a request has a span that is ours to end, and sampled."""
    trace = None if observation.extras is None else observation.extras.trace
    return trace is not None and trace.is_own and trace.is_sampled


class SpanWriter(Writer):
    """Ends live spans, and makes those of a killed process again, with the same ids.

    So a span waits in journal and spool like a row, until the collector has it. For one caller at a
    time.
    """

    name = "traces"

    def set_up(self, export: TraceExport, live: LiveSpans, *, user: bool, version: str) -> None:
        """Take the constructor's arguments.

        Args:
            export: Exports the spans.
            live: Keeps the spans of this process until they are ended here.
            user: Whether spans name the user.
            version: Version of the package, which the instrumentation scope names.
        """
        self._export = export
        self._live = live
        self._user = user
        self._version = version
        self._start_anew()

    def _start_anew(self) -> None:
        self._again: trace.Tracer | None = None
        self._ids = _GivenIds(None)
        # Of the batch that is being written, by record id: its ended spans that are still to be
        # exported, as a span ends only once; and the reason why it never can be exported.
        self._unsent: dict[str, list[ReadableSpan]] = {}
        self._refused: dict[str, str] = {}
        self._at_once = _AT_ONCE

    def write(self, batch: Sequence[UsageRecord]) -> None:
        """End the spans of a batch, and export them if the provider is ours.

        Blocks as long as the exporter does. After `StorageUnavailable` the same batch may be
        written again: spans that were exported are not exported twice.

        Raises:
            StorageUnavailable: The collector did not take them.
            RecordsRejected: Some are not sampled or cannot be made, or the collector takes all
                but these.
        """
        unsent, self._unsent = self._unsent, {}
        for record in batch:
            known = unsent.get(record.id)
            self._unsent[record.id] = self._end(record) if known is None else known
        self._send()
        refused, self._refused, self._unsent = self._refused, {}, {}
        positions = [number for number, record in enumerate(batch) if record.id in refused]
        if positions:
            raise RecordsRejected(positions, refused[batch[positions[0]].id])

    def _send(self) -> None:
        """Export all unsent spans; after a failure fewer at once, so that a bad one is found.

        An exporter does not tell an outage from spans that are malformed, or too many at once. So
        a failure is taken for an outage unless other spans were taken in the same call.

        Raises:
            StorageUnavailable: An outage.
        """
        is_up, most = False, _AT_ONCE
        while left := [key for key, spans in self._unsent.items() if spans]:
            part = left[: self._at_once]
            try:
                self._export_all(part)
            except StorageUnavailable:
                self._at_once = max(len(part) // _FACTOR, 1)
                if len(part) == 1 < len(left):
                    self._judge(part, left[-1:])
                    most = _AT_ONCE
                elif is_up and len(part) > 1:
                    most = self._at_once
                else:
                    raise
            else:
                self._at_once = min(self._at_once * _FACTOR, most)
            is_up = True

    def _judge(self, suspect: Sequence[str], other: Sequence[str]) -> None:
        """Refuse a record whose spans failed alone, and fail again after another's were taken.

        Args:
            suspect: Id of the one record that failed just now.
            other: Id of another record that is unsent.

        Raises:
            StorageUnavailable: The other's spans are not taken either: an outage.
        """
        self._export_all(other)
        try:
            self._export_all(suspect)
        except StorageUnavailable:
            (key,) = suspect
            self._unsent[key] = []
            self._refused[key] = "not taken by the collector"

    def _export_all(self, keys: Sequence[str]) -> None:
        self._export.export([span for key in keys for span in self._unsent[key]])
        for key in keys:
            self._unsent[key] = []

    def flush(self) -> None:
        """Export other libraries' spans that still wait; see `TraceExport.flush`."""
        self._export.flush()

    def reset_after_fork(self) -> None:
        """Forget the spans that the parent process will export."""
        self._start_anew()

    def _end(self, record: UsageRecord) -> list[ReadableSpan]:
        """End the span of a record; return the ended spans that we have to export."""
        with self._export.collecting() as spans:
            try:
                if not self._end_with(record):
                    self._refused[record.id] = "not sampled"
            except Exception as error:  # noqa: BLE001 - samplers and processors of the app raise anything
                if not spans:
                    self._refused[record.id] = type(error).__name__
        return spans

    def _end_with(self, record: UsageRecord) -> bool:
        """End the span of a record with its values; return False if it is not sampled."""
        start_ns = (record.started_at - _EPOCH) // _MICROSECOND * 1000
        span = self._live.take(record.span_id)
        if span is None:
            span = self._make_again(record, start_ns)
        if not span.is_recording():
            return False
        start_ns = getattr(span, "start_time", None) or start_ns
        span.update_name(name_of(record))
        span.set_attributes(attributes_of(record, user=self._user))
        if is_error(record):
            span.set_status(trace.Status(trace.StatusCode.ERROR))
        span.end(start_ns + round(record.duration_seconds * 1e9))
        return True

    def _make_again(self, record: UsageRecord, start_ns: int) -> trace.Span:
        """Start the span of a record again; with ids made of the record's if it never had one."""
        digits = record.id.replace("-", "")
        trace_id = int(record.trace_id or digits, 16)
        span_id = int(record.span_id or digits[16:], 16)
        if self._again is None:
            self._again = self._export.provider().get_tracer(
                SCOPE, self._version, schema_url=SCHEMA_URL
            )
            self._ids = _GivenIds(getattr(self._again, "id_generator", None))
            with suppress(AttributeError):  # other tracers than the SDK's make their own ids
                self._again.id_generator = self._ids  # type: ignore[attr-defined]
        context = Context()
        if record.parent_span_id is not None:
            parent = trace.SpanContext(
                trace_id,
                int(record.parent_span_id, 16),
                is_remote=True,
                trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED),
            )
            context = trace.set_span_in_context(trace.NonRecordingSpan(parent), context)
        with self._ids.given(trace_id, span_id):
            return self._again.start_span(
                name_of(record), context, trace.SpanKind.SERVER, start_time=start_ns
            )


class _GivenIds:
    """An id generator for spans that are made again with given ids (the SDK's IdGenerator).

    Args:
        others: The generator of all other ids, in case the SDK shares the tracer.
    """

    def __init__(self, others: Any) -> None:
        self._others = others
        self._local = threading.local()

    @contextmanager
    def given(self, trace_id: int, span_id: int) -> Iterator[None]:
        """Give these ids to the span that this thread starts inside the block."""
        self._local.ids = trace_id, span_id
        try:
            yield
        finally:
            self._local.ids = None

    def generate_trace_id(self) -> int:
        ids: tuple[int, int] | None = getattr(self._local, "ids", None)
        return int(self._others.generate_trace_id()) if ids is None else ids[0]

    def generate_span_id(self) -> int:
        ids: tuple[int, int] | None = getattr(self._local, "ids", None)
        return int(self._others.generate_span_id()) if ids is None else ids[1]

    def is_trace_id_random(self) -> bool:
        # Given ids may not be random, so that must not be claimed (W3C trace context, level 2).
        return False
