"""Which requests are tracked: include and exclude by view, endpoint, glob, path, blueprint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flask import Blueprint, Flask
from flask.views import MethodView
from helpers.front_door import Site
from prometheus_client import CollectorRegistry

from flask_usage_metrics import ConfigError, TrackUsage


def endpoints(site: Site) -> list[str | None]:
    return [record.endpoint for record in site.records()]


def test_exclude_mode_tracks_all_but_static_and_what_is_excluded(site: Site) -> None:
    @site.usage.exclude
    @site.app.route("/above")
    def above() -> str:
        return "x"

    @site.app.route("/below")
    @site.usage.exclude
    def below() -> str:
        return "x"

    @site.app.route("/kept")
    def kept() -> str:
        return "x"

    for path in ("/above", "/below", "/kept", "/static/x.css", "/nowhere"):
        site.get(path)
    assert endpoints(site) == ["kept", None]
    assert above() == below() == "x"


def test_include_mode_tracks_only_what_is_included(make_site: Callable[..., Site]) -> None:
    site = make_site(INCLUDE_OR_EXCLUDE_VIEWS="include")

    @site.usage.include
    @site.app.route("/above")
    def above() -> str:
        return "x"

    @site.app.route("/below")
    @site.usage.include
    def below() -> str:
        return "x"

    site.app.add_url_rule("/other", "other", lambda: "x")
    for path in ("/above", "/below", "/other", "/static/x.css", "/nowhere"):
        site.get(path)
    assert endpoints(site) == ["above", "below"]
    site.assert_agrees()


def test_a_mark_made_later_counts_from_then_on(site: Site) -> None:
    site.app.add_url_rule("/", "index", lambda: "x")
    site.get()
    site.usage.exclude("index")
    site.get()
    assert endpoints(site) == ["index"]


def test_a_view_that_another_decorator_wraps_or_a_class(site: Site) -> None:
    from functools import wraps

    def logged(view: Callable[..., str]) -> Callable[..., str]:
        @wraps(view)
        def inner() -> str:
            return view()

        return inner

    @site.app.route("/wrapped")
    @logged
    @site.usage.exclude
    def wrapped() -> str:
        return "x"

    @site.usage.exclude
    class Thing(MethodView):
        def get(self) -> str:
            return "x"

    site.app.add_url_rule("/thing", view_func=Thing.as_view("thing"))
    site.get("/wrapped")
    site.get("/thing")
    assert endpoints(site) == []


@pytest.mark.parametrize("pattern", ["api.*", "*.list", "api.list", "/api/*", "/api/list"])
def test_by_endpoint_glob_or_path(site: Site, pattern: str) -> None:
    api = Blueprint("api", "api", url_prefix="/api")
    api.add_url_rule("/list", "list", lambda: "x")
    site.app.register_blueprint(api)
    site.app.add_url_rule("/", "index", lambda: "x")
    site.usage.exclude(pattern)
    site.get("/api/list")
    site.get()
    assert endpoints(site) == ["index"]


def test_by_configuration(make_site: Callable[..., Site]) -> None:
    site = make_site(EXCLUDE=["health", "/admin/*"])
    for name in ("health", "index"):
        site.app.add_url_rule(f"/{name}", name, lambda: "x")
    for path in ("/health", "/index", "/admin/x", "/static/x"):
        site.get(path)
    assert [(r.endpoint, r.path) for r in site.records()] == [("index", "/index")]


@pytest.mark.parametrize("mode", ["exclude", "include"])
@pytest.mark.parametrize(
    ("exclude", "include", "expected"),
    [
        ((), None, []),
        (("other",), None, []),
        (("other",), "*", []),
        (None, "*", ["api.static", "static"]),
        ("none", "*", ["api.static", "static"]),
        ("", "*", []),
        (("other",), "static", ["static"]),
        (("other",), "*static", ["api.static", "static"]),
        ((), "*.static", ["api.static"]),
        ((), "/static/*", ["static"]),
        (("static",), "static", []),
    ],
)
def test_static_files_are_left_out_unless_they_are_asked_for(
    make_site: Callable[..., Site], mode: str, exclude: Any, include: Any, expected: list[str]
) -> None:
    site = make_site(EXCLUDE=exclude, INCLUDE_OR_EXCLUDE_VIEWS=mode)
    api = Blueprint("api", "api", url_prefix="/api", static_folder="files")
    api.add_url_rule("/list", "list", lambda: "x")
    site.app.register_blueprint(api)
    site.usage.include_blueprint(api)  # with its views, and not with its files
    if include is not None:
        site.usage.include(include)
    for path in ("/static/x", "/api/files/x", "/api/list"):
        site.get(path)
    assert sorted(endpoints(site)) == sorted(["api.list", *expected])


@pytest.mark.parametrize("mode", ["exclude", "include"])
def test_the_view_of_static_files_may_be_included(
    make_site: Callable[..., Site], mode: str
) -> None:
    site = make_site(INCLUDE_OR_EXCLUDE_VIEWS=mode)
    site.usage.include(site.app.view_functions["static"])
    site.get("/static/x")
    assert endpoints(site) == ["static"]


def test_what_no_route_matched(site: Site) -> None:
    assert site.usage.exclude(None) is None
    site.get("/nowhere")
    assert endpoints(site) == []


@pytest.mark.parametrize("registered_first", [True, False])
@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("mode", ["include", "exclude"])
def test_blueprints_with_what_is_nested(
    make_site: Callable[..., Site], mode: str, by_name: bool, registered_first: bool
) -> None:
    site = make_site(INCLUDE_OR_EXCLUDE_VIEWS=mode)
    parent = Blueprint("parent", "parent", url_prefix="/parent")
    child = Blueprint("child", "child", url_prefix="/child")
    mark = getattr(site.usage, f"{mode}_blueprint")
    target = "parent" if by_name else parent

    def register() -> None:
        parent.add_url_rule("/", "index", lambda: "x")
        child.add_url_rule("/", "index", lambda: "x")
        parent.register_blueprint(child)
        site.app.register_blueprint(parent)

    if registered_first:
        register()
    assert mark(target) is target
    if not registered_first:
        register()
    # Hooks of the blueprint still work: it was only marked.
    site.app.add_url_rule("/other", "other", lambda: "x")
    for path in ("/parent/", "/parent/child/", "/other"):
        assert site.get(path).status_code == 200
    inside = ["parent.index", "parent.child.index"]
    assert endpoints(site) == (inside if mode == "include" else ["other"])


def test_two_apps_of_one_extension_do_not_mix() -> None:
    stored: dict[str, list[object]] = {"one": [], "two": []}
    usage = TrackUsage(registry=CollectorRegistry())
    apps = []
    for name in ("one", "two"):
        app = Flask(name)
        app.add_url_rule("/", f"index-{name}", lambda: "x")
        usage.init_app(app, stored[name].append)
        apps.append(app)
    usage.exclude("index-two")
    for app in apps:
        app.test_client().get("/")
        app.test_client().get("/nowhere")
        with app.app_context():
            assert usage.flush()
    assert [record["server_name"] for record in stored["one"]] == ["one", "one"]
    assert [record["endpoint"] for record in stored["two"]] == [None]


@pytest.mark.parametrize("wrong", [5, ["index"], object()])
def test_a_wrong_mark_is_an_error(site: Site, wrong: object) -> None:
    with pytest.raises(ConfigError, match="expected a view, an endpoint, a glob or a path, not"):
        site.usage.include(wrong)
    with pytest.raises(ConfigError, match="expected a blueprint or its name, not"):
        site.usage.exclude_blueprint(wrong)
