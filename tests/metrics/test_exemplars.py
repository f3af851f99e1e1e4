"""Exemplars: from a bucket of the histogram to the trace of its newest request."""

from __future__ import annotations

import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
from flask import Flask
from helpers.front_door import Site
from helpers.process import run_python, until
from helpers.prometheus import Prometheus
from helpers.records import START, make_record
from helpers.servers import Gunicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest as generate_text
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from werkzeug.serving import make_server

from flask_usage_metrics import TrackUsage, UsageRecord, open_storage
from flask_usage_metrics.metrics.exposition.collector import UsageCollector, collector_of
from flask_usage_metrics.metrics.exposition.text import blocks_of, encode
from flask_usage_metrics.metrics.shape import Shape
from flask_usage_metrics.metrics.shared_app_metrics import SharedAppMetrics
from flask_usage_metrics.metrics.totals import Totals
from flask_usage_metrics.storage import Storage

BUCKET = "flask_usage_request_duration_seconds_bucket"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


class Found(NamedTuple):
    """An exemplar, and where it was found."""

    labels: dict[str, str]
    number: int
    value: float
    timestamp: float

    @property
    def bucket(self) -> tuple[str, str]:
        return self.labels.get("endpoint", ""), self.labels["le"]


def traced(number: int, *, after: float = 0.0, **overrides: Any) -> UsageRecord:
    """Return a record whose ids tell its number; it ends so many seconds after START."""
    duration = timedelta(seconds=overrides.setdefault("duration_seconds", 0.012345678))
    return make_record(
        started_at=START + timedelta(seconds=after) - duration,
        trace_id=f"{number:032x}",
        span_id=f"{number:016x}",
        **overrides,
    )


def one_in_each_bucket(**overrides: Any) -> list[UsageRecord]:
    bounds = [*Shape().buckets, 11.0]
    return [traced(n, duration_seconds=bound, **overrides) for n, bound in enumerate(bounds)]


def add(totals: Totals, *records: UsageRecord) -> None:
    totals.add(records, {}, {record.id for record in records})


def found(text: str) -> list[Found]:
    """Return the exemplars of an OpenMetrics exposition, whose ids must be those of `traced`."""
    exemplars = []
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.exemplar is None:
                continue
            assert sample.name == BUCKET
            ids, value, timestamp = sample.exemplar
            assert ids.keys() == {"trace_id", "span_id"}
            assert (len(ids["trace_id"]), len(ids["span_id"])) == (32, 16)
            number = int(ids["trace_id"], 16)
            assert int(ids["span_id"], 16) == number
            assert value <= float(sample.labels["le"])
            exemplars.append(Found(sample.labels, number, value, float(timestamp)))
    return exemplars


def expose(totals: Totals) -> list[Found]:
    return found(encode(blocks_of(totals.families(), openmetrics=True)).decode() + "# EOF\n")


def numbers(totals: Totals) -> dict[tuple[str, str], int]:
    """Return which record is the exemplar, by endpoint and bound."""
    return {exemplar.bucket: exemplar.number for exemplar in expose(totals)}


@pytest.fixture
def totals() -> Totals:
    return Totals(Shape(), "1")


def test_says_which_request_how_long_it_took_and_when_it_ended(totals: Totals) -> None:
    record = make_record(
        started_at=START,
        duration_seconds=0.0123456,
        trace_id="4bf92f3577b34da6a3ce929d0e0e4736",
        span_id="00f067aa0ba902b7",
    )
    add(totals, record)
    lines = encode(blocks_of(totals.families(), openmetrics=True)).decode().splitlines()
    (line,) = [line for line in lines if " # " in line]
    ended = f"{START.timestamp():.0f}.012"
    assert line == (
        f'{BUCKET}{{method="GET",endpoint="user",status="200",country="DE",le="0.025"}} 1.0 '
        '# {trace_id="4bf92f3577b34da6a3ce929d0e0e4736",span_id="00f067aa0ba902b7"} '
        f"0.0123456 {ended}"
    )


def test_the_newest_of_each_bucket_is_kept_in_whatever_order_they_come(totals: Totals) -> None:
    add(
        totals,
        traced(1, after=1),
        traced(2, after=9),
        traced(3, after=5),
        traced(4, after=2, duration_seconds=0.6),
        traced(5, after=0, duration_seconds=99.0),
    )
    add(totals, traced(6, after=4), traced(7, after=3, duration_seconds=0.6))
    assert numbers(totals) == {("user", "0.025"): 2, ("user", "0.75"): 7, ("user", "+Inf"): 5}
    (first, _, last) = expose(totals)
    assert first.value == 0.012345678
    assert first.timestamp == START.timestamp() + 9
    assert last.value == 99


def test_newest_is_who_ended_last_rather_than_who_began_last(totals: Totals) -> None:
    add(
        totals,
        traced(1, after=9, duration_seconds=9.0),
        traced(2, after=8.9995, duration_seconds=8.0),
    )
    assert numbers(totals) == {("user", "10.0"): 1}


def test_a_bound_belongs_to_its_bucket(totals: Totals) -> None:
    add(totals, *one_in_each_bucket())
    exemplars = expose(totals)
    assert [exemplar.number for exemplar in exemplars] == [*range(15)]
    assert [float(exemplar.labels["le"]) for exemplar in exemplars[:-1]] == [*Shape().buckets]


def test_each_series_has_its_own(totals: Totals) -> None:
    add(totals, traced(1, endpoint="a"), traced(2, endpoint="b"), traced(3, endpoint=None))
    add(totals, traced(4, endpoint="a", status=500), traced(5, endpoint="a", country="NL"))
    assert {
        (x.labels["endpoint"], x.labels["status"], x.labels["country"]): x.number
        for x in expose(totals)
    } == {
        ("__unmatched__", "200", "DE"): 3,
        ("a", "200", "DE"): 1,
        ("a", "200", "NL"): 5,
        ("a", "500", "DE"): 4,
        ("b", "200", "DE"): 2,
    }


def test_who_is_not_sampled_is_none(totals: Totals) -> None:
    sampled, other = traced(1, after=1), traced(2, after=2)
    totals.add([sampled, other], {}, {sampled.id})
    totals.add([traced(3, after=3)], {})
    assert numbers(totals) == {("user", "0.025"): 1}


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param({"trace_id": None, "span_id": None}, id="none"),
        pytest.param({"span_id": None}, id="no-span"),
        pytest.param({"trace_id": "1" * 31 + '"'}, id="quote"),
        pytest.param({"trace_id": "1" * 31 + "\n"}, id="newline"),
        pytest.param({"trace_id": "1" * 33}, id="long"),
        pytest.param({"trace_id": "1" * 31}, id="short"),
        pytest.param({"trace_id": "1 " * 16}, id="spaces"),
        pytest.param({"trace_id": "1" * 31 + "\N{ARABIC-INDIC DIGIT ONE}"}, id="other-digit"),
        pytest.param({"span_id": "g" * 16}, id="not-hexadecimal"),
        pytest.param({"span_id": "1" * 17}, id="long-span"),
    ],
)
def test_ids_that_are_not_those_of_a_span_are_ignored(
    totals: Totals, ids: dict[str, str | None]
) -> None:
    add(totals, make_record(**{"trace_id": "1" * 32, "span_id": "1" * 16, **ids}))
    assert expose(totals) == []
    assert totals.families()[0].samples[0][1] == 1  # it is counted all the same


def test_text_has_no_room_for_them(totals: Totals) -> None:
    other = Totals(Shape(), "1")
    records = one_in_each_bucket()
    add(totals, *records)
    other.add(records, {})
    assert len(expose(totals)) == 15
    text, plain = (encode(blocks_of(t.families(), openmetrics=False)) for t in (totals, other))
    assert text == plain


def test_any_exporter_of_the_registry_sees_them(totals: Totals) -> None:
    add(totals, *one_in_each_bucket(after=0.1239), *one_in_each_bucket(endpoint="b")[3:9])
    add(totals, traced(7, endpoint="c"), traced(8, status=404))
    totals.add([traced(9, endpoint="none")], {})
    registry = CollectorRegistry()
    registry.register(UsageCollector(totals, SharedAppMetrics(registry)))
    ours = expose(totals)
    assert len(ours) == 15 + 6 + 2
    assert found(generate_openmetrics(registry).decode()) == ours
    assert b"trace_id" not in generate_text(registry)


def test_they_belong_to_the_series_of_the_histogram() -> None:
    totals = Totals(Shape(histogram_labels=("endpoint",)), "1")
    add(totals, traced(1, after=2, country="NL"), traced(2, after=1, country="DE"))
    add(totals, traced(3, after=1, endpoint="b", method="POST"))
    assert [(exemplar.labels, exemplar.number) for exemplar in expose(totals)] == [
        ({"endpoint": "user", "le": "0.025"}, 1),
        ({"endpoint": "b", "le": "0.025"}, 3),
    ]


def test_a_histogram_without_labels() -> None:
    totals = Totals(Shape(histogram_labels=(), buckets=(0.5,)), "1")
    add(totals, traced(1), traced(2, duration_seconds=0.7, endpoint="b"))
    assert [(exemplar.labels, exemplar.number) for exemplar in expose(totals)] == [
        ({"le": "0.5"}, 1),
        ({"le": "+Inf"}, 2),
    ]


def test_they_are_folded_with_their_series() -> None:
    totals = Totals(Shape(max_series=1), "1")
    add(totals, traced(1), traced(2, endpoint="b"), traced(3, endpoint="c", after=1))
    assert numbers(totals) == {("user", "0.025"): 1, ("__other__", "0.025"): 3}


def test_a_scrape_shows_them_where_they_are_asked_for(make_site: Callable[..., Site]) -> None:
    site = make_site()
    add(collector_of(site.registry, Shape(), "").totals, traced(7))

    def scrape(query: str, accept: str) -> str:
        answer = site.app.test_client().get(f"/metrics{query}", headers={"Accept": accept})
        assert isinstance(answer.text, str)
        return answer.text

    (exemplar,) = found(scrape("", OPENMETRICS))
    assert exemplar.number == 7
    assert found(scrape(f"?name[]={BUCKET}", OPENMETRICS)) == [exemplar]
    counts = BUCKET.replace("bucket", "count")
    for without in (f"?name[]={counts}", OPENMETRICS), ("", "text/plain"), ("", ""):
        answer = scrape(*without)
        assert "trace_id" not in answer
        assert counts in answer


def test_a_forked_child_starts_with_none(totals: Totals) -> None:
    add(totals, traced(1))
    totals.reset_after_fork()
    assert expose(totals) == []
    add(totals, traced(2, after=-1))
    assert numbers(totals) == {("user", "0.025"): 2}


WORKER = """
import os, signal, sys
from pathlib import Path
from flask_usage_metrics.metrics.shape import Shape
from flask_usage_metrics.metrics.totals import Totals
from test_exemplars import add, numbers, traced

totals = Totals(Shape(), "1")
totals.share(Path(sys.argv[1]))
add(totals, traced(11, after=1), traced(12, after=9, duration_seconds=0.6))
add(totals, traced(13, endpoint="theirs"))
print(sorted(numbers(totals).items()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


class TestWorkers:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        (tmp_path / "g").mkdir(mode=0o700)
        return tmp_path / "g" / "totals.sqlite3"

    @pytest.fixture
    def workers(self, path: Path) -> Iterator[list[Totals]]:
        workers = [Totals(Shape(), "1") for _ in range(3)]
        for worker in workers:
            worker.share(path)
        yield workers
        for worker in workers:
            worker.close()

    def test_any_process_shows_the_newest_of_all(self, path: Path, totals: Totals) -> None:
        totals.share(path)
        add(totals, traced(1, after=5), traced(2, after=5, duration_seconds=0.6))
        add(totals, traced(3, endpoint="ours"))
        totals.sync()
        # Beside this file, from which it imports.
        worker = run_python(WORKER, path, folder=Path(__file__).parent)
        assert worker.returncode == -signal.SIGKILL
        expected = {
            ("ours", "0.025"): 3,
            ("theirs", "0.025"): 13,
            ("user", "0.025"): 1,
            ("user", "0.75"): 12,
        }
        assert worker.stdout.strip() == str(sorted(expected.items()))
        assert numbers(totals) == expected
        totals.close()

    def test_what_was_synced_is_replaced_by_what_is_newer(self, workers: list[Totals]) -> None:
        for step in range(12):
            add(workers[step % 3], traced(step, after=step))
            workers[step % 3].sync()
            add(workers[step % 2], traced(100 + step, after=step - 0.5))
        for worker in workers:
            worker.sync()
        for worker in workers:
            assert numbers(worker) == {("user", "0.025"): 11}

    def test_one_is_written_once(self, path: Path, workers: list[Totals]) -> None:
        add(workers[0], traced(1))
        for worker in workers * 2:
            worker.sync()
        with closing(sqlite3.connect(path)) as reader:
            assert reader.execute("SELECT changed FROM exemplar").fetchall() == [(1,)]

    def test_series_of_a_histogram_with_other_labels(self, path: Path) -> None:
        workers = [Totals(Shape(histogram_labels=("endpoint",)), "1") for _ in range(2)]
        for number, worker in enumerate(workers):
            worker.share(path)
            add(worker, traced(number, after=-number), traced(7, endpoint=f"of{number}"))
            worker.sync()
        for worker in workers:
            assert numbers(worker) == {
                ("user", "0.025"): 0,
                ("of0", "0.025"): 7,
                ("of1", "0.025"): 7,
            }
            worker.close()

    @pytest.mark.parametrize("how", ["removed", "garbage"])
    def test_a_damaged_file_is_made_anew_of_what_they_remember(
        self, path: Path, workers: list[Totals], how: str
    ) -> None:
        for number, worker in enumerate(workers):
            add(worker, traced(number, after=number), traced(7, endpoint=f"of{number}"))
            worker.sync()
        for worker in workers:
            worker.sync()
        if how == "removed":
            path.unlink()
        else:
            path.write_bytes(b"garbage" * 5000)
        expected = {("user", "0.025"): 2, **{(f"of{n}", "0.025"): 7 for n in range(3)}}
        until(lambda: [numbers(worker) for worker in workers], [expected] * 3)
        newcomer = Totals(Shape(), "1")
        newcomer.share(path)
        assert numbers(newcomer) == expected
        newcomer.close()

    def test_those_that_a_locked_file_kept_out_are_shown_later(
        self, path: Path, workers: list[Totals]
    ) -> None:
        ours, theirs, _ = workers
        add(ours, traced(1, after=1))
        ours.sync()
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            other.execute("UPDATE state SET number = number")
            add(ours, traced(2, after=2))
            assert numbers(ours) == {("user", "0.025"): 1}  # as other workers show
            other.execute("ROLLBACK")
        until(lambda: (ours.sync(), numbers(theirs)), (True, {("user", "0.025"): 2}))


@pytest.mark.servers
class TestPrometheus:
    @pytest.fixture
    def served(self) -> Iterator[tuple[str, Totals]]:
        """An app that answers under a real server, and the totals that its scrapes show."""
        app, registry = Flask("shop"), CollectorRegistry()
        TrackUsage(app, [], registry=registry)
        server = make_server("127.0.0.1", 0, app, threaded=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}", collector_of(registry, Shape(), "").totals
        server.shutdown()
        thread.join()
        server.server_close()

    def test_finds_the_trace_of_a_slow_request(
        self, tmp_path: Path, served: tuple[str, Totals]
    ) -> None:
        target, totals = served

        def count(number: int, *, before: float, **overrides: Any) -> None:
            # Prometheus wants those of one series in the order of their time.
            ended = datetime.now(timezone.utc) - timedelta(seconds=before)
            add(totals, traced(number, after=(ended - START).total_seconds(), **overrides))

        with Prometheus(tmp_path, target, job="shop") as prometheus:
            slow = f'{BUCKET}{{job="shop",endpoint="user",le="2.5"}}'

            def known(query: str = slow) -> list[int]:
                return [
                    int(exemplar["labels"]["trace_id"], 16)
                    for series in prometheus.query_exemplars(query)
                    for exemplar in series["exemplars"]
                ]

            start = time.time()
            count(1, before=0.0, duration_seconds=1.2345678)
            until(known, [1])
            count(2, before=3600.0, duration_seconds=1.5)
            count(3, before=0.0)
            until(lambda: known(BUCKET), [3, 1])
            count(4, before=0.0, duration_seconds=2.0)
            until(known, [1, 4])
            ((series,), end) = prometheus.query_exemplars(slow), time.time()
            assert series["seriesLabels"] == {
                "__name__": BUCKET,
                "job": "shop",
                "instance": target,
                "method": "GET",
                "endpoint": "user",
                "status": "200",
                "country": "DE",
                "le": "2.5",
            }
            first, last = series["exemplars"]
            assert first["labels"] == {"trace_id": f"{1:032x}", "span_id": f"{1:016x}"}
            assert float(first["value"]) == 1.2345678
            assert start - 0.001 <= first["timestamp"] <= last["timestamp"] <= end
            (up,) = prometheus.query("up")
            assert up["metric"] == {"__name__": "up", "job": "shop", "instance": target}
            assert up["value"][1] == "1"
            out_of_order = "prometheus_target_scrapes_exemplar_out_of_order_total 0"
            assert out_of_order in requests.get(f"{prometheus.address}/metrics", timeout=10).text


@pytest.mark.servers
def test_a_spike_leads_to_the_trace_and_the_record_whoever_answered(tmp_path: Path) -> None:
    traced = {"FLASK_TRACK_USAGE_TRACES": "true", "OTEL_TRACES_EXPORTER": "none"}
    with Gunicorn(tmp_path, "-w", "3", **traced) as server:
        answered = [server.get() for _ in range(60)]
        while len(set(answered)) < 2:  # which of the workers does is up to the system
            answered.append(server.get())
        until(server.stored, len(answered))
        with Prometheus(tmp_path, f"127.0.0.1:{server.port}") as prometheus:
            name = "flask_usage_request_duration_seconds_bucket"
            until(lambda: bool(prometheus.query_exemplars(f'{name}{{endpoint="pid"}}')), True)
            series = prometheus.query_exemplars(f'{name}{{endpoint="pid"}}')
            found = [exemplar for one in series for exemplar in one["exemplars"]]
    storage = open_storage(f"sqlite:///{tmp_path}/usage.sqlite3")
    assert isinstance(storage, Storage)
    for exemplar in found:
        (record,) = storage.records(trace_id=exemplar["labels"]["trace_id"])
        assert record.span_id == exemplar["labels"]["span_id"]
        assert record.duration_seconds == pytest.approx(float(exemplar["value"]))
    storage.close()
