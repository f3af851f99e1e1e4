"""Declared objectives: every request is good or bad, once, as the histogram has it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from flask import Blueprint, Flask, Response, abort, request
from helpers.front_door import Site
from helpers.process import until
from helpers.servers import Gunicorn
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from flask_usage_metrics import ConfigError, TrackUsage
from flask_usage_metrics.extension.settings import read

OBJECTIVES = {"availability": 0.999, "latency": (0.99, 0.05)}


def events(site: Site) -> dict[tuple[str, str], float]:
    found = site.samples("flask_usage_slo_events_total")
    return {(dict(key)["slo"], dict(key)["result"]): value for key, value in found.items()}


def test_nothing_is_declared_unless_the_app_does(site: Site) -> None:
    site.get("/nowhere")
    assert events(site) == {}
    assert site.samples("flask_usage_slo_objective_ratio") == {}


def test_both_results_are_there_from_the_start(make_site: Callable[..., Site]) -> None:
    site = make_site(SLO=OBJECTIVES)
    assert events(site) == {
        ("availability", "good"): 0,
        ("availability", "bad"): 0,
        ("latency", "good"): 0,
        ("latency", "bad"): 0,
    }
    assert site.samples("flask_usage_slo_objective_ratio") == {
        (("slo", "availability"),): 0.999,
        (("slo", "latency"),): 0.99,
    }


def test_only_5xx_is_bad_availability(make_site: Callable[..., Site]) -> None:
    site = make_site(SLO={"availability": 0.9}, TESTING=False)
    site.app.add_url_rule("/<int:status>", "view", lambda status: ("", status))
    site.app.add_url_rule("/abort", "fails", lambda: abort(503))

    @site.app.get("/crash")
    def crash() -> str:
        raise ValueError

    for path in ("/200", "/302", "/404", "/429", "/499", "/700", "/nowhere"):
        site.get(path)
    for path in ("/500", "/599", "/abort", "/crash"):
        site.get(path)
    assert events(site) == {("availability", "good"): 7, ("availability", "bad"): 4}


def test_latency_is_what_the_histograms_bucket_says(make_site: Callable[..., Site]) -> None:
    site = make_site(SLO={"fast": (0.9, 0.025), "slow": (0.9, 0.075)})
    rng = random.Random(7)
    seconds = cycle([0, 0.01, 0.03, 0.05, 0.08])  # on both sides of each bound

    @site.app.get("/")
    def view() -> tuple[str, int]:
        time.sleep(next(seconds))
        return "", rng.choice([200, 500])

    for _ in range(40):
        site.get()
    buckets: dict[str, float] = {}
    for key, value in site.samples("flask_usage_request_duration_seconds_bucket").items():
        bound = dict(key)["le"]
        buckets[bound] = buckets.get(bound, 0) + value
    assert 0 < buckets["0.025"] < 40
    assert events(site) == {
        ("fast", "good"): buckets["0.025"],
        ("fast", "bad"): 40 - buckets["0.025"],
        ("slow", "good"): buckets["0.075"],
        ("slow", "bad"): 40 - buckets["0.075"],
    }


def test_the_workers_events_are_added_up_and_a_kill_takes_none_away(tmp_path: Path) -> None:
    app = """
import os
from flask import Flask
from flask_usage_metrics import TrackUsage

app = Flask("shop")
app.config.update(TRACK_USAGE_STATE_DIR="state", TRACK_USAGE_SLO={"availability": 0.9})
TrackUsage(app, "sqlite:///usage.sqlite3")
app.add_url_rule("/pid", "pid", lambda: str(os.getpid()))
"""

    def counted() -> tuple[float, float, float]:
        """Return the good events, the bad ones, and all requests."""
        values = {
            (sample.name, sample.labels.get("result")): sample.value
            for family in text_string_to_metric_families(server.get("/metrics"))
            for sample in family.samples
        }
        events = "flask_usage_slo_events_total"
        requests = values["flask_usage_requests_total", None]
        return values[events, "good"], values[events, "bad"], requests

    with Gunicorn(tmp_path, "-w", "2", app=app) as server:
        answers = [server.get() for _ in range(40)]
        while len(set(answers)) < 2:  # which of the workers does is up to the system
            answers.append(server.get())
        *_, victim = (pid for pid in answers if pid != answers[-1])
        server.kill(int(victim))
        answers += [server.get() for _ in range(10)]
        # Those of the dead worker are recovered by the other.
        until(counted, (len(answers), 0, len(answers)), 60)


@pytest.mark.parametrize(
    "wrong",
    [
        0.999,
        "0.999",
        ["availability"],
        {"availability": 1},
        {"availability": 0},
        {"availability": 99.9},
        {"availability": True},
        {"availability": None},
        {"availability": "most"},
        {"latency": (0.99,)},
        {"latency": (0.99, 0.5, 1)},
        {"latency": (0.99, 0)},
        {"latency": (0.99, float("nan"))},
        {"latency": (0.99, float("inf"))},
        {"latency": {"seconds": 0.5}},
        {"latency": {"ratio": 99, "seconds": 0.5}},
        {"latency": {"ratio": 0.99, "seconds": -1}},
        {"latency": {"ratio": 0.99, "endpoints": [7]}},
        {"latency": {"ratio": 0.99, "endpoints": [""]}},
        {"latency": {"ratio": 0.99, "exclude": None}},
        {"latency": None},
        {"": 0.9},
        {"two words": 0.9},
        {"x" * 65: 0.9},
        {5: 0.9},
    ],
)
def test_what_cannot_be_meant_is_an_error_at_set_up(wrong: Any) -> None:
    app = Flask("shop")
    app.config["TRACK_USAGE_SLO"] = wrong
    with pytest.raises(ConfigError, match=r"^TRACK_USAGE_SLO must be a dict of ratios"):
        TrackUsage(app, [], registry=CollectorRegistry())


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"endpoints": []}, "is about no request: it leaves out all its endpoints (none)"),
        ({"exclude": ["*"]}, "is about no request: it leaves out all its endpoints (*)"),
        (
            {"endpoints": ["shop.cart", "shop.*"], "exclude": "shop.*"},
            "is about no request: it leaves out all its endpoints (shop.cart, shop.*)",
        ),
        ({"endpoint": ["a"]}, "has an unknown key 'endpoint': expected ratio, seconds, endpoints"),
    ],
)
def test_an_objective_that_is_about_nothing_is_told_by_its_name(
    told: dict[str, Any], message: str
) -> None:
    app = Flask("shop")
    app.config["TRACK_USAGE_SLO"] = {"fine": 0.9, "quick": {"ratio": 0.9, **told}}
    with pytest.raises(ConfigError) as raised:
        TrackUsage(app, [], registry=CollectorRegistry())
    assert str(raised.value).startswith(f"TRACK_USAGE_SLO: the objective 'quick' {message}")


def test_an_objective_is_about_the_endpoints_it_names(make_site: Callable[..., Site]) -> None:
    among = {"ratio": 0.9, "endpoints": ["shop.*", "index"], "exclude": ["shop.admin.*"]}
    site = make_site(
        SLO={
            "all": 0.9,
            "shop": among,
            "quick": {**among, "seconds": 5},
            "others": {"ratio": 0.9, "exclude": "shop.*"},
        },
        TESTING=False,
    )
    shop, admin = Blueprint("shop", "shop"), Blueprint("admin", "admin")
    places = {"index": site.app, "cart": shop, "list": admin, "shopping": site.app}
    for name, place in places.items():
        place.add_url_rule(f"/{name}", name, lambda: ("", 500))
    shop.register_blueprint(admin)
    site.app.register_blueprint(shop)
    for path in ("/index", "/cart", "/list", "/shopping", "/nowhere"):
        site.get(path)
    assert events(site) == {
        ("all", "good"): 1,
        ("all", "bad"): 4,
        ("shop", "good"): 0,
        ("shop", "bad"): 2,
        ("quick", "good"): 2,
        ("quick", "bad"): 0,
        ("others", "good"): 1,
        ("others", "bad"): 2,
    }


def test_a_stream_is_as_quick_as_its_first_byte(make_site: Callable[..., Site]) -> None:
    site = make_site(SLO={"quick": (0.9, 0.15)})
    waits: list[float] = []

    @site.app.get("/")
    def stream() -> Response:
        first, then = waits

        def chunks() -> Iterator[bytes]:
            time.sleep(first)
            yield b"1234"
            time.sleep(then)
            yield b"5678"

        return Response(chunks(), headers={"Content-Length": "8"} if "l" in request.args else {})

    for waits[:] in ([0.0, 0.2], [0.2, 0.0]):
        for path in ("/", "/?l"):
            assert site.get(path).data == b"12345678"
    assert events(site) == {("quick", "good"): 2, ("quick", "bad"): 2}
    quick, late = site.records()[:2], site.records()[2:]
    assert all(0 < (one.first_byte_seconds or 0) < 0.15 for one in quick)
    assert all(0.2 <= (one.first_byte_seconds or 0) <= one.duration_seconds for one in late)
    assert all(one.duration_seconds >= 0.2 for one in (*quick, *late))
    (summary,) = site.usage.storage.summarize(())
    assert (summary.requests, summary.streams) == (4, 4)
    firsts = sum(one.first_byte_seconds or 0 for one in (*quick, *late))
    assert summary.first_byte_seconds_sum == pytest.approx(firsts)


def test_it_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASK_TRACK_USAGE_SLO", '{"availability": "0.999", "latency": [0.99, 0.5]}')
    app = Flask("shop")
    app.config.from_prefixed_env()
    found = read(app.config).shape.objectives
    assert [(one.name, one.ratio, one.seconds) for one in found] == [
        ("availability", 0.999, None),
        ("latency", 0.99, 0.5),
    ]


def test_apps_on_one_registry_agree_on_them() -> None:
    registry = CollectorRegistry()
    TrackUsage(Flask("shop"), [], registry=registry)
    other = Flask("other")
    other.config["TRACK_USAGE_SLO"] = {"availability": 0.9}
    with pytest.raises(ConfigError, match="TRACK_USAGE_SLO"):
        TrackUsage(other, [], registry=registry)
