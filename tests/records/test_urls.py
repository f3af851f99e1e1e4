"""A record's URL is the one that Flask calls as ``request.url``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, request
from helpers.examples import examples
from helpers.front_door import Site
from helpers.records import make_record
from hypothesis import given, settings
from hypothesis import strategies as st
from werkzeug.test import EnvironBuilder, run_wsgi_app

from flask_usage_metrics.records.urls import url_of
from flask_usage_metrics.storage import Writer
from flask_usage_metrics.storage.sql.table import COLUMN_NAMES, to_columns


class Kept(Writer):
    """Keeps records and the URLs of their rows."""

    name = "kept"

    def set_up(self) -> None:
        self.urls: list[str] = []

    def write(self, batch: Any) -> None:
        column = COLUMN_NAMES.index("url")
        for record, url in zip(batch, to_columns(batch)[column], strict=True):
            assert url == record.url
            self.urls.append(url)


class Watched:
    """An app that notes the URL of each request, and what is kept of it."""

    def __init__(self, folder: Path) -> None:
        app = Flask("shop")
        self.seen: list[str] = []
        self.kept = Kept()
        app.before_request(self._note)
        self.site = Site(folder, [self.kept], app=app)

    def _note(self) -> None:
        self.seen.append(request.url)

    def ask(self, **environ: str) -> tuple[list[str], list[str]]:
        """Return the URLs that a hook saw, and those that were kept."""
        self.seen.clear()
        self.kept.urls.clear()
        whole = {**EnvironBuilder("/").get_environ(), **environ}
        run_wsgi_app(self.site.app.wsgi_app, whole, buffered=True)
        assert self.site.usage.flush()
        return self.seen, self.kept.urls


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    made = Watched(tmp_path_factory.mktemp("watched"))
    yield made
    made.site.close()


def wsgi(text: str) -> str:
    return text.encode().decode("latin-1")


CASES = {
    "plain": {"PATH_INFO": "/v/a", "QUERY_STRING": "q=1&r=2"},
    "a question mark": {"PATH_INFO": "/v/a?b"},
    "a fragment": {"PATH_INFO": "/v/a#b"},
    "a percent sign": {"PATH_INFO": "/v/a%b"},
    "a percent sign, encoded": {"PATH_INFO": "/v/a%25b"},
    "a newline": {"PATH_INFO": "/v/a\nb"},
    "a NUL": {"PATH_INFO": "/v/a\0b"},
    "blanks and brackets": {"PATH_INFO": "/v/a b[c]|d\\e^f`g{h}"},
    "letters": {"PATH_INFO": wsgi("/v/größe/日本"), "QUERY_STRING": "q=%C3%A9&r=%E6%97%A5"},
    "no UTF-8": {"PATH_INFO": "/v/\xff\xfe", "QUERY_STRING": "q=%FF%FE"},
    "raw bytes in the query": {"QUERY_STRING": "q=\xc3\xa9\xff"},
    "reserved in the query": {"QUERY_STRING": "q=a%2Bb%26c%3Dd%23e+f%20g%25&u=%2F%3F%3A%41"},
    "an empty query": {"QUERY_STRING": "?"},
    "a prefix": {"SCRIPT_NAME": "/shöp?x/", "PATH_INFO": "/a"},
    "no path": {"PATH_INFO": ""},
    "two slashes": {"PATH_INFO": "//a//b"},
    "a port": {"HTTP_HOST": "shop.example:8080"},
    "the usual port": {"HTTP_HOST": "shop.example:80"},
    "the other usual port": {"HTTP_HOST": "shop.example:443"},
    "https": {"HTTP_HOST": "shop.example:443", "wsgi.url_scheme": "https"},
    "capitals": {"HTTP_HOST": "Shop.EXAMPLE"},
    "an address": {"HTTP_HOST": "[::1]:5000"},
    "punycode": {"HTTP_HOST": "xn--n3h.example"},
}


@pytest.mark.parametrize("environ", CASES.values(), ids=CASES)
def test_it_is_what_flask_says(watched: Watched, environ: dict[str, str]) -> None:
    seen, kept = watched.ask(**environ)
    assert kept == seen


pieces = st.sampled_from(
    "aZ09/-_.~!$&'()*+,;=:% ?#[]{}|\\^`\"<>\n\x7fäß日\u202e"
) | st.sampled_from(
    ["%41", "%2F", "%3F", "%20", "%25", "%C3%A9", "%e9", "%zz", "%00", "%", "é", "\xff"]
)
texts = st.lists(pieces, max_size=12).map("".join)


@settings(max_examples=examples(150), deadline=None)
@given(root=texts, path=texts, query=texts)
def test_of_any_path_and_query(watched: Watched, root: str, path: str, query: str) -> None:
    root = f"/{root}" if root else ""
    seen, kept = watched.ask(
        SCRIPT_NAME=wsgi(root), PATH_INFO=wsgi(f"/{path}"), QUERY_STRING=wsgi(query)
    )
    assert kept == seen
    (url,) = kept
    assert re.search(r"[\x00-\x1f\x7f-\x9f]", url) is None


@settings(max_examples=examples(300), deadline=None)
@given(root=texts, path=texts, query=texts, host=st.sampled_from(["a.example", "127.0.0.1:8000"]))
def test_what_is_taken_as_it_is_is_what_flask_would_make(
    root: str, path: str, query: str, host: str
) -> None:
    root = f"/{root}"
    from werkzeug.sansio.utils import get_current_url

    url = url_of("http", host, root, f"/{path}", query)
    if max(url) > "\x7f":
        return
    assert url == get_current_url("http", host, root, f"/{path}", query.encode())


def test_no_terminal_obeys_it(watched: Watched) -> None:
    _, kept = watched.ask(PATH_INFO=wsgi("/a\x9b31m\x1b[31m"), QUERY_STRING="q=%C2%9B31m")
    assert kept == ["http://localhost/a%C2%9B31m%1B%5B31m?q=%C2%9B31m"] or kept == [
        "http://localhost/a%C2%9B31m%1B[31m?q=%C2%9B31m"
    ]


@pytest.mark.parametrize("host", ["a:b:c", "[::1", "a:99999", "", "a b"])
def test_of_a_host_that_is_none_it_is_the_parts(host: str) -> None:
    record = make_record(host=host, path="/a?b", query="c=%C3%A9")
    assert record.url.startswith("https://")
    assert record.url == url_of("https", host, "", "/a?b", "c=%C3%A9")


def test_without_a_host_it_is_the_parts() -> None:
    assert make_record(scheme="", host="", path="/a?b", query="").url == ":///a?b"
