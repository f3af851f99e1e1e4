"""Secrets are planted wherever a request has room for one; every output is searched for them."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pytest
from flask import Response, g, request
from helpers.front_door import Site
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from flask_usage_metrics import UsageRecord
from flask_usage_metrics.errors import StorageUnavailable
from flask_usage_metrics.storage import Writer
from flask_usage_metrics.storage.jsonl import JSONLinesStorage
from flask_usage_metrics.storage.output import OutputWriter
from flask_usage_metrics.storage.printer import PrintWriter
from flask_usage_metrics.storage.sql import SQLStorage

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbm4ifQ.c2lnbmF0dXJlY2FuYXJ5"
TOKEN = "q8Zt3vL0xN5bR7yC2wE9kJ4m1"
API_KEY = "sk_live_9fK2mQ7xW4tR8vB1nL5z"

# Never in any output, whatever the preset. Each is in the request once, under its own name.
SECRETS = {
    "a token by its name": "canary-01",
    "a signature of a URL": "canary-02",
    "a password in a form-like name": "canary-03",
    "a name in other spelling": "canary-04",
    "a value inside another URL": "canary-05",
    "an argument of the view": "canary-06",
    "a bearer token": "canary-07",
    "a password of Basic authentication": "canary-08",
    "a header of its own": "canary-09",
    "authorization for a proxy": "canary-10",
    "a cookie": "canary-11",
    "a cookie like ours": "canary-12",
    "a form": "canary-13",
    "a JSON body": "canary-14",
    "the query of a referrer": "canary-15",
    "the password of a referrer": "canary-16",
    "the fragment of a referrer": "canary-17",
    "an exception of a view": "canary-18",
    "an exception of a stream": "canary-19",
    "an exception of username": "canary-20",
    "an exception of consumer": "canary-21",
    "an exception of country": "canary-22",
    "an exception of a storage": "canary-23",
    "a cookie of the response": "canary-24",
    "a body of the response": "canary-25",
    "a variable of the app": "canary-26",
    "what the owner calls secret": "canary-27",
    "a nested variable": "canary-28",
    "a cause of an exception": "canary-29",
    "a JWT": JWT.rpartition(".")[2],
    "a random token": TOKEN,
    "an API key as user name": API_KEY,
}

# Who it is, and what "full" keeps of it as flask-track-usage did.
IDENTITY = {
    "the address": "203.0.113.77",
    "the user name": "ann-of-shop",
    "the user agent": "PersonalBrowser",
    "a query": "tea-for-two",
    "the path of a referrer": "the-page-before",
}

# What "balanced" still keeps.
TRACES = {
    "a path": "/user/walter/",
    "the network": "203.0.113.0",
    "the host of a referrer": "search.example",
    "a variable": "plan-b",
}

FOUND = {"full": {}, "balanced": IDENTITY, "strict": IDENTITY | TRACES}


class Down(Writer):
    """A storage that is down, so that its records wait on disk."""

    name = "down"

    def write(self, batch: Sequence[UsageRecord]) -> None:
        raise StorageUnavailable(SECRETS["an exception of a storage"])


class Broken(Writer):
    """A storage that raises whatever it is given."""

    name = "broken"

    def store(self, data: dict[str, Any]) -> None:
        try:
            raise LookupError(SECRETS["a cause of an exception"])
        except LookupError as error:
            raise ValueError(SECRETS["an exception of a storage"]) from error


def make_shop(
    make_site: Callable[..., Site],
    folder: Path,
    given: list[Any],
    spans: InMemorySpanExporter,
    output: IO[str],
    **config: Any,
) -> Site:
    def username() -> str | None:
        if "anonymous" in request.args:
            raise ValueError(SECRETS["an exception of username"])
        return None if request.authorization else IDENTITY["the user name"]

    def consumer() -> str:
        if "anonymous" in request.args:
            raise ValueError(SECRETS["an exception of consumer"])
        return TOKEN if "keyed" in request.args else "acme"

    def country(address: str) -> str:
        if address == "198.51.100.1":
            raise ValueError(SECRETS["an exception of country"])
        return "NL"

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    storages = [
        SQLStorage.from_url(f"sqlite:///{folder}/usage.sqlite3"),
        JSONLinesStorage(folder / "usage.jsonl"),
        given.append,
        PrintWriter(),
        OutputWriter(output),
        Down(),
        Broken(),
    ]
    site = make_site(
        storages,
        username=username,
        consumer=consumer,
        country=country,
        tracer_provider=provider,
        TRACES_ENDUSER=True,
        COOKIE=True,
        VISITORS="daily",
        REDACT=["loyalty"],
        SECRET_KEY="k",
        STATE_DIR=folder / "state",
        FLUSH_SECONDS=0.01,
        **config,
    )

    @site.app.route("/user/<name>/<token>", methods=["GET", "POST"])
    def user(name: str, token: str) -> Response:
        g.track_var.update(
            password=SECRETS["a variable of the app"],
            plan=TRACES["a variable"],
            nested=[{"api_key": SECRETS["a nested variable"]}],
        )
        request.get_data()
        response = Response(SECRETS["a body of the response"])
        response.set_cookie("session", SECRETS["a cookie of the response"])
        return response

    @site.app.route("/raises")
    def raises() -> str:
        raise ValueError(SECRETS["an exception of a view"])

    @site.app.route("/breaks")
    def breaks() -> Response:
        def body() -> Any:
            yield b"x"
            raise ValueError(SECRETS["an exception of a stream"])

        return Response(body())

    return site


def sync(site: Site) -> int:
    """Send every secret at least once; return the number of requests."""
    secret = SECRETS
    cookies = f"session={secret['a cookie']}; usage_visitor={secret['a cookie like ours']}"
    referrer = (
        f"https://me:{secret['the password of a referrer']}@{TRACES['the host of a referrer']}/"
        f"{IDENTITY['the path of a referrer']}/{TOKEN}"
        f"?q={secret['the query of a referrer']}#{secret['the fragment of a referrer']}"
    )
    headers = {
        "User-Agent": f"Mozilla/5.0 (X11; Linux) {IDENTITY['the user agent']} Firefox/139.0",
        "Referer": referrer,
        "Cookie": cookies,
        "X-Api-Key": secret["a header of its own"],
        "Proxy-Authorization": f"Bearer {secret['authorization for a proxy']}",
    }
    query = "&".join(
        (
            f"q={IDENTITY['a query']}",
            f"access_token={secret['a token by its name']}",
            f"X-Amz-Signature={secret['a signature of a URL']}",
            f"user%5Bpassword%5D={secret['a password in a form-like name']}",
            f"API-KEY={secret['a name in other spelling']}",
            f"next=%2Fin%3Fsession%3D{secret['a value inside another URL']}%26a%3Db",
            f"loyaltyCard={secret['what the owner calls secret']}",
            f"state={JWT}",
            f"cursor={TOKEN}",
        )
    )
    login = base64.b64encode(f"bob:{secret['a password of Basic authentication']}".encode())
    by_key = base64.b64encode(f"{API_KEY}:".encode())
    form = {"email": secret["a form"]}
    user = f"/user/walter/{secret['an argument of the view']}?{query}"
    sent: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", user, {}),
        ("POST", user, {"data": form}),
        ("POST", user, {"json": {"password": secret["a JSON body"]}}),
        ("GET", f"{user}&anonymous&keyed", {}),
        ("GET", f"{user}&keyed", {"Authorization": f"Bearer {secret['a bearer token']}"}),
        ("GET", user, {"Authorization": f"Basic {login.decode()}"}),
        ("GET", user, {"Authorization": f"Basic {by_key.decode()}"}),
        ("GET", f"/nowhere/{TOKEN}/{JWT}?{query}", {}),
        ("GET", f"/user/{TOKEN}/x", {}),
        ("GET", "/raises?" + query, {}),
        ("GET", "/breaks?" + query, {}),
        ("GET", "/", {"REMOTE_ADDR": "198.51.100.1"}),
    ]
    for method, path, more in sent:
        body = {name: more.pop(name) for name in ("data", "json") if name in more}
        base = {"REMOTE_ADDR": more.pop("REMOTE_ADDR", IDENTITY["the address"])}
        try:
            site.request(path, method=method, headers=headers | more, environ_base=base, **body)
        except ValueError:
            assert path.startswith("/breaks")
    return len(sent)


@pytest.fixture
def output(tmp_path: Path) -> Iterator[IO[str]]:
    with (tmp_path / "output.txt").open("w") as file:
        yield file


@pytest.mark.parametrize("preset", ["full", "balanced", "strict"])
def test_no_output_holds_a_secret(
    make_site: Callable[..., Site],
    tmp_path: Path,
    preset: str,
    output: IO[str],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG, logger="flask_usage_metrics")
    given: list[dict[str, Any]] = []
    spans = InMemorySpanExporter()
    site = make_shop(make_site, tmp_path, given, spans, output, PRIVACY=preset)
    count = sync(site)
    assert not site.usage.flush(1.0)  # one of the storages is down
    own = [record for record in caplog.records if record.name == "flask_usage_metrics"]
    formatter = logging.Formatter()
    outputs = {
        "records": "".join(map(repr, site.usage.storage.records())),
        "old shape": repr(site.usage.storage.get_usage()),
        "dicts": "".join(f"{data} {data['user_agent']}" for data in given),
        "spans": "".join(span.to_json() for span in spans.get_finished_spans()),
        "print": capsys.readouterr().out,
        "text": site.scrape(),
        "openmetrics": site.scrape(Accept="application/openmetrics-text"),
        "logs": "".join(map(formatter.format, own)),
    }
    site.close(1.0)
    outputs |= {
        str(file.relative_to(tmp_path)): file.read_bytes().decode("latin-1")
        for file in tmp_path.rglob("*")
        if file.is_file()
    }
    # What searches must be able to find something.
    assert len(spans.get_finished_spans()) == count
    assert "/raises" in outputs["spans"]
    assert len(given) == site_count(outputs["usage.jsonl"]) == count
    spools = [text for name, text in outputs.items() if name.endswith(".spool")]
    assert sum(text.count('"endpoint"') for text in spools) == count
    searched = [*spools, *(outputs[name] for name in outputs if "." in name or name == "dicts")]
    assert sum("acme" in text for text in searched) >= 5
    assert "raise ValueError" in outputs["logs"]

    forbidden = SECRETS | FOUND[preset]
    leaks = [
        f"{what} in {name}"
        for name, text in outputs.items()
        for what, secret in forbidden.items()
        if secret in text
    ]
    assert leaks == []
    # And what the preset keeps is there: nothing else was thrown away.
    for what in (IDENTITY | TRACES).keys() - FOUND[preset].keys() - {"the network"}:
        assert (IDENTITY | TRACES)[what] in outputs["usage.jsonl"], what


def site_count(lines: str) -> int:
    return sum("id" in json.loads(line) for line in lines.splitlines())
