"""GET /metrics: formats, negotiation, filters, tokens, and the rest of the registry."""

from __future__ import annotations

import gzip
import random
import threading
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from flask import Flask
from helpers.front_door import Site, samples
from helpers.records import make_record
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text
from werkzeug.test import Client

from flask_usage_metrics import ConfigError, TrackUsage
from flask_usage_metrics.metrics.exposition.collector import UsageCollector
from flask_usage_metrics.metrics.exposition.gzip_stream import CompressedText, GzipStream
from flask_usage_metrics.metrics.exposition.negotiation import prefers_openmetrics
from flask_usage_metrics.metrics.exposition.text import blocks_of, compress, encode
from flask_usage_metrics.metrics.families import BLOCK
from flask_usage_metrics.metrics.names import DESCRIPTIONS, REQUEST_LABELS
from flask_usage_metrics.metrics.shape import Shape
from flask_usage_metrics.metrics.shared_app_metrics import SharedAppMetrics
from flask_usage_metrics.metrics.totals import Totals

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


def unpacked(packed: bytes) -> bytes:
    """Return what is in one gzip member, of which there must be no more: some stop after one."""
    member = zlib.decompressobj(16 + zlib.MAX_WBITS)
    text = member.decompress(packed)
    assert (member.eof, member.unused_data) == (True, b"")
    return text


@given(st.lists(st.lists(st.integers(0, 9)), max_size=4), st.lists(st.binary(), min_size=10))
def test_compressed_texts_can_be_used_again_in_any_order(
    streams: list[list[int]], texts: list[bytes]
) -> None:
    made: dict[int, CompressedText] = {}
    for indexes in streams:
        stream = GzipStream()
        for index in indexes:
            if index in made:
                stream.add(made[index])
            else:
                made[index] = stream.write(texts[index] * 1000)
        expected = b"".join([texts[index] * 1000 for index in indexes])
        assert unpacked(stream.finish()) == expected


class TestManySeries:
    """A first, a middle, a last and a short block: whole ones are cached from scrape to scrape."""

    COUNT = 3 * BLOCK + 1

    @pytest.fixture(params=[REQUEST_LABELS, ("endpoint",), ()], ids=["all", "endpoint", "none"])
    def totals(self, request: pytest.FixtureRequest) -> Totals:
        totals = Totals(Shape(histogram_labels=request.param), "1")
        self.count(totals, range(self.COUNT))
        return totals

    def count(self, totals: Totals, numbers: Iterable[int]) -> None:
        records = [
            make_record(endpoint=f'a "{n}"\n', duration_seconds=n % 13, bytes_received=n)
            for n in numbers
        ]
        totals.add(records, {})

    def test_gzip_says_the_same_whatever_changed(self, totals: Totals) -> None:
        registry = CollectorRegistry()
        registry.register(UsageCollector(totals, SharedAppMetrics(registry)))
        chance = random.Random(1)
        for step in range(6):
            for openmetrics in (step % 3 == 0, False, True):
                text = encode(blocks_of(totals.families(), openmetrics))
                assert unpacked(compress(blocks_of(totals.families(), openmetrics))) == text
            theirs = generate_latest(registry).decode()
            text = encode(blocks_of(totals.families(), openmetrics=False))
            assert families(parse_text(text.decode())) == families(parse_text(theirs))
            self.count(totals, chance.choices(range(self.COUNT + step), k=step))

    def test_blocks_are_cached_until_one_of_their_series_changes(self, totals: Totals) -> None:
        before = totals.families()[0]
        compress(blocks_of([before], openmetrics=False))
        # The last, which is short, is made anew each time.
        assert [len(cache) for cache in before.caches] == [1, 1, 1, 0]
        self.count(totals, [BLOCK, BLOCK + 1, 3 * BLOCK - 1])
        after = totals.families()[0]
        same = [now is then for now, then in zip(after.caches, before.caches, strict=True)]
        assert same == [True, False, False, True]
        assert before.samples[BLOCK][1] == 1
        assert after.samples[BLOCK][1] == 2

    def test_asking_for_some_names_caches_nothing(self, totals: Totals) -> None:
        name = "flask_usage_request_duration_seconds_count"
        found = totals.families()
        text = compress(blocks_of(found, openmetrics=False, names={name}))
        lines = gzip.decompress(text).decode().splitlines()
        assert {line.split("{")[0].split()[0] for line in lines if line[0] != "#"} == {name}
        assert not any(cache for family in found for cache in family.caches)

    @pytest.mark.parametrize("is_shared", [False, True], ids=["alone", "shared"])
    def test_a_scrape_shows_one_moment(
        self, totals: Totals, is_shared: bool, tmp_path: Path
    ) -> None:
        if is_shared:
            (tmp_path / "g").mkdir(mode=0o700)
            totals.share(tmp_path / "g" / "totals.sqlite3")
        stop = threading.Event()

        rounds: list[None] = []

        def work() -> None:
            while not stop.is_set():
                self.count(totals, range(0, self.COUNT, 7))
                totals.sync()
                rounds.append(None)

        def scrape(found: list[set[float]]) -> None:
            while len(found) < 40 or len(rounds) < 5:
                text = unpacked(compress(blocks_of(totals.families(), openmetrics=True)))
                found.append(set(added_up(text.decode()).values()))

        found: list[set[float]] = []
        worker = threading.Thread(target=work)
        scrapers = [threading.Thread(target=scrape, args=(found,)) for _ in range(2)]
        for thread in (worker, *scrapers):
            thread.start()
        for thread in scrapers:
            thread.join()
        stop.set()
        worker.join()
        assert {len(counts) for counts in found} == {1}
        totals.close()


def added_up(text: str) -> dict[str, float]:
    """Return the sum of each of the families that count every request once."""
    sums = dict.fromkeys(
        (
            "flask_usage_requests_total",
            "flask_usage_request_duration_seconds_count",
            "flask_usage_client_requests_total",
        ),
        0.0,
    )
    for line in text.splitlines():  # a parser would take most of the time
        name = line.partition("{")[0].partition(" ")[0]
        if name in sums:
            sums[name] += float(line.rpartition(" ")[2])
    return sums


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

    def test_lets_in_with_a_token_that_is_not_ascii_as_clients_send_it(self, guarded: Site) -> None:
        shown = "Bearer sécret".encode().decode("latin-1")
        client = guarded.app.test_client()
        assert client.get("/metrics", headers={"Authorization": shown}).status_code == 200

    @pytest.mark.parametrize("token", ["s3cret\n", " s3cret", "\ts3cret\r\n"])
    def test_blanks_of_the_file_it_is_from_are_no_part_of_it(
        self, make_site: Callable[..., Site], token: str
    ) -> None:
        client = make_site(METRICS_TOKEN=token).app.test_client()
        shown = {"Authorization": "Bearer s3cret"}
        assert client.get("/metrics", headers=shown).status_code == 200
        assert client.get("/metrics").status_code == 401


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
