"""Requests by a way into Flask that was made before TrackUsage count as those through it do."""

from __future__ import annotations

import asyncio
import io
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from wsgiref.util import FileWrapper

import pytest
from flask import (
    Flask,
    Response,
    abort,
    g,
    redirect,
    request,
    send_file,
    session,
    stream_with_context,
)
from flask.sessions import SecureCookieSessionInterface
from helpers.front_door import Site
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.test import EnvironBuilder, run_wsgi_app

WSGIApp = Callable[[dict[str, Any], Any], Iterable[bytes]]


class Broken(Exception):
    """Raised by views, hooks and streams."""


class Sessions(SecureCookieSessionInterface):
    def open_session(self, app: Flask, request: Any) -> Any:
        if request.path == "/no-session":
            raise Broken
        return super().open_session(app, request)


class Silent(Response):
    """One that does not call start_response by Werkzeug's means."""

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response(self.status, [])
        return [b"12345"]


def make_app() -> Flask:
    app = Flask("shop")
    app.secret_key = "key"
    app.session_interface = Sessions()
    shared = Response("shared")

    @app.get("/thing/<int:number>")
    def thing(number: int) -> str:
        g.track_var["number"] = number
        session["seen"] = True
        return "x" * number

    @app.get("/stream")
    def stream() -> Response:
        return Response(stream_with_context(request.path for _ in range(3)))

    @app.get("/read-in-the-view")
    def read_in_the_view() -> str:
        return "".join(stream_with_context(request.path for _ in range(3)))

    @app.get("/breaks/<int:after>")
    def breaks(after: int) -> Response:
        def chunks() -> Iterator[bytes]:
            yield from [b"12"] * after
            raise Broken

        return Response(chunks(), headers={"Content-Length": "9"} if after == 2 else {})

    @app.get("/raises-beside-a-stream")
    def raises_beside_a_stream() -> str:
        stream_with_context(request.path for _ in range(3))
        raise Broken

    @app.get("/leaves")
    def leaves() -> str:
        raise SystemExit

    app.add_url_rule("/redirects", "redirects", lambda: redirect("/"))
    app.add_url_rule("/shared", "shared", lambda: shared)
    app.add_url_rule("/silent", "silent", lambda: Silent(status=203))
    app.add_url_rule("/file", "file", lambda: send_file(io.BytesIO(b"x" * 1000), "text/plain"))
    for path in ("no-session", "denied", "after", "teardown", "foreign"):
        app.add_url_rule(f"/{path}", path, lambda: "x")

    @app.before_request
    def deny() -> tuple[str, int] | None:
        return ("no", 401) if request.path == "/denied" else None

    @app.after_request
    def after(response: Response) -> Response:
        if request.path == "/after":
            raise Broken
        if request.path == "/foreign":
            return Silent(status=299)
        return response

    @app.teardown_request
    def teardown(_error: BaseException | None) -> None:
        if request.path == "/teardown":
            raise Broken

    return app


PATHS = (
    *("/thing/3", "/nowhere", "/redirects", "/stream", "/read-in-the-view", "/breaks/0"),
    *("/breaks/1", "/breaks/2", "/raises-beside-a-stream", "/leaves", "/no-session", "/denied"),
    *("/after", "/teardown", "/shared", "/shared", "/file", "/thing/0"),
)


def visit(door: WSGIApp, path: str, **options: Any) -> str:
    """Answer a request as a server would; return what it answers, or the name of what it raises."""
    environ = EnvironBuilder(path, **options).get_environ()
    environ["wsgi.file_wrapper"] = FileWrapper
    try:
        body, status, _ = run_wsgi_app(door, environ, buffered=True)
        return f"{status} {b''.join(body)!r}"
    except BaseException as error:  # noqa: BLE001 - what a server would see
        return type(error).__name__


@pytest.mark.parametrize("propagates", [False, True])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_a_request_counts_as_it_does_through_the_app(
    make_site: Callable[..., Site], caplog: pytest.LogCaptureFixture, propagates: bool, method: str
) -> None:
    answers, found = {}, {}
    for way in ("through", "past"):
        app = make_app()
        app.config["PROPAGATE_EXCEPTIONS"] = propagates
        door = ProxyFix(app.wsgi_app, x_for=1)
        site = make_site(app=app, COOKIE=True, username=lambda: "ann")
        if way == "through":
            door = ProxyFix(app.wsgi_app, x_for=1)
        headers = {"X-Forwarded-For": "198.51.100.7", "User-Agent": "Mozilla/5.0 Firefox/139.0"}
        options = {"method": method, "headers": headers}
        answers[way] = [visit(door, path, **options) for path in PATHS]
        found[way] = [
            (
                *(record.path, record.endpoint, record.status, record.exception),
                *(record.bytes_sent, record.view_args, record.track_var, record.remote_addr),
                *(record.username, record.visitor is None),
            )
            for record in site.records()
        ]
        site.assert_agrees()
        assert site.faults() == {}
        assert site.samples("flask_usage_requests_in_progress") == {(): 0}
        told = [line for line in caplog.messages if "before TrackUsage" in line]
        assert len(told) == (way == "past")
    assert answers["past"] == answers["through"]
    assert found["past"] == found["through"]
    assert len(found["past"]) == len(PATHS)


def test_a_response_that_is_not_sent_by_werkzeugs_means_counts_too(
    make_site: Callable[..., Site],
) -> None:
    app = make_app()
    door = ProxyFix(app.wsgi_app)
    site = make_site(app=app)
    assert visit(door, "/silent").startswith("203")
    assert visit(door, "/foreign").startswith("299")
    assert [(record.endpoint, record.status) for record in site.records()] == [
        ("silent", 203),
        ("foreign", 299),
    ]
    site.assert_agrees()


def test_a_stream_lasts_until_its_last_byte_or_its_end(make_site: Callable[..., Site]) -> None:
    app = make_app()
    door = ProxyFix(app.wsgi_app)
    site = make_site(app=app)
    body, _, _ = run_wsgi_app(door, EnvironBuilder("/stream").get_environ())
    assert next(iter(body)) == b"/stream"
    assert site.samples("flask_usage_requests_in_progress") == {(): 1}
    body.close()
    assert site.samples("flask_usage_requests_in_progress") == {(): 0}
    assert site.only_record().bytes_sent == len("/stream")


def test_a_server_that_takes_no_response_has_a_failed_request(
    make_site: Callable[..., Site],
) -> None:
    app = make_app()
    door = app.wsgi_app
    site = make_site(app=app)

    def gone(status: str, headers: Any) -> Any:
        raise Broken

    for path in ("/thing/1", "/stream"):
        with pytest.raises(Broken):
            door(EnvironBuilder(path).get_environ(), gone)
    assert [(record.status, record.exception) for record in site.records()] == [(500, "Broken")] * 2
    assert site.samples("flask_usage_requests_in_progress") == {(): 0}


def test_a_context_that_is_only_pushed_is_no_request(make_site: Callable[..., Site]) -> None:
    site = make_site(app=make_app())
    environ = EnvironBuilder("/thing/1").get_environ()
    before = dict(environ)
    with site.app.request_context(environ):
        assert request.path == "/thing/1"
        g.track_var["mine"] = 1
    with suppress(Broken), site.app.test_request_context("/"):
        raise Broken
    assert site.app.test_request_context("/").request.path == "/"
    assert site.records() == []
    assert {key for key in environ if "track_var" not in key} - {"werkzeug.request"} == set(before)
    assert site.samples("flask_usage_requests_in_progress") == {(): 0}


def test_who_dispatches_by_hand_gets_flasks_own_response(make_site: Callable[..., Site]) -> None:
    site = make_site(app=make_app())
    with site.app.test_request_context("/shared"):
        response = site.app.full_dispatch_request()
        assert type(response) is Response
        assert response.get_data() == b"shared"
    assert len(site.records()) == 1


def test_nothing_of_ours_stays_in_a_response(make_site: Callable[..., Site]) -> None:
    app = make_app()
    kept: list[Response] = []

    @app.get("/kept")
    def keep() -> Response:
        kept.append(Response("x"))
        return kept[-1]

    door = app.wsgi_app
    site = make_site(app=app)
    visit(door, "/kept")
    assert pickle.loads(pickle.dumps(kept[0])).status_code == 200
    assert len(site.records()) == 1


class TestNested:
    @pytest.mark.parametrize("environ_of", ["new", "copied"])
    @pytest.mark.parametrize("wrapped", [False, True])
    @pytest.mark.parametrize("outer", ["through", "past"])
    def test_a_request_within_a_request_is_two(
        self, make_site: Callable[..., Site], environ_of: str, wrapped: bool, outer: str
    ) -> None:
        app = make_app()
        door = app.wsgi_app
        if wrapped:
            inner_app = app.wsgi_app
            app.wsgi_app = lambda environ, start: inner_app({**environ}, start)  # type: ignore[method-assign]

        @app.get("/outer")
        def ask() -> str:
            g.track_var["who"] = "outer"
            environ = EnvironBuilder("/thing/3").get_environ()
            if environ_of == "copied":
                environ = {**request.environ, "PATH_INFO": "/thing/3"}
            body, _, _ = run_wsgi_app(door, environ, buffered=True)
            g.track_var["then"] = "outer"
            return b"".join(body).decode()

        site = make_site(app=app)
        way = app.wsgi_app if outer == "through" else door
        assert visit(way, "/outer") == "200 OK b'xxx'"
        found = {record.endpoint: record.track_var for record in site.records()}
        assert found == {"thing": {"number": 3}, "ask": {"who": "outer", "then": "outer"}}
        assert len(site.records()) == 2
        site.assert_agrees()

    def test_a_middleware_that_tries_again_is_one(self, make_site: Callable[..., Site]) -> None:
        app = make_app()
        inner_app = app.wsgi_app

        def retry(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            list(inner_app({**environ, "PATH_INFO": "/nowhere"}, lambda status, headers: None))
            return inner_app({**environ}, start_response)

        app.wsgi_app = retry  # type: ignore[method-assign]
        site = make_site(app=app)
        assert visit(app.wsgi_app, "/thing/3") == "200 OK b'xxx'"
        assert site.only_record().endpoint == "thing"


@pytest.mark.parametrize("late", [("parent", "child"), ("parent",), ("child",)])
def test_apps_that_were_mounted_before_they_are_tracked(
    make_site: Callable[..., Site], late: tuple[str, ...]
) -> None:
    apps = {name: make_app() for name in ("parent", "child")}
    sites = {name: make_site(app=app) for name, app in apps.items() if name not in late}
    door = DispatcherMiddleware(apps["parent"].wsgi_app, {"/child": apps["child"].wsgi_app})
    sites |= {name: make_site(app=apps[name]) for name in late}
    for path in ("/thing/1", "/child/thing/2", "/child/nowhere", "/nowhere"):
        visit(door, path)
    found = {name: [record.path for record in site.records()] for name, site in sites.items()}
    assert found == {"parent": ["/thing/1", "/nowhere"], "child": ["/thing/2", "/nowhere"]}
    for site in sites.values():
        site.assert_agrees()


def test_an_app_inside_of_one_that_is_tracked_through(make_site: Callable[..., Site]) -> None:
    parent, child = make_app(), make_app()
    parent.wsgi_app = DispatcherMiddleware(parent.wsgi_app, {"/child": child.wsgi_app})  # type: ignore[method-assign]
    outer, inner = make_site(app=parent), make_site(app=child)
    visit(parent.wsgi_app, "/child/thing/2")
    visit(parent.wsgi_app, "/thing/1")
    assert [record.path for record in outer.records()] == ["/thing/1"]
    assert [record.path for record in inner.records()] == ["/thing/2"]


def test_its_span_is_the_current_one(make_site: Callable[..., Site]) -> None:
    app = make_app()
    provider, spans = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    door = app.wsgi_app
    seen = []

    @app.get("/span")
    def span() -> str:
        seen.append(trace.get_current_span().get_span_context().span_id)
        return "x"

    site = make_site(app=app, tracer_provider=provider)
    visit(door, "/span")
    assert not trace.get_current_span().get_span_context().is_valid
    record = site.only_record()
    assert [f"{number:016x}" for number in seen] == [record.span_id]
    (finished,) = spans.get_finished_spans()
    assert f"{finished.context.span_id:016x}" == record.span_id


def test_scrapes_are_not_counted(make_site: Callable[..., Site]) -> None:
    app = make_app()
    door = ProxyFix(app.wsgi_app)
    site = make_site(app=app)
    assert "flask_usage_requests_in_progress 0" in visit(door, "/metrics")
    assert site.records() == []


# ------------------------------------------------------------------------ Connexion

SPECIFICATION = """
openapi: 3.0.0
info: {title: shop, version: "1"}
paths:
  /things/{number}:
    get:
      operationId: test_bypass.thing
      parameters: [{name: number, in: path, required: true, schema: {type: integer}}]
      responses: {"200": {description: fine}}
  /gone:
    get: {operationId: test_bypass.gone, responses: {"200": {description: fine}}}
  /broken:
    get: {operationId: test_bypass.broken, responses: {"200": {description: fine}}}
"""


def thing(number: int) -> dict[str, int]:
    g.track_var["number"] = number
    return {"number": number}


def gone() -> None:
    abort(410)


def broken() -> None:
    raise Broken


async def ask(asgi_app: Any, path: str) -> int:
    """Return the status of the answer of an ASGI app to a GET."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"shop.example")],
        "client": ("203.0.113.9", 4711),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    with suppress(Broken):  # raised again when it was answered
        await asgi_app(scope, receive, send)
    return sent[0]["status"]


@pytest.mark.parametrize("way", ["past", "through"])
def test_connexion(make_site: Callable[..., Site], tmp_path: Path, way: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports for its own tests
        connexion = pytest.importorskip("connexion", exc_type=ImportError)
    (tmp_path / "openapi.yaml").write_text(SPECIFICATION)
    cx = connexion.FlaskApp("shop", specification_dir=tmp_path)
    site = make_site(app=cx.app)
    cx.add_api("openapi.yaml")
    if way == "through":
        cx.add_wsgi_middleware(lambda _: cx.app.wsgi_app)

    async def visit_all() -> list[int]:
        return [await ask(cx, path) for path in ("/things/7", "/nowhere", "/gone", "/broken")]

    statuses = asyncio.run(visit_all())
    assert statuses == [200, 404, 410, 500]
    records = site.records()
    assert [record.status for record in records] == statuses
    assert [record.exception for record in records] == [None, None, None, "Broken"]
    assert (records[0].track_var, records[0].view_args) == ({"number": 7}, {"number": 7})
    assert records[0].remote_addr == "203.0.113.9"
    site.assert_agrees()
