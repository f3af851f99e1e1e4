"""A connection that the app takes over is one record of its own kind: 101, and no latency."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests
from flask import Flask, Response
from helpers.front_door import Site
from helpers.servers import Server
from werkzeug.test import EnvironBuilder

from flask_usage_metrics import open_storage

HANDSHAKE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
}
LATENCY = {"quick": (0.9, 0.1), "up": 0.9}


class Ends(Response):
    """What a library has the view return when the connection is over.

    Args:
        end: Raises, or returns the body.
    """

    def __init__(self, end: Callable[[], Iterable[bytes]]) -> None:
        super().__init__()
        self._end = end

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        return self._end()


def raises(error: BaseException) -> Callable[[], Iterable[bytes]]:
    def end() -> Iterable[bytes]:
        raise error

    return end


def visit(site: Site, environ: dict[str, Any], **options: Any) -> None:
    asked = EnvironBuilder("/ws/7", **options).get_environ()
    with suppress(StopIteration, ConnectionError):
        body: Any = site.app.wsgi_app({**asked, **environ}, lambda *_: len)
        list(body)
        getattr(body, "close", list)()


SOCKET: dict[str, Any] = {"gunicorn.socket": object()}


@pytest.mark.parametrize("labels", [("method", "endpoint", "status", "country"), ("endpoint",)])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("environ", "answer", "headers"),
    [
        pytest.param(SOCKET, Ends(raises(StopIteration())), HANDSHAKE, id="gunicorn"),
        pytest.param(SOCKET, Ends(raises(StopIteration())), {}, id="gunicorn, not a WebSocket"),
        pytest.param({}, Ends(raises(ConnectionError())), HANDSHAKE, id="werkzeug"),
        pytest.param({}, Response(), HANDSHAKE, id="flask-sock on werkzeug"),
        pytest.param({}, Ends(list), HANDSHAKE, id="gevent"),
        pytest.param({}, "x", HANDSHAKE, id="gevent-websocket and uWSGI, by hand"),
        pytest.param({}, Response(status=101), {"Upgrade": "other"}, id="101"),
    ],
)
def test_it_is_101_and_no_latency(
    make_site: Callable[..., Site],
    environ: dict[str, Any],
    answer: Any,
    headers: dict[str, str],
    wrapped: bool,
    labels: tuple[str, ...],
) -> None:
    app = Flask("shop")
    if wrapped:
        inner = app.wsgi_app
        app.wsgi_app = lambda environ, start: inner({**environ}, start)  # type: ignore[method-assign]
    site = make_site(app=app, SLO=LATENCY, HISTOGRAM_LABELS=labels)
    is_websocket = headers is HANDSHAKE
    app.add_url_rule("/ws/<int:n>", "ws", lambda n: answer, websocket=is_websocket)
    app.add_url_rule("/", "index", lambda: "x")
    visit(site, environ, headers=headers)
    site.get("/")
    taken, index = site.records()
    assert (taken.endpoint, taken.status, taken.exception) == ("ws", 101, None)
    assert (taken.bytes_sent, taken.view_args) == (0, {"n": 7})
    assert index.status == 200
    assert site.counted()["GET", "ws", "101", "ZZ"] == 1
    observed = site.samples("flask_usage_request_duration_seconds_count")
    assert sum(observed.values()) == 1
    events = site.samples("flask_usage_slo_events_total")
    assert sum(events.values()) == len(LATENCY)
    (family,) = [
        family
        for family in site.registry.collect()
        if family.name == "flask_usage_request_duration_seconds"
    ]
    counts = [sample.value for sample in family.samples if sample.name.endswith("_count")]
    assert sum(counts) == 1
    if labels != ("endpoint",):
        site.assert_agrees()


@pytest.mark.parametrize(
    ("environ", "answer", "headers", "status", "exception"),
    [
        pytest.param({}, Ends(raises(StopIteration())), {}, 500, "StopIteration", id="no server"),
        pytest.param({}, Ends(raises(ConnectionError())), {}, 500, "ConnectionError", id="lost"),
        pytest.param(
            {}, Ends(raises(ConnectionRefusedError())), HANDSHAKE, 500, "ConnectionRefusedError"
        ),
        pytest.param({}, ("no", 403), HANDSHAKE, 403, None, id="refused"),
        pytest.param({}, ("", 200), {"Upgrade": "h2c"}, 200, None, id="another upgrade"),
    ],
)
def test_what_is_none_keeps_its_status(
    make_site: Callable[..., Site],
    environ: dict[str, Any],
    answer: Any,
    headers: dict[str, str],
    status: int,
    exception: str | None,
) -> None:
    site = make_site()
    site.app.add_url_rule("/ws/7", "ws", lambda: answer, websocket=headers is HANDSHAKE)
    visit(site, environ, headers=headers)
    record = site.only_record()
    assert (record.endpoint, record.status, record.exception) == ("ws", status, exception)
    site.assert_agrees()


def test_a_way_that_was_made_before_is_no_different(make_site: Callable[..., Site]) -> None:
    app = Flask("shop")
    door = app.wsgi_app
    site = make_site(app=app)
    app.add_url_rule("/raises", "raises", lambda: Ends(raises(StopIteration())), websocket=True)
    app.add_url_rule("/returns", "returns", lambda: Ends(list), websocket=True)
    environ = EnvironBuilder("/raises", headers=HANDSHAKE).get_environ()
    with pytest.raises(StopIteration):
        door(environ, lambda *_: None)
    assert door(EnvironBuilder("/returns", headers=HANDSHAKE).get_environ(), lambda *_: None) == []
    found = [(record.endpoint, record.status, record.exception) for record in site.records()]
    assert found == [("raises", 101, None), ("returns", 101, None)]
    site.assert_agrees()


# ------------------------------------------------------------------------ with real servers

APP = """
import os
from flask import Flask, request
from flask_sock import Sock
from flask_socketio import SocketIO
from flask_usage_metrics import TrackUsage

app = Flask("shop")
app.config["TRACK_USAGE_STATE_DIR"] = "state"
sock = Sock(app)
app.add_url_rule("/", "index", lambda: "x")

@sock.route("/ws")
def ws(ws):
    while True:
        ws.send(ws.receive())

def track():
    TrackUsage(app, "sqlite:///usage.sqlite3")

if os.environ["ORDER"] == "before":
    track()
socketio = SocketIO(app, async_mode=os.environ["MODE"])
if os.environ["ORDER"] == "after":
    track()

@socketio.on("hello")
def hello(data):
    return request.path + data

if __name__ == "__main__":
    import sys
    from werkzeug.serving import run_simple
    run_simple("127.0.0.1", int(sys.argv[1]), app, threaded=True)
"""

PYTHON = sys.executable
GUNICORN = (PYTHON, "-m", "gunicorn", "shop:app", "-b", "127.0.0.1:{port}")
SERVERS = {
    "gunicorn": ("threading", (*GUNICORN, "--threads", "9")),
    "gevent": ("gevent", (*GUNICORN, "-k", "gevent")),
    "werkzeug": ("threading", (PYTHON, "shop.py", "{port}")),
}


def speak_socketio(websocket: Any) -> str:
    """Connect as a client of Socket.IO does, have an event answered, and return the answer."""
    # Before anything is received: what came along with the handshake's answer is looked at by
    # simple_websocket's client only when more comes.
    websocket.send("40")
    assert websocket.receive(10)[0] == "0"
    assert websocket.receive(10)[:2] == "40"
    websocket.send('420["hello","!"]')
    answer: str = json.loads(websocket.receive(10)[3:])[0]
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("server", SERVERS)
def test_flask_sock_and_flask_socketio(tmp_path: Path, server: str, order: str) -> None:
    for name in ("flask_sock", "flask_socketio"):
        pytest.importorskip(name, exc_type=ImportError)
    from simple_websocket import Client

    mode, command = SERVERS[server]
    (tmp_path / "shop.py").write_text(APP)
    with Server(tmp_path, *command, ORDER=order, MODE=mode) as served:
        address = served.address.replace("http", "ws", 1)
        for leaves in (True, False):
            websocket = Client(f"{address}/ws")
            websocket.send("tea")
            assert websocket.receive(10) == "tea"
            if leaves:
                websocket.close()
            else:
                websocket.sock.shutdown(socket.SHUT_RDWR)  # without a word
        websocket = Client(f"{address}/socket.io/?EIO=4&transport=websocket")
        assert speak_socketio(websocket) == "/socket.io/!"
        websocket.close()
        polled = f"{served.address}/socket.io/?EIO=4&transport=polling"
        assert requests.get(polled, timeout=10).text[0] == "0"
        assert requests.get(f"{served.address}/", timeout=10).text == "x"
        expected = {("ws", 101, None): 2, ("index", 200, None): 1}
        if order == "after":  # around it, and so what it answers itself is seen
            expected |= {(None, 101, None): 1, (None, 200, None): 1}
        ended = threading.Event()
        for _ in range(200):
            if served.stored() >= sum(expected.values()):
                break
            ended.wait(0.05)
    storage = open_storage(f"sqlite:///{tmp_path}/usage.sqlite3")
    found: dict[Any, int] = {}
    for record in storage.records():  # type: ignore[attr-defined]
        key = (record.endpoint, record.status, record.exception)
        found[key] = found.get(key, 0) + 1
    storage.close()
    assert found == expected, served.log()
