"""What each preset keeps of a request, who may refuse to be known, and how to forget somebody."""

from __future__ import annotations

import base64
import sqlite3
import time
from collections.abc import Callable
from typing import Any

import pytest
from flask import g
from helpers.front_door import Site
from hypothesis import given
from hypothesis import strategies as st

from flask_usage_metrics.enrich.privacy.policy import shorten

Make = Callable[..., Site]

HEADERS = {
    "User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:139.0) Gecko/20100101 Firefox/139.0",
    "Accept-Language": "de-DE,de;q=0.9",
    "Referer": "https://me:pw@search.example:8443/find/it?q=shop&token=s3cret#x",
    "X-Forwarded-For": "203.0.113.77, 198.51.100.9",
    "Authorization": "Basic " + base64.b64encode(b"ann:hunter2").decode(),
}


def tracked(make_site: Make, **config: Any) -> Site:
    site = make_site(
        country=lambda _: "NL",
        VISITORS="daily",
        TRUSTED_PROXIES=["198.51.100.0/24"],
        **config,
    )

    @site.app.route("/user/<name>/reset/<token>")
    def reset(name: str, token: str) -> str:
        g.track_var.update(plan="free", api_key="s3cret", tokens_used=512)
        return "x"

    return site


def visit(site: Site, path: str = "/user/ann/reset/s3cret?page=2&sig=s3cret", **more: str) -> Any:
    return site.get(path, headers=HEADERS | more, environ_base={"REMOTE_ADDR": "198.51.100.9"})


def kept(site: Site) -> dict[str, Any]:
    record = site.records()[-1]
    return {name: getattr(record, name) for name in record.__struct_fields__}


ALWAYS = {
    "method": "GET",
    "endpoint": "reset",
    "rule": "/user/<name>/reset/<token>",
    "status": 200,
    "country": "NL",
    "browser": "Firefox",
    "browser_version": "139",
    "platform": "Linux",
    "language": "de-DE",
    "client": "human",
    "authorization": True,
    "host": "localhost",
}


def test_full_keeps_all_but_secrets(make_site: Make) -> None:
    site = tracked(make_site)
    visit(site)
    record = kept(site)
    assert ALWAYS.items() <= record.items()
    assert record["remote_addr"] == "203.0.113.77"
    assert record["forwarded_for"] == "203.0.113.77, 198.51.100.9"
    assert record["path"] == "/user/ann/reset/REDACTED"
    assert record["query"] == "page=2&sig=REDACTED"
    assert record["view_args"] == {"name": "ann", "token": "REDACTED"}
    assert record["referrer"] == "https://search.example:8443/find/it"
    assert record["user_agent"] == HEADERS["User-Agent"]
    assert record["username"] == "ann"
    assert len(record["visitor"]) == 16
    assert record["track_var"] == {"plan": "free", "api_key": "REDACTED", "tokens_used": 512}
    site.assert_agrees()


def test_balanced_keeps_what_many_share(make_site: Make) -> None:
    site = tracked(make_site, PRIVACY="balanced", SECRET_KEY="k")
    visit(site)
    record = kept(site)
    assert ALWAYS.items() <= record.items()
    assert record["remote_addr"] == "203.0.113.0"
    assert record["path"] == "/user/ann/reset/REDACTED"
    assert record["view_args"] == {"name": "ann", "token": "REDACTED"}
    assert record["referrer"] == "search.example"
    assert len(record["username"]) == len(record["visitor"]) == 16
    assert record["username"] != record["visitor"]
    assert record["track_var"]["plan"] == "free"
    gone = ("forwarded_for", "user_agent", "ip_info")
    assert [record[name] for name in gone] == [None] * 3
    assert record["query"] == ""
    site.assert_agrees()


def test_two_visitors_whose_kept_addresses_are_the_same_are_two(make_site: Make) -> None:
    site = tracked(make_site, PRIVACY="balanced", SECRET_KEY="k")
    for address in ("203.0.113.7", "203.0.113.8", "203.0.113.8"):
        site.get("/user/ann/reset/x", environ_base={"REMOTE_ADDR": address})
    records = site.records()
    assert {record.remote_addr for record in records} == {"203.0.113.0"}
    assert len({record.visitor for record in records}) == 2
    site.assert_agrees()


def test_strict_keeps_nobody(make_site: Make, caplog: pytest.LogCaptureFixture) -> None:
    site = tracked(make_site, PRIVACY="strict", COOKIE=True)
    assert "they are not told apart" in caplog.text
    response = visit(site)
    assert "Set-Cookie" not in response.headers
    record = kept(site)
    assert ALWAYS.items() <= record.items()
    assert record["path"] == "/user/<name>/reset/<token>"
    assert record["view_args"] == {}
    assert record["track_var"] == {}
    assert record["query"] == ""
    gone = ("remote_addr", "forwarded_for", "user_agent", "ip_info", "referrer", "username")
    assert [record[name] for name in gone] == [None] * 6
    assert record["visitor"] is None
    visit(site, "/no/such/page/ann@example.com")
    record = kept(site)
    assert (record["path"], record["view_args"], record["status"]) == ("", None, 404)
    assert site.samples("flask_usage_visitors") == {}
    site.assert_agrees()


def test_balanced_takes_mail_addresses_out_of_paths_full_does_not(make_site: Make) -> None:
    for preset, expected in (("full", "/user/a@b.example/reset/"), ("balanced", "/user/REDACTED/")):
        site = tracked(make_site, PRIVACY=preset)
        visit(site, "/user/a@b.example/reset/x")
        assert kept(site)["path"].startswith(expected)


@pytest.mark.parametrize("preset", ["full", "balanced"])
def test_redact_adds_parts_of_names(make_site: Make, preset: str) -> None:
    site = tracked(make_site, PRIVACY=preset, REDACT=["NAME", "plan"])
    visit(site, "/user/ann/reset/x?userName=ann&page=2")
    record = kept(site)
    assert record["path"] == "/user/REDACTED/reset/REDACTED"
    assert record["view_args"] == {"name": "REDACTED", "token": "REDACTED"}
    assert record["track_var"]["plan"] == "REDACTED"
    assert record["query"] in ("", "userName=REDACTED&page=2")


# ------------------------------------------------------------------------ addresses


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("203.0.113.77", "203.0.113.0"),
        ("255.255.255.255", "255.255.255.0"),
        ("0.0.0.7", "0.0.0.0"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1::"),
        ("::1", "::"),
        ("ffff:ffff:ffff:ffff::", "ffff:ffff:ffff::"),
        (None, None),
    ],
)
def test_addresses_are_shortened(address: str | None, network: str | None) -> None:
    assert shorten(address) == network


@given(st.ip_addresses())
def test_a_network_is_of_its_kind_and_shortened_already(address: Any) -> None:
    network = shorten(str(address))
    assert network is not None
    assert (":" in network) == (address.version == 6)
    assert shorten(network) == network


# ------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("header", ["Sec-GPC", "DNT"])
@pytest.mark.parametrize("preset", ["full", "balanced", "strict"])
def test_who_asks_not_to_be_known_is_counted_all_the_same(
    make_site: Make, preset: str, header: str
) -> None:
    site = tracked(make_site, PRIVACY=preset, RESPECT_GPC=True, COOKIE=True, SECRET_KEY="k")
    response = visit(site, **{header: "1"})
    assert "Set-Cookie" not in response.headers
    record = kept(site)
    gone = ("remote_addr", "forwarded_for", "visitor", "username", "user_agent", "ip_info")
    assert [record[name] for name in gone] == [None] * 6
    assert ALWAYS.items() <= record.items()
    visit(site, **{header: "0"})
    assert (kept(site)["remote_addr"] is None) == (preset == "strict")
    site.assert_agrees()


def test_refusals_are_not_looked_at_unless_asked_for(make_site: Make) -> None:
    site = tracked(make_site)
    visit(site, **{"Sec-GPC": "1", "DNT": "1"})
    assert kept(site)["remote_addr"] == "203.0.113.77"


def test_a_brought_cookie_is_not_read_of_who_refuses(make_site: Make) -> None:
    site = tracked(make_site, RESPECT_GPC=True, COOKIE=True)
    visit(site, **{"Sec-GPC": "1", "Cookie": f"usage_visitor={'a' * 32}"})
    assert kept(site)["visitor"] is None


def test_refusals_and_country_headers_are_kept_apart(make_site: Make) -> None:
    site = make_site(COUNTRY="header:X-Country", TRUSTED_PROXIES=["198.51.100.9"], RESPECT_GPC=True)
    visit(site, "/", **{"X-Country": "fr", "DNT": "1"})
    assert (kept(site)["country"], kept(site)["remote_addr"]) == ("FR", None)
    visit(site, "/", **{"X-Country": "1"})
    assert (kept(site)["country"], kept(site)["remote_addr"]) == (None, "203.0.113.77")


# ------------------------------------------------------------------------ pseudonyms, erasure


def test_a_pseudonym_is_the_same_for_the_same_key_only(make_site: Make) -> None:
    names = []
    for key in ("k", "k", b"other"):
        site = tracked(make_site, PRIVACY="balanced", SECRET_KEY=key)
        visit(site)
        names.append(kept(site)["username"])
    assert names[0] == names[1] != names[2]


def test_without_a_secret_key_the_state_directory_has_one(make_site: Make) -> None:
    site = tracked(make_site, PRIVACY="balanced")
    visit(site)
    state = site.app.config["TRACK_USAGE_STATE_DIR"]
    site.close()
    again = tracked(make_site, PRIVACY="balanced", STATE_DIR=state)
    visit(again)
    assert kept(site)["username"] == kept(again)["username"]
    (file,) = state.glob("*/pseudonyms.key")
    assert file.stat().st_mode & 0o777 == 0o600
    elsewhere = tracked(make_site, PRIVACY="balanced")
    visit(elsewhere)
    assert kept(elsewhere)["username"] not in (None, kept(site)["username"])


@pytest.mark.parametrize("preset", ["full", "balanced"])
def test_a_user_is_found_by_name_and_forgotten(make_site: Make, preset: str) -> None:
    names = iter(["ann", "bob", "ann"])
    site = make_site(PRIVACY=preset, SECRET_KEY="k", username=lambda: next(names))
    for _ in range(3):
        site.get()
    site.records()
    storage = site.usage.storage
    assert storage.count(username="ann") == 2
    assert storage.erase(username="ann") == 2
    assert storage.count(username="ann") == 0
    assert storage.count() == storage.count(username="bob") == 1


def test_a_user_is_found_after_the_key_was_changed(make_site: Make) -> None:
    site = make_site(PRIVACY="balanced", SECRET_KEY="old", username=lambda: "ann")
    site.get()
    site.records()
    config = {key: site.app.config[f"TRACK_USAGE_{key}"] for key in ("STORAGE", "STATE_DIR")}
    site.close()
    app_config = {"SECRET_KEY": "new", "SECRET_KEY_FALLBACKS": ["older", "old"]}
    after = make_site(PRIVACY="balanced", username=lambda: "ann", **config, **app_config)
    after.get()
    one, two = after.records()
    assert one.username != two.username
    assert after.usage.storage.erase(username="ann") == 2


def test_by_address_and_by_visitor(make_site: Make) -> None:
    site = make_site(VISITORS="daily")
    for address in ("203.0.113.7", "2001:db8::1", "203.0.113.7"):
        site.get("/", environ_base={"REMOTE_ADDR": address})
    visitor = site.records()[0].visitor
    storage = site.usage.storage
    assert storage.count(visitor=visitor) == 2
    assert storage.erase(remote_addr="2001:DB8:0::1") == 1
    assert storage.erase(visitor=visitor) == 2
    assert storage.count() == 0


def test_what_is_erased_is_gone_from_the_file(make_site: Make) -> None:
    site = make_site(username=lambda: "ann-who-left")
    site.get()
    site.records()
    folder = site.app.config["TRACK_USAGE_STATE_DIR"].parent
    assert any(b"ann-who-left" in file.read_bytes() for file in folder.glob("usage.sqlite3*"))
    assert site.usage.storage.erase(username="ann-who-left") == 1
    assert not any(b"ann-who-left" in file.read_bytes() for file in folder.glob("usage.sqlite3*"))
    with sqlite3.connect(folder / "usage.sqlite3") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


# ------------------------------------------------------------------------ keys of past days


def test_a_key_is_destroyed_in_time_though_nobody_comes(make_site: Make) -> None:
    site = make_site(VISITORS="daily", FLUSH_SECONDS=0.05)
    site.get()
    assert site.only_record().visitor is not None
    state = site.app.config["TRACK_USAGE_STATE_DIR"]
    (file,) = state.glob("*/visitors-*/*.key")
    key = file.read_bytes()
    keys = site.app.extensions["track_usage"].pipeline._processor._enricher._visitors
    due_in = keys.due_in()
    assert due_in is not None
    keys._clock = lambda: time.time() + due_in - 1.0
    site.get()  # the last for long
    deadline = time.monotonic() + 10
    while file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not any(key in path.read_bytes() for path in state.rglob("*") if path.is_file())
    assert keys.due_in() is None


def test_a_key_is_destroyed_though_visitors_are_not_told_apart_any_more(make_site: Make) -> None:
    site = make_site(VISITORS="daily")
    site.get()
    site.records()
    state = site.app.config["TRACK_USAGE_STATE_DIR"]
    site.close()
    (file,) = state.glob("*/visitors-*/*.key")
    old = file.rename(file.with_name("2026-01-02.key"))
    after = make_site(STATE_DIR=state)
    after.get()
    after.records()
    assert not old.exists()


# ------------------------------------------------------------------------ what passes through


def test_the_journal_is_wiped_when_all_is_written(make_site: Make) -> None:
    site = make_site(PRIVACY="strict")
    for number in range(200):
        site.get(f"/canary-{number}?token=canary", headers={"User-Agent": "x" * 300})
        if number % 7 == 0:
            site.records()
    (journal,) = site.app.config["TRACK_USAGE_STATE_DIR"].rglob("*.journal")
    assert b"canary" in journal.read_bytes()
    site.records()
    # Written from the worker's thread; all is settled when the storage has all.
    assert b"canary" not in journal.read_bytes()


def test_an_argument_that_a_preprocessor_took_out_is_redacted_in_the_path(make_site: Make) -> None:
    site = make_site()
    site.app.add_url_rule("/in/<token>/<page>", "in", lambda page: page)
    site.app.url_value_preprocessor(lambda _, values: values and values.pop("token", None))
    assert site.get("/in/s3cret/home").text == "home"
    record = site.only_record()
    assert (record.path, record.view_args) == ("/in/REDACTED/home", {"page": "home"})
