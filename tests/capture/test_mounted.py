"""Apps in apps, and middlewares that hand on an environ of their own: one request, one record."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from flask import Flask, g, request
from helpers.front_door import Site, samples
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from werkzeug.middleware.dispatcher import DispatcherMiddleware

WSGIApp = Callable[[dict[str, Any], Any], Iterable[bytes]]


def same(wsgi_app: WSGIApp) -> WSGIApp:
    return wsgi_app


def copying(wsgi_app: WSGIApp) -> WSGIApp:
    return lambda environ, start_response: wsgi_app({**environ}, start_response)


def without_keys_of_others(wsgi_app: WSGIApp) -> WSGIApp:
    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        known = {key: value for key, value in environ.items() if "flask_usage" not in key}
        return wsgi_app(known, start_response)

    return answer


HANDING_ON = pytest.mark.parametrize("hand_on", [same, copying, without_keys_of_others])


def make_app(name: str) -> Flask:
    app = Flask(name)

    @app.get("/")
    def index() -> str:
        g.track_var["who"] = name
        return name

    @app.get("/raises")
    def raises() -> str:
        raise LookupError

    @app.get("/hidden")
    def hidden() -> str:
        return "x"

    return app


@HANDING_ON
@pytest.mark.parametrize("order", ["child first", "parent first"])
@pytest.mark.parametrize("dispatcher", ["inside", "outside"])
def test_a_request_is_counted_by_the_app_that_answers(
    make_site: Callable[..., Site], hand_on: Any, order: str, dispatcher: str
) -> None:
    parent, child = make_app("parent"), make_app("child")

    def mount() -> None:
        mounts = {"/child": lambda environ, start: child.wsgi_app(environ, start)}
        parent.wsgi_app = hand_on(DispatcherMiddleware(parent.wsgi_app, mounts))  # type: ignore[method-assign]

    sites: dict[str, Site] = {}

    def track(app: Flask) -> None:
        sites[app.name] = make_site(app=app, EXCLUDE=["hidden"], COOKIE=True)

    if order == "child first":
        track(child)
    if dispatcher == "inside":
        mount()
    track(parent)
    if dispatcher == "outside":
        mount()
    if order == "parent first":
        track(child)

    for path in ("/", "/child/", "/child/nowhere", "/child/hidden", "/nowhere", "/child/raises"):
        response = sites["parent"].get(path, headers={"User-Agent": "Mozilla/5.0 Firefox/139.0"})
        assert len(response.headers.getlist("Set-Cookie")) == ("hidden" not in path)
    found = {
        name: [
            (record.root_path, record.path, record.endpoint, record.status, record.exception)
            for record in site.records()
        ]
        for name, site in sites.items()
    }
    assert found == {
        "parent": [("", "/", "index", 200, None), ("", "/nowhere", None, 404, None)],
        "child": [
            ("/child", "/", "index", 200, None),
            ("/child", "/nowhere", None, 404, None),
            ("/child", "/raises", "raises", 500, "LookupError"),
        ],
    }
    for name, site in sites.items():
        assert site.records()[0].track_var == {"who": name}
        site.assert_agrees()
        assert site.faults() == {}


@HANDING_ON
def test_while_a_mounted_app_answers_one_request_is_in_progress(
    make_site: Callable[..., Site], hand_on: Any
) -> None:
    parent, child = make_app("parent"), make_app("child")
    seen: list[float] = []
    inner = make_site(app=child)
    parent.wsgi_app = hand_on(DispatcherMiddleware(parent.wsgi_app, {"/child": child}))  # type: ignore[method-assign]
    outer = make_site(app=parent)

    def progress(site: Site) -> float:
        value = site.registry.get_sample_value("flask_usage_requests_in_progress")
        assert value is not None
        return value

    @child.get("/progress")
    def ask() -> str:
        seen.extend((progress(outer), progress(inner)))
        return "x"

    outer.get("/child/progress")
    outer.get("/child/metrics")
    assert seen == [0, 1]
    assert (progress(outer), progress(inner)) == (0, 0)
    assert (len(outer.records()), len(inner.records())) == (0, 1)


def test_who_calls_another_app_from_a_view_answers_too(make_site: Callable[..., Site]) -> None:
    parent, child = make_app("parent"), make_app("child")
    inner = make_site(app=child)

    @parent.get("/calls")
    def calls() -> str:
        return child.test_client().get("/").text

    parent.wsgi_app = copying(parent.wsgi_app)  # type: ignore[method-assign]
    outer = make_site(app=parent)
    assert outer.get("/calls").text == "child"
    assert [record.endpoint for record in outer.records()] == ["calls"]
    assert [record.endpoint for record in inner.records()] == ["index"]


def test_who_is_asked_first_and_has_nothing_leaves_it_to_the_app(
    make_site: Callable[..., Site],
) -> None:
    parent, child = make_app("parent"), make_app("child")
    make_site(app=child)
    own = parent.wsgi_app
    parent.add_url_rule("/only-here", "here", lambda: "x")

    def cascade(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        statuses: list[str] = []

        def hold(status: str, headers: Any, exc_info: Any = None) -> Any:
            statuses.append(status)
            return lambda data: None

        body = list(child.wsgi_app({**environ}, hold))
        if statuses[-1].startswith("404"):
            return own(environ, start_response)
        start_response(statuses[-1], [])
        return body

    parent.wsgi_app = cascade  # type: ignore[method-assign]
    site = make_site(app=parent)
    site.get("/only-here")
    assert [record.endpoint for record in site.records()] == ["here"]


def test_metrics_that_are_mounted_in_the_app_are_not_counted(
    make_site: Callable[..., Site],
) -> None:
    app = make_app("shop")
    mounts: dict[str, Any] = {"/ops": None}
    app.wsgi_app = DispatcherMiddleware(app.wsgi_app, mounts)  # type: ignore[method-assign]
    site = make_site(app=app, METRICS_PATH=None)
    mounts["/ops"] = site.usage.metrics_app()
    site.get()
    text = site.get("/ops/metrics").text
    assert samples(text, "flask_usage_requests_in_progress") == {(): 0}
    assert len(site.records()) == 1


@HANDING_ON
def test_whatever_environ_is_handed_on_all_of_the_request_is_known(
    make_site: Callable[..., Site], hand_on: Any
) -> None:
    app = make_app("shop")

    @app.get("/<name>")
    def page(name: str) -> str:
        g.track_var = {"replaced": name}
        return name

    @app.before_request
    def seen() -> None:
        request.environ["REMOTE_ADDR"] = "198.51.100.7"  # as ProxyFix does

    app.wsgi_app = hand_on(app.wsgi_app)  # type: ignore[method-assign]
    site = make_site(app=app, username=lambda: "ann", country=lambda address: "NL")
    site.get("/tea", auth=("bob", "secret"))
    site.get("/raises")
    # A scrape is not in progress itself.
    assert site.samples("flask_usage_requests_in_progress") == {(): 0}
    tea, raised = site.records()
    assert (tea.endpoint, tea.view_args, tea.username) == ("page", {"name": "tea"}, "ann")
    assert (tea.track_var, tea.authorization) == ({"replaced": "tea"}, True)
    assert (tea.remote_addr, tea.country) == ("198.51.100.7", "NL")
    assert (raised.endpoint, raised.exception, raised.status) == ("raises", "LookupError", 500)
    site.assert_agrees()


@pytest.mark.parametrize("traced", [("parent", "child"), ("parent",), ("child",)])
def test_a_request_to_a_mounted_app_has_one_span(
    make_site: Callable[..., Site], traced: tuple[str, ...]
) -> None:
    parent, child = make_app("parent"), make_app("child")
    provider, spans = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    given = {name: {"tracer_provider": provider} for name in traced}
    inner = make_site(app=child, **given.get("child", {}))
    parent.wsgi_app = DispatcherMiddleware(parent.wsgi_app, {"/child": child})  # type: ignore[method-assign]
    outer = make_site(app=parent, **given.get("parent", {}))
    outer.get("/child/")
    (record,) = inner.records()
    assert outer.records() == []
    (span,) = spans.get_finished_spans()
    assert span.parent is None
    if "child" in traced:
        assert (span.name, record.span_id) == ("GET /child/", f"{span.context.span_id:016x}")
