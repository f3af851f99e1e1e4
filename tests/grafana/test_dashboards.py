"""The dashboards as files: they are what is built, import anywhere, and ask for what exists.

What Grafana's own linter demands is ported (grafana/dashboard-linter, commit 4d0844b): that is
in Go. Not its rules for Loki, which nothing here asks.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import promql_parser as promql
import pytest
from helpers.dashboards import DASHBOARDS, FOLDER, panels, substituted, targets, variables
from helpers.process import run

from flask_usage_metrics.metrics.names import DESCRIPTIONS, LABELS

Dashboard = dict[str, Any]

UIDS = ("flask-usage-overview", "flask-usage-audience", "flask-usage-endpoint")
CORE_PANELS = {"timeseries", "stat", "gauge", "bargauge", "table", "heatmap", "geomap", "alertlist"}
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
UNITS = {"short", "none", "percentunit", "s", "reqps", "wps", "cps", "bytes"}  # of the linter's

RANGE_SECONDS, RATE_INTERVAL_SECONDS = 7654321, 1234567  # nobody would write these by hand


class Asked(NamedTuple):
    """A part of an expression, and what it is within, the outermost first."""

    panel: str
    part: promql.Expr
    within: tuple[promql.Expr, ...]

    def calls(self) -> set[str]:
        return {outer.func.name for outer in self.within if isinstance(outer, promql.Call)}


def asked(dashboard: Dashboard) -> Iterator[Asked]:
    """Yield all parts of all expressions."""
    for panel in panels(dashboard):
        for target in targets(panel):
            for part, within in parts(target["expr"], dashboard):
                yield Asked(panel["title"], part, within)


def parts(
    expression: str, dashboard: Dashboard
) -> list[tuple[promql.Expr, tuple[promql.Expr, ...]]]:
    text = substituted(
        expression,
        {name: f"${name}" for name in variables(dashboard)},
        range_seconds=RANGE_SECONDS,
        rate_interval=f"{RATE_INTERVAL_SECONDS}s",
    )
    found: list[tuple[promql.Expr, tuple[promql.Expr, ...]]] = []
    around: list[promql.Expr] = []

    def enter(part: promql.Expr) -> None:
        found.append((part, tuple(around)))
        around.append(part)

    promql.walk(promql.parse(text), enter, lambda _: around.pop() and None)
    return found


def selectors(dashboard: Dashboard) -> Iterator[tuple[Asked, dict[str, str]]]:
    """Yield all selectors, with their matchers as they were written."""
    signs = {"Equal": "=", "NotEqual": "!=", "Re": "=~", "NotRe": "!~"}
    for found in asked(dashboard):
        if isinstance(found.part, promql.VectorSelector):
            matchers = found.part.matchers.matchers
            written = {m.name: signs[str(m.op).rpartition(".")[2]] + m.value for m in matchers}
            yield found, written


def template_datasource(dashboard: Dashboard) -> Iterator[str]:
    sources = [v for v in variables(dashboard).values() if v["type"] == "datasource"]
    found = [(source["name"], source["label"], source["query"]) for source in sources]
    if found != [("datasource", "Data source", "prometheus")]:
        yield f"data sources {found}"


def template_job_and_instance(dashboard: Dashboard) -> Iterator[str]:
    for name in ("job", "instance"):
        variable = variables(dashboard).get(name, {})
        keys = ("type", "datasource", "label", "multi", "allValue")
        if [variable.get(key) for key in keys] != ["query", SOURCE, name.title(), True, ".+"]:
            yield f"variable {name}"


def template_label_promql(dashboard: Dashboard) -> Iterator[str]:
    for name, variable in variables(dashboard).items():
        if variable["type"] == "query":
            query = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
            if query is None or not parts(query[1], dashboard):
                yield f"variable {name}: {variable['query']}"


def template_on_time_change_reload(dashboard: Dashboard) -> Iterator[str]:
    for name, variable in variables(dashboard).items():
        if variable["type"] == "query" and variable.get("refresh") != 2:
            yield f"variable {name}"


def panel_datasource(dashboard: Dashboard) -> Iterator[str]:
    for panel in panels(dashboard):
        if any(asks.get("datasource") != SOURCE for asks in (panel, *targets(panel))):
            yield panel["title"]


def panel_title_description(dashboard: Dashboard) -> Iterator[str]:
    for panel in panels(dashboard):
        if not panel.get("title") or not panel.get("description"):
            yield f"panel {panel['id']}: {panel.get('title')}"


def panel_units(dashboard: Dashboard) -> Iterator[str]:
    for panel in panels(dashboard):
        config = panel["fieldConfig"]
        changed = [
            p["value"] for o in config["overrides"] for p in o["properties"] if p["id"] == "unit"
        ]
        for unit in [config["defaults"].get("unit"), *changed]:
            if unit not in UNITS:
                yield f"{panel['title']}: unit {unit}"


def panel_no_targets(dashboard: Dashboard) -> Iterator[str]:
    for panel in panels(dashboard):
        if not targets(panel):
            yield panel["title"]


def target_promql(dashboard: Dashboard) -> Iterator[str]:
    for panel in panels(dashboard):
        for target in targets(panel):
            try:
                parts(target["expr"], dashboard)
            except (ValueError, KeyError) as error:
                yield f"{panel['title']} {target['refId']}: {error!r}"


def target_rate_interval(dashboard: Dashboard) -> Iterator[str]:
    """The linter lets increase have any range: one written by hand does not follow the picker."""
    for found in asked(dashboard):
        if isinstance(found.part, promql.MatrixSelector):
            seconds = found.part.range.total_seconds()
            right = (
                {RATE_INTERVAL_SECONDS}
                if found.calls() & {"rate", "irate"}
                else {RATE_INTERVAL_SECONDS, RANGE_SECONDS}
            )
            if seconds not in right or not found.calls():
                yield f"{found.panel}: [{seconds} s] in {found.calls()}"


def target_job_and_instance(dashboard: Dashboard) -> Iterator[str]:
    for found, matchers in selectors(dashboard):
        for label in ("job", "instance"):
            if matchers.get(label) != f"=~${label}":
                yield f"{found.panel}: {found.part.prettify()}"


def target_counter_agg(dashboard: Dashboard) -> Iterator[str]:
    for found, _ in selectors(dashboard):
        counter = re.search(r"_(total|bucket|sum|count)$", found.part.name or "")
        if counter and not found.calls() & {"rate", "irate", "increase"}:
            yield f"{found.panel}: {found.part.prettify()}"


def uneditable_dashboard(dashboard: Dashboard) -> Iterator[str]:
    if dashboard["editable"] is not False:
        yield "editable"


RULES: tuple[Callable[[Dashboard], Iterator[str]], ...] = (
    template_datasource,
    template_job_and_instance,
    template_label_promql,
    template_on_time_change_reload,
    panel_datasource,
    panel_title_description,
    panel_units,
    panel_no_targets,
    target_promql,
    target_rate_interval,
    target_job_and_instance,
    target_counter_agg,
    uneditable_dashboard,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__.replace("_", "-"))
@pytest.mark.parametrize("uid", UIDS)
def test_the_linter_finds_nothing(uid: str, rule: Callable[[Dashboard], Iterator[str]]) -> None:
    assert list(rule(DASHBOARDS[uid])) == []


@pytest.mark.skipif(sys.version_info < (3, 11), reason="grafana-foundation-sdk needs Python 3.11")
def test_the_files_are_what_the_build_makes() -> None:
    build = [sys.executable, FOLDER.parent / "build", "--check"]
    checked = run(*build)
    assert (checked.stdout, checked.returncode) == ("", 0)
    assert {file.stem for file in FOLDER.iterdir()} == set(UIDS)


@pytest.mark.parametrize("uid", UIDS)
class TestDashboard:
    def test_goes_anywhere(self, uid: str) -> None:
        """By hand, from a folder, through a sidecar: whatever the data source is called there."""
        dashboard = DASHBOARDS[uid]
        assert dashboard["uid"] == uid
        assert dashboard["schemaVersion"] == 39
        assert not dashboard.keys() & {"__inputs", "__requires", "__elements", "id", "version"}
        assert "${DS_" not in json.dumps(dashboard)
        assert {panel["type"] for panel in panels(dashboard)} <= CORE_PANELS

    def test_what_is_chosen(self, uid: str) -> None:
        chosen = variables(DASHBOARDS[uid])
        assert [*chosen] == ["datasource", "job", "instance", "endpoint", "country"]
        several = {name for name, variable in chosen.items() if variable["multi"]}
        one = {"endpoint"} if uid == "flask-usage-endpoint" else set()
        assert several == {"job", "instance", "endpoint", "country"} - one
        for name in several:
            assert chosen[name]["current"]["value"] == ["$__all"]

    def test_panels_lie_side_by_side(self, uid: str) -> None:
        """Without overlap, without a hole: each line of panels is 24 wide and of one height."""
        shown = [*DASHBOARDS[uid]["panels"]]
        shown += [panel for row in shown if row["type"] == "row" for panel in row["panels"]]
        assert len({panel["id"] for panel in shown}) == len(shown)
        titles = [panel["title"] for panel in panels(DASHBOARDS[uid])]
        assert len(set(titles)) == len(titles)
        cells: dict[tuple[int, int], str] = {}
        for panel in shown:
            place = panel["gridPos"]
            for x in range(place["x"], place["x"] + place["w"]):
                for y in range(place["y"], place["y"] + place["h"]):
                    assert (x, y) not in cells, f"{panel['title']} lies on {cells[x, y]}"
                    cells[x, y] = panel["title"]
        lowest = max(y for _, y in cells)
        assert cells.keys() == {(x, y) for x in range(24) for y in range(lowest + 1)}

    def test_every_panel_says_what_good_and_missing_are(self, uid: str) -> None:
        """Else Grafana paints what is 80 or more red, and says 'No data' where all is well."""
        for panel in panels(DASHBOARDS[uid]):
            defaults = panel["fieldConfig"]["defaults"]
            assert defaults["noValue"], panel["title"]
            values = [step["value"] for step in defaults["thresholds"]["steps"]]
            assert values[0] is None, panel["title"]
            assert values[1:] == sorted(values[1:]), panel["title"]

    def test_metrics_and_their_labels_exist(self, uid: str) -> None:
        labels = exposed()
        for found, matchers in selectors(DASHBOARDS[uid]):
            known = labels[found.part.name]
            grouped = {label for outer in found.within for label in group(outer)}
            wrong = (matchers.keys() | grouped) - known
            assert not wrong, f"{found.panel}: {found.part.name} has no {wrong}"

    def test_the_highest_are_chosen_once_and_not_at_each_step(self, uid: str) -> None:
        for panel in panels(DASHBOARDS[uid]):
            for target in targets(panel):
                if target.get("instant"):
                    continue
                for part, within in parts(target["expr"], DASHBOARDS[uid]):
                    if isinstance(part, promql.VectorSelector) and any(
                        str(getattr(outer, "op", "")) in ("topk", "bottomk") for outer in within
                    ):
                        assert str(part.at) == "@ end()", panel["title"]

    def test_links_lead_to_dashboards_there_are(self, uid: str) -> None:
        dashboard = DASHBOARDS[uid]
        (link,) = dashboard["links"]
        assert (link["type"], link["tags"]) == ("dashboards", ["flask-usage"])
        assert link["includeVars"] is link["keepTime"] is True
        assert dashboard["tags"] == ["flask-usage"]
        for url in re.findall(r'"url": "(/[^"]*)"', json.dumps(dashboard)):
            found = re.fullmatch(r"/d/([\w-]+)\?(.+)&\$\{__url_time_range\}", url)
            assert found is not None, url
            given = re.findall(r"\$\{(\w+):queryparam\}|var-(\w+)=", found[2])
            names = {name or other for name, other in given}
            assert names == variables(DASHBOARDS[found[1]]).keys(), url

    def test_each_endpoint_in_a_table_leads_to_its_dashboard(self, uid: str) -> None:
        for panel in panels(DASHBOARDS[uid]):
            if panel["type"] != "table":
                continue
            overrides = {
                override["matcher"]["options"]: override["properties"]
                for override in panel["fieldConfig"]["overrides"]
                if override["matcher"]["id"] == "byName"
            }
            titles = {title for _, title in renamed(panel)}
            for title in titles & {"Endpoint"}:
                side = "Endpoint\\Country" if "Country" in titles else title
                ((link,),) = [p["value"] for p in overrides[side] if p["id"] == "links"]
                assert link["url"].startswith(
                    "/d/flask-usage-endpoint?var-endpoint=${__value.raw}&"
                )

    def test_labels_can_be_renamed(self, uid: str) -> None:
        """They stand in expressions, in {{ }}, and as keys of what renames them; nowhere else."""
        dashboard = json.loads(json.dumps(DASHBOARDS[uid]))
        for panel in panels(dashboard):
            for target in targets(panel):
                del target["expr"], target["legendFormat"]
            for transformation in panel.get("transformations", []):
                if transformation["id"] == "organize":
                    options = transformation["options"]
                    options["renameByName"] = list(options["renameByName"].values())
                    options["indexByName"] = options["excludeByName"] = {}
        del dashboard["templating"], dashboard["annotations"]
        quoted = re.findall(r'"(\w+)"|\{\{(\w+)\}\}|labels\.(\w+)', json.dumps(dashboard))
        assert not {name for found in quoted for name in found} & {*LABELS, "job", "instance"}


def exposed() -> dict[str, set[str]]:
    """Return the labels each series has in Prometheus, by its name."""
    labels: dict[str, set[str]] = {}
    for described in DESCRIPTIONS:
        has = {*described.labels, "job", "instance"}
        if described.kind == "histogram":
            labels |= {f"{described.name}_{suffix}": has for suffix in ("sum", "count")}
            labels[f"{described.name}_bucket"] = has | {"le"}
        else:
            labels[described.name] = has
    return labels


def group(part: promql.Expr) -> list[str]:
    """Return the labels that an aggregation keeps, or that two sides are matched on."""
    modifier = getattr(part, "modifier", None)
    by = getattr(modifier, "matching", modifier)
    return by.labels if by is not None else []


def renamed(panel: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the fields of a table and their titles."""
    return [
        pair
        for transformation in panel["transformations"]
        if transformation["id"] == "organize"
        for pair in transformation["options"]["renameByName"].items()
    ]


def test_the_readme_says_what_each_panel_answers() -> None:
    readme = (FOLDER.parent / "README.md").read_text()
    for dashboard in DASHBOARDS.values():
        heading = dashboard["title"].partition(": ")[2].capitalize()
        section = readme.partition(f"\n### {heading}\n")[2].partition("\n#")[0]
        rows = re.findall(r"^\| (.+?) \| (.+) \|$", section, re.MULTILINE)
        assert rows == [
            (panel["title"], panel["description"])
            for panel in panels(dashboard)
            if panel["type"] != "row"
        ]
