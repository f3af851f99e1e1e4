"""Under real servers: what was answered is what is stored and counted."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from flask_usage_metrics import open_storage
from flask_usage_metrics.storage import Storage

APP = """
from flask import Flask, Response
from flask_usage_metrics import TrackUsage

app = Flask(__name__)
usage = TrackUsage(app, "sqlite:///usage.sqlite3")
app.add_url_rule("/", "index", lambda: "hello")
app.add_url_rule("/stream", "stream", lambda: Response(str(n) for n in range(10)))
"""


@contextmanager
def gunicorn(folder: Path, *options: str) -> Iterator[str]:
    """Serve the app with gunicorn; yield its address; end it as a supervisor does."""
    (folder / "shop.py").write_text(APP)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (folder / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "gunicorn", "shop:app", "-b", f"127.0.0.1:{port}", *options],
        cwd=folder,
        stdout=log,
        stderr=log,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
        log.close()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("-w", "1", "--threads", "4"), id="threads"),
        pytest.param(("-w", "3"), id="workers"),
        pytest.param(("-w", "2", "--preload"), id="preload"),
        pytest.param(("-w", "2", "--max-requests", "20"), id="recycled"),
    ],
)
def test_every_answer_of_gunicorn_is_a_row(tmp_path: Path, options: tuple[str, ...]) -> None:
    with gunicorn(tmp_path, *options) as address:
        for number in range(120):
            path = "/stream" if number % 3 else "/"
            assert requests.get(address + path, timeout=10).ok
    storage = open_storage(f"sqlite:///{tmp_path}/usage.sqlite3")
    assert isinstance(storage, Storage)
    assert storage.count() == 120
    sent = {record.endpoint: record.bytes_sent for record in storage.records()}
    assert sent == {"index": 5, "stream": 10}
    storage.close()


def test_one_worker_counts_what_it_answered(tmp_path: Path) -> None:
    with gunicorn(tmp_path, "-w", "1", "--threads", "4") as address:
        for _ in range(30):
            requests.get(address, timeout=10)
        text = requests.get(f"{address}/metrics", timeout=10).text
    found = re.search(r'^flask_usage_requests_total\{.*"index".*\} (.*)$', text, re.MULTILINE)
    assert found is not None
    assert float(found.group(1)) == 30
