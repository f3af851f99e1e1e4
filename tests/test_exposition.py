"""GET /metrics: formats, negotiation, filters, tokens, and the rest of the registry."""

from __future__ import annotations

import gzip
from collections.abc import Callable

import pytest
from flask import Flask
from front_door import Site, samples
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text
from werkzeug.test import Client

from flask_usage_metrics import ConfigError, TrackUsage
from flask_usage_metrics.exposition import prefers_openmetrics
from flask_usage_metrics.metrics import DESCRIPTIONS

PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;"
    "version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


@pytest.fixture
def visited(site: Site) -> Site:
    site.app.add_url_rule('/"<path:rest>', 'odd"end\\point\n', lambda rest: "x")
    site.app.add_url_rule("/", "index", lambda: "x")
    site.app.add_url_rule("/broken", "broken", lambda: 1 / 0)
    for path in ('/"a', "/", "/", "/nowhere", "/broken"):
        site.get(path)
    return site


def families(parsed: object) -> dict[str, tuple[str, str, set[object]]]:
    """Return what is in an exposition, without what changes from scrape to scrape."""
    return {
        family.name: (
            family.type,
            family.documentation,
            {
                (sample.name, tuple(sorted(sample.labels.items())), sample.value)
                for sample in family.samples
                if not sample.name.endswith("_created")
            },
        )
        for family in parsed
        if not family.name.endswith("_created")
    }


def test_our_encoder_says_what_client_python_says(visited: Site) -> None:
    theirs = generate_latest(visited.registry).decode()
    assert families(parse_text(visited.scrape())) == families(parse_text(theirs))
    assert len(families(parse_text(theirs))) == len(DESCRIPTIONS)


def test_both_formats_say_the_same(visited: Site) -> None:
    text = families(parse_text(visited.scrape()))
    openmetrics = visited.scrape(Accept=PROMETHEUS)
    assert openmetrics.endswith("# EOF\n")
    found = families(parse_openmetrics(openmetrics))
    assert {name.removesuffix("_total"): family for name, family in text.items()} == found


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "text"),
        ("*/*", "text"),
        (PROMETHEUS, "openmetrics"),
        ("application/openmetrics-text", "openmetrics"),
        ("application/openmetrics-text; version=0.0.1", "openmetrics"),
        ("application/openmetrics-text;version=abc", "text"),
        ("application/openmetrics-text;version=9.9.9", "text"),
        ("application/openmetrics-text;q=0", "text"),
        ("application/openmetrics-text;q=0.3,text/plain;q=0.5", "text"),
        ("application/openmetrics-text;q=abc", "text"),
        (";;;,,q=", "text"),
        ('"' * 5000, "text"),
    ],
)
def test_negotiation(site: Site, accept: str, expected: str) -> None:
    response = site.app.test_client().get("/metrics", headers={"Accept": accept})
    assert response.status_code == 200
    kinds = {
        "text": "text/plain; version=0.0.4; charset=utf-8",
        "openmetrics": "application/openmetrics-text; version=1.0.0; charset=utf-8",
    }
    assert response.headers["Content-Type"] == kinds[expected]


@given(st.text())
def test_no_accept_header_is_an_error(accept: str) -> None:
    assert prefers_openmetrics(accept) in (True, False)


def test_head_has_no_body(visited: Site) -> None:
    response = visited.app.test_client().head("/metrics")
    assert (response.status_code, response.data) == (200, b"")
    assert int(response.headers["Content-Length"]) > 1000


def test_gzip_when_accepted(visited: Site) -> None:
    client = visited.app.test_client()
    packed = client.get("/metrics", headers={"Accept-Encoding": "gzip"})
    assert packed.headers["Content-Encoding"] == "gzip"
    assert b"flask_usage_requests_total" in gzip.decompress(packed.data)
    for refused in ("", "identity", "gzip;q=0"):
        plain = client.get("/metrics", headers={"Accept-Encoding": refused})
        assert "Content-Encoding" not in plain.headers


@pytest.mark.parametrize("accept", ["text/plain", PROMETHEUS], ids=["text", "openmetrics"])
def test_only_the_samples_asked_for(visited: Site, accept: str) -> None:
    Counter("orders", "Orders.", registry=visited.registry).inc()
    Counter("refunds", "Refunds.", registry=visited.registry).inc()
    query = (
        "/metrics?name[]=flask_usage_requests_total&name[]=orders_total"
        "&name[]=flask_usage_request_duration_seconds_count"
    )
    response = visited.app.test_client().get(query, headers={"Accept": accept})
    names = {line.split("{")[0].split()[0] for line in response.text.splitlines() if line[0] != "#"}
    assert names == {
        "flask_usage_requests_total",
        "flask_usage_request_duration_seconds_count",
        "orders_total",
    }


def test_the_apps_own_metrics_come_along_once(visited: Site) -> None:
    Counter("orders", "Orders.", registry=visited.registry).inc(3)
    text = visited.scrape()
    assert samples(text, "orders_total") == {(): 3}
    assert text.count("# TYPE flask_usage_requests_total counter") == 1


def test_a_failing_collector_of_the_apps_own_hides_only_itself(visited: Site) -> None:
    bad = Counter("bad", "Bad.", ["word"], registry=visited.registry)
    bad.labels("\udcff").inc()
    assert "flask_usage_requests_total" in visited.scrape()
    assert visited.faults()["exposition"] >= 1


class TestToken:
    @pytest.fixture
    def guarded(self, make_site: Callable[..., Site]) -> Site:
        return make_site(METRICS_TOKEN="sécret")

    @pytest.mark.parametrize(
        "given", ["", "Bearer", "Bearer wrong", "Basic sécret", "sécret", "Bearer \xff"]
    )
    def test_refuses(self, guarded: Site, given: str) -> None:
        response = guarded.app.test_client().get(
            "/metrics", headers={"Authorization": given.encode().decode("latin-1")}
        )
        assert (response.status_code, response.data) == (401, b"")
        assert response.headers["WWW-Authenticate"] == "Bearer"

    def test_lets_in(self, make_site: Callable[..., Site]) -> None:
        site = make_site(METRICS_TOKEN="s3cret")
        client = site.app.test_client()
        for shown in ("Bearer s3cret", "bearer  s3cret"):
            assert client.get("/metrics", headers={"Authorization": shown}).status_code == 200


class TestPlace:
    def test_another_path(self, make_site: Callable[..., Site]) -> None:
        site = make_site(METRICS_PATH="/internal/metrics")
        assert site.app.test_client().get("/internal/metrics").status_code == 200
        assert site.get("/metrics").status_code == 404

    def test_no_route_but_a_wsgi_app(self, make_site: Callable[..., Site]) -> None:
        site = make_site(METRICS_PATH=None)
        assert site.get("/metrics").status_code == 404
        client = Client(site.usage.metrics_app())
        response = client.get("/whatever")
        assert samples(response.text, "flask_usage_requests_total") == {
            (
                ("country", "ZZ"),
                ("endpoint", "__unmatched__"),
                ("method", "GET"),
                ("status", "404"),
            ): 1
        }
        assert client.head("/").status_code == 200
        assert client.post("/").status_code == 405

    def test_a_path_that_is_taken(self) -> None:
        app = Flask("shop")
        app.add_url_rule("/metrics", "mine", lambda: "x")
        with pytest.raises(ConfigError, match="'mine': set TRACK_USAGE_METRICS_PATH"):
            TrackUsage(app, [], registry=CollectorRegistry())

    def test_is_neither_counted_nor_stored(self, site: Site) -> None:
        site.scrape()
        site.app.test_client().head("/metrics")
        assert site.counted() == {}
        assert site.records() == []


def test_any_exporter_of_the_registry_sees_us(visited: Site) -> None:
    labels = {"method": "GET", "endpoint": "index", "status": "200", "country": "ZZ"}
    value = visited.registry.get_sample_value
    assert value("flask_usage_requests_total", labels) == 2
    assert value("flask_usage_request_duration_seconds_count", labels) == 2
    buckets = {**labels, "le": "10.0"}
    assert value("flask_usage_request_duration_seconds_bucket", buckets) == 2
