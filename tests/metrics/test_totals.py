"""Totals of apps and of workers: every request is in exactly one series of each family."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from helpers.examples import examples
from helpers.front_door import Site, samples
from helpers.records import make_record
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from werkzeug.test import EnvironBuilder, run_wsgi_app

from flask_usage_metrics import ConfigError, TrackUsage
from flask_usage_metrics.metrics.shape import Shape
from flask_usage_metrics.metrics.totals import Totals


def test_histogram_without_country(make_site: Callable[..., Site]) -> None:
    site = make_site(country=lambda _: "NL", HISTOGRAM_LABELS=["endpoint", "method"])
    site.app.add_url_rule("/", "index", lambda: "x")
    site.get()
    site.get("/nowhere")
    text = site.scrape()
    assert samples(text, "flask_usage_request_duration_seconds_count") == {
        (("endpoint", "__unmatched__"), ("method", "GET")): 1,
        (("endpoint", "index"), ("method", "GET")): 1,
    }
    assert len(samples(text, "flask_usage_requests_total")) == 2


def test_histogram_without_labels(make_site: Callable[..., Site]) -> None:
    site = make_site(HISTOGRAM_LABELS=[], BUCKETS=[0.5, 10])
    site.get("/nowhere")
    text = site.scrape()
    assert samples(text, "flask_usage_request_duration_seconds_count") == {(): 1}
    assert list(samples(text, "flask_usage_request_duration_seconds_bucket")) == [
        (("le", "0.5"),),
        (("le", "10.0"),),
        (("le", "+Inf"),),
    ]


def test_renamed_labels(make_site: Callable[..., Site]) -> None:
    site = make_site(LABEL_NAMES={"endpoint": "route"})
    site.get("/nowhere")
    text = site.scrape()
    for name in ("requests_total", "request_duration_seconds_count", "response_bytes_total"):
        (key,) = samples(text, f"flask_usage_{name}")
        assert ("route", "__unmatched__") in key
    assert "endpoint=" not in text


def test_bucket_bounds_are_included_and_cumulative(site: Site) -> None:
    site.get("/nowhere")
    buckets = site.samples("flask_usage_request_duration_seconds_bucket")
    bounds = [dict(key)["le"] for key in buckets]
    bounds_of_client_python = "0.005 0.01 0.025 0.05 0.075 0.1 0.25 0.5 0.75 1.0 2.5 5.0 7.5 10.0"
    assert " ".join(bounds) == f"{bounds_of_client_python} +Inf"
    counts = list(buckets.values())
    assert counts == sorted(counts)
    assert counts[-1] == 1


def counts(totals: Totals, index: int = 0) -> dict[tuple[str, ...], float]:
    """Return the samples of a family, by default of the requests."""
    return {labels.values: value for labels, value in totals.families()[index].samples}


class TestWorkers:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        (tmp_path / "g").mkdir(mode=0o700)
        return tmp_path / "g" / "totals.sqlite3"

    def test_what_was_counted_and_shown_alone_is_told_to_workers_that_come(
        self, path: Path
    ) -> None:
        one, other = Totals(Shape(), "1"), Totals(Shape(), "1")
        ids = {"trace_id": "1" * 32, "span_id": "2" * 16}
        records = [make_record(**ids), make_record(), make_record(endpoint="b")]
        one.add(records, {}, {records[0].id})
        assert sum(counts(one).values()) == 3
        one.add([make_record()], {})
        one.share(path)
        one.sync()
        other.share(path)
        for totals in (one, other):
            assert counts(totals) == {
                ("GET", "user", "200", "DE"): 3,
                ("GET", "b", "200", "DE"): 1,
            }
            (exemplars,) = [f.exemplars for f in totals.families() if f.exemplars]
            assert [*exemplars] == [("GET", "user", "200", "DE")]
            totals.close()

    def test_what_a_full_table_folded_is_counted_on_its_own_once_another_worker_knows_it(
        self, path: Path
    ) -> None:
        full, other = Totals(Shape(max_series=1), "1"), Totals(Shape(max_series=1), "1")
        full.add([make_record(), *[make_record(country="NL", endpoint="b")] * 3], {})
        folded = {("GET", "user", "200", "DE"): 1, ("GET", "__other__", "200", "__other__"): 3}
        assert counts(full) == folded
        other.add([make_record(country="NL", endpoint="b")], {})
        for totals in (other, full):
            totals.share(path)
            totals.sync()
        full.add([make_record(country="NL", endpoint="b")], {})
        assert counts(full) == {**folded, ("GET", "b", "200", "NL"): 2}
        sent = {family.description.name: family for family in full.families()}
        by_endpoint = sent["flask_usage_response_bytes_total"].samples
        assert {labels.values: value / 1234 for labels, value in by_endpoint} == {
            ("user",): 1,
            ("__other__",): 3,
            ("b",): 2,
        }
        overflow = sent["flask_usage_label_overflow_total"].samples
        assert {labels.values[0]: value for labels, value in overflow} == {
            "country": 3,
            "endpoint": 3,
            "exception": 0,
            "consumer": 0,
        }
        for totals in (full, other):
            totals.close()

    def test_whatever_is_remembered_of_a_combination_counts_in_every_family(
        self, path: Path
    ) -> None:
        workers = [Totals(Shape(histogram_labels=("endpoint",)), "1") for _ in range(3)]
        chance = random.Random(1)
        expected: Counter[tuple[str, ...]] = Counter()
        for step in range(60):
            worker = chance.choice(workers)
            if step == 20:
                for each in workers:
                    each.share(path)
            made = [
                make_record(
                    endpoint=chance.choice([None, "a", "b"]),
                    country=chance.choice([None, "NL", "DE"]),
                    method=chance.choice(["GET", "BREW"]),
                    status=chance.choice([200, 999]),
                    client=chance.choice(["human", "script"]),
                )
                for _ in range(chance.randrange(9))
            ]
            worker.add(made, {})
            expected.update(
                (
                    "GET" if record.method == "GET" else "_OTHER",
                    record.endpoint or "__unmatched__",
                    "200" if record.status == 200 else "_OTHER",
                    record.country or "ZZ",
                )
                for record in made
            )
            if chance.random() < 0.5:
                worker.sync()
            if chance.random() < 0.2:
                worker.families()
        for worker in workers:
            worker.sync()
        for worker in workers:
            assert counts(worker) == expected
            families = {family.description.name: family for family in worker.families()}
            observed = families["flask_usage_request_duration_seconds"].histograms
            clients = families["flask_usage_client_requests_total"].samples
            sent = families["flask_usage_response_bytes_total"].samples
            total = sum(expected.values())
            assert sum(buckets[-1] for _, buckets, _ in observed) == total
            assert sum(value for _, value in clients) == total
            assert sum(value for _, value in sent) == total * 1234
            worker.close()


class TestSharedRegistry:
    def test_apps_on_one_registry_add_up(self, make_site: Callable[..., Site]) -> None:
        registry = CollectorRegistry()
        apps = []
        for name in ("one", "two"):
            app = Flask(name)
            TrackUsage(app, [], registry=registry)
            app.add_url_rule("/", "index", lambda: "x")
            app.test_client().get("/")
            apps.append(app)
        text = apps[0].test_client().get("/metrics").text
        assert sum(samples(text, "flask_usage_requests_total").values()) == 2

    def test_apps_on_one_registry_agree_on_the_shape(self) -> None:
        registry = CollectorRegistry()
        TrackUsage(Flask("one"), [], registry=registry)
        other = Flask("two")
        other.config["TRACK_USAGE_BUCKETS"] = [1]
        with pytest.raises(ConfigError, match="must agree on TRACK_USAGE_MAX_SERIES"):
            TrackUsage(other, [], registry=registry)


@pytest.fixture(scope="module")
def fuzzed() -> tuple[Flask, TrackUsage, list[dict[str, Any]]]:
    stored: list[dict[str, Any]] = []
    app = Flask("fuzzed")
    usage = TrackUsage(app, stored.append, registry=CollectorRegistry())
    app.add_url_rule("/<path:rest>", "any", lambda rest: "x")
    return app, usage, stored


@settings(max_examples=examples(100), deadline=None)
@given(
    method=st.text(max_size=30),
    path=st.text(max_size=60),
    headers=st.dictionaries(
        st.sampled_from(
            [
                "HTTP_USER_AGENT",
                "HTTP_ACCEPT_LANGUAGE",
                "HTTP_X_FORWARDED_FOR",
                "HTTP_HOST",
                "HTTP_REFERER",
                "HTTP_AUTHORIZATION",
                "HTTP_X_REQUEST_START",
                "QUERY_STRING",
                "CONTENT_LENGTH",
                "REMOTE_ADDR",
                "SERVER_PROTOCOL",
                "SCRIPT_NAME",
            ]
        ),
        st.text(max_size=40),
    ),
)
def test_no_request_breaks_a_scrape_or_is_lost(
    fuzzed: tuple[Flask, TrackUsage, list[dict[str, Any]]],
    method: str,
    path: str,
    headers: dict[str, str],
) -> None:
    app, usage, stored = fuzzed
    before = len(stored)
    environ = EnvironBuilder("/").get_environ()
    environ.update(REQUEST_METHOD=method, PATH_INFO=path, **headers)
    # Flask itself may fail on such an environ, as it does without us.
    with suppress(Exception):
        run_wsgi_app(app.wsgi_app, environ, buffered=True)
    assert usage.flush()
    assert len(stored) == before + 1
    repr(stored[-1]).encode()
    text = app.test_client().get("/metrics").text
    assert sum(samples(text, "flask_usage_requests_total").values()) == len(stored)
