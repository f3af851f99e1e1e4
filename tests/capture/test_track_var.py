"""``g.track_var``: a dict in every request, and on its record."""

from __future__ import annotations

import time

from flask import g
from helpers.front_door import Site


def test_is_a_dict_in_every_request(site: Site) -> None:
    seen: list[object] = []

    @site.app.before_request
    def early() -> None:
        seen.append(g.track_var)
        assert "track_var" in g
        assert g.get("track_var") is g.track_var

    site.app.add_url_rule("/", "index", lambda: "x")
    site.get()
    site.get("/nowhere")
    assert [type(value) for value in seen] == [dict, dict]


def test_may_hold_anything(site: Site) -> None:
    loop: dict[str, object] = {}
    loop["self"] = loop

    @site.app.get("/")
    def index() -> str:
        g.track_var.update(
            bytes=b"\xff", number=10**30, date=time.gmtime(), odd={1: {2, 3}}, bad="\udcff\0"
        )
        return "x"

    @site.app.get("/loop")
    def looped() -> str:
        g.track_var.update(loop)
        return "x"

    @site.app.get("/raises")
    def raises() -> str:
        class Odd:
            def __str__(self) -> str:
                raise LookupError

        g.track_var["odd"] = Odd()
        return "x"

    @site.app.get("/list")
    def replaced() -> str:
        g.track_var = [1, 2]
        return "x"

    @site.app.get("/large")
    def large() -> str:
        g.track_var["large"] = "x" * 1_000_000
        return "x"

    for path in ("/", "/loop", "/raises", "/list", "/large"):
        assert site.get(path).status_code == 200
    found = {record.endpoint: record.track_var for record in site.records()}
    assert found["index"]["number"] == str(10**30)
    assert found["replaced"] == {"value": [1, 2]}
    assert found["large"] == {}
    assert site.faults()["track_var"] == 1
