"""Every request exactly once, whatever else happens to it."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from wsgiref.simple_server import make_server

import pytest
from flask import (
    Blueprint,
    Flask,
    Response,
    abort,
    g,
    redirect,
    request,
)
from flask.views import MethodView
from helpers.front_door import Site
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.test import EnvironBuilder, run_wsgi_app


def test_a_request_is_one_record_with_all_that_is_known(site: Site) -> None:
    @site.app.post("/user/<name>")
    def user(name: str) -> tuple[str, int]:
        g.track_var["plan"] = "free"
        assert request.get_data() == b"12345678"
        return "hello", 201

    before = time.time()
    site.request(
        "/user/ann?q=1&q=2",
        method="POST",
        data=b"12345678",
        headers={
            "User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:130.0) Gecko/20100101 Firefox/130.0",
            "Accept-Language": "nl-NL,nl;q=0.9",
            "Referer": "https://example.org/page",
            "X-Forwarded-For": "198.51.100.7",
        },
        auth=("bob", "secret"),
    )
    record = site.only_record()
    assert before <= record.started_at.timestamp() <= time.time()
    assert 0 < record.duration_seconds < 5
    assert (record.method, record.status, record.endpoint) == ("POST", 201, "user")
    assert (record.rule, record.view_args) == ("/user/<name>", {"name": "ann"})
    assert record.url == "http://localhost/user/ann?q=1&q=2"
    assert (record.bytes_sent, record.bytes_received) == (5, 8)
    assert (record.remote_addr, record.forwarded_for) == ("203.0.113.9", "198.51.100.7")
    assert (record.browser, record.browser_version, record.platform) == ("Firefox", "130", "Linux")
    assert (record.client, record.language) == ("human", "nl-NL")
    assert (record.authorization, record.username) == (True, "bob")
    assert record.referrer == "https://example.org/page"
    assert record.track_var == {"plan": "free"}
    assert (record.scheme, record.host, record.root_path) == ("http", "localhost", "")
    assert (record.path, record.query, record.protocol) == ("/user/ann", "q=1&q=2", "HTTP/1.1")
    assert (record.user_agent or "").endswith("Firefox/130.0")
    assert record.process.endswith(f":{os.getpid()}")
    assert uuid.UUID(record.id).version == 7
    unknown = ["blueprint", "exception", "country", "ip_info", "visitor", "trace_id", "span_id"]
    assert [getattr(record, name) for name in (*unknown, "queue_seconds")] == [None] * 8
    assert record.app == "shop"
    assert "secret" not in repr(record)


@pytest.mark.parametrize("testing", [False, True], ids=["answered", "propagated"])
def test_an_exception_is_counted_once(site: Site, testing: bool) -> None:
    site.app.testing = testing

    @site.app.get("/")
    def broken() -> str:
        raise LookupError("nothing there")

    if testing:
        with pytest.raises(LookupError):
            site.get()
    else:
        assert site.get().status_code == 500
    record = site.only_record()
    assert (record.status, record.exception, record.endpoint) == (500, "LookupError", "broken")


def test_an_exception_that_a_handler_answered_is_none(site: Site) -> None:
    @site.app.errorhandler(LookupError)
    def answer(_error: LookupError) -> tuple[str, int]:
        return "sorry", 404

    @site.app.get("/")
    def broken() -> str:
        raise LookupError

    assert site.get().status_code == 404
    record = site.only_record()
    assert (record.status, record.exception) == (404, None)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_what_ends_the_process_counts_too(site: Site, error: type[BaseException]) -> None:
    @site.app.get("/thing/<int:number>")
    def leave(number: int) -> str:
        raise error

    with pytest.raises(error):
        site.get("/thing/7")
    record = site.only_record()
    assert (record.endpoint, record.status) == ("leave", 500)
    assert (record.exception, record.view_args) == (error.__name__, {"number": 7})


def test_methods_and_unmatched_paths(site: Site) -> None:
    site.app.add_url_rule("/slash/", "slash", lambda: "x")
    site.app.add_url_rule("/gone", "gone", lambda: redirect("/slash/"))
    assert site.request("/slash/", method="HEAD").status_code == 200
    assert site.request("/slash/", method="OPTIONS").status_code == 200
    assert site.request("/slash/", method="DELETE").status_code == 405
    assert site.request("/slash/", method="BREW").status_code == 405
    assert site.get("/nowhere").status_code == 404
    assert site.get("/slash").status_code == 308
    assert site.get("/gone").status_code == 302
    assert site.counted() == {
        ("HEAD", "slash", "200", "ZZ"): 1,
        ("OPTIONS", "slash", "200", "ZZ"): 1,
        ("DELETE", "__unmatched__", "405", "ZZ"): 1,
        ("_OTHER", "__unmatched__", "405", "ZZ"): 1,
        ("GET", "__unmatched__", "404", "ZZ"): 1,
        ("GET", "__unmatched__", "308", "ZZ"): 1,
        ("GET", "gone", "302", "ZZ"): 1,
    }
    head = next(record for record in site.records() if record.method == "HEAD")
    assert head.bytes_sent == 0


class TestOtherHooks:
    def test_an_earlier_before_request_answers(self, make_site: object) -> None:
        app = Flask("shop")

        @app.before_request
        def deny() -> tuple[str, int]:
            g.track_var["denied"] = True
            return "no", 401

        app.add_url_rule("/", "index", lambda: "x")
        site = make_site(app=app, METRICS_PATH=None)
        assert site.get().status_code == 401
        record = site.only_record()
        assert (record.status, record.endpoint) == (401, "index")
        assert record.track_var == {"denied": True}

    def test_a_later_after_request_changes_the_status(self, site: Site) -> None:
        site.app.add_url_rule("/", "index", lambda: "x")

        @site.app.after_request
        def change(response: Response) -> Response:
            if request.endpoint == "index":
                response.status_code = 299
            return response

        site.get()
        assert site.only_record().status == 299

    def test_a_raising_after_request_is_one_500(self, site: Site) -> None:
        site.app.add_url_rule("/", "index", lambda: "x")

        @site.app.after_request
        def fail(response: Response) -> Response:
            if request.endpoint == "index":
                raise RuntimeError
            return response

        # Flask finalizes once more, and the hook raises again.
        assert site.get().status_code == 500
        record = site.only_record()
        assert (record.status, record.exception) == (500, "RuntimeError")

    def test_a_raising_teardown_is_what_the_server_sees(self, site: Site) -> None:
        site.app.add_url_rule("/", "index", lambda: "x")

        @site.app.teardown_request
        def fail(_error: BaseException | None) -> None:
            if request.endpoint == "index":
                raise RuntimeError

        with pytest.raises(RuntimeError):
            site.get()
        record = site.only_record()
        assert (record.status, record.exception) == (500, "RuntimeError")

    def test_a_test_request_context_records_nothing(self, site: Site) -> None:
        with pytest.raises(LookupError), site.app.test_request_context("/"):
            raise LookupError
        assert site.records() == []


def test_async_views(site: Site) -> None:
    @site.app.get("/")
    async def index() -> str:
        await asyncio.sleep(0.01)
        g.track_var["async"] = True
        return "x"

    assert site.get().data == b"x"
    record = site.only_record()
    assert (record.endpoint, record.track_var) == ("index", {"async": True})
    assert record.duration_seconds >= 0.01


def test_method_views_and_nested_blueprints(site: Site) -> None:
    class Thing(MethodView):
        def get(self) -> str:
            return "x"

    parent = Blueprint("parent", "parent", url_prefix="/parent")
    child = Blueprint("child", "child")
    child.add_url_rule("/thing", view_func=Thing.as_view("thing"))
    parent.register_blueprint(child)
    site.app.register_blueprint(parent)
    site.get("/parent/thing")
    record = site.only_record()
    assert (record.endpoint, record.blueprint) == ("parent.child.thing", "parent.child")


class TestNested:
    def test_a_request_within_a_request_is_two(self, site: Site) -> None:
        @site.app.get("/outer")
        def outer() -> str:
            g.track_var["who"] = "outer"
            inner = site.app.test_client().get("/inner")
            g.track_var["then"] = "outer"
            return inner.text

        @site.app.get("/inner")
        def inner() -> str:
            g.track_var["who"] = "inner"
            return "x"

        site.get("/outer")
        found = {record.endpoint: record.track_var for record in site.records()}
        assert found == {"inner": {"who": "inner"}, "outer": {"who": "outer", "then": "outer"}}

    def test_from_a_copy_of_the_environ(self, site: Site) -> None:
        @site.app.get("/outer")
        def outer() -> bytes:
            g.track_var["who"] = "outer"
            environ = {**request.environ, "PATH_INFO": "/inner"}
            body, _, _ = run_wsgi_app(site.app.wsgi_app, environ, buffered=True)
            return b"".join(body)

        site.app.add_url_rule("/inner", "inner", lambda: str(dict(g.track_var)))
        assert site.get("/outer").data == b"{}"
        assert sorted(record.endpoint or "" for record in site.records()) == ["inner", "outer"]

    def test_the_same_request_handed_on_is_one(self, site: Site) -> None:
        wrapped = site.app.wsgi_app

        def twice(environ: dict, start_response: object) -> object:
            return wrapped(environ, start_response)

        site.app.wsgi_app = twice
        site.app.add_url_rule("/", "index", lambda: "x")
        site.get()
        assert len(site.records()) == 1


class TestMounted:
    def test_under_a_prefix(self, site: Site) -> None:
        site.app.add_url_rule("/thing", "thing", lambda: "x")
        outside = DispatcherMiddleware(Flask("other"), {"/shop": site.app})
        run_wsgi_app(outside, EnvironBuilder("/shop/thing").get_environ(), buffered=True)
        record = site.only_record()
        assert (record.root_path, record.path) == ("/shop", "/thing")
        assert record.url == "http://localhost/shop/thing"

    @pytest.mark.parametrize("inside", [True, False])
    def test_with_proxy_fix_inside_or_outside(self, make_site: object, inside: bool) -> None:
        app = Flask("shop")
        app.add_url_rule("/", "index", lambda: request.remote_addr or "")
        if inside:
            app.wsgi_app = ProxyFix(app.wsgi_app, x_for=1)
        site = make_site(app=app)
        if not inside:
            app.wsgi_app = ProxyFix(app.wsgi_app, x_for=1)
        assert site.get(headers={"X-Forwarded-For": "198.51.100.7"}).text == "198.51.100.7"
        record = site.only_record()
        assert (record.remote_addr, record.endpoint) == ("198.51.100.7", "index")
        site.assert_agrees()

    def test_behind_proxy_fix_the_peer_is_who_is_trusted(self, make_site: object) -> None:
        site = make_site(COUNTRY="header:CF-IPCountry", TRUSTED_PROXIES=["203.0.113.9"])
        site.app.add_url_rule("/", "index", lambda: "x")
        site.app.wsgi_app = ProxyFix(site.app.wsgi_app, x_for=1)
        headers = {"X-Forwarded-For": "198.51.100.7", "CF-IPCountry": "NL"}
        site.get(headers=headers)
        site.get(headers=headers, environ_base={"REMOTE_ADDR": "198.51.100.8"})
        addresses = [record.remote_addr for record in site.records()]
        assert addresses == ["198.51.100.7"] * 2
        assert [record.country for record in site.records()] == ["NL", None]

    def test_middleware_that_holds_start_response_back(self, make_site: object) -> None:
        app = Flask("shop")
        app.add_url_rule("/", "index", lambda: "x")
        inner = app.wsgi_app

        def hold(environ: dict, start_response: object) -> list[bytes]:
            body, status, headers = run_wsgi_app(inner, environ, buffered=True)
            start_response(status, list(headers))
            return [b"".join(body)]

        app.wsgi_app = hold
        site = make_site(app=app)
        site.get()
        record = site.only_record()
        assert (record.endpoint, record.status, record.bytes_sent) == ("index", 200, 1)
        site.assert_agrees()


def test_a_raising_or_odd_username_is_none(make_site: object) -> None:
    class Odd:
        def __str__(self) -> str:
            raise LookupError

    answers = iter(["ann", None, Odd(), "\udcff\0x"])
    site = make_site(username=lambda: next(answers))
    site.app.add_url_rule("/", "index", lambda: "x")
    for _ in range(5):  # the fifth: StopIteration
        assert site.get().status_code == 200
    names = [record.username for record in site.records()]
    assert names == ["ann", None, None, "\\udcffx", None]
    site.assert_agrees()


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"X-Long": "x" * 1_000_000}, id="a-megabyte"),
        pytest.param({"User-Agent": "x" * 1_000_000}, id="a-megabyte-that-is-kept"),
        pytest.param({"Content-Length": "9" * 5000}, id="a-huge-length"),
        pytest.param({"Content-Length": "-5"}, id="a-negative-length"),
        pytest.param({"Authorization": "Basic \xff\xfe"}, id="broken-basic"),
        pytest.param({"Authorization": "Bearer secret"}, id="bearer"),
        pytest.param({"Host": "a\xffb:99999"}, id="odd-host"),
        pytest.param({"X-Request-Start": "t=nan"}, id="odd-start"),
        pytest.param({"Accept-Language": ",;=q" * 1000}, id="odd-language"),
        pytest.param({"X-Forwarded-For": ",".join(["1.2.3.4"] * 5000)}, id="long-chain"),
    ],
)
def test_odd_headers_are_one_clean_record(site: Site, headers: dict[str, str]) -> None:
    site.app.add_url_rule("/", "index", lambda: "x")
    environ = EnvironBuilder("/").get_environ()
    for name, value in headers.items():
        key = name.upper().replace("-", "_")
        environ[key if key == "CONTENT_LENGTH" else f"HTTP_{key}"] = value
    run_wsgi_app(site.app.wsgi_app, environ, buffered=True)
    record = site.only_record()
    assert record.endpoint == "index" or record.status == 400
    assert record.username is None


@pytest.mark.parametrize(
    "path",
    ["/\0", "/\xff\xfe", "/\ud800", "/" + "x" * 100_000, "//", ""],
    ids=["nul", "not-utf8", "surrogate", "long", "slashes", "empty"],
)
def test_odd_paths_are_one_clean_record(site: Site, path: str) -> None:
    environ = EnvironBuilder("/").get_environ()
    environ["PATH_INFO"] = path
    environ["QUERY_STRING"] = "a=\0\xff"
    with suppress(UnicodeEncodeError):  # Flask's own, of a surrogate
        run_wsgi_app(site.app.wsgi_app, environ, buffered=True)
    record = site.only_record()
    assert "\0" not in record.path + record.query
    assert len(record.path) <= 2048
    record.path.encode()


def test_more_random_paths_than_there_may_be_series_are_one(make_site: Callable[..., Site]) -> None:
    site = make_site(MAX_SERIES=50)
    for number in range(100):
        site.wsgi(f"/{number:x}")
    assert site.counted() == {("GET", "__unmatched__", "404", "ZZ"): 100}
    assert not any(site.samples("flask_usage_label_overflow_total").values())
    site.assert_agrees()


def test_many_threads_lose_nothing(site: Site) -> None:
    site.app.add_url_rule("/<int:number>", "index", lambda number: "x")

    def visit(start: int) -> None:
        for number in range(start, start + 200):
            site.wsgi(f"/{number}")

    threads = [threading.Thread(target=visit, args=(1000 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({record.id for record in site.records()}) == 1600
    assert site.counted() == {("GET", "index", "200", "ZZ"): 1600}


def test_in_progress_never_counts_the_scrape(site: Site) -> None:
    entered, leave = threading.Event(), threading.Event()

    @site.app.get("/")
    def slow() -> str:
        entered.set()
        leave.wait(10)
        return "x"

    thread = threading.Thread(target=site.get)
    thread.start()
    assert entered.wait(10)
    assert site.samples("flask_usage_requests_in_progress") == {(): 1}
    leave.set()
    thread.join()
    assert site.samples("flask_usage_requests_in_progress") == {(): 0}


def test_over_a_real_server(site: Site) -> None:
    import urllib.request

    site.app.add_url_rule("/", "index", lambda: Response(iter(["a", "b"])))
    with make_server("127.0.0.1", 0, site.app) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/"
            with urllib.request.urlopen(url, timeout=10) as answer:
                assert answer.read() == b"ab"
        finally:
            server.shutdown()
            thread.join()
    assert site.only_record().bytes_sent == 2


def test_abort_in_a_view_is_no_exception(site: Site) -> None:
    site.app.add_url_rule("/", "index", lambda: abort(403))
    assert site.get().status_code == 403
    record = site.only_record()
    assert (record.endpoint, record.status, record.exception) == ("index", 403, None)
