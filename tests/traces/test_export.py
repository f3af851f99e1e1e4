"""Spans over the wire: all of them, once, whatever becomes of the collector or of a process."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import requests
from helpers.collector import Received, Receiver
from helpers.front_door import Site
from helpers.process import Process, start_python, until
from helpers.servers import Gunicorn
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    Decision,
    ParentBased,
    TraceIdRatioBased,
)
from opentelemetry.util._once import Once

from flask_usage_metrics import ConfigError, open_storage
from flask_usage_metrics.storage import Storage
from flask_usage_metrics.traces.conventions import SCHEMA_URL

Make = Callable[..., Site]
SDK = tuple(int(part) for part in version("opentelemetry-sdk").split(".")[:2])
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(autouse=True)
def collector() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture(autouse=True)
def environment(collector: Receiver, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have the SDK's variables name the collector, and no global provider set."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER_SET_ONCE", Once())
    yield
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        provider.shutdown()


@pytest.fixture
def make_shop(make_site: Make) -> Make:
    """Make a site with traces, and views that succeed, fail and query."""

    def make(traces: Any = True, **options: Any) -> Site:
        site = make_site(TRACES=traces, **options)
        site.app.add_url_rule("/", "index", lambda: "x")
        site.app.add_url_rule("/fails", "fails", lambda: ("x", 503))

        @site.app.get("/item/<int:number>")
        def item(number: int) -> str:
            with trace.get_tracer("child").start_as_current_span(f"SELECT {number}"):
                return "x"

        return site

    return make


def visit(site: Site, count: int, path: str = "/") -> None:
    for _ in range(count):
        assert site.get(path).status_code == 200


def account(written: int, dropped: int = 0, failed: int = 0, pending: int = 0) -> dict[str, int]:
    return {"written": written, "dropped": dropped, "failed": failed, "pending": pending}


def is_up(site: Site) -> float:
    return site.samples("flask_usage_sink_up")[(("sink", "traces"),)]


def assert_agrees(site: Site, collector: Receiver) -> None:
    """Spans = records, each once, with the same ids, times and status."""
    site.assert_agrees()
    records = {record.span_id: record for record in site.records()}
    assert sorted(collector.ids()) == sorted(records)
    for span in collector.servers():
        record = records[span.span_id]
        assert span.trace_id == record.trace_id
        assert span.parent_id == (record.parent_span_id or "")
        assert span.start_ns // 1000 == int(record.started_at.timestamp() * 1e6 + 0.5)
        assert span.end_ns - span.start_ns == round(record.duration_seconds * 1e9)
        assert span.attributes["http.response.status_code"] == record.status
        assert span.attributes["flask_usage.record_id"] == record.id
    assert site.account("traces") == account(len(records))


# ------------------------------------------------------------------------ what is sent, and where


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_true_alone_sends_to_the_collector_of_the_environment(
    make_shop: Make,
    collector: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    compression: str,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", compression)
    site = make_shop()
    site.get("/item/7", headers={"traceparent": PARENT, "User-Agent": "curl/8.5.0"})
    site.get("/fails")
    assert site.usage.flush()
    item, fails = collector.servers()
    assert (item.name, item.status, item.parent_id) == (
        "GET /item/<int:number>",
        "UNSET",
        PARENT[36:52],
    )
    schema = SCHEMA_URL if SDK >= (1, 24) else ""  # not sent then
    assert item.scope == ("flask_usage_metrics", version("flask-usage-metrics"), schema)
    assert item.resource["service.name"] == "shop"
    assert item.attributes == {
        "http.request.method": "GET",
        "http.route": "/item/<int:number>",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "url.path": "/item/7",
        "server.address": "localhost",
        "server.port": 80,
        "client.address": "203.0.113.9",
        "network.protocol.version": "1.1",
        "user_agent.original": "curl/8.5.0",
        "user_agent.synthetic.type": "bot",
        "flask.endpoint": "item",
        "flask_usage.client": "script",
        "flask_usage.record_id": site.records()[0].id,
    }
    assert (fails.status, fails.attributes["error.type"]) == ("ERROR", "503")
    (child,) = [span for span in collector.spans() if span.kind == "INTERNAL"]
    assert (child.trace_id, child.parent_id) == (PARENT[3:35], item.span_id)
    assert child.resource == item.resource
    assert_agrees(site, collector)


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("OTEL_SERVICE_NAME", "checkout", "checkout"),
        ("OTEL_RESOURCE_ATTRIBUTES", "service.name=checkout,team=web", "checkout"),
        ("OTEL_RESOURCE_ATTRIBUTES", "k8s.service.name=checkout,team=web", "shop"),
        ("OTEL_SERVICE_NAME", "", "shop"),
    ],
)
def test_the_environment_names_the_service_or_else_it_is_the_app(
    make_shop: Make,
    collector: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    expected: str,
) -> None:
    monkeypatch.setenv(variable, value)
    site = make_shop()
    visit(site, 1)
    assert site.usage.flush()
    (span,) = collector.spans()
    assert span.resource["service.name"] == expected
    assert span.resource.get("team") == ("web" if "team" in value else None)


def test_an_exporter_that_is_given_gets_all(make_shop: Make, collector: Receiver) -> None:
    site = make_shop(OTLPSpanExporter(collector.url, headers={"api-key": "k"}))
    visit(site, 3, "/item/1")
    assert site.usage.flush()
    assert len(collector.spans()) == 6
    assert_agrees(site, collector)


def test_a_global_provider_of_before_the_first_request_is_used(
    make_shop: Make, collector: Receiver
) -> None:
    site = make_shop()
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    visit(site, 3, "/item/1")
    assert site.usage.flush()
    assert collector.spans() == []  # its processor sends them in its own time
    provider.force_flush()
    assert len(collector.spans()) == 6
    assert_agrees(site, collector)


def test_an_exporter_beside_a_global_provider_gets_the_requests_only(
    make_shop: Make, collector: Receiver
) -> None:
    with Receiver() as theirs:
        provider = TracerProvider()
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(theirs.url)))
        trace.set_tracer_provider(provider)
        site = make_shop(OTLPSpanExporter(collector.url))
        visit(site, 2, "/item/1")
        assert site.usage.flush()
        provider.force_flush()
        assert [span.parent_id for span in theirs.spans()] == collector.ids()
        assert len(collector.spans()) == 2
    assert_agrees(site, collector)


def test_exporting_is_not_traced_in_turn(make_shop: Make) -> None:
    seen: list[object] = []

    class Exporter(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            # What instrumentations of HTTP clients look at, of any version.
            seen.append(otel_context.get_value(otel_context._SUPPRESS_INSTRUMENTATION_KEY))
            return SpanExportResult.SUCCESS

    site = make_shop(Exporter())
    visit(site, 1, "/item/1")
    assert site.usage.flush()
    assert seen == [True, True]
    # Also where the thread of a request has to do it.
    site.app.extensions["track_usage"].traces.writer.write(site.records())
    assert seen == [True, True, True]
    assert otel_context.get_value(otel_context._SUPPRESS_INSTRUMENTATION_KEY) is None


def test_no_exporter_is_called_twice_at_once(
    make_shop: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    busy = threading.Lock()
    exported: list[ReadableSpan] = []
    was_busy: list[bool] = []

    class Exporter(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            is_first = busy.acquire(blocking=False)
            was_busy.append(not is_first)
            time.sleep(0.05)
            exported.extend(spans)
            if is_first:
                busy.release()
            return SpanExportResult.SUCCESS

    site = make_shop(Exporter(), FLUSH_SECONDS=0.01)
    for _ in range(30):
        visit(site, 1, "/item/1")
        time.sleep(0.01)
    assert site.usage.flush()
    assert len(exported) == 60
    assert not any(was_busy)


def test_an_exporter_that_cannot_be_made_yet_loses_nothing(
    make_shop: Make, collector: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_shop()

    def fails(*_: object) -> None:
        raise ValueError

    with monkeypatch.context() as patch:
        patch.setattr(OTLPSpanExporter, "__init__", fails)
        visit(site, 3)
        # So long that what is no outage would have been given up.
        assert not site.usage.flush(1.5)
        assert is_up(site) == 0
        assert site.account("traces") == account(0, pending=3)
    assert site.usage.flush(20)
    assert_agrees(site, collector)


# ------------------------------------------------------------------------ OpenTelemetry's switches


def test_none_sends_nothing_and_still_has_ids(
    make_shop: Make, collector: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    site = make_shop()
    visit(site, 3, "/item/1")
    assert site.usage.flush()
    assert site.account("traces") == account(3)
    assert collector.spans() == []
    assert None not in {record.span_id for record in site.records()}
    site.assert_agrees()


@pytest.mark.skipif(SDK < (1, 24), reason="the SDK cannot be disabled before 1.24")
def test_a_disabled_sdk_has_no_spans_but_the_callers_ids(
    make_shop: Make, collector: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    site = make_shop()
    visit(site, 2, "/item/1")
    site.get(headers={"traceparent": PARENT})
    assert [record.trace_id for record in site.records()] == [None, None, PARENT[3:35]]
    assert site.account("traces") == account(0)
    assert collector.spans() == []
    site.assert_agrees()


def sampled(site: Site) -> list[str | None]:
    """Ids of the spans of all requests that a half is taken of, by the ids of their traces."""
    sampler = TraceIdRatioBased(0.5)
    return [
        record.span_id
        for record in site.usage.storage.records()
        if sampler.should_sample(None, int(record.trace_id or "", 16), "").decision
        is not Decision.DROP
    ]


def test_a_half_is_sent_where_a_half_is_sampled(
    make_shop: Make, collector: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    site = make_shop()
    visit(site, 100, "/item/1")
    assert site.usage.flush()
    expected = sampled(site)
    assert 20 < len(expected) < 80
    assert sorted(collector.ids()) == sorted(expected)
    assert len(collector.spans()) == 2 * len(expected)
    assert site.account("traces") == account(len(expected))
    site.assert_agrees()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", "must be otlp, console or none for us, not 'zipkin'"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "must be http/protobuf for us, not 'grpc'"),
    ],
)
def test_what_we_do_not_speak_is_named(
    make_shop: Make, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name} {message}"):
        make_shop()


def test_the_protocol_of_traces_is_what_counts(
    make_shop: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    make_shop()


def test_a_missing_exporter_names_the_extra(
    make_shop: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'flask-usage-metrics\[otlp\]'"):
        make_shop()


def test_a_provider_that_is_given_needs_no_exporter(
    make_shop: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    make_shop(tracer_provider=TracerProvider())


def test_without_opentelemetry_the_extra_is_named(tmp_path: Path) -> None:
    done = start(
        tmp_path,
        """
        import sys
        sys.modules["opentelemetry"] = None
        from flask import Flask
        from flask_usage_metrics import ConfigError, TrackUsage
        app = Flask("shop")
        app.config["TRACK_USAGE_TRACES"] = True
        try:
            TrackUsage(app, "sqlite://")
        except ConfigError as error:
            print(error)
        """,
    ).finish()
    expected = "opentelemetry is not installed: pip install 'flask-usage-metrics[otlp]'\n"
    assert done == (0, expected, "")


# ------------------------------------------------------------------------ a collector that fails


def exporter(collector: Receiver) -> OTLPSpanExporter:
    made = OTLPSpanExporter(collector.url, timeout=1)
    made._MAX_RETRY_TIMEOUT = 2  # that of SDK 1.20 tries for a minute, whatever the timeout
    return made


@pytest.mark.parametrize("how", ["down", "hangs", "500", "400"])
def test_an_outage_delays_nobody_and_loses_nothing(
    make_shop: Make, collector: Receiver, how: str
) -> None:
    site = make_shop(exporter(collector))
    visit(site, 5)
    assert site.usage.flush()
    assert is_up(site) == 1
    if how == "down":
        collector.down()
    elif how == "hangs":
        collector.hang_seconds = 3
    else:
        collector.status = int(how)
    longest = 0.0
    for _ in range(20):
        started = time.perf_counter()
        visit(site, 1)
        longest = max(longest, time.perf_counter() - started)
    assert longest < 1
    until(lambda: is_up(site), 0)
    assert site.account("traces") == account(5, pending=20)
    assert site.usage.storage.count() == 25
    assert len(collector.spans()) == 5
    if how == "down":
        collector.up()
    collector.hang_seconds, collector.status = 0, 200
    assert site.usage.flush(20)
    assert is_up(site) == 1
    assert_agrees(site, collector)


def test_a_slow_collector_is_waited_for(make_shop: Make, collector: Receiver) -> None:
    collector.hang_seconds = 1
    site = make_shop()
    started = time.monotonic()
    visit(site, 20, "/item/1")
    assert not site.usage.flush(0.3)
    assert time.monotonic() - started < 1
    assert site.usage.flush(20)
    assert is_up(site) == 1
    assert_agrees(site, collector)


def test_a_hanging_collector_does_not_hold_up_a_flush_of_others_spans(
    make_shop: Make, collector: Receiver
) -> None:
    site = make_shop()
    visit(site, 1, "/item/1")
    assert site.usage.flush()
    collector.hang_seconds = 5
    trace.get_tracer("child").start_span("background").finish()
    started = time.monotonic()
    assert site.usage.flush()
    assert time.monotonic() - started < 3
    collector.down()


def test_what_the_app_says_of_a_span_outlasts_an_outage(
    make_shop: Make, collector: Receiver
) -> None:
    collector.status = 500
    site = make_shop(exporter(collector))

    @site.app.get("/cart")
    def cart() -> str:
        trace.get_current_span().set_attribute("shop.cart", 7)
        return "x"

    visit(site, 1, "/cart")
    until(lambda: is_up(site), 0)
    visit(site, 1, "/cart")
    collector.status = 200
    assert site.usage.flush(20)
    assert [span.attributes["shop.cart"] for span in collector.servers()] == [7, 7]
    assert_agrees(site, collector)


def test_a_long_outage_drops_the_oldest_and_counts_them(
    make_shop: Make, collector: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    collector.down()
    site = make_shop(exporter(collector), SPOOL_BYTES=1024 * 1024, FLUSH_SECONDS=0.05)
    while is_up(site):
        visit(site, 1)
        time.sleep(0.05)
    for _ in range(8):
        visit(site, 80, "/?text=" + 7000 * "x")
        assert not site.usage.flush(0.1)
    until(lambda: site.account("traces")["dropped"] > 20, True)
    expected = sampled(site)
    found = site.account("traces")
    assert found == account(0, found["dropped"], pending=len(expected) - found["dropped"])
    collector.up()
    assert site.usage.flush(20)
    found = site.account("traces")
    assert found == account(len(expected) - found["dropped"], found["dropped"])
    assert set(collector.ids()) <= set(expected)
    assert len(collector.ids()) == len(set(collector.ids())) == found["written"]
    assert expected[-1] in collector.ids()
    site.assert_agrees()


def test_a_span_that_is_never_taken_holds_up_no_other(make_shop: Make, collector: Receiver) -> None:
    collector.refuses = lambda span: span.attributes.get("url.query") == "poison"
    site = make_shop(exporter(collector))
    visit(site, 1, "/?poison")
    assert not site.usage.flush(0.5)
    # Alone it looks like an outage.
    assert site.account("traces") == account(0, pending=1)
    visit(site, 20)
    visit(site, 2, "/?poison")
    visit(site, 20)
    assert site.usage.flush(20)
    assert site.account("traces") == account(40, failed=3)
    expected = [record.span_id for record in site.records() if record.query != "poison"]
    assert sorted(collector.ids()) == sorted(expected)
    site.assert_agrees()


def test_a_span_that_cannot_be_encoded_holds_up_no_other(
    make_shop: Make, collector: Receiver
) -> None:
    site = make_shop(exporter(collector))

    @site.app.get("/file")
    def file() -> str:
        trace.get_current_span().set_attribute("file", "\udcff")  # as os.fsdecode may return it
        return "x"

    visit(site, 3)
    visit(site, 1, "/file")
    visit(site, 3)
    assert site.usage.flush(20)
    assert len(collector.ids()) == len(set(collector.ids())) >= 6
    assert site.account("traces")["pending"] == 0
    site.assert_agrees()


class Failing(SpanExporter):
    """Takes spans after so many failures."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.taken: list[str] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if self.failures:
            self.failures -= 1
            return SpanExportResult.FAILURE
        self.taken += [trace.format_span_id(span.context.span_id) for span in spans]
        return SpanExportResult.SUCCESS


def test_no_span_is_refused_because_an_outage_ends(make_shop: Make) -> None:
    for failures in range(1, 7):
        failing = Failing(failures)
        site = make_shop(failing, FLUSH_SECONDS=60)
        visit(site, 6)
        assert site.usage.flush(20)
        assert sorted(failing.taken) == sorted(str(record.span_id) for record in site.records())
        assert site.account("traces") == account(6)


def test_a_collector_that_takes_few_at_once_gets_all(make_shop: Make, collector: Receiver) -> None:
    collector.most = 10
    site = make_shop(exporter(collector), FLUSH_SECONDS=60)
    visit(site, 100)
    assert site.usage.flush(30)
    assert max(collector.sizes) <= 10
    # It is not asked one by one, nor for too many again and again: that would be slow.
    assert len(collector.sizes) < 60
    assert collector.refusals < 10
    assert_agrees(site, collector)


def test_after_an_outage_many_are_sent_at_once_again(make_shop: Make, collector: Receiver) -> None:
    collector.status = 400
    site = make_shop(exporter(collector))
    visit(site, 40)
    assert not site.usage.flush(1)
    collector.status = 200
    assert site.usage.flush(20)
    visit(site, 40)
    assert site.usage.flush(20)
    assert collector.sizes[-1] > 10
    assert_agrees(site, collector)


def test_a_processor_of_the_app_that_raises_spoils_one_span_only(
    make_site: Make, collector: Receiver
) -> None:
    class Broken(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            if span.attributes and span.attributes.get("url.query") == "poison":
                raise ValueError

    provider = TracerProvider()
    provider.add_span_processor(Broken())
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    site = make_site(tracer_provider=provider, FLUSH_SECONDS=60)
    site.app.add_url_rule("/", "index", lambda: "x")
    visit(site, 10)
    visit(site, 1, "/?poison")
    visit(site, 10)
    assert site.usage.flush()
    provider.shutdown()
    assert site.account("traces") == account(20, failed=1)
    expected = [record.span_id for record in site.records() if record.query != "poison"]
    assert sorted(collector.ids()) == sorted(expected)


# ------------------------------------------------------------------------ spans made again


def lose_live_spans(site: Site) -> None:
    """Do to the spans in memory what the end of a process does."""
    site.app.extensions["track_usage"].traces.tracing.live.reset_after_fork()


@pytest.mark.parametrize("parent", [PARENT, None])
def test_what_is_made_again_is_the_same(
    make_shop: Make, collector: Receiver, parent: str | None
) -> None:
    site = make_shop(FLUSH_SECONDS=60)
    headers = {"traceparent": parent} if parent else {}
    for path in ("/item/7", "/fails"):
        site.get(path, headers=headers)
    lose_live_spans(site)
    for path in ("/item/7", "/fails"):
        site.get(path, headers=headers)
    assert site.usage.flush()
    again, live = collector.servers()[:2], collector.servers()[2:]
    for one, other in zip(again, live, strict=True):
        assert (one.name, one.status, one.scope) == (other.name, other.status, other.scope)
        assert one.parent_id == other.parent_id == (parent[36:52] if parent else "")
        assert one.resource == other.resource
        different = {"flask_usage.record_id": ""}
        assert one.attributes | different == other.attributes | different
    assert_agrees(site, collector)


def test_a_sampler_that_takes_no_span_twice_is_counted(make_site: Make) -> None:
    class NeverAgain(ParentBased):
        def __init__(self) -> None:
            super().__init__(ALWAYS_ON)
            self.seen: set[int] = set()

        def should_sample(self, parent: Any, trace_id: int, *more: Any, **named: Any) -> Any:
            if trace_id in self.seen:
                return ALWAYS_OFF.should_sample(parent, trace_id, "")
            self.seen.add(trace_id)
            return super().should_sample(parent, trace_id, *more, **named)

    site = make_site(tracer_provider=TracerProvider(sampler=NeverAgain()), FLUSH_SECONDS=60)
    for _ in range(3):
        site.get()
    lose_live_spans(site)
    for _ in range(2):
        site.get()
    assert site.usage.flush()
    assert site.account("traces") == account(2, failed=3)
    assert site.faults()["sink traces"] == 1
    site.assert_agrees()


def test_other_threads_get_ids_of_their_own_meanwhile(make_site: Make, collector: Receiver) -> None:
    others: list[int] = []
    busy = threading.local()

    def start_another() -> None:
        busy.is_so = True
        # Some SDKs return the same tracer for the same name.
        tracer = provider.get_tracer(
            "flask_usage_metrics", version("flask-usage-metrics"), schema_url=SCHEMA_URL
        )
        span = tracer.start_span("other")
        others.append(span.get_span_context().trace_id)

    class Nosy(ParentBased):
        def should_sample(self, *given: Any, **named: Any) -> Any:
            if not hasattr(busy, "is_so"):
                thread = threading.Thread(target=start_another)
                thread.start()
                thread.join()
            return super().should_sample(*given, **named)

    provider = TracerProvider(sampler=Nosy(ALWAYS_ON))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    site = make_site(tracer_provider=provider, FLUSH_SECONDS=60)
    for _ in range(3):
        site.get()
    lose_live_spans(site)
    assert site.usage.flush()
    provider.shutdown()
    assert len(others) == len(set(others)) == 6
    assert not {f"{trace_id:032x}" for trace_id in others} & {
        record.trace_id for record in site.records()
    }
    assert_agrees(site, collector)


# ------------------------------------------------------------------------ the end of a process


def start(folder: Path, program: str, *arguments: str, **environment: str) -> Process:
    """Start a Python program in a folder of its own."""
    folder.mkdir(exist_ok=True)
    return start_python(
        program,
        *arguments,
        # urllib3 leaves sockets to the garbage collector when an exporter of the SDK is shut down.
        warnings=("error", "ignore::ResourceWarning"),
        folder=folder,
        env={"TMPDIR": str(folder), **environment},
    )


SHOP = """
import os, sys, time
from flask import Flask
from opentelemetry import trace
from flask_usage_metrics import TrackUsage

def provide():
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)

app = Flask("shop")
app.config["TRACK_USAGE_TRACES"] = True
app.config["TRACK_USAGE_STATE_DIR"] = "state"
app.config.from_prefixed_env()

@app.get("/")
def index():
    span = trace.get_current_span().get_span_context()
    with trace.get_tracer("child").start_as_current_span("SELECT"):
        return trace.format_span_id(span.span_id)

def visit(count):
    for _ in range(count):
        assert app.test_client().get("/").status_code == 200
"""


def stored(folder: Path) -> list[str | None]:
    """Ids of the spans of all rows."""
    storage = open_storage(f"sqlite:///{folder}/usage.sqlite3")
    assert isinstance(storage, Storage)
    try:
        return [record.span_id for record in storage.records()]
    finally:
        storage.close()


def assert_once(spans: Sequence[Received], folder: Path, *, children: int = 1) -> None:
    """Spans = rows, each once, and each has had so many children."""
    ours = [span.span_id for span in spans if span.kind == "SERVER"]
    assert sorted(ours) == sorted(map(str, stored(folder)))
    assert sorted(span.parent_id for span in spans if span.kind == "INTERNAL") == sorted(
        children * ours
    )


ENDS = {
    "runs out": ("", 0),
    "exits": ("sys.exit(3)", 3),
    "raises": ("raise ZeroDivisionError", 1),
}


def test_whatever_ends_a_process_all_is_sent_before(tmp_path: Path, collector: Receiver) -> None:
    started: dict[tuple[str, str], Process] = {}
    for provider in ("ours", "before", "after"):
        for how, (end, _) in ENDS.items():
            program = [
                SHOP,
                "provide()" if provider == "before" else "",
                'usage = TrackUsage(app, "sqlite:///usage.sqlite3")',
                "provide()" if provider == "after" else "",
                "visit(20)",
                end,
            ]
            started[provider, how] = start(
                tmp_path / f"{provider} {how}",
                "\n".join(program),
                FLASK_TRACK_USAGE_FLUSH_SECONDS="60",
                OTEL_SERVICE_NAME=f"{provider} {how}",
            )
    ended = {case: process.finish() for case, process in started.items()}
    for (provider, how), (code, _, err) in ended.items():
        assert code == ENDS[how][1], err
        assert err.rpartition("\n")[0][-17:] == ("ZeroDivisionError" if how == "raises" else "")
        spans = collector.of(f"{provider} {how}")
        assert len(spans) == 40
        assert_once(spans, tmp_path / f"{provider} {how}")


def test_the_console_is_a_collector_too(tmp_path: Path) -> None:
    program = [SHOP, 'TrackUsage(app, "sqlite:///usage.sqlite3")', "visit(2)"]
    process = start(tmp_path, "\n".join(program), OTEL_TRACES_EXPORTER="console")
    code, out, err = process.finish()
    assert (code, err) == (0, "")
    spans = json.loads("[" + out.replace("\n}\n{\n", "\n},{\n") + "]")
    ours = [span["context"]["span_id"][2:] for span in spans if span["kind"] == "SpanKind.SERVER"]
    assert sorted(ours) == sorted(map(str, stored(tmp_path)))
    assert len(spans) == 4


def test_what_a_failing_collector_leaves_is_sent_by_the_next_process(
    tmp_path: Path, collector: Receiver
) -> None:
    program = "\n".join(
        [
            SHOP,
            'usage = TrackUsage(app, "sqlite:///usage.sqlite3")',
            "visit(10)",
            "print(time.time(), flush=True)",
        ]
    )
    collector.down()
    with Receiver() as hanging:
        hanging.hang_seconds = 60
        cases = {"down": collector, "hanging": hanging}
        processes = [
            start(tmp_path / how, program, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint)
            for how, receiver in cases.items()
        ]
        for code, out, err in [process.finish() for process in processes]:
            assert code == 0, err
            assert time.time() - float(out) < 7
        hanging.down()
        for receiver in cases.values():
            receiver.up()
        assert collector.spans() == hanging.spans() == []
        processes = [
            start(tmp_path / how, program, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint)
            for how, receiver in cases.items()
        ]
        for code, _, err in [process.finish() for process in processes]:
            assert (code, err) == (0, "")
        for how, receiver in cases.items():
            assert len(receiver.ids()) == 20
            assert sorted(receiver.ids()) == sorted(map(str, stored(tmp_path / how)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_sends_its_own_and_nothing_twice(
    tmp_path: Path, collector: Receiver
) -> None:
    program = """
usage = TrackUsage(app, "sqlite:///usage.sqlite3")
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork
visit(5)
assert usage.flush()
visit(5)  # these wait while the process forks
children = []
for _ in range(3):
    pid = os.fork()
    if not pid:
        visit(5)
        sys.exit()
    children.append(pid)
visit(5)
assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 3
visit(5)
"""
    assert start(tmp_path, SHOP + program).finish() == (0, "", "")
    assert len(collector.ids()) == 35
    assert_once(collector.spans(), tmp_path)
    storage = open_storage(f"sqlite:///{tmp_path}/usage.sqlite3")
    processes = {record.span_id: record.process for record in storage.records()}
    storage.close()
    # Nor do two processes share a connection, as what they send would mix.
    users = {(span.peer, processes[span.span_id]) for span in collector.servers()}
    assert len({process for _, process in users}) == 4
    assert len({peer for peer, _ in users}) == len(users)


# ------------------------------------------------------------------------ many workers

APP = (
    SHOP
    + """
usage = TrackUsage(app, "sqlite:///usage.sqlite3")
visit(int(os.environ.get("VISITS", 0)))
"""
)
THREE = ("-w", "3", "--threads", "2", "--graceful-timeout", "10")


@pytest.mark.parametrize(
    ("options", "visits"),
    [
        pytest.param(THREE, 0, id="threads"),
        pytest.param((*THREE, "--preload"), 0, id="preloaded"),
        pytest.param((*THREE, "--preload"), 4, id="preloaded-and-in-use"),
    ],
)
def test_all_workers_send_each_span_once(
    tmp_path: Path, collector: Receiver, options: tuple[str, ...], visits: int
) -> None:
    with Gunicorn(tmp_path, *options, app=APP, VISITS=str(visits)) as server:
        answered = [server.get("/") for _ in range(60)]
    assert len(collector.ids()) == 60 + visits
    assert set(answered) <= set(collector.ids())
    assert_once(collector.spans(), tmp_path)
    assert "Traceback" not in server.log()


def test_killed_workers_take_no_span_away(tmp_path: Path, collector: Receiver) -> None:
    answered: set[str] = set()
    stop = threading.Event()

    def load(address: str) -> None:
        session = requests.Session()
        while not stop.is_set():
            with suppress(requests.RequestException):
                answered.add(session.get(f"{address}/", timeout=10).text)

    options = ("-w", "2", "--threads", "2")
    server = Gunicorn(tmp_path, *options, app=APP)
    threads = [threading.Thread(target=load, args=(server.address,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(1, 7):
        until(lambda: len(answered) >= 40 * number, True)  # noqa: B023 - it is called at once
        time.sleep(0.1)
        server.kill(server.workers()[number % 2])
    until(lambda: len(answered) >= 280, True)
    # Now all at once, as the kernel does when there is no more memory.
    workers = server.workers()
    server.process.kill()
    server.process.wait()
    for pid in workers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    stop.set()
    for thread in threads:
        thread.join()
    server.stop()
    with Gunicorn(tmp_path, *options, app=APP) as server:
        answered.add(server.get("/"))
        until(lambda: answered - set(collector.ids()), set())
    spans = collector.ids()
    rows = stored(tmp_path)
    assert answered <= set(map(str, rows))
    # What was sent and not yet noted to be when its worker was killed comes again, as the same.
    assert set(spans) == set(rows)
    assert len(rows) == len(set(rows)) <= len(spans) <= 2 * len(rows)
