"""Methods that the app's rules name are told apart; all others are one, however many come."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from datetime import datetime, timedelta, timezone

import pytest
from flask import Flask
from helpers.front_door import Site
from werkzeug.routing import Rule

from flask_usage_metrics.extension.methods import methods_of

NAMED = ["GET", "PROPFIND", "QUERY", "purge", "X-ODD"]


def methods(site: Site) -> dict[str, float]:
    """Return the requests by the label."""
    found: dict[str, float] = {}
    for (method, *_), value in site.counted().items():
        found[method] = found.get(method, 0) + value
    return found


@pytest.mark.parametrize("storage", [None, "jsonl"])
def test_the_apps_own_are_labels_and_groups(
    make_site: Callable[..., Site], tmp_path: object, storage: str | None
) -> None:
    site = make_site(None if storage is None else f"jsonl:///{tmp_path}/usage.jsonl")
    site.app.add_url_rule("/", "index", lambda: "x", methods=NAMED)
    for method in ("GET", "PROPFIND", "QUERY", "PURGE", "purge", "X-ODD", "BREW", "brew", "X'--"):
        site.request("/", method=method)
    site.request("/nowhere", method="PROPFIND")
    expected = {"GET": 1, "PROPFIND": 2, "QUERY": 1, "PURGE": 2, "X-ODD": 1, "_OTHER": 3}
    assert methods(site) == expected
    assert site.usage.flush()
    grouped = site.usage.storage.summarize(("method",))
    assert {one.group["method"]: one.requests for one in grouped} == expected
    assert site.usage.storage.count(method="PROPFIND") == 2
    assert {record.method for record in site.records()} == {*expected, "BREW", "X'--"} - {"_OTHER"}


def test_they_stay_apart_in_the_sums_of_days(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.app.add_url_rule("/", "index", lambda: "x", methods=NAMED)
    for method in ("GET", "PROPFIND", "BREW"):
        site.request("/", method=method)
    storage = site.usage.storage
    site.records()
    later = datetime.now(timezone.utc) + timedelta(days=3)
    while storage.maintain(timedelta(days=1), later) < 1:
        pass
    assert storage.count() == 0
    (one,) = storage.summarize(("method",), method="GET")
    assert one.rolled_up
    grouped = {one.group["method"]: one.requests for one in storage.summarize(("method",))}
    assert grouped == {"GET": 1, "PROPFIND": 1, "_OTHER": 1}


def test_lower_case_is_what_flask_takes_it_for(site: Site) -> None:
    site.app.add_url_rule("/", "index", lambda: "x")
    assert site.wsgi(method="get") == (b"x", "200 OK")
    assert site.counted() == {("GET", "index", "200", "ZZ"): 1}
    assert site.only_record().method == "GET"
    site.assert_agrees()


def test_a_rule_for_any_method_lets_strangers_add_none(site: Site) -> None:
    site.app.url_map.add(Rule("/", endpoint="any"))
    site.app.view_functions["any"] = lambda: "x"
    for number in range(20):
        assert site.request("/", method=f"M{number}").status_code == 200
    assert methods(site) == {"_OTHER": 20}


def test_who_asks_for_them_does_not_keep_the_app() -> None:
    app = Flask("shop")
    app.add_url_rule("/", "index", methods=NAMED)
    known, app_ = methods_of(app), weakref.ref(app)
    assert {"PROPFIND", "PURGE", "DELETE"} < known()
    del app
    gc.collect()
    assert app_() is None
    assert "PROPFIND" not in known()
