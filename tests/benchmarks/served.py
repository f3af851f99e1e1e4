"""The app that a gunicorn worker answers with, in each of the set-ups `servers.py` compares.

Other than in `variants.py` there is a clock: all have the delays that are their defaults.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flask import Flask

from . import variants

BARE = "bare Flask"
METRICS = "ours, metrics"
SQLITE = "ours, SQLite"
POSTGRESQL = "ours, PostgreSQL"


def make(contender: str, folder: str, storage: str) -> Flask:
    """Return the app.

    Args:
        contender: One of `CONTENDERS`.
        folder: Where state may be kept.
        storage: URL of the database, for those that have one.
    """
    # Threads that are started later inherit it.
    os.sched_setaffinity(0, {worker_core()})
    app = Flask("shop")
    # As little as an app can do: whatever is around it shows the most.
    app.add_url_rule("/hello/<name>", "hello", lambda name: "hello")
    app.config["TRACK_USAGE_STATE_DIR"] = str(Path(folder, "state"))
    CONTENDERS[contender](app, storage)
    return app


def worker_core() -> int:
    """Return the core for the worker, and for nothing else."""
    return max(os.sched_getaffinity(0))


def bare(app: Flask, storage: str) -> None:
    """Flask, and nothing else."""


def ours_with_metrics(app: Flask, storage: str) -> None:
    """Metrics, and no storage."""
    _track_usage(app, [])


def ours_with_storage(app: Flask, storage: str) -> None:
    """Metrics, and every request as a row."""
    _track_usage(app, storage)


def _track_usage(app: Flask, storage: object) -> None:
    from prometheus_client import CollectorRegistry

    from flask_usage_metrics import TrackUsage

    TrackUsage(app, storage, registry=CollectorRegistry())


def prometheus_flask_exporter(app: Flask, storage: str) -> None:
    """As in `variants`, which has no delays."""
    variants.prometheus_flask_exporter(app, 0)


def opentelemetry(app: Flask, storage: str) -> None:
    """A span a request, and metrics; both exported to nowhere."""
    from opentelemetry.instrumentation.flask import FlaskInstrumentor
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import (
        MetricExporter,
        MetricExportResult,
        PeriodicExportingMetricReader,
    )
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    class NoSpans(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            return SpanExportResult.SUCCESS

    class NoMetrics(MetricExporter):
        def export(self, *_: Any, **__: Any) -> MetricExportResult:
            return MetricExportResult.SUCCESS

        def force_flush(self, *_: Any, **__: Any) -> bool:
            return True

        def shutdown(self, *_: Any, **__: Any) -> None:
            pass

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(NoSpans()))
    meters = MeterProvider(metric_readers=[PeriodicExportingMetricReader(NoMetrics())])
    FlaskInstrumentor.instrument_app(app, tracer_provider=provider, meter_provider=meters)


CONTENDERS: dict[str, Callable[[Flask, str], None]] = {
    BARE: bare,
    METRICS: ours_with_metrics,
    SQLITE: ours_with_storage,
    POSTGRESQL: ours_with_storage,
    "prometheus-flask-exporter": prometheus_flask_exporter,
    "opentelemetry-flask-and-metrics": opentelemetry,
}
