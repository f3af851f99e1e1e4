"""The dashboards of grafana/dashboards, read as Grafana reads them: panels, queries, variables."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "grafana" / "dashboards"

DASHBOARDS: dict[str, dict[str, Any]] = {
    dashboard["uid"]: dashboard
    for dashboard in (json.loads(file.read_text()) for file in sorted(FOLDER.glob("*.json")))
}
"""By uid."""


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what shows something: panels, those in collapsed rows too, without the rows."""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            yield from panel["panels"]
        else:
            yield panel


def targets(panel: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the queries of a panel; none, if it asks nothing."""
    found: list[dict[str, Any]] = panel.get("targets", [])
    return found


def variables(dashboard: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the variables by name, in the order they are chosen in."""
    return {variable["name"]: variable for variable in dashboard["templating"]["list"]}


def chosen(dashboard: dict[str, Any], **values: str | Sequence[str]) -> dict[str, str]:
    """Return what Grafana puts into an expression for each variable.

    Args:
        values: What is chosen, as one value or several; the others are at "All".
    """
    texts = {}
    for name, variable in variables(dashboard).items():
        if variable["type"] != "query":
            continue
        if name not in values:
            assert variable["includeAll"], f"{name} has no All: choose a value"
            texts[name] = variable["allValue"]
            continue
        given = [values[name]] if isinstance(values[name], str) else values[name]
        if variable["multi"] or variable["includeAll"]:
            escaped = [re.sub(r"[$^*{}\[\]'+?.()|]", r"\\\\\g<0>", value) for value in given]
            texts[name] = escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"
        else:
            (value,) = given
            texts[name] = value.replace("\\", r"\\").replace('"', r"\"")
    return texts


def substituted(
    expression: str,
    values: dict[str, str],
    *,
    range_seconds: int = 3600,
    rate_interval: str = "1m",
) -> str:
    """Return an expression as Prometheus gets it.

    Args:
        values: What `chosen` returned.
        range_seconds: Length of the time range that is looked at.
        rate_interval: What Grafana makes of the data source's scrape interval and the range.
    """
    known = {
        "__rate_interval": rate_interval,
        "__range": f"{range_seconds}s",
        "__range_s": str(range_seconds),
        **values,
    }
    return re.sub(r"\$\{?(\w+)\}?", lambda found: known[found[1]], expression)
