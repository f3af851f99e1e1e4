"""Each sampled request is one span, with the times, names and ids of its record."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from flask import Blueprint, Flask, Response, abort, stream_with_context
from helpers.front_door import Site
from helpers.process import run_python
from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.instrumentation.flask import FlaskInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, TraceIdRatioBased

from flask_usage_metrics import ConfigError
from flask_usage_metrics.enrich.enricher import Enricher

Make = Callable[..., Site]
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = PARENT[:-1] + "0"


class Traced:
    """A site with a provider of its own."""

    def __init__(self, make_site: Make, sampler: Any = None, **options: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(sampler=sampler)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.site: Site = make_site(tracer_provider=self.provider, **options)
        self.app = self.site.app
        self.child = self.provider.get_tracer("child")

    def spans(self) -> list[ReadableSpan]:
        assert self.site.usage.flush()
        return list(self.exporter.get_finished_spans())

    def only(self) -> ReadableSpan:
        (span,) = self.spans()
        return span

    def assert_agrees(self) -> None:
        """Spans = records, one to one, in ids, times and status."""
        self.site.assert_agrees()
        ours = [span for span in self.spans() if span.kind is trace.SpanKind.SERVER]
        spans = {trace.format_span_id(span.context.span_id): span for span in ours}
        records = {record.span_id: record for record in self.site.records()}
        assert len(ours) == len(spans)
        assert spans.keys() == records.keys()
        for span_id, span in spans.items():
            record = records[span_id]
            assert trace.format_trace_id(span.context.trace_id) == record.trace_id
            assert span.start_time // 1000 == int(record.started_at.timestamp() * 1e6 + 0.5)
            assert span.end_time - span.start_time == round(record.duration_seconds * 1e9)
            assert span.attributes["http.response.status_code"] == record.status
            assert span.attributes.get("http.route") == record.rule
            assert span.attributes["flask_usage.record_id"] == record.id
        account = self.site.account("traces")
        assert account == {"written": len(records), "dropped": 0, "failed": 0, "pending": 0}


@pytest.fixture
def traced(make_site: Make) -> Iterator[Traced]:
    made = Traced(make_site, country=lambda _: "NL")
    shop = Blueprint("shop", __name__, url_prefix="/shop")
    shop.add_url_rule("/item/<int:number>", "item", lambda number: "x", methods=["GET", "POST"])
    made.app.register_blueprint(shop)
    made.app.add_url_rule("/", "index", lambda: "x")
    yield made
    made.assert_agrees()


# ------------------------------------------------------------------------ what a span says


def test_it_has_the_stable_names_of_http(traced: Traced) -> None:
    traced.site.get(
        "/shop/item/7?page=2&sig=s3cret",
        base_url="https://shop.example:8443",
        headers={"User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:139.0) Firefox/139.0"},
    )
    span = traced.only()
    assert span.name == "GET /shop/item/<int:number>"
    assert span.kind is trace.SpanKind.SERVER
    assert span.status.status_code is trace.StatusCode.UNSET
    assert span.parent is None
    assert span.events == ()
    assert span.instrumentation_scope.name == "flask_usage_metrics"
    assert dict(span.attributes) == {
        "http.request.method": "GET",
        "http.route": "/shop/item/<int:number>",
        "http.response.status_code": 200,
        "url.scheme": "https",
        "url.path": "/shop/item/7",
        "url.query": "page=2&sig=REDACTED",
        "server.address": "shop.example",
        "server.port": 8443,
        "client.address": "203.0.113.9",
        "network.protocol.version": "1.1",
        "user_agent.original": "Mozilla/5.0 (X11; Linux x86_64; rv:139.0) Firefox/139.0",
        "geo.country.iso_code": "NL",
        "flask.endpoint": "shop.item",
        "flask.blueprint": "shop",
        "flask_usage.client": "human",
        "flask_usage.record_id": traced.site.only_record().id,
    }


@pytest.mark.parametrize(
    ("method", "path", "name", "status", "error"),
    [
        ("POST", "/shop/item/7", "POST /shop/item/<int:number>", 200, None),
        ("GET", "/nowhere/4711", "GET", 404, None),
        ("DELETE", "/shop/item/7", "DELETE", 405, None),
        ("BREW", "/", "HTTP", 405, None),
        ("GET", "/client", "GET /client", 418, None),
        ("GET", "/server", "GET /server", 503, "503"),
        ("GET", "/beyond", "GET /beyond", 600, None),
        ("GET", "/raises", "GET /raises", 500, "ZeroDivisionError"),
    ],
)
def test_name_and_status_are_by_route_and_outcome(
    traced: Traced, method: str, path: str, name: str, status: int, error: str | None
) -> None:
    traced.app.add_url_rule("/client", "client", lambda: abort(418))
    traced.app.add_url_rule("/server", "server", lambda: ("x", 503))
    traced.app.add_url_rule("/beyond", "beyond", lambda: ("x", 600))
    traced.app.add_url_rule("/raises", "raises", lambda: str(1 // 0))
    traced.site.request(path, method=method)
    span = traced.only()
    assert span.name == name
    assert span.attributes["http.response.status_code"] == status
    assert span.attributes.get("error.type") == error
    assert span.status.is_unset == (error is None)
    assert span.status.description is None
    expected = ("_OTHER", method) if method == "BREW" else (method, None)
    keys = ("http.request.method", "http.request.method_original")
    assert tuple(span.attributes.get(key) for key in keys) == expected


def test_robots_are_synthetic_and_users_are_named_only_when_asked_for(make_site: Make) -> None:
    quiet = Traced(make_site, username=lambda: "ann")
    asked = Traced(make_site, username=lambda: "ann", TRACES_ENDUSER=True)
    hashed = Traced(
        make_site, username=lambda: "ann", TRACES_ENDUSER=True, PRIVACY="balanced", SECRET_KEY="k"
    )
    for one in (quiet, asked, hashed):
        one.site.get(headers={"User-Agent": "curl/8.5.0"})
        assert one.only().attributes["user_agent.synthetic.type"] == "bot"
        one.assert_agrees()
    assert "enduser.id" not in quiet.only().attributes
    assert asked.only().attributes["enduser.id"] == "ann"
    assert hashed.only().attributes["enduser.id"] == hashed.site.only_record().username != "ann"


@pytest.mark.parametrize("preset", ["full", "balanced", "strict"])
def test_it_says_no_more_than_the_record(make_site: Make, preset: str) -> None:
    traced = Traced(make_site, PRIVACY=preset)
    traced.app.add_url_rule("/reset/<token>", "reset", lambda token: "x")
    traced.site.get("/reset/s3cret?q=tea", headers={"User-Agent": "PersonalBrowser"})
    attributes = traced.only().attributes
    record = traced.site.only_record()
    assert attributes["url.path"] == record.path
    assert attributes.get("client.address") == record.remote_addr
    assert attributes.get("url.query", "") == record.query
    assert attributes.get("user_agent.original") == record.user_agent
    assert "s3cret" not in str(dict(attributes))
    traced.assert_agrees()


# ------------------------------------------------------------------------ where it belongs


def test_the_callers_trace_goes_on_and_children_nest(traced: Traced) -> None:
    @traced.app.route("/query")
    def query() -> str:
        with traced.child.start_as_current_span("SELECT"):
            carrier: dict[str, str] = {}
            propagate.inject(carrier)
            return carrier["traceparent"]

    sent_on = traced.site.get("/query", headers={"traceparent": PARENT}).text
    spans = {span.name: span for span in traced.spans()}
    ours, child = spans["GET /query"], spans["SELECT"]
    assert trace.format_trace_id(ours.context.trace_id) == PARENT[3:35]
    assert trace.format_span_id(ours.parent.span_id) == PARENT[36:52]
    assert child.parent.span_id == ours.context.span_id
    assert sent_on.split("-")[1:3] == [
        PARENT[3:35],
        trace.format_span_id(child.context.span_id),
    ]
    assert traced.site.only_record().parent_span_id == PARENT[36:52]
    assert not trace.get_current_span().get_span_context().is_valid


def test_routing_sessions_and_hooks_are_inside(traced: Traced) -> None:
    opened = traced.app.session_interface.open_session

    def open_session(*arguments: Any) -> Any:
        with traced.child.start_as_current_span("session"):
            return opened(*arguments)

    traced.app.session_interface.open_session = open_session  # type: ignore[method-assign]

    @traced.app.before_request
    def before() -> None:
        traced.child.start_span("before").end()

    @traced.app.teardown_request
    def after(_: object) -> None:
        traced.child.start_span("teardown").end()

    traced.app.test_client().get("/")  # without `with`, which delays the teardown
    spans = {span.name: span for span in traced.spans()}
    parents = {spans[name].parent.span_id for name in ("session", "before", "teardown")}
    assert parents == {spans["GET /"].context.span_id}


@pytest.mark.parametrize("with_context", [False, True])
def test_it_is_current_for_each_chunk_of_a_stream(traced: Traced, with_context: bool) -> None:
    def body() -> Iterator[bytes]:
        try:
            for number in range(3):
                with traced.child.start_as_current_span(f"chunk {number}"):
                    yield b"x"
        finally:
            traced.child.start_span("end").end()

    @traced.app.route("/stream")
    def stream() -> Response:
        chunks = body()
        return Response(stream_with_context(chunks) if with_context else chunks)

    assert traced.site.get("/stream").data == b"xxx"
    spans = {span.name: span for span in traced.spans()}
    children = [f"chunk {number}" for number in range(3)] + ["end"]
    assert {spans[name].parent.span_id for name in children} == {
        spans["GET /stream"].context.span_id
    }
    assert spans["GET /stream"].end_time >= spans["chunk 2"].end_time


def test_a_stream_that_breaks_or_is_left_ends_once(traced: Traced) -> None:
    @traced.app.route("/breaks")
    def breaks() -> Response:
        def body() -> Iterator[bytes]:
            yield b"x"
            raise ConnectionResetError

        return Response(body())

    @traced.app.route("/endless")
    def endless() -> Response:
        return Response(iter(lambda: b"x", None))

    with pytest.raises(ConnectionResetError):
        traced.site.get("/breaks")
    response = traced.app.test_client().get("/endless")
    next(response.response)
    response.close()
    broken, left = traced.spans()
    assert broken.attributes["error.type"] == "ConnectionResetError"
    assert broken.status.status_code is trace.StatusCode.ERROR
    assert left.status.is_unset
    assert not trace.get_current_span().get_span_context().is_valid


def test_what_ends_a_worker_is_an_error(traced: Traced) -> None:
    def leave() -> str:
        raise SystemExit(3)

    traced.app.add_url_rule("/leave", "leave", leave)
    with pytest.raises(SystemExit):
        traced.site.get("/leave")
    assert traced.only().attributes["error.type"] == "SystemExit"
    assert not trace.get_current_span().get_span_context().is_valid


def test_threads_do_not_mix_traces(traced: Traced) -> None:
    @traced.app.route("/work/<int:number>")
    def work(number: int) -> str:
        with traced.child.start_as_current_span(str(number)):
            return "x"

    def visit(first: int) -> None:
        for number in range(first, first + 25):
            traced.site.get(f"/work/{number}")

    threads = [threading.Thread(target=visit, args=(25 * n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spans = traced.spans()
    by_id = {span.context.span_id: span for span in spans}
    children = [span for span in spans if span.name.isdecimal()]
    assert len(children) == 150
    for child in children:
        assert by_id[child.parent.span_id].attributes["url.path"] == f"/work/{child.name}"


def test_a_request_within_a_request_is_part_of_it(traced: Traced) -> None:
    @traced.app.route("/outer")
    def outer() -> str:
        return traced.app.test_client().get("/").text

    traced.site.get("/outer")
    spans = traced.spans()
    assert [span.name for span in spans] == ["GET /outer"]
    inner, outer_record = sorted(traced.site.records(), key=lambda record: record.path)
    # The inner one joins the span that is current: that of the outer.
    assert inner.span_id == outer_record.span_id
    traced.assert_agrees = lambda: None  # type: ignore[method-assign]


def test_excluded_views_and_the_scrape_have_none(make_site: Make) -> None:
    traced = Traced(make_site, EXCLUDE=["hidden"])
    traced.app.add_url_rule("/hidden", "hidden", lambda: "x")
    traced.site.get("/hidden")
    traced.site.scrape()
    assert traced.spans() == []
    traced.assert_agrees()


# ------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("how", ["off", "by the caller"])
def test_what_is_not_sampled_is_counted_and_stored(make_site: Make, how: str) -> None:
    sampler = ALWAYS_OFF if how == "off" else ParentBased(ALWAYS_OFF)
    traced = Traced(make_site, sampler=sampler)
    traced.site.get(headers={"traceparent": UNSAMPLED})
    assert traced.spans() == []
    record = traced.site.only_record()
    assert record.trace_id == PARENT[3:35]
    assert record.span_id not in (None, PARENT[36:52])
    assert record.parent_span_id == PARENT[36:52]
    assert traced.site.account("traces")["written"] == 0
    traced.site.assert_agrees()


def test_a_half_is_sampled(make_site: Make) -> None:
    traced = Traced(make_site, sampler=TraceIdRatioBased(0.5))
    for _ in range(200):
        traced.site.get()
    spans = traced.spans()
    assert 50 < len(spans) < 150
    assert traced.site.account("traces")["written"] == len(spans)
    ids = {trace.format_span_id(span.context.span_id) for span in spans}
    assert ids < {record.span_id for record in traced.site.records()}
    traced.site.assert_agrees()


def test_samplers_see_method_and_path(make_site: Make) -> None:
    seen: list[Any] = []

    class Sampler(ParentBased):
        def should_sample(
            self,
            parent_context: Any,
            trace_id: int,
            name: str,
            kind: Any = None,
            attributes: Any = None,
            links: Sequence[Any] | None = None,
            **more: Any,
        ) -> Any:
            seen.append((name, kind, dict(attributes)))
            return super().should_sample(parent_context, trace_id, name, kind, attributes, links)

    traced = Traced(make_site, sampler=Sampler(ALWAYS_OFF))
    traced.site.get("/health")
    expected = {"http.request.method": "GET", "url.path": "/health", "url.scheme": "http"}
    assert seen == [("GET", trace.SpanKind.SERVER, expected)]


def test_what_there_is_no_room_for_or_fails_is_counted_here_too(
    make_site: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = Traced(make_site, BUFFER_RECORDS=10, FLUSH_SECONDS=60)
    with traced.site.held():
        for _ in range(15):
            traced.site.get()
    assert len(traced.spans()) == 10
    assert traced.site.account("traces") == {"written": 10, "dropped": 5, "failed": 0, "pending": 0}

    def fails(*_: object) -> Any:
        raise ValueError

    monkeypatch.setattr(Enricher, "enrich", fails)
    traced.site.get()
    assert len(traced.spans()) == 10
    assert traced.site.account("traces") == {"written": 10, "dropped": 5, "failed": 1, "pending": 0}
    assert traced.site.account("metrics")["failed"] == 1


# ------------------------------------------------------------------------ joining


def test_a_span_that_is_current_is_joined(traced: Traced) -> None:
    inner = traced.app.wsgi_app

    def middleware(environ: Any, start_response: Any) -> Any:
        with traced.child.start_as_current_span("theirs"):
            return inner(environ, start_response)

    traced.app.wsgi_app = middleware  # type: ignore[method-assign]
    traced.site.get("/shop/item/7", headers={"User-Agent": "curl/8.5.0"})
    span = traced.only()
    assert span.name == "theirs"
    assert dict(span.attributes) == {
        "flask.endpoint": "shop.item",
        "flask.blueprint": "shop",
        "flask_usage.client": "script",
        "user_agent.synthetic.type": "bot",
    }
    record = traced.site.only_record()
    assert record.span_id == trace.format_span_id(span.context.span_id)
    assert traced.site.account("traces")["written"] == 0
    traced.assert_agrees = traced.site.assert_agrees  # type: ignore[method-assign]


@pytest.mark.parametrize("theirs_first", [False, True])
@pytest.mark.parametrize("testing", [False, True])
def test_the_span_of_instrumentation_flask_is_joined(
    make_site: Make, theirs_first: bool, testing: bool
) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = Flask("shop")
    if theirs_first:
        FlaskInstrumentor.instrument_app(app, tracer_provider=provider)
    site = make_site(
        app=app,
        tracer_provider=provider,
        TESTING=testing,
        COUNTRY="header:X-Country",
        TRUSTED_PROXIES=["203.0.113.9"],
    )
    if not theirs_first:
        FlaskInstrumentor.instrument_app(app, tracer_provider=provider)
    app.add_url_rule("/hello/<name>", "hello", lambda name: "x")
    app.add_url_rule("/raises", "raises", lambda: str(1 // 0))
    site.get("/hello/ann", headers={"X-Country": "nl"})
    if testing:
        with pytest.raises(ZeroDivisionError):
            site.get("/raises")
    else:
        site.get("/raises")
    FlaskInstrumentor.uninstrument_app(app)
    assert site.usage.flush()
    one, two = exporter.get_finished_spans()
    hello, raises = site.records()
    assert one.attributes["geo.country.iso_code"] == "NL"
    assert (one.attributes["flask.endpoint"], two.attributes["flask.endpoint"]) == (
        "hello",
        "raises",
    )
    for span, record in ((one, hello), (two, raises)):
        assert record.span_id == trace.format_span_id(span.context.span_id)
    assert site.account("traces")["written"] == 0
    site.assert_agrees()


def test_a_failing_propagator_or_provider_reaches_nobody(
    make_site: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = Traced(make_site)

    def fails(*_: object, **__: object) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(propagate, "extract", fails)
    assert traced.site.get().status_code == 404
    assert traced.site.only_record().trace_id is None
    assert traced.site.faults()["traces"] == 1
    traced.site.assert_agrees()


# ------------------------------------------------------------------------ set-up


def test_without_traces_opentelemetry_is_not_imported(tmp_path: Any) -> None:
    program = """
        import sys
        from flask import Flask
        from flask_usage_metrics import TrackUsage
        app = Flask("shop")
        usage = TrackUsage(app, "sqlite://")
        app.test_client().get("/")
        assert usage.flush()
        assert app.test_client().get("/metrics").status_code == 200
        assert not [name for name in sys.modules if name.startswith("opentelemetry")]
    """
    assert run_python(program, folder=tmp_path) == (0, "", "")


def test_without_an_sdk_the_callers_trace_is_kept(make_site: Make) -> None:
    site = make_site(tracer_provider=trace.NoOpTracerProvider())
    site.get(headers={"traceparent": PARENT})
    site.get()
    one, two = site.records()
    assert (one.trace_id, one.span_id, one.parent_span_id) == (PARENT[3:35], None, PARENT[36:52])
    assert (two.trace_id, two.span_id, two.parent_span_id) == (None, None, None)
    site.assert_agrees()


@pytest.mark.parametrize(
    ("value", "message"),
    [("TRACES", "must be True, False or a SpanExporter, not 'maybe'")],
)
def test_a_wrong_setting_is_named(make_site: Make, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_site(**{value: "maybe"})


def test_a_wrong_provider_is_named(make_site: Make) -> None:
    with pytest.raises(ConfigError, match="tracer_provider must be a TracerProvider or None"):
        make_site(tracer_provider="otlp")


def test_nothing_stays_attached(traced: Traced) -> None:
    before = otel_context.get_current()
    traced.site.get()
    assert otel_context.get_current() == before
