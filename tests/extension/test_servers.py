"""Under servers other than a plain gunicorn: what was answered is what is stored and counted."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests
from helpers.front_door import samples
from helpers.gunicorn_server import until

from flask_usage_metrics import open_storage
from flask_usage_metrics.storage import Storage

APP = """
import atexit, os, time
from pathlib import Path
from flask import Flask, Response
from flask_usage_metrics import TrackUsage

app = Flask("shop")
app.config["TRACK_USAGE_STATE_DIR"] = "state"
app.config.from_prefixed_env()
if os.environ.get("SLOW_DISK"):
    allocate = os.posix_fallocate
    os.posix_fallocate = lambda *given: (time.sleep(0.5), allocate(*given))
usage = TrackUsage(app, "sqlite:///usage.sqlite3", country=lambda address: "NL")
app.add_url_rule("/", "index", lambda: str(os.getpid()))
app.add_url_rule("/stream", "stream", lambda: Response(str(n) for n in range(10)))
atexit.register(lambda: Path(f"exited-{os.getpid()}").touch())

@app.get("/slow")
def slow():
    time.sleep(0.5)
    return str(os.getpid())

if __name__ == "__main__":
    import sys
    from werkzeug.serving import run_simple
    run_simple("127.0.0.1", int(sys.argv[1]), app, processes=3)
"""

Launch = Callable[..., "Server"]


class Server:
    """A command that serves the app above, in a folder, on a free loopback port.

    Args:
        folder: Where it runs; the app's files are there.
        command: Its command line, with ``{port}`` where the port goes.
        **environment: Added to the environment.
    """

    def __init__(self, folder: Path, *command: str, **environment: str) -> None:
        self.folder = folder
        (folder / "shop.py").write_text(APP)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        with (folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [part.format(port=self.port) for part in command],
                cwd=folder,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(folder), **environment},
            )
        self.known = {self.process.pid}

    def wait_until_it_answers(self) -> None:
        for _ in range(400):
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            assert self.process.poll() is None, self.log()
            time.sleep(0.05)
        raise AssertionError(self.log())

    def get(self, path: str = "/") -> str:
        response = requests.get(self.address + path, timeout=10)
        assert response.status_code == 200
        return response.text

    def visit(self, times: int) -> Counter[str]:
        """Make requests, four at once, each third for a stream; count what each process answered.

        Returns:
            By process id, without the streams.
        """
        with ThreadPoolExecutor(4) as visitors:
            texts = list(visitors.map(self.get, ["/stream", "/", "/"] * (times // 3)))
        assert set(texts[::3]) == {"0123456789"}
        return Counter(text for number, text in enumerate(texts) if number % 3)

    def total(self) -> float:
        return sum(samples(self.get("/metrics"), "flask_usage_requests_total").values())

    def stored(self) -> int:
        storage = open_storage(f"sqlite:///{self.folder}/usage.sqlite3")
        assert isinstance(storage, Storage)
        try:
            return storage.count()
        finally:
            storage.close()

    def children(self) -> list[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End it as a supervisor does; return its exit status."""
        self.process.send_signal(how)
        return self.process.wait(15)

    def end_all(self, how: signal.Signals) -> None:
        """End all its processes at once, as a terminal does."""
        if self.process.poll() is None:
            for pid in [*self.children(), self.process.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, how)
            self.process.wait(15)

    def assert_exact(self, expected: int) -> None:
        """Every process answers for all, and the records are the requests."""
        until(self.total, expected)
        for _ in range(5):  # whoever answers
            assert self.total() == expected
        until(self.stored, expected)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start servers; they are ended in the end."""
    started: list[Server] = []

    def start(*command: str, **environment: str) -> Server:
        server = Server(tmp_path, *command, **environment)
        started.append(server)
        server.wait_until_it_answers()
        return server

    yield start
    for server in started:
        server.end_all(signal.SIGKILL)


def need(found: Any, name: str) -> None:
    """Skip without a server at a desk, fail without it in CI."""
    if not found:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{name} is not installed")


# ------------------------------------------------------------------------ gunicorn, gevent

GEVENT = (
    *(sys.executable, "-m", "gunicorn", "shop:app", "-b", "127.0.0.1:{port}"),
    *("-k", "gevent", "-w", "2"),
)


def test_gevent_workers_count_and_store_what_they_answer(launch: Launch) -> None:
    need(importlib.util.find_spec("gevent"), "gevent")
    server = launch(*GEVENT)
    assert len(server.visit(150)) == 2
    server.assert_exact(150)
    server.visit(30)
    assert server.stop() == 0
    assert server.stored() == 180


def test_a_killed_gevent_worker_takes_nothing_away(launch: Launch) -> None:
    need(importlib.util.find_spec("gevent"), "gevent")
    # So long that nothing is folded or written before the kill.
    server = launch(*GEVENT, FLASK_TRACK_USAGE_FLUSH_SECONDS="2")
    server.visit(60)
    (victim, _) = server.children()
    os.kill(victim, signal.SIGKILL)
    until(lambda: len(server.children()), 2)
    until(lambda: victim in server.children(), False)
    server.visit(21)
    server.assert_exact(81)


# ------------------------------------------------------------------------ uWSGI

UWSGI = Path(sysconfig.get_path("scripts"), "uwsgi")
MASTER = (
    *(str(UWSGI), "--http-socket", "127.0.0.1:{port}", "--module", "shop:app"),
    *("--master", "--processes", "3", "--die-on-term", "--need-app", "--virtualenv", sys.prefix),
)


@pytest.mark.parametrize(
    ("options", "how"),
    [
        pytest.param(("--enable-threads",), signal.SIGTERM, id="enable-threads"),
        pytest.param(("--enable-threads",), signal.SIGINT, id="interrupted"),
        pytest.param(("--enable-threads", "--lazy-apps"), signal.SIGTERM, id="lazy-apps"),
        pytest.param(("--threads", "2"), signal.SIGTERM, id="threads"),
        # The same as the first since one of the releases after 2.0.23.
        pytest.param((), signal.SIGTERM, id="without-threads"),
    ],
)
def test_uwsgi_counts_and_stores_what_it_answers(
    launch: Launch, options: tuple[str, ...], how: signal.Signals
) -> None:
    need(UWSGI.exists(), "uwsgi")
    server = launch(*MASTER, *options)
    if "--lazy-apps" in options:
        until(lambda: server.log().count(" ready in "), 3)
    assert len(server.visit(150)) >= 2
    server.assert_exact(150)
    server.visit(30)
    workers = server.children()
    server.stop(how)
    assert server.stored() == 180
    # It does run what atexit was given, in each worker.
    assert all((server.folder / f"exited-{pid}").exists() for pid in workers)


def test_a_reload_of_uwsgi_keeps_the_counts(launch: Launch) -> None:
    need(UWSGI.exists(), "uwsgi")
    server = launch(*MASTER)
    before = set(server.visit(60))
    server.process.send_signal(signal.SIGHUP)
    until(lambda: bool(before & set(map(str, server.children()))), False)
    until(lambda: len(server.children()), 3)
    server.wait_until_it_answers()
    server.visit(30)
    server.assert_exact(90)


def test_a_killed_uwsgi_worker_takes_nothing_away(launch: Launch) -> None:
    need(UWSGI.exists(), "uwsgi")
    # So long that nothing is folded or written before the kill.
    server = launch(*MASTER, FLASK_TRACK_USAGE_FLUSH_SECONDS="2")
    victim = int(max(server.visit(60)))
    os.kill(victim, signal.SIGKILL)
    until(lambda: victim in server.children(), False)
    server.visit(21)
    server.assert_exact(81)


# ------------------------------------------------------------------------ waitress


WAITRESS = (
    *(sys.executable, "-m", "waitress", "--listen=127.0.0.1:{port}", "--threads=4"),
    "shop:app",
)


def test_waitress_counts_and_stores_what_it_answers(launch: Launch) -> None:
    need(importlib.util.find_spec("waitress"), "waitress")
    server = launch(*WAITRESS)
    assert len(server.visit(150)) == 1
    assert server.total() == 150
    server.visit(30)
    server.stop(signal.SIGINT)
    assert server.stored() == 180


def test_the_very_first_requests_survive_a_kill(launch: Launch) -> None:
    need(importlib.util.find_spec("waitress"), "waitress")
    server = launch(*WAITRESS, SLOW_DISK="1", FLASK_TRACK_USAGE_FLUSH_SECONDS="5")
    server.visit(6)
    server.end_all(signal.SIGKILL)
    server = launch(*WAITRESS)
    server.get()
    until(server.stored, 7, 3)


def test_what_a_zombie_left_is_taken_up(launch: Launch) -> None:
    need(importlib.util.find_spec("waitress"), "waitress")
    server = launch(*WAITRESS, FLASK_TRACK_USAGE_FLUSH_SECONDS="5")
    for _ in range(9):
        server.get()
    os.kill(server.process.pid, signal.SIGKILL)  # and nobody waits for it, as in many containers
    following = launch(*WAITRESS)
    following.get()
    until(following.stored, 10, 3)
    assert server.process.wait() == -signal.SIGKILL


# ------------------------------------------------------------------------ Werkzeug's own


FLASK_RUN = (
    *(sys.executable, "-m", "flask", "--app", "shop", "run", "--debug", "-p", "{port}"),
    *("--exclude-patterns", f"{Path(__file__).parents[2]}/*"),  # somebody may be editing
)


def test_flask_run_goes_on_after_a_reload(launch: Launch) -> None:
    server = launch(*FLASK_RUN)
    (before,) = server.visit(60)
    assert server.total() == 60
    shop = server.folder / "shop.py"
    os.utime(shop, (time.time() + 5, time.time() + 5))
    until(lambda: int(before) in server.children(), False)
    server.wait_until_it_answers()
    (after,) = server.visit(30)
    assert after != before
    # A process that counts alone begins at zero, as Prometheus expects of a restart.
    assert server.total() == 30
    until(server.stored, 90)
    server.visit(9)
    server.end_all(signal.SIGINT)
    assert server.stored() == 99


def test_a_process_for_each_request_loses_none(launch: Launch) -> None:
    server = launch(sys.executable, "shop.py", "{port}")
    assert len(server.visit(60)) == 40
    assert server.total() == 60
    for _ in range(3):  # whoever adopts what others left
        server.get("/metrics")
    server.visit(30)
    assert server.total() == 90
    until(server.stored, 90, 3)
    # 4 MiB each.
    assert len(list(server.folder.glob("state/*/*/*.journal"))) <= 3


# ------------------------------------------------------------------------ heirs


def test_a_worker_that_is_killed_with_what_it_inherited_leaves_it_to_the_next(
    launch: Launch, tmp_path: Path
) -> None:
    command = (sys.executable, "-m", "gunicorn", "shop:app", "-b", "127.0.0.1:{port}")
    server = launch(*command, FLASK_TRACK_USAGE_FLUSH_SECONDS="0.2")
    server.get()
    until(server.stored, 1)
    storage = sqlite3.connect(tmp_path / "usage.sqlite3", isolation_level=None)
    storage.execute("BEGIN IMMEDIATE")  # nobody else can write
    for _ in range(3):
        server.visit(9)
        time.sleep(0.8)  # folded, and not written
        (worker,) = server.children()
        os.kill(worker, signal.SIGKILL)
        until(lambda worker=worker: server.children() not in ([], [worker]), True)
    storage.close()
    server.visit(9)
    until(server.stored, 37, 10)
    server.stop()
    assert server.stored() == 37
