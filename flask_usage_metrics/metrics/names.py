"""The Prometheus names of the package: metric families, labels, label values."""

from __future__ import annotations

from typing import Literal

import msgspec

REQUEST_LABELS = ("method", "endpoint", "status", "country")
LABELS = (
    *REQUEST_LABELS,
    "exception",
    "client",
    "consumer",
    "window",
    "slo",
    "sink",
    "result",
    "label",
    "part",
    "version",
)

RESERVED = ("le", "quantile", "job", "instance")
"""Labels that Prometheus writes itself: of the samples of a histogram or summary, and of a target.
"""

OTHER_STATUS = "_OTHER"
UNMATCHED = "__unmatched__"
UNKNOWN_COUNTRY = "ZZ"
FOLDED = "__other__"
"""Label value of all that a full table of series has no room to keep apart."""

Kind = Literal["counter", "gauge", "histogram"]


class Description(msgspec.Struct, frozen=True):
    """The metadata of a metric family.

    Attributes:
        name: As Prometheus sees it; a counter's with ``_total``.
        kind: Its type.
        help: One sentence.
        labels: Names of the labels, before `Shape.label_names` renames them.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()


REQUESTS = Description(
    "flask_usage_requests_total", "counter", "Requests that were answered.", REQUEST_LABELS
)
DURATION = Description(
    "flask_usage_request_duration_seconds",
    "histogram",
    "Seconds from the request's arrival until the last byte was handed to the server.",
    REQUEST_LABELS,
)
EXCEPTIONS = Description(
    "flask_usage_exceptions_total",
    "counter",
    "Exceptions that no error handler answered, mid-stream ones included.",
    ("endpoint", "exception"),
)
RESPONSE_BYTES = Description(
    "flask_usage_response_bytes_total",
    "counter",
    "Bytes of response bodies handed to the server.",
    ("endpoint",),
)
REQUEST_BYTES = Description(
    "flask_usage_request_bytes_total",
    "counter",
    "Bytes that were read of request bodies, whatever these claim to have.",
    ("endpoint",),
)
CLIENT_REQUESTS = Description(
    "flask_usage_client_requests_total",
    "counter",
    "Requests by kind of client: human, search-bot, ai-training, ...",
    ("client",),
)
CONSUMER_REQUESTS = Description(
    "flask_usage_consumer_requests_total",
    "counter",
    "Requests by API client, where the app names one.",
    ("consumer", "status"),
)
VISITORS = Description(
    "flask_usage_visitors",
    "gauge",
    "Different visitors since midnight UTC (window 1d), where they are told apart.",
    ("window",),
)
OBJECTIVES = Description(
    "flask_usage_slo_objective_ratio",
    "gauge",
    "The share of requests that are to be good, by declared objective.",
    ("slo",),
)
OBJECTIVE_EVENTS = Description(
    "flask_usage_slo_events_total",
    "counter",
    "Requests by declared objective, good or bad.",
    ("slo", "result"),
)
IN_PROGRESS = Description(
    "flask_usage_requests_in_progress",
    "gauge",
    "Requests being answered now; never the scrape itself.",
)
RECORDS = Description(
    "flask_usage_records_total",
    "counter",
    "Records by what became of them in each sink: written, dropped (no room) or failed.",
    ("sink", "result"),
)
PENDING = Description(
    "flask_usage_records_pending", "gauge", "Records each sink has yet to write.", ("sink",)
)
SINK_UP = Description(
    "flask_usage_sink_up", "gauge", "1 if the sink's last write went well, else 0.", ("sink",)
)
OVERFLOW = Description(
    "flask_usage_label_overflow_total",
    "counter",
    "Requests whose label was folded into __other__ because the table of series is full.",
    ("label",),
)
FAULTS = Description(
    "flask_usage_faults_total",
    "counter",
    "Failures inside flask_usage_metrics, by part; none of them reached a visitor.",
    ("part",),
)
WORKERS = Description(
    "flask_usage_workers", "gauge", "Worker processes whose totals are added together here."
)
SHARED = Description(
    "flask_usage_totals_shared",
    "gauge",
    "0 if totals of other workers of this server are missing here, else 1.",
)
JOURNALED = Description(
    "flask_usage_journaled",
    "gauge",
    "1 if all captured requests survive a kill of the process: they are on disk, else 0.",
)
BUILD_INFO = Description(
    "flask_usage_build_info", "gauge", "1, with the version of flask_usage_metrics.", ("version",)
)

DESCRIPTIONS = (
    REQUESTS,
    DURATION,
    EXCEPTIONS,
    RESPONSE_BYTES,
    REQUEST_BYTES,
    CLIENT_REQUESTS,
    CONSUMER_REQUESTS,
    VISITORS,
    OBJECTIVES,
    OBJECTIVE_EVENTS,
    IN_PROGRESS,
    RECORDS,
    PENDING,
    SINK_UP,
    OVERFLOW,
    FAULTS,
    WORKERS,
    SHARED,
    JOURNALED,
    BUILD_INFO,
)
"""All families, in the order they are exposed in."""
