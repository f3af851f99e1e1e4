"""The end of a server with several workers, which all close at once: it takes no longer with us."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
import time
from pathlib import Path

import pytest
import requests
from helpers.servers import Gunicorn

pytestmark = [pytest.mark.slow, pytest.mark.alone]

APP = """
import os
from flask import Flask
from flask_usage_metrics import TrackUsage

app = Flask("shop")
app.config["TRACK_USAGE_STATE_DIR"] = "state"
app.add_url_rule("/pid", "pid", lambda: str(os.getpid()))
if os.environ["TRACKED"] == "yes":
    TrackUsage(app, "sqlite:///usage.sqlite3")
"""


def seconds_to_end(folder: Path, tracked: str, *, is_locked: bool = False) -> float:
    """Return how long a server of four workers takes to end while it is asked all the time.

    Args:
        folder: Where it runs.
        tracked: Whether the app is tracked, ``"yes"`` or ``"no"``.
        is_locked: Whether somebody holds the file of the shared totals.
    """
    folder.mkdir()
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            try:
                requests.get(f"{server.address}/pid", timeout=5)
            except requests.RequestException:
                time.sleep(0.01)

    server = Gunicorn(folder, "-w", "4", app=APP, TRACKED=tracked)
    threads = [threading.Thread(target=ask) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        time.sleep(2)
        if is_locked:
            (path,) = folder.glob("state/*/g-*/totals.sqlite3")
            holder = sqlite3.connect(path, isolation_level=None)
            holder.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        os.kill(server.process.pid, signal.SIGTERM)
        server.process.wait(30)
        ended = time.monotonic()
        if is_locked:
            holder.close()
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
        server.end_all()
    return ended - began


def test_a_server_ends_as_soon_as_without_us(tmp_path: Path) -> None:
    took = {
        tracked: min(seconds_to_end(tmp_path / f"{tracked}{n}", tracked) for n in range(3))
        for tracked in ("no", "yes")
    }
    assert took["yes"] < 1.5 * took["no"] + 0.5, took


def test_workers_that_end_wait_once_for_a_file_that_is_held(tmp_path: Path) -> None:
    free = min(seconds_to_end(tmp_path / f"free{n}", "yes") for n in range(2))
    held = min(seconds_to_end(tmp_path / f"held{n}", "yes", is_locked=True) for n in range(2))
    assert held < free + 2.0, (free, held)
