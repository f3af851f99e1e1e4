"""TRACK_USAGE_COOKIE: who gets the cookie, and what a record has of it."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from typing import Any

import pytest
from flask import Blueprint, Flask, Response, abort, stream_with_context
from helpers.front_door import Site
from werkzeug.test import EnvironBuilder

Make = Callable[..., Site]

PERSON = {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:139.0) Gecko/20100101 Firefox/139.0"}
COOKIE = re.compile(
    r"usage_visitor=([0-9a-f]{32}); Max-Age=31536000; Path=/; HttpOnly; SameSite=Lax(; Secure)?"
)


@pytest.fixture
def site(make_site: Make) -> Site:
    made = make_site(COOKIE=True)
    made.app.add_url_rule("/", "index", lambda: "x", methods=["GET", "POST"])
    return made


def given(response: Any) -> list[str]:
    return response.headers.getlist("Set-Cookie")


def test_a_visitor_is_recognised(site: Site) -> None:
    client = site.app.test_client()
    first, second = client.get("/", headers=PERSON), client.post("/", headers=PERSON)
    other = site.get(headers=PERSON)
    (cookie,) = given(first)
    assert COOKIE.fullmatch(cookie)
    assert given(second) == []  # a year from the first visit, not from the last
    assert given(other) != [cookie]
    one, two, three = site.records()
    assert one.visitor == two.visitor == COOKIE.fullmatch(cookie)[1]  # type: ignore[index]
    assert three.visitor not in (None, one.visitor)
    assert site.samples("flask_usage_visitors") == {(("window", "1d"),): 2}
    assert [s.visitors for s in site.usage.storage.summarize((), visitors=True)] == [2]
    assert site.usage.storage.count(visitor=one.visitor) == 2
    site.assert_agrees()


def test_without_the_setting_nobody_gets_one(make_site: Make) -> None:
    site = make_site()
    assert given(site.get(headers=PERSON | {"Cookie": f"usage_visitor={'a' * 32}"})) == []
    assert site.only_record().visitor is None
    assert site.samples("flask_usage_visitors") == {}


def test_it_is_secure_under_https(site: Site) -> None:
    (cookie,) = given(site.get(headers=PERSON, base_url="https://shop.example"))
    assert cookie.endswith("; SameSite=Lax; Secure")


def test_it_is_beside_the_apps_own_cookies(site: Site) -> None:
    @site.app.route("/own")
    def own() -> Response:
        response = Response("x")
        response.set_cookie("cart", "7")
        return response

    cookies = given(site.get("/own", headers=PERSON))
    assert cookies[0] == "cart=7; Path=/"
    assert COOKIE.fullmatch(cookies[1])


@pytest.mark.parametrize(
    "agent", ["", "curl/8.5.0", "Mozilla/5.0 (compatible; Googlebot/2.1)", "python-requests/2.32"]
)
def test_programs_get_none(site: Site, agent: str) -> None:
    assert given(site.get(headers={"User-Agent": agent})) == []
    assert site.only_record().visitor is None


def test_excluded_views_get_none(make_site: Make) -> None:
    site = make_site(COOKIE=True, EXCLUDE=["hidden", "/private/*"])
    internal = Blueprint("internal", __name__, url_prefix="/internal")
    internal.add_url_rule("/", "index", lambda: "x")
    site.app.register_blueprint(internal)
    site.usage.exclude_blueprint(internal)
    site.app.add_url_rule("/hidden", "hidden", lambda: "x")
    site.app.add_url_rule("/private/x", "private", lambda: "x")
    for path in ("/hidden", "/private/x", "/internal/", "/metrics"):
        assert given(site.get(path, headers=PERSON)) == []
    assert site.records() == []


def test_include_mode_gives_it_to_what_is_included(make_site: Make) -> None:
    site = make_site(COOKIE=True, INCLUDE_OR_EXCLUDE_VIEWS="include")
    site.app.add_url_rule("/in", "in", site.usage.include(lambda: "x"))
    site.app.add_url_rule("/out", "out", lambda: "x")
    assert given(site.get("/out", headers=PERSON)) == []
    assert given(site.get("/none", headers=PERSON)) == []
    assert len(given(site.get("/in", headers=PERSON))) == 1


@pytest.mark.parametrize("control", ["public, max-age=60", "Public", "s-maxage=5"])
def test_what_shared_caches_keep_has_none(site: Site, control: str) -> None:
    site.app.add_url_rule(
        "/cached", "cached", lambda: Response("x", headers={"cache-control": control})
    )
    assert given(site.get("/cached", headers=PERSON)) == []
    assert site.only_record().visitor is None


@pytest.mark.parametrize(
    "value", ["", "x" * 32, "A" * 32, "a" * 31, "a" * 33, "a" * 32 + "x", "é" * 32, "x" * 100_000]
)
def test_what_is_not_ours_is_replaced(site: Site, value: str) -> None:
    response = site.get(headers=PERSON | {"Cookie": f"usage_visitor={value}; a=b"})
    (cookie,) = given(response)
    assert site.only_record().visitor == COOKIE.fullmatch(cookie)[1]  # type: ignore[index]


@pytest.mark.parametrize(
    "around", ["{}", "a=b; {}", "{}; c=d", "a=b;{};c=d", "xusage_visitor=1; {}"]
)
def test_it_is_found_among_others(site: Site, around: str) -> None:
    number = secrets.token_hex(16)
    cookies = around.format(f"usage_visitor={number}")
    assert given(site.get(headers=PERSON | {"Cookie": cookies})) == []
    assert site.only_record().visitor == number


@pytest.mark.parametrize("name", ["xusage_visitor", "usage_visitor2", "session"])
def test_no_other_cookie_is_taken_for_it(site: Site, name: str) -> None:
    number = secrets.token_hex(16)
    assert len(given(site.get(headers=PERSON | {"Cookie": f"{name}={number}"}))) == 1
    assert site.only_record().visitor not in (None, number)


@pytest.mark.parametrize("testing", [False, True])
def test_every_kind_of_answer_has_it_once(make_site: Make, testing: bool) -> None:
    site = make_site(COOKIE=True, TESTING=testing)

    @site.app.route("/stream")
    def stream() -> Response:
        return Response(stream_with_context(iter(["a", "b"])))

    site.app.add_url_rule("/abort", "abort", lambda: abort(403))
    site.app.add_url_rule("/slash/", "slash", lambda: "x")
    for path in ("/stream", "/abort", "/slash", "/nowhere"):
        assert len(given(site.get(path, headers=PERSON))) == 1, path
    assert len({record.visitor for record in site.records()} - {None}) == 4


def test_a_second_start_response_has_the_same_one(make_site: Make) -> None:
    app = Flask("shop")
    inner = app.wsgi_app

    def twice(environ: Any, start_response: Any) -> Any:
        list(inner(environ, start_response))
        try:
            raise ValueError
        except ValueError as error:
            start_response("500 Oops", [], (type(error), error, error.__traceback__))
        return [b"oops"]

    app.wsgi_app = twice  # type: ignore[method-assign]
    app.add_url_rule("/", "index", lambda: "x")
    site = make_site(app=app, COOKIE=True)
    started: list[Any] = []

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        started.append(headers)
        return list

    environ = EnvironBuilder("/", headers=PERSON).get_environ()
    assert list(app.wsgi_app(environ, start_response)) == [b"oops"]
    first, second = [dict(headers)["Set-Cookie"] for headers in started]
    assert first == second
    assert site.only_record().visitor == COOKIE.fullmatch(first)[1]  # type: ignore[index]


def test_cookie_comes_before_the_daily_hash(make_site: Make) -> None:
    site = make_site(COOKIE=True, VISITORS="daily")
    client = site.app.test_client()
    for headers in (PERSON, PERSON, {"User-Agent": "curl/8.5.0"}):
        client.get("/", headers=headers)
    one, two, program = [record.visitor for record in site.records()]
    assert one == two
    assert len(one or "") == 32
    assert program == one  # it sent the cookie as well
    site.get(headers={"User-Agent": "curl/8.5.0"})
    assert len(site.records()[-1].visitor or "") == 16


def test_a_failure_of_ours_reaches_nobody(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> str:
        raise OSError("no random numbers")

    monkeypatch.setattr(secrets, "token_hex", fails)
    assert site.get(headers=PERSON).text == "x"
    assert site.only_record().visitor is None
    assert site.faults()["cookie"] == 1
