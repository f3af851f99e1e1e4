"""TrackUsage as flask-track-usage's users make and configure it."""

from __future__ import annotations

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
from flask import Blueprint, Flask, Response
from flask.views import MethodView
from helpers.old_app import Kept, Shop

import flask_usage_metrics
from flask_usage_metrics import TrackUsage

# -- TrackUsage ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda app, storage: TrackUsage(app, storage),
        lambda app, storage: TrackUsage(app, [storage]),
        lambda app, storage: TrackUsage(app=app, storage=[storage]),
        lambda app, storage: TrackUsage().init_app(app, storage),
        lambda app, storage: TrackUsage().init_app(app, [storage]),
        lambda app, storage: TrackUsage().init_app(app=app, storage=(storage,)),
        lambda app, storage: TrackUsage(None, storage).init_app(app, storage),
    ],
)
def test_it_is_made_with(make: Callable[[Flask, Any], Any], tmp_path: Path) -> None:
    app, kept = Flask("shop", instance_path=str(tmp_path)), Kept()
    app.config["TRACK_USAGE_DELIVERY"] = "inline"
    with app.app_context():  # as factories do
        make(app, kept)
    app.test_client().get("/")
    assert len(kept.items) == 1
    app.extensions["track_usage"].owner.close()


def test_the_module_has_a_version() -> None:
    assert flask_usage_metrics.__version__[0].isdigit()


@pytest.mark.parametrize("mode", ["", "none", None])
def test_neither_include_nor_exclude_is_not_implemented(
    make_shop: Callable[..., Shop], mode: Any
) -> None:
    with pytest.raises(NotImplementedError):
        make_shop(INCLUDE_OR_EXCLUDE_VIEWS=mode)


def test_the_mode_is_read_once(shop: Shop) -> None:
    shop.app.config["TRACK_USAGE_INCLUDE_OR_EXCLUDE_VIEWS"] = "include"
    shop.get()
    assert shop.paths() == ["/"]


VISITS = ("/marked", "/", "/nowhere", "/method", "/twice1", "/twice2", "/api/a", "/api/b")


def mark_views(shop: Shop, mark: Callable[[Any], Any], mark_blueprint: Callable[..., Any]) -> None:
    """Make an app of each way to mark a view; all but "/" and what has no view is marked."""

    @mark
    @shop.app.route("/marked")
    def marked() -> str:
        return "x"

    class Method(MethodView):
        def get(self) -> str:
            return "x"

    view = Method.as_view("method")
    shop.app.add_url_rule("/method", view_func=view)
    mark(view)
    shop.app.add_url_rule("/twice1", "twice1", twice := lambda: "x")
    shop.app.add_url_rule("/twice2", "twice2", twice)
    mark(shop.app.view_functions["twice1"])
    blueprint = Blueprint("api", "shop", url_prefix="/api")
    blueprint.add_url_rule("/a", "a", lambda: "x")
    blueprint.add_url_rule("/b", "b", lambda: "x")
    shop.app.register_blueprint(blueprint)
    mark_blueprint(blueprint)


@pytest.mark.parametrize("visited", VISITS)
def test_include_mode_tracks_what_is_included_only(
    make_shop: Callable[..., Shop], visited: str
) -> None:
    shop = make_shop(INCLUDE_OR_EXCLUDE_VIEWS="include")
    mark_views(shop, shop.usage.include, shop.usage.include_blueprint)
    shop.get(visited)
    assert shop.paths() == ([] if visited in ("/", "/nowhere") else [visited])


@pytest.mark.parametrize("visited", VISITS)
def test_exclude_mode_tracks_all_but_what_is_excluded(shop: Shop, visited: str) -> None:
    mark_views(shop, shop.usage.exclude, shop.usage.exclude_blueprint)
    shop.get(visited)
    assert shop.paths() == ([visited] if visited in ("/", "/nowhere") else [])


@pytest.mark.parametrize("mode", ["include", "exclude"])
def test_the_marks_of_the_other_mode_have_no_effect(
    make_shop: Callable[..., Shop], mode: str
) -> None:
    shop = make_shop(INCLUDE_OR_EXCLUDE_VIEWS=mode)
    mark = shop.usage.exclude if mode == "include" else shop.usage.include
    mark(shop.app.view_functions["index"])
    shop.get()
    assert shop.paths() == ([] if mode == "include" else ["/"])


def test_exclude_none_drops_what_no_route_matched(shop: Shop) -> None:
    shop.usage.exclude(None)
    shop.get("/nowhere")
    shop.get()
    assert shop.paths() == ["/"]


def test_a_blueprint_that_nobody_marked_is_untouched(shop: Shop) -> None:
    blueprint = Blueprint("api", "shop")
    blueprint.before_app_request(lambda: None)
    shop.usage.include_blueprint(blueprint)
    blueprint.before_request(lambda: Response("early"))
    blueprint.add_url_rule("/late", "late", lambda: "late")
    shop.app.register_blueprint(blueprint)
    assert shop.get("/late").text == "early"
    assert shop.paths() == ["/late"]


# -- configuration -------------------------------------------------------------------------------


class Geography(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        body = json.dumps({"country": "Germany", "countryCode": "DE"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.mark.parametrize(
    ("template", "asked"),
    [("/json/{ip}/x", "/json/8.8.8.8/x"), ("/json/", "/json/8.8.8.8")],
)
def test_freegeoip_asks_the_endpoint_and_keeps_its_answer(
    template: str, asked: str, make_shop: Callable[..., Shop]
) -> None:
    Geography.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Geography)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}{template}"
    try:
        shop = make_shop(USE_FREEGEOIP=True, FREEGEOIP_ENDPOINT=endpoint)
        shop.get(environ_base={"REMOTE_ADDR": "8.8.8.8"})
        assert shop.usage.flush()
        assert shop.data()["ip_info"] == {"country": "Germany", "countryCode": "DE"}
        assert Geography.asked == [asked]
    finally:
        server.shutdown()
        server.server_close()
