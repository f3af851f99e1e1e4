"""TRACK_USAGE_CLIENTS: the owner says what a client is, and no visitor waits for the patterns."""

from __future__ import annotations

import threading
import time

import pytest
from opentelemetry.sdk.trace import TracerProvider

from flask_usage_metrics.enrich.clients.own_kinds import OwnKinds
from flask_usage_metrics.errors import ConfigError

BROWSER = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"


def test_the_first_pattern_that_is_found_holds_before_all_that_is_known(make_site):
    site = make_site(
        COUNTRY=None,
        CLIENTS={"^acme-app/": "human", r"acme|\bprobe\b": "monitor", "firefox": "script"},
    )
    told = {
        "ACME-App/5.1 okhttp/4": "human",
        "x acme-app/5.1": "monitor",
        "the PROBE": "monitor",
        "probes/1": "other-bot",
        BROWSER: "script",
        "Googlebot/2.1": "search-bot",
        "Googlebot/2.1 " + "x" * 500 + " acme": "search-bot",
    }
    for agent in told:
        site.get(headers={"User-Agent": agent})
    records = site.records()
    assert [record.client for record in records] == list(told.values())
    assert {record.browser for record in records} == {None}
    site.assert_agrees()


def test_it_may_be_json_as_environment_variables_are(make_site):
    site = make_site(COUNTRY=None, CLIENTS='{"^$": "monitor"}')
    site.get(headers={"User-Agent": ""})
    assert site.only_record().client == "monitor"


def test_two_apps_call_one_client_differently(make_site):
    sites = [make_site(COUNTRY=None, CLIENTS={"acme": kind}) for kind in ("feed", "preview")]
    for site in sites:
        site.get(headers={"User-Agent": "acme/1"})
    assert [site.only_record().client for site in sites] == ["feed", "preview"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"acme(": "feed"},
            "TRACK_USAGE_CLIENTS: 'acme(' is no regular expression: "
            "missing ), unterminated subpattern at position 4",
        ),
        ({"acme": "robot"}, r"a kind must be one of human, .*, other-bot, not 'robot'"),
        ({"acme": "prefetch"}, "not 'prefetch'"),
        ({"acme": ["feed"]}, r"not \['feed'\]"),
        ({7: "feed"}, "a pattern must be a text, not 7"),
        ({"": "feed"}, "a pattern must be a text, not ''"),
        (["acme"], "must be a dict of regular expressions and kinds of client"),
        ("acme", "must be a dict of regular expressions and kinds of client"),
        ("[1]", "must be a dict of regular expressions and kinds of client"),
    ],
)
def test_what_is_wrong_is_told_at_set_up(make_site, given, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(")", r"\)")):
        make_site(CLIENTS=given)


def test_the_patterns_are_searched_by_the_worker_alone(make_site, monkeypatch):
    threads = []
    kind_of = OwnKinds.kind_of

    def watched(self, user_agent):
        threads.append(threading.current_thread().name)
        return kind_of(self, user_agent)

    monkeypatch.setattr(OwnKinds, "kind_of", watched)
    site = make_site(
        COUNTRY="auto",
        COOKIE=True,
        VISITORS="daily",
        CLIENTS={"acme": "monitor"},
        tracer_provider=TracerProvider(),
    )
    for number in range(5):
        site.get(headers={"User-Agent": f"acme/{number}"})
    deadline = time.monotonic() + 10
    while len(threads) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads == ["flask_usage_metrics pipeline"] * 5


def test_who_its_owner_calls_a_program_is_no_visitor_by_its_cookies(make_site):
    site = make_site(COUNTRY=None, COOKIE=True, CLIENTS={"acme": "monitor"})
    for _ in range(3):
        site.get(headers={"User-Agent": f"{BROWSER} acme"})
    site.get(headers={"User-Agent": BROWSER})
    *programs, person = site.records()
    assert [record.visitor for record in programs] == [None] * 3
    assert person.visitor is not None
    assert site.samples("flask_usage_visitors") == {(("window", "1d"),): 1}
