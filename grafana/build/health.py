"""Self-health: whether what the other panels show can be believed."""

from __future__ import annotations

from typing import Any

from assembly import Row
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.common import BigValueTextMode
from grafana_foundation_sdk.models.dashboard import (
    ValueMap,
    ValueMappingResult,
)
from panels import at_the_end, big_number, lines, over_time, steps

GOOD_IF_ONE = steps("text", (0, "red"), (1, "green"))
FATES = {r"/ written$/": "green", r"/ dropped$/": "orange", r"/ failed$/": "red"}


def row() -> Row:
    panels: list[Any] = [
        _yes_or_no(
            "Sinks",
            "Down: the last write to this sink failed somewhere. Its records wait meanwhile.",
            "min by (sink) (flask_usage_sink_up{HERE})",
            "{{sink}}",
            "up",
            "down",
        ).span(8),
        _yes_or_no(
            "Totals shared",
            "No: a scrape misses the requests that the server's other workers answered.",
            "min by (instance) (flask_usage_totals_shared{HERE})",
            "{{instance}}",
            "yes",
            "no",
        ).span(4),
        _yes_or_no(
            "Journal",
            "No: requests captured by a worker that is killed are lost.",
            "min by (instance) (flask_usage_journaled{HERE})",
            "{{instance}}",
            "yes",
            "no",
        ).span(4),
        big_number(
            "Workers",
            "Processes whose totals are added together, by instance. Fewer than you started: "
            "some have not answered a request yet, or cannot share their totals.",
            over_time("sum by (instance) (flask_usage_workers{HERE})", "{{instance}}"),
            unit=units.Short,
            named=True,
        ).span(4),
        big_number(
            "Version",
            "Of flask_usage_metrics. Several: not all instances were updated.",
            at_the_end("count by (version) (flask_usage_build_info{HERE})", "{{version}}"),
            unit=units.Short,
        )
        .text_mode(BigValueTextMode.NAME)
        .span(4),
        lines(
            "Records by fate",
            "Written, dropped (no room), failed (the sink refused them); failed and dropped "
            "ones never reached storage.",
            over_time(
                "sum by (sink, result) (rate(flask_usage_records_total{HERE}[$__rate_interval]))",
                "{{sink}} {{result}}",
            ),
            unit=units.WritesPerSecond,
            shades=FATES,
        ).span(12),
        lines(
            "Records waiting by sink",
            "Captured, not yet written. Rises while a sink is slow or away; when there is no "
            "more room records are dropped. Requests never wait.",
            over_time(
                "max by (instance, sink) (flask_usage_records_pending{HERE})",
                "{{sink}} ({{instance}})",
            ),
            unit=units.Short,
        ).span(12),
        lines(
            "Label overflow",
            "Requests whose label was folded into __other__ because the table of series is full: "
            "see TRACK_USAGE_MAX_SERIES. The records have the real values.",
            over_time(
                """
                sum by (label) (
                  increase(flask_usage_label_overflow_total{HERE}[$__rate_interval])
                )
                """,
                "{{label}}",
            ),
            unit=units.Short,
        ).span(12),
        lines(
            "Faults",
            "Failures inside flask_usage_metrics, by part. No visitor noticed; the log says what.",
            over_time(
                "sum by (part) (increase(flask_usage_faults_total{HERE}[$__rate_interval]))",
                "{{part}}",
            ),
            unit=units.Short,
            missing="no faults",
        ).span(12),
    ]
    heights = [4, 4, 4, 4, 4, 8, 8, 8, 8]
    for panel, height in zip(panels, heights, strict=True):
        panel.height(height)
    return Row("Is the measuring itself well?", panels, collapsed=True)


def _yes_or_no(
    title: str, description: str, expression: str, name: str, one: str, zero: str
) -> Any:
    """Show a gauge that is 1 if all is well, else 0, in words."""
    words = {
        "1": ValueMappingResult(text=one, color="green", index=0),
        "0": ValueMappingResult(text=zero, color="red", index=1),
    }
    panel = big_number(
        title,
        description,
        at_the_end(expression, name),
        unit=units.NoUnit,
        colors=GOOD_IF_ONE,
        named=True,
    )
    return panel.mappings([ValueMap(options=words)])
