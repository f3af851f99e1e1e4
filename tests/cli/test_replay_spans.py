"""`flask usage …`: what it prints, what it ends with, and what a collector gets of it."""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import sqlite3
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import Result
from flask import Flask, abort
from helpers.collector import Received, Receiver
from helpers.front_door import Site
from helpers.process import Done, Process, run_python
from helpers.records import START, make_record, make_records
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from flask_usage_metrics import TrackUsage, UsageRecord, open_storage
from flask_usage_metrics.cli import usage
from flask_usage_metrics.cli.times import parse_when
from flask_usage_metrics.errors import StorageUnavailable
from flask_usage_metrics.records.query import Filter
from flask_usage_metrics.storage import Storage
from flask_usage_metrics.traces.conventions import attributes_of, name_of

Make = Callable[..., Site]
UTC = timezone.utc
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
ALL = ("--since", "1970-01-01")
"""Up to the real now, which the records that tests make may lie beyond."""
EVER = ("--since", "1970-01-01", "--until", "9999-12-31")
SHOP = """
from flask import Flask
from flask_usage_metrics import TrackUsage

app = Flask("shop")
app.config["TRACK_USAGE_STORAGE"] = {url!r}
TrackUsage(app)
"""


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The desk's own OpenTelemetry is none of the tests' business."""
    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    with Receiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        yield receiver


class Kept(Storage):
    """Records in a list, which a storage of somebody else may have made; reading them may fail."""

    name = "kept"

    def set_up(self, records: list[UsageRecord], fails_at: int | None = None) -> None:
        self.kept = records
        self.fails_at = fails_at

    def select(self, wanted: Filter, order: str, limit: int | None) -> Iterator[UsageRecord]:
        for number, record in enumerate(self.kept):
            if number == self.fails_at:
                raise StorageUnavailable("kept: Connection reset by peer")
            if wanted.matches(record):
                yield record


def replay(app: Flask, *options: str) -> Result:
    """Run the command as a test of the app's owner would; a traceback fails the test."""
    result = app.test_cli_runner().invoke(usage, ["replay-spans", *options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def replayed(app: Flask, *options: str) -> str:
    """Run the command, which must do all it is asked for, and return what it says."""
    result = replay(app, *options)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def keep(site: Site, records: list[UsageRecord]) -> None:
    site.usage.storage.write(records)


def nanoseconds(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1000


def contents(spans: list[Received]) -> list[dict[str, Any]]:
    """All of each span, but the connection it came by."""
    return [span._asdict() | {"peer": None} for span in spans]


def is_valid(span: Received) -> bool:
    return bool(
        re.fullmatch(r"[0-9a-f]{32}", span.trace_id)
        and int(span.trace_id, 16)
        and re.fullmatch(r"[0-9a-f]{16}", span.span_id)
        and int(span.span_id, 16)
    )


# ------------------------------------------------------------------------ what a span is


@pytest.fixture
def unsampled(make_site: Make) -> Site:
    """An app whose requests are in traces that nobody has kept."""
    site = make_site(tracer_provider=TracerProvider(sampler=ALWAYS_OFF), country=lambda _: "NL")
    site.app.add_url_rule("/item/<int:number>", "item", lambda number: "x")
    site.app.add_url_rule("/gone", "gone", lambda: abort(503))
    site.app.add_url_rule("/raises", "raises", lambda: str(1 // 0))
    return site


def test_each_record_is_one_span_with_its_ids_times_and_attributes(
    unsampled: Site, collector: Receiver
) -> None:
    for path in ("/item/7?page=2", "/gone", "/raises", "/nowhere", "/item/8"):
        unsampled.get(path, headers={"traceparent": PARENT} if path == "/item/8" else {})
    records = unsampled.records()
    assert len(records) == 5
    assert replayed(unsampled.app, *ALL).startswith("5 spans exported, 1970-01-01 00:00 to 20")
    assert len(collector.spans()) == 5
    spans = {span.span_id: span for span in collector.spans()}
    for record in records:
        assert record.span_id is not None
        span = spans[record.span_id]
        assert span.trace_id == record.trace_id
        assert span.parent_id == (record.parent_span_id or "")
        assert span.start_ns == nanoseconds(record.started_at)
        assert span.end_ns - span.start_ns == round(record.duration_seconds * 1e9)
        assert (span.name, span.kind) == (name_of(record), "SERVER")
        assert span.status == ("ERROR" if record.status >= 500 else "UNSET")
        assert span.attributes == attributes_of(record, user=False)
        assert span.attributes["geo.country.iso_code"] == "NL"
        assert span.resource["service.name"] == "shop"
        assert span.scope[0] == "flask_usage_metrics"
    assert records[-1].trace_id == PARENT[3:35]
    assert unsampled.records() == records


def test_it_is_the_live_span_again(make_site: Make, collector: Receiver) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    site = make_site(tracer_provider=provider)
    site.app.add_url_rule("/item/<int:number>", "item", lambda number: "x")
    for path in ("/item/7", "/item/8", "/nowhere"):
        site.get(path, headers={"traceparent": PARENT[:-1] + "1"} if path == "/item/8" else {})
    site.records()
    replayed(site.app, *ALL)
    lives = exporter.get_finished_spans()
    assert len(lives) == 3  # by way of the app's provider went none
    for live, span in zip(lives, collector.spans(), strict=True):
        assert span.name == live.name
        assert span.trace_id == trace.format_trace_id(live.context.trace_id)
        assert span.span_id == trace.format_span_id(live.context.span_id)
        parent = "" if live.parent is None else trace.format_span_id(live.parent.span_id)
        assert span.parent_id == parent
        assert span.start_ns // 1000 == live.start_time // 1000  # records have microseconds
        assert span.end_ns - span.start_ns == live.end_time - live.start_time
        assert span.attributes == dict(live.attributes)
        assert span.status == live.status.status_code.name
        scope = live.instrumentation_scope
        assert span.scope == (scope.name, scope.version, scope.schema_url)


def test_doing_it_again_gives_the_same_spans(make_site: Make, collector: Receiver) -> None:
    site = make_site()
    keep(site, make_records(20))
    replayed(site.app, *EVER)
    replayed(site.app, *EVER, "--batch", "7")
    assert collector.sizes == [20, 7, 7, 6]
    first, second = collector.spans()[:20], collector.spans()[20:]
    assert contents(first) == contents(second)
    assert len({span.span_id for span in first}) == 20


def test_a_request_without_a_trace_has_the_ids_of_its_record(
    make_site: Make, collector: Receiver
) -> None:
    site = make_site()
    site.app.add_url_rule("/", "index", lambda: "x")
    for _ in range(3):
        site.get()
    records = site.records()
    assert {record.trace_id for record in records} == {None}
    replayed(site.app, *ALL)
    digits = [record.id.replace("-", "") for record in records]
    assert [span.trace_id for span in collector.spans()] == digits
    assert collector.ids() == [text[16:] for text in digits]
    assert all(is_valid(span) and span.parent_id == "" for span in collector.spans())


def test_ids_that_are_none_are_replaced_each_by_itself(
    make_site: Make, collector: Receiver
) -> None:
    good, trace_id, span_id = "5a" * 16, "c" * 32, "d" * 16
    record_id = f"{good[:8]}-{good[8:12]}-{good[12:16]}-{good[16:20]}-{good[20:]}"
    cases = [
        # As stored: trace, span, parent; as exported, None being some other one.
        (trace_id, span_id, "e" * 16, trace_id, span_id, "e" * 16),
        (trace_id, None, None, trace_id, good[16:], ""),  # the caller's trace, and no SDK
        (None, span_id, "e" * 16, good, span_id, ""),
        ("0" * 32, "0" * 16, "0" * 16, good, good[16:], ""),
        (trace_id, span_id, "0" * 16, trace_id, span_id, ""),
        ("no id", "nor this", "nor that", good, good[16:], ""),
        (trace_id.upper(), "D" * 16, None, trace_id, span_id, ""),
        (trace_id[1:], span_id + "d", "", good, good[16:], ""),
        ("c" * 31 + "\n", "\u0663" * 16, None, good, good[16:], ""),
    ]
    for given_trace, given_span, given_parent, *_ in cases:
        record = make_record(
            id=record_id, trace_id=given_trace, span_id=given_span, parent_span_id=given_parent
        )
        replayed(make_site([Kept([record])]).app, *EVER)
    found = [(span.trace_id, span.span_id, span.parent_id) for span in collector.spans()]
    assert found == [case[3:] for case in cases]


@pytest.mark.parametrize("record_id", ["", "7", "no uuid", "0" * 32, f"{'0' * 16}{'a' * 16}", "é"])
def test_any_id_of_a_record_makes_ids_of_a_span(
    make_site: Make, collector: Receiver, record_id: str
) -> None:
    site = make_site([Kept([make_record(id=record_id), make_record(id=record_id, app="other")])])
    replayed(site.app, *EVER)
    replayed(site.app, *EVER)
    first, other, again, _ = collector.spans()
    assert is_valid(first)
    assert (again.trace_id, again.span_id) == (first.trace_id, first.span_id)
    assert other.trace_id != first.trace_id


def make_old_table(file: Path, year: int, keys: tuple[int, ...] = (1, 2, 3)) -> None:
    """Make a table as flask-track-usage left it."""
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(
            "CREATE TABLE flask_usage (id INTEGER PRIMARY KEY, url VARCHAR(128), "
            "status INTEGER, path VARCHAR(32), speed FLOAT, datetime DATETIME)"
        )
        for key in keys:
            connection.execute(
                "INSERT INTO flask_usage VALUES (?, 'http://localhost/a?x=1', 200, '/a', 0.3, ?)",
                (key, f"{year}-05-01 12:00:00.000000"),
            )
        connection.execute("INSERT INTO flask_usage (datetime) VALUES (?)", (f"{year}-06-01",))


def test_rows_of_flask_track_usage_have_valid_ids_that_stay(
    tmp_path: Path, make_site: Make, collector: Receiver
) -> None:
    ids = []
    for year in (2017, 2018, 2018):
        make_old_table(tmp_path / f"{len(ids)}.sqlite3", year, (-1, 0, 1, 2, 3))
        site = make_site(f"sqlite:///{tmp_path}/{len(ids)}.sqlite3")
        # Reading upgrades the table: afterwards it must be the same.
        assert replayed(site.app, *ALL) == replayed(site.app, *ALL)
        spans = collector.spans()[12 * len(ids) :]
        assert contents(spans[:6]) == contents(spans[6:])
        assert all(is_valid(span) for span in spans)
        ids.append([(span.trace_id, span.span_id) for span in spans[:6]])
        assert {span.resource["service.name"] for span in spans} == {"shop"}
    assert spans[0].name == "HTTP"
    assert spans[0].attributes["url.path"] == "/a"
    assert spans[0].end_ns - spans[0].start_ns == 300_000_000
    assert ids[1] == ids[2]
    assert len({*ids[0], *ids[1]}) == 12  # the same keys, of another app's table


@pytest.mark.parametrize("preset", ["balanced", "strict"])
def test_a_span_says_no_more_than_the_record(
    make_site: Make, collector: Receiver, preset: str
) -> None:
    site = make_site(
        PRIVACY=preset, SECRET_KEY="k", username=lambda: "ann@example.org", TRACES_ENDUSER=True
    )
    site.app.add_url_rule("/reset/<token>", "reset", lambda token: "x")
    headers = {"User-Agent": "PersonalBrowser/1.0 (ann)", "Referer": "https://ann.example/"}
    site.get("/reset/s3cret?q=private&token=s3cret", headers=headers)
    record = site.only_record()
    replayed(site.app, *ALL)
    (span,) = collector.spans()
    assert span.attributes == attributes_of(record, user=True)
    assert span.attributes["url.path"] == record.path
    told = str(span)
    for secret in ("s3cret", "203.0.113.9", "ann@example.org", "PersonalBrowser"):
        assert secret not in told


@pytest.mark.parametrize("asked", [False, True])
def test_users_are_named_as_the_app_says(make_site: Make, collector: Receiver, asked: bool) -> None:
    site = make_site(TRACES_ENDUSER=asked)
    keep(site, [make_record(username="ann")])
    replayed(site.app, *EVER)
    assert collector.spans()[0].attributes.get("enduser.id") == ("ann" if asked else None)


def test_apps_that_share_a_storage_are_services_of_their_own(
    make_site: Make, collector: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    apps = ["shop", "admin", "", "shop"]
    keep(site, [make_record(app=app) for app in apps])
    replayed(site.app, *EVER)
    assert sorted(span.resource["service.name"] for span in collector.spans()) == [
        "admin", "shop", "shop", "shop"
    ]  # fmt: skip
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mall")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    replayed(site.app, *EVER)
    resources = [span.resource for span in collector.spans()[4:]]
    assert {resource["service.name"] for resource in resources} == {"mall"}
    assert {resource["deployment.environment.name"] for resource in resources} == {"test"}


def test_a_sampler_of_the_environment_drops_none(
    make_site: Make, collector: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    site = make_site()
    keep(site, make_records(3))
    assert replayed(site.app, *EVER).startswith("3 spans exported")
    assert len(collector.spans()) == 3


def test_what_cannot_be_a_span_is_left_out_and_told(make_site: Make, collector: Receiver) -> None:
    broken: list[dict[str, Any]] = [
        {"started_at": datetime(1969, 12, 31, tzinfo=UTC)},
        {"started_at": datetime(2700, 1, 1, tzinfo=UTC)},
        {"duration_seconds": float("nan")},
        {"duration_seconds": float("inf")},
        {"duration_seconds": 1e30},
        {"duration_seconds": -1e12},
        {"protocol": None},
    ]
    records = [make_record(**one) for one in broken]
    good = make_records(2)
    site = make_site([Kept([good[0], *records, good[1]])])
    result = replay(site.app, "--since", "0001-01-01", "--until", "9999-12-31", "--batch", "4")
    assert result.exit_code == 1
    assert result.stdout == "2 spans exported, 0001-01-01 00:00 to 9999-12-31 00:00 UTC\n"
    assert result.stderr == "Error: 7 records cannot be spans, such as by their times\n"
    found = [span.attributes["flask_usage.record_id"] for span in collector.spans()]
    assert found == [record.id for record in good]


# ------------------------------------------------------------------------ which records


def test_only_what_is_meant_is_exported(make_site: Make, collector: Receiver) -> None:
    site = make_site()
    fields = [("index", 200), ("item", 204), ("item", 503), ("cart", 404), (None, 404)]
    records = [
        make_record(started_at=START + timedelta(hours=hour), endpoint=endpoint, status=status)
        for hour in range(3)
        for endpoint, status in fields
    ]
    keep(site, records)
    cases: list[tuple[tuple[str, ...], Callable[[UsageRecord], bool]]] = [
        (EVER, lambda record: True),
        (("--endpoint", "item"), lambda record: record.endpoint == "item"),
        (
            ("--endpoint", "item", "--endpoint", "cart"),
            lambda record: record.endpoint in ("item", "cart"),
        ),
        (("--status-class", "5xx"), lambda record: record.status == 503),
        (
            ("--status-class", "5XX", "--status-class", "2xx", "--endpoint", "item"),
            lambda record: record.endpoint == "item",
        ),
        (
            ("--since", "2026-11-22T10:00", "--until", "2026-11-22T11:00Z"),
            lambda record: record.started_at.hour == 10,
        ),
        (
            ("--since", "2026-11-22T10:00:00.000001Z", "--until", "2026-11-22T13:00:00.000+01:00"),
            lambda record: record.started_at.hour == 11,
        ),
    ]
    for options, is_meant in cases:
        before = len(collector.spans())
        replayed(site.app, *EVER, *options)
        found = collector.spans()[before:]
        expected = [record for record in records if is_meant(record)]
        assert [span.start_ns for span in found] == [nanoseconds(r.started_at) for r in expected]
        assert {span.attributes["flask_usage.record_id"] for span in found} == {
            record.id for record in expected
        }


def test_a_dry_run_counts_and_exports_nothing(
    make_site: Make, collector: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    keep(site, make_records(1203))
    keep(site, [make_record(endpoint="item", started_at=START + timedelta(days=1))])
    during = ("--since", "2026-11-22", "--until", "2026-11-24T09:12:59")
    stretch = "2026-11-22 00:00 to 2026-11-24 09:12 UTC\n"
    # Not even the exporter is needed.
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    said = replayed(site.app, *during, "--dry-run")
    assert said == f"1 204 spans would be exported, {stretch}"
    said = replayed(site.app, *during, "--endpoint", "item", "--dry-run")
    assert said == f"1 span would be exported, {stretch}"
    said = replayed(site.app, *during, "--endpoint", "none", "--dry-run")
    assert said == f"0 spans would be exported, {stretch}"
    assert collector.sizes == []
    monkeypatch.undo()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    assert replayed(site.app, *during) == f"1 204 spans exported, {stretch}"
    assert collector.sizes == [512, 512, 180]


def test_quiet_says_nothing_but_what_went_wrong(make_site: Make, collector: Receiver) -> None:
    site = make_site()
    keep(site, make_records(3))
    assert replayed(site.app, *EVER, "--quiet") == ""
    assert len(collector.spans()) == 3
    collector.status = 401
    result = replay(site.app, *EVER, "-q")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "HTTP 401" in result.stderr


# ------------------------------------------------------------------------ times

NOW = datetime(2026, 11, 24, 9, 12, 30, 123456, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("now", NOW),
        (" Now ", NOW),
        ("today", datetime(2026, 11, 24, tzinfo=UTC)),
        ("yesterday", datetime(2026, 11, 23, tzinfo=UTC)),
        ("7d", NOW - timedelta(days=7)),
        ("24h", NOW - timedelta(hours=24)),
        ("90m", NOW - timedelta(minutes=90)),
        ("2W", NOW - timedelta(weeks=2)),
        ("0d", NOW),
        ("2026-08-01", datetime(2026, 8, 1, tzinfo=UTC)),
        ("2026-08-01T12:00", datetime(2026, 8, 1, 12, tzinfo=UTC)),
        ("2026-08-01 12:00", datetime(2026, 8, 1, 12, tzinfo=UTC)),
        ("2026-08-01T12:00:07Z", datetime(2026, 8, 1, 12, 0, 7, tzinfo=UTC)),
        ("2026-08-01t12:00:07z", datetime(2026, 8, 1, 12, 0, 7, tzinfo=UTC)),
        ("2026-08-01T12:00+02:00", datetime(2026, 8, 1, 10, tzinfo=UTC)),
        ("2026-08-01T00:30:00-05:30", datetime(2026, 8, 1, 6, tzinfo=UTC)),
        ("2026-08-01T12:00:07.123Z", datetime(2026, 8, 1, 12, 0, 7, 123000, tzinfo=UTC)),
        ("2026-08-01T12:00:07.000001", datetime(2026, 8, 1, 12, 0, 7, 1, tzinfo=UTC)),
    ],
)
def test_times_are_understood(text: str, expected: datetime) -> None:
    found = parse_when(text, NOW)
    assert found == expected
    assert found.utcoffset() == timedelta(0)


@pytest.mark.parametrize(
    "text",
    [
        "", "7", "d", "7x", "-7d", "7 d", "7d7d", "\u0667d", "1.5h", "tomorrow", "2026",
        "2026-13-01", "2026-02-30", "2026-8-1", "20260801", "01.08.2026", "2026-W31", "12:00",
        "2026-08-01T", "2026-08-01T25:00", "2026-08-01T12",
        "2026-08-01T12:00:00.1", "2026-08-01T12:00.500",
        "2026-08-01Z", "2026-08-01T12:00+2", "2026-08-01T12:00+99:00", "2026-08-01T12:00ZZ",
        "999999999w", "9" * 5000 + "d", "0001-01-01T00:00+12:00", "9999-12-31T23:59-12:00",
        "1969-12-31 and so on", "\udc80", "now\0", "2026-08-01\n2026-08-01",
    ],
)  # fmt: skip
def test_what_is_not_a_time_is_refused_with_examples(make_site: Make, text: str) -> None:
    result = replay(make_site().app, "--since", text)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Invalid value for '--since'" in result.stderr
    for example in ("7d", "yesterday", "2026-08-01T12:00"):
        assert example in result.stderr


@pytest.fixture(scope="module")
def empty() -> Flask:
    """An app with nothing in its storage."""
    app = Flask("empty")
    TrackUsage(app, [Kept([])])
    return app


_PARTS = st.sampled_from([*"0123456789-:.+TZdhmw /\u0663", "2026-08-01", "T12:00", "now", "today"])


@given(st.text() | st.lists(_PARTS, max_size=12).map("".join))
@hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_time_makes_a_traceback(empty: Flask, text: str) -> None:
    for options in (("--since", text), ("--since", "0001-01-01", "--until", text)):
        result = replay(empty, *options, "--dry-run")
        assert result.exit_code in (0, 2)
        assert result.stderr.count("Error: ") == (result.exit_code == 2)


@given(st.datetimes(timezones=st.timezones() | st.just(UTC)))
@hypothesis_settings(deadline=None)
def test_every_time_that_is_printed_is_understood(moment: datetime) -> None:
    try:
        in_utc = moment.astimezone(UTC)
    except OverflowError:
        return
    assert parse_when(in_utc.isoformat(), NOW) == in_utc
    assert parse_when(in_utc.replace(tzinfo=None).isoformat() + "Z", NOW) == in_utc


def test_since_must_be_before_until(make_site: Make) -> None:
    app = make_site().app
    for options in (("now",), ("7d", "--until", "7d"), ("today", "--until", "yesterday")):
        result = replay(app, "--since", *options)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "--since must be before --until" in result.stderr


# ------------------------------------------------------------------------ what may go wrong


class Failing(Receiver):
    """A collector that answers some requests with an error, or (0) not at all."""

    def __init__(self, answers: list[int]) -> None:
        super().__init__()
        self.answers = iter(answers)

    def answer(self, path: str, body: bytes, *rest: Any) -> int:
        self.status = next(self.answers, 200)
        if not self.status:
            self.hang_seconds = 60.0
        return super().answer(path, body, *rest)


def test_after_a_failure_it_says_how_many_went_and_goes_on_there(
    make_site: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    keep(site, records := make_records(100, step=timedelta(milliseconds=1, microseconds=1)))
    with Failing([200, 200, 500]) as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        result = replay(site.app, "--since", "2026-11-22", "--until", "2026-11-23", "--batch", "30")
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == (
            "Error: the collector did not take the spans: HTTP 500; 60 spans exported\n"
            "To go on: the same with --since 2026-11-22T09:00:00.060060Z "
            "--until 2026-11-23T00:00:00Z\n"
        )
        assert len(collector.spans()) == 60
        hint = result.stderr.split("with ")[1].split()
        assert replayed(site.app, *hint, "--batch", "30").startswith("40 spans exported")
        found = [span.attributes["flask_usage.record_id"] for span in collector.spans()]
    assert found == [record.id for record in records]


def test_what_passes_is_tried_again_in_silence(
    make_site: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    keep(site, make_records(10))
    with Failing([200, 503]) as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        assert replayed(site.app, *EVER, "--batch", "5").startswith("10 spans exported")
    assert collector.sizes == [5, 5]
    assert collector.refusals == 1


def test_a_failure_that_passed_is_not_taken_for_the_one_that_did_not(
    make_site: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    keep(site, make_records(3))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")
    with Failing([503, 200, 0]) as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        result = replay(site.app, *EVER, "--batch", "1")
    assert result.exit_code == 1
    assert "OTEL_EXPORTER_OTLP_TIMEOUT gives; 1 span exported\n" in result.stderr


def test_an_exporter_that_raises_makes_no_traceback(
    make_site: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(self: OTLPSpanExporter, spans: Any) -> Any:  # as before 1.25
        try:
            raise ConnectionRefusedError(111, "Connection refused")
        except OSError as error:
            raise RuntimeError("http://bob:pa55word@localhost") from error

    monkeypatch.setattr(OTLPSpanExporter, "export", export)
    site = make_site()
    keep(site, make_records(3))
    result = replay(site.app, *EVER)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "did not take the spans: Connection refused; 0 spans exported\n" in result.stderr
    assert "pa55word" not in result.stderr


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("http://127.0.0.1:{port}", "Connection refused"),
        ("http://bob:pa55word@127.0.0.1:{port}/?key=pa55word", "Connection refused"),
        ("http://bob:pa55word@collector.invalid", ""),
        ("bob:pa55word", ""),
        ("http://bob:pa55word@[broken", ""),
        ("http://bob:pa55word@127.0.0.1:pa55word", ""),
    ],
)
def test_a_collector_that_is_not_there_is_told_without_a_password(
    make_site: Make, monkeypatch: pytest.MonkeyPatch, endpoint: str, reason: str
) -> None:
    site = make_site()
    keep(site, make_records(3))
    port = Receiver().endpoint.rpartition(":")[2]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.format(port=port))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=pa55word,,pa55word")
    result = replay(site.app, *EVER)
    assert (result.exit_code, result.stdout) == (1, "")
    assert reason in result.stderr
    assert "0 spans exported\nTo go on: " in result.stderr
    assert "pa55word" not in result.stderr
    assert "Traceback" not in result.stderr


def test_an_app_that_is_not_tracked_is_told_so() -> None:
    result = replay(Flask("bare"), "--since", "7d")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "Error: the app 'bare' is not tracked: "
        "call TrackUsage(app), or usage.init_app(app) in its factory\n"
    )


@pytest.mark.parametrize("given", [[], ["print:"], [lambda record: None]])
def test_an_app_without_a_readable_storage_is_told_so(make_site: Make, given: list[Any]) -> None:
    result = replay(make_site(given).app, "--since", "7d")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: none of the app's storages can be read")


def test_a_storage_that_offers_no_records_is_told_so(make_site: Make, collector: Receiver) -> None:
    class Legacy(Storage):
        def store(self, data: dict[str, Any]) -> None: ...

    for options in ((), ("--dry-run",)):
        result = replay(make_site([Legacy()]).app, "--since", "7d", *options)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == "Error: the app's storage does not offer records()\n"


def test_the_first_storage_that_can_be_read_is(make_site: Make, collector: Receiver) -> None:
    site = make_site(["print:", Kept(make_records(2)), Kept(make_records(5))])
    assert replayed(site.app, *EVER).startswith("2 spans exported")


def test_a_storage_that_is_down_is_told(make_site: Make, tmp_path: Path) -> None:
    (tmp_path / "pa55word.sqlite3").write_bytes(b"no database" * 100)
    site = make_site(f"sqlite:///{tmp_path}/pa55word.sqlite3")
    for options in ((), ("--dry-run",)):
        result = replay(site.app, "--since", "7d", *options)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("Error: the storage cannot be read now: sqlite: ")
        assert ("To go on: " in result.stderr) == (not options)
        assert "pa55word" not in result.stderr


def test_a_storage_that_goes_down_on_the_way_is_told(make_site: Make, collector: Receiver) -> None:
    records = make_records(10)
    site = make_site([Kept(records, fails_at=7)])
    result = replay(site.app, *EVER, "--batch", "3")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "Error: the storage cannot be read now: kept: Connection reset by peer; 6 spans exported\n"
        # The last that went, for what comes next is not known.
        "To go on: the same with --since 2026-11-22T09:00:05Z --until 9999-12-31T00:00:00Z\n"
    )


@pytest.mark.parametrize(
    "missing", ["opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.sdk.trace"]
)
def test_without_the_extra_it_says_what_to_install(
    make_site: Make, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in [name for name in sys.modules if name.startswith(missing)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    result = replay(make_site().app, "--since", "7d")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "pip install 'flask-usage-metrics[otlp]'" in result.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_SDK_DISABLED", " True"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
        ("OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER", "pa55word"),
    ],
)
def test_variables_with_which_nothing_would_come_are_refused(
    make_site: Make,
    collector: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
) -> None:
    monkeypatch.setenv(name, value)
    site = make_site()
    keep(site, make_records(1))
    result = replay(site.app, *EVER)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "OTEL_" in result.stderr
    assert "pa55word" not in result.stderr
    assert collector.sizes == []


def test_the_protocol_of_traces_overrides_the_general_one(
    make_site: Make, collector: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    site = make_site()
    keep(site, make_records(1))
    assert replayed(site.app, *EVER).startswith("1 span exported")
    assert collector.sizes == [1]


# ------------------------------------------------------------------------ what it leaves alone


def test_it_leaves_nothing_behind(
    make_site: Make, collector: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suppressed: list[object] = []
    export = OTLPSpanExporter.export

    def watched(self: OTLPSpanExporter, spans: Any) -> Any:
        suppressed.append(otel_context.get_value(_SUPPRESS_INSTRUMENTATION_KEY))
        return export(self, spans)

    monkeypatch.setattr(OTLPSpanExporter, "export", watched)
    provider = trace.get_tracer_provider()
    site = make_site(TRACES=True, tracer_provider=TracerProvider())
    keep(site, make_records(3))
    threads, files = set(threading.enumerate()), set(tmp_path.rglob("*"))
    replayed(site.app, *EVER)
    replayed(site.app, *EVER, "--dry-run")
    ours = [thread for thread in set(threading.enumerate()) - threads if "flask" in thread.name]
    assert ours == []
    assert set(tmp_path.rglob("*")) == files
    assert trace.get_tracer_provider() is provider
    assert logging.getLogger("opentelemetry").propagate
    assert logging.getLogger("opentelemetry").handlers == []
    assert suppressed == [True]
    assert otel_context.get_value(_SUPPRESS_INSTRUMENTATION_KEY) is None
    assert len(site.records()) == 3
    assert site.counted() == {}


class Weighing(Receiver):
    """A collector that keeps nothing, and looks at the memory in use while the sender waits."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes_in_use: list[int] = []

    def answer(self, path: str, body: bytes, *rest: Any) -> int:
        self.sizes.append(len(body))
        if len(self.sizes) == 6:  # from the first on, all would take five times as long
            tracemalloc.start()
        if tracemalloc.is_tracing():
            gc.collect()
            self.bytes_in_use.append(tracemalloc.get_traced_memory()[0])
        return 200


def test_memory_does_not_grow_with_the_records(
    make_site: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    records = make_records(6_000)
    keep(
        site,
        [
            msgspec.structs.replace(record, host=f"{number}.example", rule=f"/{number}/<name>")
            for number, record in enumerate(records)
        ],
    )
    del records
    with Weighing() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        try:
            assert replayed(site.app, *EVER).startswith("6 000 spans exported")
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert len(collector.sizes) == 12
    settled, last = collector.bytes_in_use[2], collector.bytes_in_use[-2]
    # In between are eight batches of 512 records: 30 bytes for each, less than any text takes.
    assert last - settled < 120_000, (collector.bytes_in_use, collector.sizes)
    assert most < 10_000_000


# ------------------------------------------------------------------------ as a program


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with an app and its 1 204 records."""
    url = f"sqlite:///{tmp_path}/usage.sqlite3"
    storage = open_storage(url)
    storage.write(make_records(1204, app="shop"))
    storage.close()
    (tmp_path / "shop.py").write_text(SHOP.format(url=url))
    return tmp_path


def start(folder: Path, *arguments: str, **options: Any) -> Process:
    command = (sys.executable, "-W", "error", "-m", "flask", *arguments)
    return Process(*command, folder=folder, **options)


def finish(process: Process) -> Done:
    with process:
        return process.finish()


def run(folder: Path, *arguments: str) -> Done:
    return finish(start(folder, *arguments))


def test_flask_finds_the_command(shop: Path, collector: Receiver) -> None:
    code, out, err = run(shop, "--app", "shop", "usage", "--help")
    assert (code, err) == (0, "")
    assert re.search(r"replay-spans +Export stored records as OpenTelemetry spans\.", out)
    code, out, err = run(
        shop, "--app", "shop", "usage", "replay-spans", "--since", "2026-11-22",
        "--until", "2026-11-24T09:12",
    )  # fmt: skip
    said = "1 204 spans exported, 2026-11-22 00:00 to 2026-11-24 09:12 UTC\n"
    assert (code, out, err) == (0, said, "")
    assert len(set(collector.ids())) == 1204
    assert len(collector.of("shop")) == 1204
    assert collector.sizes == [512, 512, 180]
    left = {file.name for file in shop.iterdir()} - {"__pycache__"}
    assert left == {"shop.py", "usage.sqlite3"}


def test_the_terminal_shows_a_failure_once_and_no_log(
    shop: Path, collector: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (shop / "shop.py").open("a") as file:
        file.write("import logging\nlogging.basicConfig()\n")
    collector.status = 503
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")
    code, out, err = run(shop, "--app", "shop", "usage", "replay-spans", *EVER)
    assert (code, out) == (1, "")
    assert err == (
        "Error: the collector did not take the spans: HTTP 503; 0 spans exported\n"
        "To go on: the same with --since 2026-11-22T09:00:00Z --until 9999-12-31T00:00:00Z\n"
    )
    assert collector.refusals == 2  # it was tried again


def test_an_unknown_app_is_told(tmp_path: Path) -> None:
    code, out, err = run(tmp_path, "--app", "nope", "usage", "replay-spans", "--since", "7d")
    assert (code, out) == (2, "")
    assert "Could not import 'nope'" in err
    assert "Traceback" not in err


def test_other_commands_do_not_wait_for_what_this_one_needs(tmp_path: Path) -> None:
    code = (
        "import sys, flask_usage_metrics.cli\n"
        "print([name for name in sys.modules if name in ('opentelemetry', 'sqlalchemy')])"
    )
    assert run_python(code, fresh=True) == (0, "[]\n", "")


@pytest.fixture
def _ctrl_c_works() -> Iterator[None]:
    """A shell lets what it runs in the background ignore Ctrl-C, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_works")
def test_ctrl_c_says_how_to_go_on(shop: Path, collector: Receiver) -> None:
    process = start(
        shop, "--app", "shop", "usage", "replay-spans", *EVER, "--batch", "100"
    )  # fmt: skip
    until = time.monotonic() + 30
    while len(collector.sizes) < 2:
        assert time.monotonic() < until
        time.sleep(0.001)
    collector.hang_seconds = 60.0
    assert collector.hangs.wait(30)
    done = len(collector.sizes)  # and one more is being waited for
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, out) == (130, "")
    number = f"{100 * done:,}".replace(",", " ")
    moment = (START + timedelta(seconds=100 * done)).replace(tzinfo=None).isoformat()
    assert err == (
        f"Error: interrupted; {number} spans exported\n"
        f"To go on: the same with --since {moment}Z --until 9999-12-31T00:00:00Z\n"
    )


def test_a_terminal_shows_how_far_it_is(shop: Path, collector: Receiver) -> None:
    for options, shown in (((), True), (("--quiet",), False), (("--dry-run",), False)):
        reading, writing = os.openpty()
        process = start(
            shop, "--app", "shop", "usage", "replay-spans", *EVER, *options, stderr=writing
        )
        os.close(writing)
        seen = b""
        with open(reading, "rb", 0) as terminal:  # noqa: PTH123 - a descriptor has no path
            try:
                while some := terminal.read(4096):
                    seen += some
            except OSError:  # what Linux says when the other end is closed
                pass
        code, out, _ = finish(process)
        assert code == 0
        assert out.startswith("1 204 spans") == ("--quiet" not in options)
        assert (b"512/1204" in seen) == shown
        assert (b"1204/1204" in seen) == shown
        assert shown or seen == b""
