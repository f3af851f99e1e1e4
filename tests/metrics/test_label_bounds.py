"""Labels are bounded and clean, and records keep the real values."""

from __future__ import annotations

from collections.abc import Callable

from flask import Response
from helpers.front_door import Site
from helpers.records import make_record

from flask_usage_metrics.metrics.shape import Shape
from flask_usage_metrics.metrics.totals import Totals


def test_a_full_table_folds_country_first_then_endpoint(make_site: Callable[..., Site]) -> None:
    valid = ["AE", "AL", "AR", "AT", "BE", "BR", "BS", "CL", "CR", "CZ", "DE", "EE", "ES"]
    turn = iter(valid * 20)
    site = make_site(country=lambda _address: next(turn), MAX_SERIES=10)
    for number in range(4):
        site.app.add_url_rule(f"/{number}", f"view{number}", lambda: "x")
    for request in range(26):
        site.get(f"/{request % 4}", environ_base={"REMOTE_ADDR": f"203.0.113.{request}"})
        site.scrape()
    counted = site.counted()
    assert sum(counted.values()) == 26
    exact = [key for key in counted if key[3] != "__other__"]
    folded = [key for key in counted if key[3] == "__other__"]
    assert len(exact) == 10
    # One more than the bound is kept by endpoint; the others are folded altogether.
    assert len(folded) == 2
    assert {key[1] for key in folded} >= {"__other__"}
    overflow = {key[0][1]: n for key, n in site.samples("flask_usage_label_overflow_total").items()}
    assert overflow["country"] == 16
    assert 0 < overflow["endpoint"] < 16
    # The raw records keep the real values.
    assert len({record.country for record in site.records()}) == 13
    observed = site.samples("flask_usage_request_duration_seconds_count")
    assert sum(observed.values()) == 26


def test_junk_methods_and_statuses_are_one_series(site: Site) -> None:
    @site.app.route("/<int:status>", methods=["GET", "BREW", "PATCH"])
    def view(status: int) -> Response:
        return Response("", status=status)

    for status in (99, 600, 777, 999):
        site.get(f"/{status}")
    for method in ("PATCH", "BREW", "STEEP", "POUR"):  # the rule names two of these
        site.request("/200", method=method)
    assert site.counted() == {
        ("GET", "view", "_OTHER", "ZZ"): 4,
        ("PATCH", "view", "200", "ZZ"): 1,
        ("BREW", "view", "200", "ZZ"): 1,
        ("_OTHER", "__unmatched__", "405", "ZZ"): 2,
    }


def test_a_lone_surrogate_in_an_endpoint_does_not_break_a_scrape(site: Site) -> None:
    site.app.add_url_rule("/", "a\udcffb", lambda: "x")
    site.get()
    assert site.counted() == {("GET", "a\\udcffb", "200", "ZZ"): 1}


def test_exceptions_are_bounded(make_site: Callable[..., Site]) -> None:
    site = make_site(MAX_SERIES=5)

    @site.app.get("/<name>")
    def view(name: str) -> str:
        raise type(name, (Exception,), {})

    for number in range(20):
        site.get(f"/E{number}")
    found = site.samples("flask_usage_exceptions_total")
    assert len(found) == 6
    assert sum(found.values()) == 20


def test_junk_methods_are_not_remembered() -> None:
    totals = Totals(Shape(max_series=50), "1")
    totals.add([make_record(method=f"JUNK{number}") for number in range(1000)], {})
    totals.add([make_record(country=f"{number:02}") for number in range(1000)], {})
    assert len(totals._counts._labels.known) == 49
    assert sum(value for _, value in totals.families()[0].samples) == 2000
