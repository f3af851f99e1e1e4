"""The campaign that a landing page's query names: kept by every preset but strict."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers.front_door import Site

Make = Callable[..., Site]

NEWS = "utm_source=news&utm_medium=email&utm_campaign=autumn+sale&ref=hn"
FIELDS = ("news", "email", "autumn sale", "hn")

# Query, and what is kept of it as source, medium, campaign, ref.
QUERIES = {
    "": (None, None, None, None),
    "page=2": (None, None, None, None),
    NEWS: FIELDS,
    f"page=2&{NEWS}&gclid=x": FIELDS,
    "ref=hn": (None, None, None, "hn"),
    "href=x&pref=y": (None, None, None, None),
    "UTM_SOURCE=news&Ref=hn": (None, None, None, None),
    "utm_source": (None, None, None, None),
    "utm_source=": (None, None, None, None),
    "utm_source=%20&utm_source=a&utm_source=b": ("a", None, None, None),
    "utm_source=caf%C3%A9%20%26%20co%3D1": ("café & co=1", None, None, None),
    "utm_source=caf\u00e9": ("café", None, None, None),
    "utm_source=a%00b%0Ac%1b": ("ab\ufffdc\ufffd", None, None, None),
    "utm_source=%ff": ("\ufffd", None, None, None),
    "utm_campaign=" + "ab+" * 200: (None, None, ("ab " * 200)[:256], None),
    "ref=https%3A%2F%2Fnews.example%2Fa": (None, None, None, "https://news.example/a"),
    # Secrets, by their shape and by their name.
    "ref=https%3A%2F%2Fann%3Apw@news.example%2F": (None, None, None, "REDACTED"),
    "ref=https%3A%2F%2Fnews.example%2F%3Ftoken%3D1": (None, None, None, "REDACTED"),
    "utm_source=eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOjF9.x&ref=a": ("REDACTED", None, None, "a"),
    "utm_medium=x7Kq9ZbR2mWv5TnY8cLp3HdF": (None, "REDACTED", None, None),
    "utm_source=a;token=b": ("a;token=REDACTED", None, None, None),
}


def told(site: Site) -> list[tuple[str | None, ...]]:
    return [
        (record.utm_source, record.utm_medium, record.utm_campaign, record.ref)
        for record in site.records()
    ]


@pytest.mark.parametrize("preset", ["full", "balanced"])
def test_it_is_taken_from_the_query(make_site: Make, preset: str) -> None:
    site = make_site(PRIVACY=preset)
    for query in QUERIES:
        site.get(f"/?{query}")
    for query, found in zip(QUERIES, told(site), strict=True):
        assert (query, found) == (query, QUERIES[query])
    if preset == "balanced":
        assert {record.query for record in site.records()} == {""}
    site.assert_agrees()


def test_strict_keeps_none(make_site: Make) -> None:
    site = make_site(PRIVACY="strict")
    site.get(f"/?{NEWS}")
    assert told(site) == [(None,) * 4]


def test_mail_addresses_are_kept_where_those_of_the_query_are(make_site: Make) -> None:
    for preset, kept in (("full", "ann@example.com"), ("balanced", "REDACTED")):
        site = make_site(PRIVACY=preset)
        site.get("/?utm_source=ann%40example.com")
        assert told(site) == [(kept, None, None, None)]


@pytest.mark.parametrize("preset", ["full", "balanced"])
def test_redact_takes_one_away(make_site: Make, preset: str) -> None:
    site = make_site(PRIVACY=preset, REDACT=["utm_campaign"])
    site.get(f"/?{NEWS}")
    assert told(site) == [("news", "email", "REDACTED", "hn")]


def test_what_was_cut_is_not_half_a_secret(make_site: Make) -> None:
    site = make_site()
    site.get("/?" + "x" * (4096 - len("&ref=hunter")) + "&ref=hunter2@host")
    assert told(site) == [(None,) * 4]


def test_who_refuses_to_be_known_has_come_from_somewhere_too(make_site: Make) -> None:
    site = make_site(RESPECT_GPC=True)
    site.get(f"/?{NEWS}", headers={"Sec-GPC": "1"})
    assert told(site) == [FIELDS]


def test_records_are_counted_by_campaign(make_site: Make) -> None:
    site = make_site()
    for query in (NEWS, NEWS, "utm_source=ads", "", "utm_source=News"):
        site.get(f"/?{query}")
    site.usage.flush()
    storage = site.usage.storage
    found = storage.summarize(by=("utm_source", "ref"))
    groups = {(one.group["utm_source"], one.group["ref"]): one.requests for one in found}
    assert groups == {("news", "hn"): 2, ("ads", None): 1, (None, None): 1, ("News", None): 1}
    assert storage.count(utm_source=["news", None]) == 3
    assert storage.count(utm_campaign="autumn sale", ref="hn", utm_medium="email") == 2
