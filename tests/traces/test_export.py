"""Where spans are sent, by the app's provider or ours, and what OpenTelemetry's switches change."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pytest
from flask import g, request
from helpers.collector import Receiver
from helpers.spans import PARENT, SDK, Make, account, assert_agrees, is_up, sampled, start, visit
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from flask_usage_metrics import ConfigError
from flask_usage_metrics.traces.conventions import SCHEMA_URL

pytestmark = pytest.mark.usefixtures("collector", "environment")

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


def test_labels_of_the_apps_own_leave_a_span_for_each_request(
    make_shop: Make, collector: Receiver
) -> None:
    site = make_shop(LABELS=["plan"])

    @site.app.before_request
    def note() -> None:
        g.track_var["plan"] = request.args.get("plan")

    for number in range(12):
        site.get(f"/?plan={number // 3}" if number % 3 else "/fails")
    assert site.usage.flush()
    text = site.scrape(Accept="application/openmetrics-text; version=1.0.0")
    assert len(collector.servers()) == 12
    assert_agrees(site, collector)
    # An exemplar is of a request with the labels of its series.
    plans = {record.trace_id: record.track_var["plan"] or "" for record in site.records()}
    found = re.findall(r'_bucket{.*plan="(.*?)".* # {trace_id="(\w+)"', text)
    assert len(found) >= 5
    assert all(plan == plans[trace_id] for plan, trace_id in found)


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
