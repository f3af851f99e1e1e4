"""Bytes received are those that were read of the body, whatever a request claims to send."""

from __future__ import annotations

import io
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Response, request
from helpers.front_door import Site
from helpers.servers import Gunicorn
from werkzeug.test import EnvironBuilder, run_wsgi_app

BODY = b"first=1&second=2\nthird"


class Bare:
    """A stream with no more than PEP 3333 asks for."""

    def __init__(self, content: bytes) -> None:
        self._file = io.BytesIO(content)
        self.read, self.readline = self._file.read, self._file.readline
        self.readlines = self._file.readlines

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._file)


def ask(site: Site, stream: Any, *, method: str = "POST", **environ: Any) -> int:
    """Ask for ``/`` and return the status."""
    whole = {**EnvironBuilder("/", method=method).get_environ(), "wsgi.input": stream, **environ}
    body, status, _ = run_wsgi_app(site.app.wsgi_app, whole, buffered=True)
    b"".join(body)
    return int(status[:3])


def received(site: Site) -> tuple[int | None, float]:
    """Return what the only record says, and the counter."""
    counted = site.samples("flask_usage_request_bytes_total")
    return site.only_record().bytes_received, sum(counted.values())


READS: dict[str, Callable[[Any], bytes]] = {
    "read": lambda stream: bytes(stream.read()),
    "read some": lambda stream: stream.read(5) + stream.read(len(BODY)),
    "lines": lambda stream: b"".join([stream.readline(), stream.readline(3), *stream]),
    "readlines": lambda stream: b"".join(stream.readlines()),
    "iterate": lambda stream: b"".join(stream),
}


@pytest.mark.parametrize("kind", [io.BytesIO, Bare])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize(
    "announced",
    [
        {"CONTENT_LENGTH": str(len(BODY))},
        {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True},
        {"wsgi.input_terminated": True},  # HTTP/2 needs neither
    ],
    ids=["length", "chunked", "neither"],
)
def test_they_are_counted_however_they_are_read(
    site: Site, kind: Any, read: Callable[[Any], bytes], announced: dict[str, Any]
) -> None:
    seen = []

    @site.app.post("/")
    def upload() -> str:
        seen.append(read(request.stream))
        return ""

    assert ask(site, kind(BODY), **announced) == 200
    assert seen == [BODY]
    assert received(site) == (len(BODY), len(BODY))


def test_by_every_way_that_a_file_can_be_read(site: Site) -> None:
    seen: list[bytes] = []

    @site.app.post("/")
    def upload() -> str:
        stream = request.environ["wsgi.input"]
        buffer = bytearray(4)
        assert stream.readinto(buffer) == 4
        seen.extend([bytes(buffer), stream.read1(3), stream.readline(), stream.read()])
        assert stream.tell() == len(BODY)
        assert not hasattr(stream, "fill")
        return ""

    ask(site, io.BytesIO(BODY), CONTENT_LENGTH=str(len(BODY)))
    assert b"".join(seen) == BODY
    assert received(site)[0] == len(BODY)


def test_forms_and_files(site: Site) -> None:
    @site.app.post("/")
    def upload() -> str:
        return request.form["name"] + request.files["file"].read().decode()

    data = {"name": "ann", "file": (io.BytesIO(b"x" * 100_000), "x.txt")}
    assert site.request("/", method="POST", data=data).text == "ann" + "x" * 100_000
    assert 100_000 < (received(site)[0] or 0) < 101_000


@pytest.mark.parametrize("claim", ["9" * 15, "9" * 5000, "-5", "many"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_is_claimed_and_never_read_is_not_counted(site: Site, method: str, claim: str) -> None:
    site.app.add_url_rule("/", "index", lambda: "x", methods=["GET", "POST"])
    assert ask(site, io.BytesIO(), method=method, CONTENT_LENGTH=claim) == 200
    assert received(site) == (0, 0)


def test_a_body_that_is_too_large_is_not_counted(site: Site) -> None:
    site.app.config["MAX_CONTENT_LENGTH"] = 1000
    site.app.add_url_rule("/", "index", lambda: request.get_data(), methods=["POST"])
    assert ask(site, io.BytesIO(b"x" * 2000), CONTENT_LENGTH=str(7 * 10**9)) == 413
    assert received(site) == (0, 0)


def test_a_client_that_leaves_half_way_sent_half(site: Site) -> None:
    site.app.add_url_rule("/", "index", lambda: request.get_data(), methods=["POST"])
    assert ask(site, io.BytesIO(b"x" * 400), CONTENT_LENGTH="1000") == 400
    assert received(site) == (400, 400)


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE"])
@pytest.mark.parametrize("length", [None, ""])
def test_without_a_body_there_are_none(site: Site, method: str, length: str | None) -> None:
    site.app.add_url_rule("/", "index", lambda: "x", methods=["GET", "DELETE"])
    environ = {} if length is None else {"CONTENT_LENGTH": length}
    assert ask(site, io.BytesIO(), method=method, **environ) == 200
    assert received(site) == (None, 0)


def test_a_get_without_a_body_has_the_servers_own_stream(site: Site) -> None:
    stream, seen = io.BytesIO(), []

    @site.app.get("/")
    def index() -> str:
        seen.append(request.environ["wsgi.input"])
        return ""

    ask(site, stream, method="GET")
    assert seen == [stream]


def test_a_body_that_is_read_while_the_answer_is_sent(site: Site) -> None:
    @site.app.post("/")
    def echo() -> Response:
        stream = request.stream
        return Response(iter(lambda: stream.read(4), b""))

    ask(site, io.BytesIO(BODY), CONTENT_LENGTH=str(len(BODY)))
    assert received(site)[0] == len(BODY)


def test_a_server_without_a_stream(site: Site) -> None:
    site.app.add_url_rule("/", "index", lambda: "x", methods=["POST"])
    environ = EnvironBuilder("/", method="POST").get_environ()
    del environ["wsgi.input"]
    run_wsgi_app(site.app.wsgi_app, environ, buffered=True)
    assert received(site) == (None, 0)


def test_an_app_mounted_in_another_counts_what_it_read(make_site: Callable[..., Site]) -> None:
    from werkzeug.middleware.dispatcher import DispatcherMiddleware

    inner = make_site()
    inner.app.add_url_rule("/", "index", lambda: request.get_data(), methods=["POST"])
    outer = make_site()
    outer.app.wsgi_app = DispatcherMiddleware(outer.app.wsgi_app, {"/in": inner.app.wsgi_app})
    outer.request("/in/", method="POST", data=BODY)
    assert received(inner)[0] == len(BODY)


def exchanged(port: int, request: bytes) -> bytes:
    """Send a request, and return all that is answered."""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(4096), b""))


def test_over_a_chunked_connection(tmp_path: Any) -> None:
    app = """
from flask import Flask, request
from flask_usage_metrics import TrackUsage

app = Flask("shop")
app.config.update(TRACK_USAGE_STATE_DIR="state", MAX_CONTENT_LENGTH=1000)
TrackUsage(app, [])
app.add_url_rule("/", "index", lambda: str(len(request.get_data())), methods=["GET", "POST"])
"""
    with Gunicorn(tmp_path, app=app) as server:
        chunked = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
        chunked += b"Connection: close\r\n\r\n4\r\nabcd\r\n6\r\nefghij\r\n0\r\n\r\n"
        assert exchanged(server.port, chunked).endswith(b"10")
        claims = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 7000000000\r\n"
        assert b" 413 " in exchanged(server.port, claims + b"Connection: close\r\n\r\n")
        assert 'flask_usage_request_bytes_total{endpoint="index"} 10.0\n' in server.get("/metrics")
