"""What a browser fetches of itself is no visit: neither a visitor nor a human."""

from __future__ import annotations

import pytest

from flask_usage_metrics.capture.visitor_cookie import NAME

BROWSER = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"

PREFETCHES = [
    {"Sec-Purpose": "prefetch"},
    {"Sec-Purpose": "prefetch;prerender"},
    {"Sec-Purpose": 'prefetch;anonymous-client-ip, prefetch;"x"'},
    {"Purpose": "prefetch"},
    {"Purpose": "Prefetch"},
    {"X-Purpose": "preview"},
    {"X-Moz": "prefetch"},
    {"Sec-Purpose": "", "X-Moz": "prefetch"},
]
VISITS = [{}, {"Sec-Purpose": ""}, {"Purpose": "fetch"}, {"X-Moz": "microsummary"}]


@pytest.mark.parametrize("told_by", ["VISITORS", "COOKIE"])
def test_a_prefetch_is_of_its_own_kind_and_no_visitor(make_site, told_by):
    site = make_site(COUNTRY=None, **{told_by: "daily" if told_by == "VISITORS" else True})
    brought = {"User-Agent": BROWSER, "Cookie": f"{NAME}={'7' * 32}"}
    for headers in (*PREFETCHES, *VISITS):
        site.get(headers=brought | headers)
    site.get(headers={"User-Agent": "Googlebot/2.1", **PREFETCHES[0]})
    records = site.records()
    kinds = [record.client for record in records]
    assert kinds == ["prefetch"] * len(PREFETCHES) + ["human"] * len(VISITS) + ["search-bot"]
    visitors = {record.visitor for record in records[len(PREFETCHES) : -1]}
    assert len(visitors) == 1
    assert None not in visitors
    assert {record.visitor for record in records[: len(PREFETCHES)]} == {None}
    assert {record.browser for record in records[:-1]} == {"Firefox"}
    assert site.samples("flask_usage_client_requests_total") == {
        (("client", "prefetch"),): len(PREFETCHES),
        (("client", "human"),): len(VISITS),
        (("client", "search-bot"),): 1,
    }
    site.assert_agrees()


@pytest.mark.parametrize("refuses", [False, True])
def test_a_nameless_prefetch_is_one_all_the_same(make_site, refuses):
    site = make_site(COUNTRY=None, RESPECT_GPC=refuses, PRIVACY="full" if refuses else "strict")
    site.get(headers={"User-Agent": BROWSER, "Sec-GPC": "1", **PREFETCHES[0]})
    record = site.only_record()
    assert (record.client, record.remote_addr) == ("prefetch", None)
