"""/metrics under the app's own rules: about hosts, logins, limits and https."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask, redirect, request
from helpers.front_door import Site, samples

TOKEN = {"Authorization": "Bearer s3cret"}
WRONG = {"Authorization": "Bearer wrong"}


def by_hosts() -> Flask:
    app = Flask("shop", static_folder=None, host_matching=True)
    app.add_url_rule("/", "index", lambda: "x", host="shop.example")
    app.add_url_rule("/<path:page>", "page", lambda page: "x", host="pages.example")
    return app


def by_subdomains() -> Flask:
    app = Flask("shop", subdomain_matching=True)
    app.config["SERVER_NAME"] = "shop.example"
    app.add_url_rule("/", "index", lambda: "x")
    app.add_url_rule("/", "tenant", lambda tenant: tenant, subdomain="<tenant>")
    return app


def plain() -> Flask:
    app = Flask("shop")
    app.add_url_rule("/", "index", lambda: "x")
    return app


def trusting() -> Flask:
    app = plain()
    app.config["TRUSTED_HOSTS"] = ["shop.example"]
    return app


def guarded() -> Flask:
    app = plain()

    @app.before_request
    def guard() -> Any:
        return None if request.endpoint == "index" else redirect("/login")

    return app


def raising() -> Flask:
    app = plain()

    @app.before_request
    def fail() -> None:
        if request.endpoint != "index":
            raise LookupError

    return app


def scrape(site: Site, host: str, **headers: str) -> Any:
    return site.get("/metrics", base_url=f"http://{host}", headers=headers)


@pytest.mark.filterwarnings("ignore:Current server name")  # Werkzeug's, of an address
class TestWithoutAToken:
    @pytest.mark.parametrize("make_app", [by_hosts, by_subdomains])
    @pytest.mark.parametrize("host", ["shop.example", "a.shop.example", "10.0.0.5:8000", "[::1]"])
    def test_it_is_found_on_every_host(
        self, make_site: Callable[..., Site], make_app: Callable[[], Flask], host: str
    ) -> None:
        site = make_site(app=make_app())
        assert scrape(site, host).status_code == 200
        assert site.get("/", base_url="http://shop.example").text == "x"
        with site.app.test_request_context("/", base_url="http://shop.example"):
            assert "/metrics" in site.app.url_for("track_usage_metrics")
        assert [record.endpoint for record in site.records()] == ["index"]

    @pytest.mark.parametrize(
        ("make_app", "status"), [(trusting, 400), (guarded, 302), (raising, 500)]
    )
    def test_whatever_answers_it_is_not_counted(
        self, make_site: Callable[..., Site], make_app: Callable[[], Flask], status: int
    ) -> None:
        site = make_site(app=make_app())
        assert scrape(site, "10.0.0.5").status_code == status
        site.get("/", base_url="http://shop.example")
        site.get("/nowhere", base_url="http://10.0.0.5")
        assert sorted(record.path for record in site.records()) == ["/", "/nowhere"]


@pytest.mark.filterwarnings("ignore:Current server name")
class TestWithAToken:
    @pytest.mark.parametrize(
        "make_app", [by_hosts, by_subdomains, trusting, guarded, raising, plain]
    )
    @pytest.mark.parametrize("host", ["shop.example", "pages.example", "10.0.0.5:8000"])
    def test_who_shows_it_is_answered_before_any_rule(
        self, make_site: Callable[..., Site], make_app: Callable[[], Flask], host: str
    ) -> None:
        site = make_site(app=make_app(), METRICS_TOKEN="s3cret")
        assert scrape(site, host, **TOKEN).status_code == 200
        site.get("/", base_url="http://shop.example")
        text = scrape(site, host, **TOKEN).text
        assert sum(samples(text, "flask_usage_requests_total").values()) == 1
        assert samples(text, "flask_usage_requests_in_progress") == {(): 0}
        for shown in ({}, WRONG):
            assert "flask_usage" not in scrape(site, host, **shown).text
        expected = ["index"]
        if make_app is by_hosts and host == "pages.example":  # a page of the app's own
            expected += ["page", "page"]
        assert sorted(record.endpoint or "" for record in site.records()) == expected

    def test_only_scrapes_are(self, make_site: Callable[..., Site]) -> None:
        site = make_site(app=guarded(), METRICS_TOKEN="s3cret")
        assert site.get("/metrics/more", headers=TOKEN).status_code == 302
        assert site.request("/metrics", method="POST", headers=TOKEN).status_code == 405
        assert site.request("/metrics", method="HEAD", headers=TOKEN).status_code == 200


# ------------------------------------------------------------------------ the README's lines


@pytest.fixture
def extended(make_site: Callable[..., Site]) -> tuple[Flask, Site]:
    app = plain()
    app.secret_key = "key"
    return app, make_site(app=app)


def test_flask_login(extended: tuple[Flask, Site]) -> None:
    login = pytest.importorskip("flask_login", exc_type=ImportError)
    app, site = extended
    manager = login.LoginManager(app)
    manager.user_loader(lambda user: None)

    @app.before_request
    def guard() -> Any:
        if request.endpoint != "track_usage_metrics" and not login.current_user.is_authenticated:
            return manager.unauthorized()
        return None

    assert site.get("/").status_code == 401
    assert scrape(site, "localhost").status_code == 200


@pytest.mark.filterwarnings("ignore:Using the in-memory storage")
def test_flask_limiter(extended: tuple[Flask, Site]) -> None:
    limiter_of = pytest.importorskip("flask_limiter", exc_type=ImportError)
    app, site = extended
    limiter = limiter_of.Limiter(lambda: "all", app=app, default_limits=["1 per hour"])
    limiter.exempt(app.view_functions["track_usage_metrics"])
    assert [site.get("/").status_code for _ in range(2)] == [200, 429]
    assert [scrape(site, "localhost").status_code for _ in range(3)] == [200] * 3


def test_flask_talisman(extended: tuple[Flask, Site]) -> None:
    talisman_of = pytest.importorskip("flask_talisman", exc_type=ImportError)
    app, site = extended
    talisman = talisman_of.Talisman(app)
    talisman(force_https=False)(app.view_functions["track_usage_metrics"])
    assert site.get("/").status_code == 302
    assert scrape(site, "localhost").status_code == 200


def test_apiflask(make_site: Callable[..., Site]) -> None:
    apiflask = pytest.importorskip("apiflask", exc_type=ImportError)
    app = apiflask.APIFlask("shop", docs_path=None)
    site = make_site(app=app)
    app.add_url_rule("/things", "things", lambda: "x")
    views = app.view_functions
    views["track_usage_metrics"] = app.doc(hide=True)(views["track_usage_metrics"])
    assert scrape(site, "localhost").status_code == 200
    assert list(site.get("/openapi.json").json["paths"]) == ["/things"]
