"""The shape of the families: the settings that all apps on one registry must agree on."""

from __future__ import annotations

import msgspec

from flask_usage_metrics.metrics.names import (
    DURATION,
    REQUEST_LABELS,
    REQUESTS,
    Description,
)
from flask_usage_metrics.metrics.objectives import Objective
from flask_usage_metrics.records.summary import BUCKETS


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """Labels, buckets, bound and objectives of the families.

    Attributes:
        max_series: Label sets of the request families, before labels are folded.
        labels: Keys of ``g.track_var`` whose values are labels of the counter of requests, too.
        histogram_labels: Labels of the histogram, some of `request_labels` in their order.
        buckets: Upper bounds of the latency buckets in seconds, ascending.
        label_names: New names of labels, by their own.
        objectives: Service-level objectives that each request is held against.
    """

    max_series: int = 10_000
    labels: tuple[str, ...] = ()
    histogram_labels: tuple[str, ...] = REQUEST_LABELS
    buckets: tuple[float, ...] = BUCKETS
    label_names: dict[str, str] = {}
    objectives: tuple[Objective, ...] = ()

    @property
    def request_labels(self) -> tuple[str, ...]:
        """Labels of the counter of requests: `REQUEST_LABELS`, then the app's own."""
        return (*REQUEST_LABELS, *self.labels)

    def labels_of(self, description: Description) -> tuple[str, ...]:
        """Return the names of a family's labels, renamed."""
        labels = description.labels
        if description is REQUESTS:
            labels = self.request_labels
        elif description is DURATION:
            labels = self.histogram_labels
        return tuple(self.label_names.get(label, label) for label in labels)
