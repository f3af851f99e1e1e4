"""No span is lost or sent twice while a collector fails, or when it is made again of its record."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import pytest
from helpers.collector import Receiver
from helpers.front_door import Site
from helpers.process import until
from helpers.spans import PARENT, Make, account, assert_agrees, exporter, is_up, sampled, visit
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased

from flask_usage_metrics.traces.conventions import SCHEMA_URL

pytestmark = pytest.mark.usefixtures("collector", "environment")

# ------------------------------------------------------------------------ a collector that fails


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
    trace.get_tracer("child").start_span("background").end()
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
        visit(site, 80, "/?" + 1000 * "text=x&")
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
