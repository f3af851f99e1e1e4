"""A process that is no worker shows what the workers have counted, and adds nothing."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import requests
from helpers.front_door import samples
from helpers.process import free_port, run_python, until
from helpers.servers import Gunicorn

APP = """
from flask import Flask
from flask_usage_metrics import TrackUsage
from prometheus_client import Counter

app = Flask("shop", instance_path=INSTANCE)
usage = TrackUsage(app)
pages = Counter("pages", "Counted by the app itself")
app.add_url_rule("/", "index", lambda: pages.inc() or "x")
"""

CONFIGURATION = """
import threading
from wsgiref.simple_server import make_server

def when_ready(server):
    from shop import usage
    door = make_server("127.0.0.1", PORT, usage.metrics_app())
    threading.Thread(target=door.serve_forever, daemon=True).start()
"""

STRANGER = """
import sys
sys.path.insert(0, sys.argv[1])
from prometheus_client import REGISTRY, generate_latest
import shop

print(generate_latest(REGISTRY).decode())
"""


def requests_in(text: str) -> float:
    return sum(samples(text, "flask_usage_requests_total").values())


def is_open(port: int) -> bool:
    with socket.socket() as visitor:
        return visitor.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def source(tmp_path: Path) -> str:
    return APP.replace("INSTANCE", repr(str(tmp_path / "instance")))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_parent_of_the_workers_shows_their_totals(
    tmp_path: Path, source: str, workers: int
) -> None:
    port = free_port()
    (tmp_path / "conf.py").write_text(CONFIGURATION.replace("PORT", str(port)))
    with Gunicorn(tmp_path, "-c", "conf.py", "-w", str(workers), app=source) as server:

        def shown() -> str:
            return requests.get(f"http://127.0.0.1:{port}/", timeout=20).text

        until(lambda: is_open(port), True)
        assert requests_in(shown()) == 0
        for _ in range(9):
            server.get("/")
        until(lambda: requests_in(shown()), 9)
        text = shown()
        assert 1 <= samples(text, "flask_usage_workers")[()] <= workers
        assert samples(text, "flask_usage_totals_shared") == {(): 1}
        assert samples(text, "flask_usage_request_duration_seconds_count") == samples(
            text, "flask_usage_requests_total"
        )
        server.get("/")
        until(lambda: requests_in(shown()), 10)
        until(lambda: samples(shown(), "pages_total"), {(): 10})
        until(lambda: requests_in(server.get("/metrics")), 10)  # it has added nothing


def test_a_stranger_shows_the_totals_of_all_servers_in_the_state_directory(
    tmp_path: Path, source: str
) -> None:
    with Gunicorn(tmp_path, app=source) as one, Gunicorn(tmp_path, app=source) as two:
        for server, times in ((one, 4), (two, 3)):
            for _ in range(times):
                server.get("/")
            until(lambda server=server: requests_in(server.get("/metrics")), times)
        done = run_python(STRANGER, tmp_path)
        assert done.stderr == ""
        assert requests_in(done.stdout) == 7
        assert samples(done.stdout, "flask_usage_workers") == {(): 2}
        assert requests_in(one.get("/metrics")) == 4
    done = run_python(STRANGER, tmp_path)
    assert requests_in(done.stdout) == 0  # no server runs


def test_a_process_that_has_answered_requests_itself_shows_those(
    tmp_path: Path, source: str
) -> None:
    command = f"""{STRANGER}
shop.app.test_client().get("/")
print("#", shop.app.test_client().get("/metrics").text, sep="\\n")
"""
    with Gunicorn(tmp_path, app=source) as server:
        for _ in range(4):
            server.get("/")
        until(lambda: requests_in(server.get("/metrics")), 4)
        done = run_python(command, tmp_path)
        before, _, after = done.stdout.partition("\n#\n")
        assert (requests_in(before), requests_in(after)) == (4, 1)
