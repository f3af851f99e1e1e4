"""Marks across all graphs: when an alert fired, when another version of the package came."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import AnnotationQuery
from promql import HERE
from variables import SOURCE


class Mark(AnnotationQuery):
    """A mark for when a series began, and for how long it was there.

    The SDK knows of annotations only what all data sources have in common: without a title
    Prometheus' would have none.
    """

    def __init__(self, name: str, color: str, expression: str, title: str) -> None:
        super().__init__(name, SOURCE, icon_color=color, expr=expression)
        self.title = title

    def to_json(self) -> dict[str, object]:
        """Return what the JSON of a dashboard has of it."""
        return super().to_json() | {"titleFormat": self.title}


ALERTS = Mark(
    "Alerts that fire",
    "red",
    'ALERTS{alertname=~"FlaskUsage.*",alertstate="firing",job=~"$job"}',
    "{{alertname}}",
)

VERSION = f"flask_usage_build_info{{{HERE}}}"
UPDATES = Mark(
    "New versions of flask_usage_metrics",
    "blue",
    f"count by (version) ({VERSION}) unless count by (version) ({VERSION} offset 5m)",
    "New version of flask_usage_metrics",
)
