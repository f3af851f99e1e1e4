"""Every Prometheus name, label and bound of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from operator import itemgetter
from typing import Any, Literal

import msgspec

from flask_usage_metrics.metrics.exemplars import Row
from flask_usage_metrics.metrics.objectives import Objective
from flask_usage_metrics.records.summary import BUCKETS

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

METHODS = frozenset(
    ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
)
"""RFC 9110, section 9, and PATCH of RFC 5789."""

OTHER_METHOD = OTHER_STATUS = "_OTHER"
UNMATCHED = "__unmatched__"
UNKNOWN_COUNTRY = "ZZ"
FOLDED = "__other__"

Kind = Literal["counter", "gauge", "histogram"]


class Description(msgspec.Struct, frozen=True):
    """What is always the same about a metric family.

    Attributes:
        name: As Prometheus sees it; a counter's with ``_total``.
        help: One sentence.
        labels: Names before `Shape.label_names` renames them.
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
    "Bytes of request bodies, by their Content-Length.",
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
    "0 if this worker has siblings whose totals are missing here, else 1.",
)
JOURNALED = Description(
    "flask_usage_journaled",
    "gauge",
    "1 if captured requests survive a kill of the process: a journal could be made, else 0.",
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


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What apps on one registry must agree on.

    Attributes:
        max_series: Label sets of the request families, before folding.
        histogram_labels: Labels of the histogram, some of `REQUEST_LABELS` in their order.
        buckets: Upper bounds of the latency buckets in seconds, ascending.
        label_names: New names of labels, by their own.
        objectives: What each request is held against.
    """

    max_series: int = 10_000
    histogram_labels: tuple[str, ...] = REQUEST_LABELS
    buckets: tuple[float, ...] = BUCKETS
    label_names: dict[str, str] = {}
    objectives: tuple[Objective, ...] = ()


class LabelSet:
    """The label values of one series, and their text in an exposition.

    Attributes:
        values: Clean values, in the order of the family's labels.
        text: ``name="value",...``, escaped, in UTF-8.
    """

    __slots__ = ("text", "values")

    def __init__(self, names: Iterable[str], values: tuple[str, ...]) -> None:
        self.values = values
        pairs = zip(names, values, strict=True)
        self.text = ",".join(f'{name}="{_escape(value)}"' for name, value in pairs).encode()


BLOCK = 32
"""So many series of a table are encoded together, and again when one of them changed.

Half as many make the first scrape a tenth slower, twice as many those after 50 series changed by
half.
"""

Kept = dict[tuple[str, bool], Any]
"""What a block of series looks like, compressed: by family, and whether in OpenMetrics."""


class Family(msgspec.Struct, frozen=True):
    """A family at one moment.

    Attributes:
        labels: Names of the labels, renamed.
        series: Labels of each series.
        rows: What is counted of each series; of a histogram that is for each bucket the count of
            what is in it alone, and the sum in seconds.
        kept: For each `BLOCK` of series, what an encoder keeps of it. When one of them changes,
            the next moment has another dictionary in its place.
        exemplars: By the label values of those series of a histogram that have any.
        value: Takes the value of a counter or gauge from its row.
        buckets: Upper bounds in seconds of a histogram.
    """

    description: Description
    labels: tuple[str, ...]
    series: list[LabelSet] = []
    rows: list[list[int | float]] = []
    kept: list[Kept] = []
    exemplars: dict[tuple[str, ...], Row] = {}
    value: Callable[[list[int | float]], float] = itemgetter(0)
    buckets: tuple[float, ...] = ()

    @property
    def samples(self) -> list[tuple[LabelSet, float]]:
        """The value of each series of a counter or gauge."""
        values = map(self.value, self.rows)
        return [*zip(self.series, values, strict=True)]

    @property
    def histograms(self) -> list[tuple[LabelSet, list[int], float]]:
        """For each series the cumulative counts by bucket, and the sum in seconds."""
        return [
            (labels, [*accumulate(map(int, row[:-1]))], float(row[-1]))
            for labels, row in zip(self.series, self.rows, strict=True)
        ]


def _escape(value: str) -> str:
    """Escape a label's value; text format and OpenMetrics agree on how."""
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
