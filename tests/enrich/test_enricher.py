"""What is remembered to make records cheaply changes none of them, and stays small."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, g
from helpers.front_door import Site
from prometheus_client import CollectorRegistry
from werkzeug.test import EnvironBuilder, run_wsgi_app

from flask_usage_metrics import TrackUsage, UsageRecord
from flask_usage_metrics.storage import Writer

Make = Callable[..., Site]

TOKEN = "n3VQh7Zk2LxP9sTf4RmYw8Bc6D"


def test_what_is_remembered_of_one_request_is_right_for_the_next(make_site: Make) -> None:
    site = make_site(TRUSTED_PROXIES="203.0.113.0/24", COUNTRY=None, RESPECT_GPC=True)
    site.app.add_url_rule("/<name>", "page", lambda name: name)
    site.app.add_url_rule("/<name>", "post", lambda name: name, methods=["POST"])
    agents = [
        "curl/8.5.0",
        "Mozilla/5.0 (X11; Linux x86_64; rv:130.0) Gecko/20100101 Firefox/130.0",
    ]
    asked = [
        (method, f"/{name}?{query}", agent, address, referrer, refuses)
        for method in ("GET", "POST")
        for name in ("ann", "bob")
        for query in ("", "page=2", f"token={TOKEN}")
        for agent in agents
        for address in ("198.51.100.7", "2001:db8::1")
        for referrer in ("", "https://example.org/a?b=c")
        for refuses in ("", "1")
    ]
    for _ in range(2):  # the second time all is remembered
        for method, path, agent, address, referrer, refuses in asked:
            headers = {"User-Agent": agent, "X-Forwarded-For": address}
            headers |= {"Referer": referrer} if referrer else {}
            headers |= {"Sec-GPC": refuses} if refuses else {}
            site.request(path, method=method, headers=headers)
    records = site.records()
    assert len(records) == 2 * len(asked)
    for number, record in enumerate(records):
        method, path, agent, address, referrer, refuses = asked[number % len(asked)]
        name, query = path[1:].split("?")
        assert (record.method, record.path, record.rule) == (method, f"/{name}", "/<name>")
        assert record.endpoint == ("page" if method == "GET" else "post")
        assert record.query == query.replace(TOKEN, "REDACTED")
        assert record.view_args == {"name": name}
        assert record.remote_addr == (None if refuses else address)
        assert record.user_agent == (None if refuses else agent)
        assert record.browser == ("Firefox" if agent is agents[1] else None)
        assert record.client == ("human" if agent is agents[1] else "script")
        assert record.referrer == ("https://example.org/a" if referrer else None)
    assert len({record.id for record in records}) == len(records)


def test_client_hints_tell_the_browser_and_are_not_kept(make_site: Make) -> None:
    site = make_site(COUNTRY=None, VISITORS="daily")
    agent = (
        "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) "
        "Chrome/142.0.0.0 Safari/537.36"
    )
    brands = '"Chromium";v="142", "Brave";v="142", "Not_A Brand";v="99"'
    for hints in (
        {},
        {"Sec-CH-UA": brands},
        {"Sec-CH-UA": brands, "Sec-CH-UA-Platform": '"Android"'},
        {"Sec-CH-UA-Platform": '"Android"'},
    ):
        site.get(headers={"User-Agent": agent, **hints})
    site.get(headers={"User-Agent": "", "Sec-CH-UA": brands})
    *records, nameless = site.records()
    assert [(record.browser, record.platform) for record in records] == [
        ("Chrome", "Linux"),
        ("Brave", "Linux"),
        ("Brave", "Android"),
        ("Chrome", "Linux"),
    ]
    assert {(record.client, record.user_agent, record.browser_version) for record in records} == {
        ("human", agent, "142")
    }
    assert len({record.visitor for record in records}) == 1
    assert (nameless.client, nameless.user_agent) == ("other-bot", None)
    site.assert_agrees()


class Spoiler(Writer):
    """Changes what it is handed, as nobody should."""

    name = "spoiler"

    def set_up(self) -> None:
        self.seen: list[tuple[Any, Any]] = []

    def write(self, batch: Sequence[UsageRecord]) -> None:
        for record in batch:
            self.seen.append(deepcopy((record.view_args, record.track_var)))
            for values in (record.view_args, record.track_var):
                assert values is not None
                values["name"] = "somebody else"
                values.get("tags", []).append("spoiled")


@pytest.mark.parametrize("more", [{}, {"tags": ["a"]}])
def test_records_of_the_same_target_share_nothing_that_can_be_changed(
    make_site: Make, more: dict[str, Any]
) -> None:
    spoiler = Spoiler()
    site = make_site([spoiler])

    @site.app.url_value_preprocessor
    def add(_endpoint: str | None, values: dict[str, Any] | None) -> None:
        if values is not None:
            values.update(deepcopy(more))

    @site.app.get("/<name>")
    def page(name: str, **_: object) -> str:
        g.track_var["name"] = name
        return name

    for _ in range(3):
        site.get("/ann")
        assert site.usage.flush()
    assert spoiler.seen == [({"name": "ann"} | more, {"name": "ann"})] * 3


@pytest.mark.parametrize("key", ["path", "User-Agent", "Referer", "Host", "view_args"])
def test_long_texts_of_strangers_are_not_remembered(make_site: Make, key: str) -> None:
    site = make_site()

    @site.app.url_value_preprocessor
    def enlarge(_endpoint: str | None, values: dict[str, Any] | None) -> None:
        if key == "view_args" and values is not None:
            values["extra"] = "x" * 2000

    site.app.add_url_rule("/<path:path>", "page", lambda path, **extra: path[:1])
    for number in range(20):
        long = f"{number}{'y' * 2000}"
        headers = {"User-Agent": "curl", "Referer": "https://example.org/"}
        if key in ("User-Agent", "Referer", "Host"):
            headers[key] = long
        path = f"/{long}" if key == "path" else f"/{number}"
        site.get(path, headers=headers)
    assert len(site.records()) == 20
    enricher = site.app.extensions["track_usage"].pipeline._processor._enricher
    caches = (enricher._targets, enricher._callers, enricher._referrers)
    remembered = [len(repr(key)) for cache in caches for key in (*cache, *cache._older)]
    assert max(remembered) < 1000


def test_a_country_that_a_header_tells_is_not_remembered_with_the_client(make_site: Make) -> None:
    site = make_site(COUNTRY="header:CF-IPCountry", TRUSTED_PROXIES=["203.0.113.9"])
    site.app.add_url_rule("/", "index", lambda: "hello")
    for country in ("DE", "NL", "DE", "XX"):
        site.get(headers={"CF-IPCountry": country})
    assert [record.country for record in site.records()] == ["DE", "NL", "DE", None]


def test_without_a_host_it_is_the_server_that_was_asked(make_site: Make) -> None:
    site = make_site()
    site.app.add_url_rule("/", "index", lambda: "hello")
    for host, port in ((None, "80"), ("", "8080"), (None, 443), ("shop.example:1", "80")):
        environ = EnvironBuilder("/").get_environ() | {"SERVER_NAME": "own", "SERVER_PORT": port}
        del environ["HTTP_HOST"]
        if host is not None:
            environ["HTTP_HOST"] = host
        run_wsgi_app(site.app.wsgi_app, environ, buffered=True)
    expected = ["own", "own:8080", "own:443", "shop.example:1"]
    assert [record.host for record in site.records()] == expected


def test_a_queue_is_told_by_either_header(make_site: Make) -> None:
    site = make_site(TRUSTED_PROXIES=["203.0.113.9"])
    site.app.add_url_rule("/", "index", lambda: "hello")
    came = f"t={time.time() - 2}"
    for name in ("X-Request-Start", "X-Queue-Start", "X-Other"):
        site.get(headers={name: came})
    waited = [record.queue_seconds for record in site.records()]
    assert waited == [pytest.approx(2, abs=0.5), pytest.approx(2, abs=0.5), None]


@pytest.mark.parametrize("proxies", [[], ["198.51.100.9"]], ids=["none", "another"])
def test_a_stranger_cannot_tell_how_long_a_request_waited(
    make_site: Make, proxies: list[str]
) -> None:
    site = make_site(TRUSTED_PROXIES=proxies)
    site.get(headers={"X-Request-Start": f"t={time.time() - 2}"})
    assert site.only_record().queue_seconds is None


@pytest.mark.parametrize(
    ("ago", "told"),
    [(0, 0), (-0.5, 0), (290, 290), (310, None), (3000, None), (-60, None), (1e9, None)],
)
@pytest.mark.parametrize("scale", [1, 1e3, 1e6])
def test_a_queue_is_no_longer_than_is_plausible(
    make_site: Make, ago: float, told: float | None, scale: float
) -> None:
    site = make_site(TRUSTED_PROXIES=["203.0.113.9"])
    site.get(headers={"X-Request-Start": f"t={(time.time() - ago) * scale:f}"})
    waited = site.only_record().queue_seconds
    assert waited == (None if told is None else pytest.approx(told, abs=2))


@pytest.mark.parametrize("told", ["t=", "t=nan", "t=inf", "-1", "9" * 5000, "1e400", "t=t=1", "٣"])
def test_what_tells_no_time_is_no_queue(make_site: Make, told: str) -> None:
    site = make_site(TRUSTED_PROXIES=["203.0.113.9"])
    environ = EnvironBuilder("/").get_environ() | {"REMOTE_ADDR": "203.0.113.9"}
    run_wsgi_app(site.app.wsgi_app, environ | {"HTTP_X_REQUEST_START": told}, buffered=True)
    assert site.only_record().queue_seconds is None
    assert site.faults() == {}


@pytest.mark.parametrize(("name", "kept"), [("café кафе", "café кафе"), ("x" * 200, "x" * 128)])
def test_the_name_of_the_app_is_kept_in_any_alphabet(tmp_path: Path, name: str, kept: str) -> None:
    app = Flask(name)
    app.config |= {"TRACK_USAGE_STATE_DIR": tmp_path}
    records: list[dict[str, Any]] = []
    usage = TrackUsage(app, records.append, registry=CollectorRegistry())
    app.test_client().get("/")
    assert usage.flush()
    assert [record["app"] for record in records] == [kept]
