"""A dashboard out of rows of panels: their places and numbers, and what all dashboards share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as made
from marks import ALERTS, UPDATES
from promql import write_out

TAG = "flask-usage"
SCHEMA_VERSION = 39  # Grafana 10.4: later ones migrate it


class Row(NamedTuple):
    """Panels under a heading, as they flow into lines of 24 columns."""

    title: str
    panels: list[Builder[made.Panel]]
    collapsed: bool = False


def assemble(
    uid: str,
    title: str,
    description: str,
    variables: list[Any],
    *rows: Row,
    endpoint: str = 'endpoint=~"$endpoint"',
) -> made.Dashboard:
    """Make a dashboard; its uid is for ever, as links lead to it.

    ``endpoint`` is how that variable is matched: a single value is no regular expression.
    """
    builder = (
        build.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([TAG])
        .readonly()  # the file is the truth
        .timezone("browser")
        .time("now-6h", "now")
        .refresh("1m")
        .tooltip(made.DashboardCursorSync.CROSSHAIR)
        .variables(variables)
        .link(_other_dashboards())
    )
    for row in rows:
        heading = build.Row(row.title).collapsed(row.collapsed)
        if row.collapsed:
            for panel in row.panels:
                heading.with_panel(panel)
            builder.with_row(heading)
        else:
            builder.with_row(heading)
            for panel in row.panels:
                builder.with_panel(panel)
    dashboard = builder.build()
    dashboard.schema_version = SCHEMA_VERSION
    dashboard.annotations.list_val = [ALERTS, UPDATES]
    for variable in dashboard.templating.list_val or []:
        # The SDK adds to each what only variables of type interval have.
        variable.auto = variable.auto_min = variable.auto_count = None
    for number, panel in enumerate(_all_panels(dashboard), 1):
        panel.id_val = number
        panel.transparent = panel.repeat_direction = None
        if panel.type_val == "table":
            panel.options.footer = None  # Grafana 13 has none
        for target in getattr(panel, "targets", None) or []:
            target.expr = write_out(target.expr, endpoint=endpoint)
    return dashboard


def _all_panels(dashboard: made.Dashboard) -> Iterator[Any]:
    for panel in dashboard.panels or []:
        yield panel
        yield from getattr(panel, "panels", None) or []


def _other_dashboards() -> build.DashboardLink:
    return (
        build.DashboardLink("Flask usage")
        .type(made.DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .include_vars(True)
        .keep_time(True)
    )
