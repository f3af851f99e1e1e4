"""The record that flask-track-usage's users rely on: its keys, and what each holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from flask import Blueprint, g
from helpers.old_app import FIREFOX, Kept, Shop, user

from flask_usage_metrics.storage.printer import PrintWriter

# -- the record ----------------------------------------------------------------------------------


RECORD = {
    "url": "http://localhost/user/ann?q=1&q=2&empty=",
    "server_name": "shop",
    "blueprint": None,
    "view_args": {"name": "ann"},
    "status": 200,
    "remote_addr": "127.0.0.1",
    "xforwardedfor": "203.0.113.7, 10.0.0.1",
    "authorization": True,
    "ip_info": None,
    "path": "/user/ann",
    "content_length": len("Hello, ann!"),
    "request": "GET http://localhost/user/ann?q=1&q=2&empty= HTTP/1.1",
    "url_args": {"q": "1", "empty": ""},
    "username": "ann",
    "track_var": {"plan": "free"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a storage is given of one request that has everything."""
    shop = Shop(tmp_path_factory.mktemp("shop"))
    shop.app.add_url_rule("/user/<name>", "user", user)
    headers = {
        "User-Agent": FIREFOX,
        "X-Forwarded-For": "203.0.113.7, 10.0.0.1",
        "Accept-Language": "de",
    }
    shop.get("/user/ann?q=1&q=2&empty=", headers=headers, auth=("ann", "s3cret"))
    shop.usage.close()
    return shop.data()


@pytest.mark.parametrize("key", RECORD)
def test_the_record_has(key: str, data: dict[str, Any]) -> None:
    assert data[key] == RECORD[key]
    assert type(data[key]) is type(RECORD[key])


def test_the_record_is_a_dict_without_the_password(data: dict[str, Any]) -> None:
    assert type(data) is dict
    assert "s3cret" not in repr(data)


def test_speed_is_a_float_of_seconds(shop: Shop) -> None:
    shop.app.add_url_rule("/slow", "slow", lambda: time.sleep(0.02) or "x")
    shop.get("/slow")
    assert type(shop.data()["speed"]) is float
    assert 0.02 <= shop.data()["speed"] < 2


def test_date_is_an_int_of_epoch_seconds(shop: Shop) -> None:
    before = int(time.time())
    shop.get()
    assert type(shop.data()["date"]) is int
    assert before <= shop.data()["date"] <= time.time()


def test_user_agent_has_attributes_and_is_its_header(data: dict[str, Any]) -> None:
    agent = data["user_agent"]
    assert str(agent) == agent.string == FIREFOX
    assert (agent.browser, agent.version, agent.platform, agent.language) == (
        *("Firefox", "139", "Linux"),
        "de",
    )


@pytest.mark.parametrize(
    ("path", "options", "expected"),
    [
        ("/", {}, {"view_args": {}, "track_var": {}, "username": None, "authorization": False}),
        ("/", {}, {"xforwardedfor": None, "blueprint": None, "url_args": {}}),
        ("/nowhere", {}, {"status": 404, "view_args": None, "blueprint": None}),
        ("/", {"method": "POST"}, {"status": 405, "request": "POST http://localhost/ HTTP/1.1"}),
        ("/", {"method": "OPTIONS"}, {"status": 200, "view_args": {}}),
        ("/parent/child/x", {}, {"status": 200, "blueprint": "parent.child"}),
        ("/broken", {}, {"status": 500, "path": "/broken"}),
        ("/", {"headers": {"Authorization": "Bearer x"}}, {"authorization": True}),
    ],
)
def test_a_request_of_its_kind_is_recorded_once(
    shop: Shop, path: str, options: dict[str, Any], expected: dict[str, Any]
) -> None:
    parent, child = Blueprint("parent", "shop"), Blueprint("child", "shop")
    child.add_url_rule("/x", "x", lambda: "x")
    parent.register_blueprint(child, url_prefix="/child")
    shop.app.register_blueprint(parent, url_prefix="/parent")
    shop.app.add_url_rule("/broken", "broken", lambda: 1 / 0)
    shop.ask(path, **options)
    found = shop.data()
    assert {key: found[key] for key in expected} == expected


def test_each_storage_has_a_dict_of_its_own(make_shop: Callable[..., Shop]) -> None:
    other = Kept()
    shop = make_shop(PrintWriter(), lambda data: data.clear(), other)
    shop.get()
    assert shop.data().keys() == other.items[0].keys()
    assert shop.data() is not other.items[0]


# -- g.track_var ---------------------------------------------------------------------------------


def test_track_var_is_there_in_views_that_are_not_tracked(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop(INCLUDE_OR_EXCLUDE_VIEWS="include")
    shop.app.add_url_rule("/user/<name>", "user", user)
    assert shop.get("/user/ann").status_code == 200
    assert shop.paths() == []


def test_a_track_var_of_the_apps_own_is_kept(shop: Shop) -> None:
    @shop.app.before_request
    def before() -> None:
        g.track_var = {"early": 1}

    shop.app.add_url_rule("/user/<name>", "user", user)
    shop.get("/user/ann")
    assert shop.data()["track_var"] == {"early": 1, "plan": "free"}
