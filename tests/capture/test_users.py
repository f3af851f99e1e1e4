"""Who made a request: by Basic authentication, Flask-Login or the app's own word."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask, abort, g, request
from flask_login import LoginManager, UserMixin, login_user, logout_user
from helpers.front_door import Site

Make = Callable[..., Site]


def basic(name: str, password: str = "pw") -> dict[str, str]:
    token = base64.b64encode(f"{name}:{password}".encode()).decode()
    return {"Authorization": f"Basic {token}"}


class User(UserMixin):
    """As people write them; its text would show a password hash."""

    def __init__(self, name: str) -> None:
        self.id = name

    def __repr__(self) -> str:
        return f"<User {self.id} hash=hunter2>"


def with_login(app: Flask) -> LoginManager:
    app.secret_key = "k"
    manager = LoginManager(app)
    manager.user_loader(User)

    @app.route("/login/<name>")
    def login(name: str) -> str:
        login_user(User(name))
        return "in"

    @app.route("/logout")
    def logout() -> str:
        logout_user()
        return "out"

    @app.route("/me")
    def me() -> str:
        from flask_login import current_user

        return "me" if current_user.is_authenticated else "nobody"

    app.add_url_rule("/open", "open", lambda: "open")
    return manager


def test_the_user_of_flask_login_is_its_id(make_site: Make) -> None:
    site = make_site()
    with_login(site.app)
    client = site.app.test_client()
    for path in ("/me", "/login/ann", "/me", "/open", "/logout", "/me"):
        client.get(path)
    users = [(record.path, record.username) for record in site.records()]
    # /open never asks who it is, and is not made to: a look-up would cost the visitor a query.
    assert users == [
        ("/me", None),
        ("/login/ann", "ann"),
        ("/me", "ann"),
        ("/open", None),
        ("/logout", None),
        ("/me", None),
    ]
    site.assert_agrees()


def test_flask_login_is_never_made_to_load_a_user(make_site: Make) -> None:
    site = make_site()
    loaded = []
    with_login(site.app).user_loader(lambda name: loaded.append(name) or User(name))
    client = site.app.test_client()
    client.get("/login/ann")
    client.get("/open")
    assert loaded == []
    client.get("/me")
    assert loaded == ["ann"]


@pytest.mark.parametrize("what", ["get_id", "is_authenticated"])
def test_a_user_that_raises_is_none(make_site: Make, what: str) -> None:
    class Odd(User):
        pass

    def detached(*_: object) -> Any:
        raise LookupError("hunter2")

    setattr(Odd, what, property(detached) if what == "is_authenticated" else detached)
    site = make_site()
    with_login(site.app)

    @site.app.route("/odd")
    def odd() -> str:
        g._login_user = Odd("ann")
        return "fine"

    assert site.get("/odd").text == "fine"
    assert site.only_record().username is None
    assert site.faults()["username"] == 1


def test_the_apps_own_word_comes_first_then_flask_login_then_basic(make_site: Make) -> None:
    site = make_site(username=lambda: request.args.get("as"))
    with_login(site.app)
    client = site.app.test_client()
    client.get("/me?as=own", headers=basic("gate"))
    client.get("/me", headers=basic("gate"))
    client.get("/login/ann", headers=basic("gate"))
    client.get("/me", headers=basic("gate"))
    client.get("/me?as=own")
    users = [record.username for record in site.records()]
    assert users == ["own", "gate", "ann", "ann", "own"]


def test_a_bearer_token_is_no_user(site: Site) -> None:
    site.get("/", headers={"Authorization": "Bearer None"})
    record = site.only_record()
    assert (record.authorization, record.username) == (True, None)


def test_an_api_key_in_place_of_a_user_name_is_not_kept(site: Site) -> None:
    key = f"sk_live_{secrets.token_hex(16)}"
    site.get("/", headers=basic(key, ""))
    site.get("/", headers=basic("ann.of.the.long.department.name"))
    key_record, ann = site.records()
    assert key_record.username == "REDACTED"
    assert key_record.authorization is True
    assert ann.username == "ann.of.the.long.department.name"


@pytest.mark.parametrize("name", ["", ":", "\u00e4\u00f6", "a" * 5000, "\0"])
def test_odd_basic_names_do_no_harm(site: Site, name: str) -> None:
    assert site.get("/", headers=basic(name)).status_code == 404
    record = site.only_record()
    assert record.username is None or len(record.username) <= 256
    assert "\0" not in (record.username or "")


# ------------------------------------------------------------------------ API clients


def test_a_consumer_is_a_field_a_label_and_a_group(make_site: Make) -> None:
    owners = {"k1": "acme", "k2": "globex"}
    site = make_site(consumer=lambda: owners.get(request.headers.get("X-Api-Key", "")))
    site.app.add_url_rule("/", "index", lambda: "x" if "ok" in request.args else abort(400))
    for key, query in (("k1", "?ok"), ("k1", ""), ("k2", "?ok"), ("", "?ok")):
        site.get(f"/{query}", headers={"X-Api-Key": key})
    assert [record.consumer for record in site.records()] == ["acme", "acme", "globex", None]
    counted = {
        tuple(value for _, value in key): n
        for key, n in site.samples("flask_usage_consumer_requests_total").items()
    }
    assert counted == {("acme", "200"): 1, ("acme", "400"): 1, ("globex", "200"): 1}
    storage = site.usage.storage
    assert storage.count(consumer="acme", status_class="4xx") == 1
    groups = {s.group["consumer"]: s.requests for s in storage.summarize(by=("consumer",))}
    assert groups == {"acme": 2, "globex": 1, None: 1}
    site.assert_agrees()


def test_without_a_consumer_there_is_no_series(site: Site) -> None:
    site.get()
    assert site.samples("flask_usage_consumer_requests_total") == {}


def test_the_label_is_bounded(make_site: Make) -> None:
    site = make_site(consumer=lambda: request.args["c"], MAX_SERIES=20)
    for number in range(50):
        site.get(f"/?c={number}")
    found = site.samples("flask_usage_consumer_requests_total")
    assert len(found) == 21
    assert found[(("consumer", "__other__"), ("status", "404"))] == 30
    assert site.samples("flask_usage_label_overflow_total")[(("label", "consumer"),)] == 30
    assert site.records()[-1].consumer == "49"


def test_a_consumer_that_raises_or_names_the_key_itself(make_site: Make) -> None:
    key = secrets.token_urlsafe(32)

    def consumer() -> object:
        if "raise" in request.args:
            raise ZeroDivisionError
        return request.headers["X-Api-Key"]

    site = make_site(consumer=consumer)
    assert site.get("/?raise").status_code == 404
    site.get("/", headers={"X-Api-Key": key})
    assert [record.consumer for record in site.records()] == [None, "REDACTED"]
    assert key not in site.scrape()
    assert site.faults()["consumer"] == 1


def test_the_app_is_asked_once_a_request(make_site: Make) -> None:
    asked: list[str] = []
    site = make_site(
        username=lambda: asked.append("username"), consumer=lambda: asked.append("consumer")
    )
    site.app.add_url_rule("/raises", "raises", lambda: str(1 // 0))
    for path in ("/", "/raises"):  # where Flask tells of the exception, and of the answer
        site.get(path)
    assert asked == ["username", "consumer"] * 2
