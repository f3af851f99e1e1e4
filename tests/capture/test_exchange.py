"""A response counts once, when its last byte is sent: streams, files, lengths, old-style writes."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from typing import Any
from wsgiref.util import FileWrapper as ServerFileWrapper

import pytest
from flask import Flask, Response, request, send_file, stream_with_context
from helpers.front_door import Site
from werkzeug.test import EnvironBuilder, run_wsgi_app


class BrokenStream(Exception):
    """Raised by a stream."""


class TestStreams:
    def test_lasts_until_the_last_byte(self, site: Site) -> None:
        @site.app.get("/")
        def stream() -> Response:
            def chunks() -> Iterator[bytes]:
                for _ in range(4):
                    time.sleep(0.02)
                    yield b"1234"

            return Response(chunks())

        assert site.get().data == b"1234" * 4
        record = site.only_record()
        assert record.bytes_sent == 16
        assert record.duration_seconds >= 0.08
        assert 0.02 <= (record.first_byte_seconds or 0) < record.duration_seconds - 0.04

    @pytest.mark.parametrize("length", [None, 4])
    def test_its_first_byte_is_not_that_of_an_empty_chunk(
        self, site: Site, length: int | None
    ) -> None:
        @site.app.get("/")
        def stream() -> Response:
            def chunks() -> Iterator[bytes]:
                yield b""
                time.sleep(0.02)
                yield b"12"
                yield b"34"

            response = Response(chunks())
            response.content_length = length
            return response

        assert site.get().data == b"1234"
        assert (site.only_record().first_byte_seconds or 0) >= 0.02

    def test_only_they_have_a_first_byte(self, site: Site) -> None:
        def empty() -> Response:
            return Response(iter([]))

        def fails() -> Response:
            def chunks() -> Iterator[bytes]:
                raise BrokenStream
                yield b""

            return Response(chunks())

        def at_once() -> Response:
            return Response(iter([b"1234"]), headers={"Content-Length": "4"})

        views = {"page": lambda: "page", "empty": empty, "fails": fails, "at_once": at_once}
        for name, view in views.items():
            site.app.add_url_rule(f"/{name}", name, view)
        for name in ("page", "empty", "at_once", "nowhere"):
            site.get(f"/{name}")
        with pytest.raises(BrokenStream):
            site.get("/fails")
        site.request("/page", method="HEAD")
        assert [record.first_byte_seconds for record in site.records()] == [None] * 6

    def test_that_breaks_half_way_has_the_status_that_was_sent(self, site: Site) -> None:
        @site.app.get("/")
        def stream() -> Response:
            def chunks() -> Iterator[bytes]:
                yield b"1234"
                raise BrokenStream

            return Response(chunks())

        with pytest.raises(BrokenStream):
            site.get()
        record = site.only_record()
        assert (record.status, record.exception, record.bytes_sent) == (200, "BrokenStream", 4)

    @pytest.mark.parametrize("length", [None, 4])
    def test_that_breaks_at_once_is_a_500(self, site: Site, length: int | None) -> None:
        @site.app.get("/")
        def stream() -> Response:
            def chunks() -> Iterator[bytes]:
                raise BrokenStream
                yield b"1234"

            response = Response(chunks())
            response.content_length = length
            return response

        with pytest.raises(BrokenStream):
            site.get()
        record = site.only_record()
        assert (record.status, record.exception, record.bytes_sent) == (500, "BrokenStream", 0)

    def test_that_the_client_leaves_is_closed_and_counted(self, site: Site) -> None:
        closed = []

        @site.app.get("/")
        def stream() -> Response:
            response = Response(iter([b"12", b"34", b"56"]))
            response.call_on_close(lambda: closed.append(True))
            return response

        body, _, _ = run_wsgi_app(site.app.wsgi_app, EnvironBuilder("/").get_environ())
        assert next(iter(body)) == b"12"
        assert site.samples("flask_usage_requests_in_progress")[()] == 1
        body.close()
        assert closed == [True]
        assert site.samples("flask_usage_requests_in_progress")[()] == 0
        record = site.only_record()
        assert (record.status, record.bytes_sent, record.exception) == (200, 2, None)

    def test_with_context_and_a_length(self, site: Site) -> None:
        @site.app.get("/")
        def stream() -> Response:
            @stream_with_context
            def chunks() -> Iterator[str]:
                yield request.args["q"]
                yield request.endpoint or ""

            return Response(chunks(), headers={"Content-Length": "8"})

        assert site.get("/?q=ab").data == b"abstream"
        assert site.only_record().bytes_sent == 8

    def test_kept_open_by_a_client_that_keeps_its_context(self, site: Site) -> None:
        site.app.add_url_rule("/", "index", lambda: Response(iter(["a", "b"])))
        with site.app.test_client() as client:
            assert client.get("/").data == b"ab"
            assert client.get("/").data == b"ab"
        assert len(site.records()) == 2


class TestFiles:
    def test_keep_the_servers_own_wrapper(self, site: Site) -> None:
        @site.app.get("/")
        def download() -> Response:
            return send_file(io.BytesIO(b"x" * 100_000), mimetype="text/plain")

        environ = EnvironBuilder("/").get_environ()
        environ["wsgi.file_wrapper"] = ServerFileWrapper
        started: list[str] = []
        body = site.app.wsgi_app(environ, lambda status, headers: started.append(status))
        # Only for its own wrapper does a server use sendfile.
        assert isinstance(body, ServerFileWrapper)
        body.close()
        record = site.only_record()
        assert (record.status, record.bytes_sent) == (200, 100_000)

    def test_of_a_wrapper_that_is_a_function(self, site: Site) -> None:
        content = io.BytesIO(b"12345")
        site.app.add_url_rule("/", "download", lambda: send_file(content, "text/plain"))
        environ = EnvironBuilder("/").get_environ()
        environ["wsgi.file_wrapper"] = lambda file, _size=0: file
        assert site.app.wsgi_app(environ, lambda status, headers: None) is content
        assert site.only_record().bytes_sent == 5

    def test_ranges_and_not_modified(self, site: Site) -> None:
        site.app.add_url_rule(
            "/",
            "download",
            lambda: send_file(io.BytesIO(b"0123456789"), "text/plain", etag="v1", conditional=True),
        )
        assert site.get(headers={"Range": "bytes=2-4"}).data == b"234"
        assert site.get(headers={"If-None-Match": '"v1"'}).status_code == 304
        assert [(record.status, record.bytes_sent) for record in site.records()] == [
            (206, 3),
            (304, 0),
        ]


def test_old_style_write_is_counted(make_site: object) -> None:
    app = Flask("shop")

    def old(environ: dict, start_response: object) -> list[bytes]:
        write = start_response("200 OK", [("Content-Type", "text/plain")])
        write(b"12345")
        return [b"678"]

    app.wsgi_app = old
    site = make_site(app=app, METRICS_PATH=None)
    body, _, _ = run_wsgi_app(site.app.wsgi_app, EnvironBuilder("/").get_environ())
    assert b"".join(body) == b"12345678"
    assert site.only_record().bytes_sent == 8


@pytest.mark.parametrize(
    ("name", "value", "is_over"),
    [
        ("Content-Length", "5", True),
        ("content-length", "5", True),
        ("CONTENT-LENGTH", "5", True),
        ("Content-Length", "five", False),
        ("Content-Length", "6", False),
        ("X-Length-Sent", "5", False),
    ],
)
def test_a_body_is_over_when_as_much_is_sent_as_was_said(
    make_site: Callable[..., Site], name: str, value: str, is_over: bool
) -> None:
    site = make_site()
    site.app.add_url_rule("/", "index", lambda: "x")

    def answer(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Type", "text/plain"), (name, value)])
        return iter([b"he", b"llo"])

    site.app.extensions["track_usage"].middleware._wsgi_app = answer
    environ = EnvironBuilder("/").get_environ()
    body = site.app.wsgi_app(environ, lambda status, headers, exc_info=None: len)
    chunks = iter(body)
    assert [next(chunks), next(chunks)] == [b"he", b"llo"]
    # Neither the end of the body was met nor was it closed.
    assert len(site.records()) == is_over
    body.close()  # type: ignore[attr-defined]
    assert site.only_record().bytes_sent == 5


# CPython reads no number of more than 4 300 digits, databases none of 2^63 and more, and sums of
# 64 bits overflow before.
@pytest.mark.parametrize("digits", [15, 16, 19, 20, 4300, 4301, 100_000])
@pytest.mark.parametrize("is_file", [False, True], ids=["body", "file"])
def test_a_length_of_any_size_is_an_ordinary_answer_and_one_record(
    site: Site, digits: int, is_file: bool
) -> None:
    @site.app.get("/")
    def index() -> Response:
        answer = send_file(io.BytesIO(b"abc"), "text/plain") if is_file else Response("abc")
        answer.headers["Content-Length"] = "9" * digits
        return answer

    environ = EnvironBuilder("/").get_environ()
    if is_file:
        environ["wsgi.file_wrapper"] = ServerFileWrapper
    body, status, _ = run_wsgi_app(site.app.wsgi_app, environ)
    assert (b"".join(body), status) == (b"abc", "200 OK")
    body.close()
    record = site.only_record()
    assert record.status == 200
    # Of a file it is the only thing known.
    announced = int("9" * digits) if digits == 15 else 0
    assert record.bytes_sent == (announced if is_file else 3)
    assert site.faults() == {}
    site.assert_agrees()


@pytest.mark.parametrize(
    ("line", "status"),
    [
        *(("200 OK", 200), ("200", 200), ("200\tOK", 200), ("500 ", 500), ("599 x", 599)),
        *(("600 Beyond", 600), ("999", 999), ("099 x", 99)),
        *(("5000 Four", 0), ("0500 Four", 0), ("50 Two", 0), ("5", 0), ("500OK", 0), ("500-", 0)),
        *((" 500 x", 0), ("", 0), ("   ", 0), ("OK", 0), ("\u0665\u0660\u0660 x", 0), ("+50 x", 0)),
        ("5" * 5000, 0),
    ],
)
def test_a_status_is_three_digits_and_only_500_to_599_are_server_errors(
    make_site: Callable[..., Site], line: str, status: int
) -> None:
    site = make_site(SLO={"availability": 0.99})
    middleware = site.app.extensions["track_usage"].middleware
    ordinary = middleware._wsgi_app

    def answer(environ: Any, start_response: Any) -> Any:
        if environ["PATH_INFO"] == "/metrics":
            return ordinary(environ, start_response)
        start_response(line, [("Content-Type", "text/plain")])
        return [b"x"]

    middleware._wsgi_app = answer
    body = site.app.wsgi_app(EnvironBuilder("/").get_environ(), lambda status, headers: len)
    assert list(body) == [b"x"]
    record = site.only_record()
    is_error = status in (500, 599)
    assert (record.status, record.is_server_error) == (status, is_error)
    (summary,) = site.usage.storage.summarize()
    assert summary.errors == site.usage.storage.count(status_class="5xx") == is_error
    ((labels, _),) = site.samples("flask_usage_requests_total").items()
    assert dict(labels)["status"] == (str(status) if 100 <= status <= 599 else "_OTHER")
    events = site.samples("flask_usage_slo_events_total")
    bad = [n for key, n in events.items() if ("result", "bad") in key]
    assert sum(bad) == is_error
    site.assert_agrees()
