"""The dashboards ask a real Prometheus about the demo's shop: each panel has data, the right one.

What is right is told by the stored records, which know nothing of Prometheus.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from dashboard_shop import A_WEEK_AGO_PER_SECOND, SENT, Live, visited_shop
from helpers.dashboards import DASHBOARDS, chosen, panels, substituted, targets, variables

from flask_usage_metrics import UsageRecord
from flask_usage_metrics.records.summary import BUCKETS

pytestmark = pytest.mark.servers

OVERVIEW, AUDIENCE, ENDPOINT = (f"flask-usage-{it}" for it in ("overview", "audience", "endpoint"))

Chosen = str | list[str]
Numbers = dict[str, float]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with visited_shop(tmp_path_factory.mktemp("live")) as live:
        yield live


def values_of(uid: str, **values: Chosen) -> dict[str, str]:
    """Return what is chosen: the endpoint where most goes wrong, if it must be one."""
    one = {"endpoint": "shop.checkout"} if uid == ENDPOINT else {}
    return chosen(DASHBOARDS[uid], **{**one, **values})


def panel_of(uid: str, title: str) -> dict[str, Any]:
    (panel,) = (panel for panel in panels(DASHBOARDS[uid]) if panel["title"] == title)
    return panel


def titles_of(panel: dict[str, Any]) -> dict[str, str]:
    """Return the titles of a table's fields by their names, from left to right."""
    (options,) = (it["options"] for it in panel["transformations"] if it["id"] == "organize")
    renamed: dict[str, str] = options["renameByName"]
    return {name: renamed[name] for name in sorted(renamed, key=options["indexByName"].get)}


def labels_of(panel: dict[str, Any]) -> list[str]:
    """Return the labels that tell the rows of a table apart, the leftmost first."""
    return [name for name in titles_of(panel) if not name.startswith("Value")]


def last(series: dict[str, Any]) -> float:
    return float(series["values"][-1][1])


def drawn(live: Live, uid: str, title: str, **values: Chosen) -> Numbers:
    """Return the last value of each line, bar or number of a panel, by its name."""
    found: Numbers = {}
    for target in targets(panel_of(uid, title)):
        for series in live.series(target, values_of(uid, **values)):
            name = target["legendFormat"]
            for label, value in series["metric"].items():
                name = name.replace(f"{{{{{label}}}}}", value)
            assert name not in found, f"{title}: two of the name {name}"
            found[name] = last(series)
    return found


def number(live: Live, uid: str, title: str, **values: Chosen) -> float:
    (value,) = drawn(live, uid, title, **values).values()
    return value


def table(live: Live, uid: str, title: str) -> dict[tuple[str, ...], Numbers]:
    """Return the numbers of a table by the title of their column, by what stands left of them."""
    panel = panel_of(uid, title)
    titles, labels = titles_of(panel), labels_of(panel)
    rows: dict[tuple[str, ...], Numbers] = {}
    for target in targets(panel):
        field = f"Value #{target['refId']}" if len(targets(panel)) > 1 else "Value"
        for series in live.series(target, values_of(uid)):
            row = tuple(series["metric"][label] for label in labels)
            rows.setdefault(row, {})[titles.get(field, field)] = last(series)
    return rows


def endpoint(record: UsageRecord) -> str:
    return record.endpoint or "__unmatched__"


def country(record: UsageRecord) -> str:
    return record.country or "ZZ"


def grouped(
    records: list[UsageRecord], key: Callable[[UsageRecord], str]
) -> dict[str, list[UsageRecord]]:
    groups: dict[str, list[UsageRecord]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def share(records: list[UsageRecord], status: str) -> float:
    return sum(bool(re.match(status, str(it.status))) for it in records) / len(records)


def seconds(records: list[UsageRecord]) -> float:
    return sum(record.duration_seconds for record in records)


@pytest.mark.parametrize("which", ["all", "some"])
@pytest.mark.parametrize("uid", DASHBOARDS)
def test_every_query_has_data_with_the_labels_it_is_drawn_by(
    live: Live, uid: str, which: str
) -> None:
    some: dict[str, Chosen] = {
        "job": "shop",
        "instance": [live.instance],
        "endpoint": ["shop.checkout"],
        "country": ["US", "DE", "GB"],
    }
    values = values_of(uid, **(some if which == "some" else {}))
    problems = []
    for panel in panels(DASHBOARDS[uid]):
        for target in targets(panel):
            found = live.series(target, values)
            finite = sum(math.isfinite(float(v)) for it in found for _, v in it["values"])
            names = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            if target["format"] == "table":
                names = set(labels_of(panel))
            if not finite or any(series["metric"].keys() != names for series in found):
                labels = {tuple(series["metric"]) for series in found}
                problems.append((panel["title"], target["refId"], finite, labels, names))
    assert problems == []


@pytest.mark.parametrize("uid", DASHBOARDS)
def test_marks_what_began(live: Live, uid: str) -> None:
    alerts, versions = (
        live.ask("query", query=substituted(it["expr"], values_of(uid)), time=live.end)["result"]
        for it in DASHBOARDS[uid]["annotations"]["list"]
    )
    assert alerts == []  # there are no rules
    assert [it["metric"].keys() for it in versions] == [{"version"}]


@pytest.mark.parametrize("uid", DASHBOARDS)
def test_exemplars_lead_to_a_trace(live: Live, uid: str) -> None:
    asking = [
        (panel["title"], substituted(target["expr"], values_of(uid)))
        for panel in panels(DASHBOARDS[uid])
        for target in targets(panel)
        if target.get("exemplar")
    ]
    has_some = {"Latency", "Latency heatmap"} if uid != AUDIENCE else set()
    assert {title for title, _ in asking} == has_some
    traces = {record.trace_id for record in live.records}
    for title, expression in asking:
        found = live.prometheus.query_exemplars(expression)
        known = {it["labels"]["trace_id"] for series in found for it in series["exemplars"]}
        assert known & traces, title


@pytest.mark.parametrize("uid", DASHBOARDS)
def test_there_is_to_choose_what_there_is(live: Live, uid: str) -> None:
    offered = {}
    for name, variable in variables(DASHBOARDS[uid]).items():
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
            assert asked is not None
            selector = substituted(asked[1], values_of(uid))
            # Grafana asks about the range that is looked at.
            span = {"start": live.end - live.range_seconds, "end": live.end}
            path = f"label/{asked[2]}/values"
            offered[name] = set(live.ask(path, **span, **{"match[]": selector}))
    assert offered == {
        "job": {"shop"},
        "instance": {live.instance},
        "endpoint": {endpoint(record) for record in live.records},
        "country": {country(record) for record in live.records},
    }


class TestNumbers:
    """They are those of the records."""

    def test_requests(self, live: Live) -> None:
        sent = pytest.approx(SENT * live.stretch)
        assert number(live, AUDIENCE, "Requests") == sent
        rate = number(live, OVERVIEW, "Requests per second")
        assert rate * live.range_seconds == sent
        statuses = Counter(str(record.status) for record in live.records)
        assert len(statuses) >= 6
        assert drawn(live, OVERVIEW, "Requests by status") == pytest.approx(
            {it: count * live.stretch / live.range_seconds for it, count in statuses.items()}
        )

    def test_errors(self, live: Live) -> None:
        five, four = (share(live.records, str(it)) for it in (5, 4))
        assert five > 0
        assert number(live, OVERVIEW, "Server errors") == pytest.approx(five)
        assert drawn(live, OVERVIEW, "Error ratio") == pytest.approx({"5xx": five, "4xx": four})

    @pytest.mark.parametrize("uid", [OVERVIEW, ENDPOINT])
    def test_no_errors_are_0(self, live: Live, uid: str) -> None:
        at_home = {"endpoint": "shop.home", "country": ["NL", "FR"]}
        assert number(live, uid, "Server errors", **at_home) == 0
        assert drawn(live, uid, "Error ratio", **at_home) == {"5xx": 0, "4xx": 0}

    def test_of_what_is_chosen(self, live: Live) -> None:
        countries = ["DE", "US"]
        of_both = [it for it in live.records if it.country in countries]
        given = {"endpoint": ["shop.product", "shop.checkout"], "country": countries}
        of_these = [it for it in of_both if it.endpoint in given["endpoint"]]
        for values, records in ({"country": countries}, of_both), (given, of_these):
            expected = pytest.approx(len(records) * live.stretch)
            assert number(live, AUDIENCE, "Requests", **values) == expected

    @pytest.mark.parametrize("uid", [AUDIENCE, ENDPOINT])
    def test_by_country(self, live: Live, uid: str) -> None:
        records = [it for it in live.records if uid == AUDIENCE or it.endpoint == "shop.checkout"]
        by_country = grouped(records, country)
        assert len(by_country) > 10
        found = table(live, uid, "Countries")
        assert {row: (it["Requests"], it["5xx"]) for row, it in found.items()} == {
            (country,): pytest.approx((len(of_it) * live.stretch, share(of_it, "5")))
            for country, of_it in by_country.items()
        }
        assert all(0 < row["p95"] <= 10 for row in found.values())

    def test_on_the_map_is_whose_country_is_known(self, live: Live) -> None:
        beside = table(live, AUDIENCE, "Countries")
        on_the_map = table(live, AUDIENCE, "Requests by country")
        assert ("ZZ",) in beside
        assert on_the_map == {
            row: {"Requests": numbers["Requests"]}
            for row, numbers in beside.items()
            if row != ("ZZ",)
        }
        assert number(live, AUDIENCE, "Countries seen") == len(on_the_map)
        unknown = sum(record.country is None for record in live.records)
        assert number(live, AUDIENCE, "Unknown country") == pytest.approx(unknown / SENT)

    def test_by_endpoint(self, live: Live) -> None:
        by_endpoint = grouped(live.records, endpoint)
        found = table(live, OVERVIEW, "Endpoints")
        per_second = live.stretch / live.range_seconds
        assert found == {
            (name,): {
                "Requests": pytest.approx(len(records) * live.stretch),
                "5xx": pytest.approx(share(records, "5")),
                "p50": found[name,]["p50"],  # see below
                "p95": found[name,]["p95"],
                "Busy": pytest.approx(seconds(records) * per_second, rel=1e-3),
                "Sent": pytest.approx(sum(it.bytes_sent for it in records) * live.stretch),
            }
            for name, records in by_endpoint.items()
        }
        bars = drawn(live, OVERVIEW, "Where the time goes")
        assert [*bars.values()] == sorted(bars.values(), reverse=True)
        assert bars == {name: row["Busy"] for (name,), row in found.items()}
        slow = sorted(found, key=lambda row: -found[row]["p95"])[:5]
        assert drawn(live, OVERVIEW, "Slowest endpoints").keys() == {name for (name,) in slow}

    @pytest.mark.parametrize(("column", "of_all"), [("p50", 0.5), ("p95", 0.95)])
    def test_quantiles(self, live: Live, column: str, of_all: float) -> None:
        """They lie in the bucket where they are to lie, or at most in that of the next request."""

        def bucket(seconds: float) -> tuple[float, float]:
            (found,) = (it for it in pairwise([0, *BUCKETS, math.inf]) if it[0] < seconds <= it[1])
            return found

        by_endpoint = grouped(live.records, endpoint)
        for (name,), row in table(live, OVERVIEW, "Endpoints").items():
            taken = sorted(record.duration_seconds for record in by_endpoint[name])
            rank = of_all * len(taken)
            low, _ = bucket(taken[math.ceil(rank) - 1])
            _, high = bucket(taken[min(math.floor(rank), len(taken) - 1)])
            assert low <= row[column] <= high, name

    def test_endpoints_by_country(self, live: Live) -> None:
        counts = Counter((endpoint(record), country(record)) for record in live.records)
        found = table(live, AUDIENCE, "Endpoints by country")
        assert found == {row: {"Value": pytest.approx(counts[row] * live.stretch)} for row in found}
        assert len(found) == min(100, len(counts))
        left_out = [count for row, count in counts.items() if row not in found]
        assert max(left_out, default=0) <= min(counts[row] for row in found)

    def test_exceptions(self, live: Live) -> None:
        raised = sum(record.status == 500 for record in live.records)
        assert raised > 0
        times = {"Times": pytest.approx(raised * live.stretch)}
        row = ("shop.checkout", "ZeroDivisionError")
        assert table(live, OVERVIEW, "Unhandled exceptions") == {row: times}
        assert table(live, ENDPOINT, "Unhandled exceptions") == {row[1:]: times}

    def test_objectives(self, live: Live) -> None:
        slow = sum(record.duration_seconds > 0.05 for record in live.records)
        bad = {"availability": share(live.records, "5"), "latency": slow / SENT}
        goals = {"availability": 0.99, "latency": 0.95}
        assert table(live, OVERVIEW, "Objectives") == {
            (slo, "shop"): {
                "Goal": goal,
                "Good": pytest.approx(1 - bad[slo], rel=1e-3),
                "Bad requests": pytest.approx(bad[slo] * SENT * live.stretch, rel=1e-3),
            }
            for slo, goal in goals.items()
        }
        burnt = {f"{slo} (shop)": bad[slo] / (1 - goal) for slo, goal in goals.items()}
        assert drawn(live, OVERVIEW, "Burn rate") == pytest.approx(burnt, rel=1e-3)
        left = drawn(live, OVERVIEW, "Error budget left")
        spent = {name: 1 - value for name, value in left.items()}
        assert spent == pytest.approx(burnt, rel=1e-3)

    def test_who(self, live: Live) -> None:
        kinds = Counter(record.client for record in live.records)
        ai = {kind: count for kind, count in kinds.items() if kind.startswith("ai-")}
        assert len(ai) >= 2
        bots = 1 - kinds["human"] / SENT
        assert number(live, AUDIENCE, "Bots") == pytest.approx(bots)
        crawled = sum(ai.values()) * live.stretch
        assert number(live, AUDIENCE, "AI crawlers") == pytest.approx(crawled)
        per_second = live.stretch / live.range_seconds
        for title, expected in ("Kinds of client", kinds), ("AI crawlers by kind", ai):
            assert drawn(live, AUDIENCE, title) == pytest.approx(
                {kind: count * per_second for kind, count in expected.items()}
            )
        # The second time they were the same visitors.
        visitors = {record.visitor for record in live.records}
        assert number(live, AUDIENCE, "Visitors today") == len(visitors)

    def test_api_clients(self, live: Live) -> None:
        named = [record for record in live.records if record.consumer is not None]
        by_consumer = grouped(named, lambda record: str(record.consumer))
        assert by_consumer.keys() == {"partner", "nobody"}
        assert table(live, AUDIENCE, "API clients") == {
            (consumer,): {
                "Requests": pytest.approx(len(records) * live.stretch),
                "4xx": pytest.approx(share(records, "4")),
                "5xx": 0,
            }
            for consumer, records in by_consumer.items()
        }

    def test_one_endpoint(self, live: Live) -> None:
        records = [record for record in live.records if record.endpoint == "shop.checkout"]
        assert number(live, ENDPOINT, "Requests in range") == pytest.approx(
            len(records) * live.stretch
        )
        assert number(live, ENDPOINT, "Share of all requests") == pytest.approx(len(records) / SENT)
        assert number(live, ENDPOINT, "Share of all time") == pytest.approx(
            seconds(records) / seconds(live.records), rel=1e-3
        )
        sent = sum(record.bytes_sent for record in records) / len(records)
        received = sum(record.bytes_received or 0 for record in records) / len(records)
        assert drawn(live, ENDPOINT, "Bytes per request") == pytest.approx(
            {"sent": sent, "received": received}
        )
        answers = Counter((str(record.status), record.method) for record in records)
        assert table(live, ENDPOINT, "Answers") == {
            row: {"Requests": pytest.approx(count * live.stretch)} for row, count in answers.items()
        }

    def test_a_week_ago(self, live: Live) -> None:
        both = drawn(live, OVERVIEW, "Now and a week ago")
        assert both["a week ago"] == pytest.approx(A_WEEK_AGO_PER_SECOND, rel=0.01)
        assert both["now"] == number(live, OVERVIEW, "Requests per second")

    def test_faults(self, live: Live) -> None:
        unnamed = sum(record.path == "/.env" for record in live.records)
        assert unnamed > 0
        assert drawn(live, OVERVIEW, "Faults")["consumer"] == pytest.approx(unnamed * live.stretch)


def test_nobody_there_is_neither_an_error_nor_perfect(live: Live) -> None:
    """Where there are no requests there is no share of errors, and no budget was spent."""
    idle = live._replace(end=live.idle, range_seconds=3)
    assert number(idle, AUDIENCE, "Requests") == 0
    for title in ("Server errors", "Error ratio", "p95 latency", "Latency", "Where the time goes"):
        assert drawn(idle, OVERVIEW, title) == {}, title
    for title in ("Endpoints", "Unhandled exceptions"):
        assert table(idle, OVERVIEW, title) == {}, title
    assert set(drawn(idle, OVERVIEW, "Burn rate").values()) == {0.0}
    assert set(drawn(idle, OVERVIEW, "Error budget left").values()) == {1.0}


@pytest.mark.parametrize("uid", DASHBOARDS)
def test_where_nothing_is_measured_nothing_is_claimed(live: Live, uid: str) -> None:
    """Without an objective, a visitor, a consumer there is no number but 0."""
    values = values_of(uid, job="another")
    for panel in panels(DASHBOARDS[uid]):
        for target in targets(panel):
            found = {last(series) for series in live.series(target, values)}
            assert found <= {0.0}, panel["title"]
