"""Under servers other than a plain gunicorn: what was answered is what is stored and counted."""

from __future__ import annotations

import importlib.util
import os
import signal
import sqlite3
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers.front_door import samples
from helpers.process import need, until
from helpers.servers import Server

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

Launch = Callable[..., "Served"]


class Served(Server):
    """A command that serves the app above; see `Server`."""

    def __init__(self, folder: Path, *command: str, **environment: str) -> None:
        (folder / "shop.py").write_text(APP)
        super().__init__(folder, *command, **environment)

    def visit_several_processes(self) -> int:
        """Make requests until two processes have answered; return how many it took.

        One worker alone may have answered many by the time that the others have started.
        """
        answered: Counter[str] = Counter()
        times = 0
        while len(answered) < 2:
            assert times < 5_000, answered
            answered += self.visit(150)
            times += 150
        return times

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

    def assert_exact(self, expected: int) -> None:
        """Every process answers for all, and the records are the requests."""
        until(self.total, expected)
        for _ in range(5):  # whoever answers
            assert self.total() == expected
        until(self.stored, expected)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start servers; they are ended in the end."""
    with ExitStack() as stack:

        def start(*command: str, **environment: str) -> Served:
            server = Served(tmp_path, *command, **environment)
            stack.callback(server.end_all)
            return server

        yield start


# ------------------------------------------------------------------------ gunicorn, gevent

GEVENT = (
    *(sys.executable, "-m", "gunicorn", "shop:app", "-b", "127.0.0.1:{port}"),
    *("-k", "gevent", "-w", "2"),
)


def test_gevent_workers_count_and_store_what_they_answer(launch: Launch) -> None:
    need(importlib.util.find_spec("gevent"), "gevent")
    server = launch(*GEVENT)
    visits = server.visit_several_processes()
    server.assert_exact(visits)
    server.visit(30)
    assert server.stop() == 0
    assert server.stored() == visits + 30


def test_a_killed_gevent_worker_takes_nothing_away(launch: Launch) -> None:
    need(importlib.util.find_spec("gevent"), "gevent")
    # So long that nothing is folded or written before the kill.
    server = launch(*GEVENT, FLASK_TRACK_USAGE_FLUSH_SECONDS="2")
    server.visit(60)
    (victim, _) = server.workers()
    os.kill(victim, signal.SIGKILL)
    until(lambda: len(server.workers()), 2)
    until(lambda: victim in server.workers(), False)
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
    visits = server.visit_several_processes()
    server.assert_exact(visits)
    server.visit(30)
    workers = server.workers()
    server.stop(how)
    assert server.stored() == visits + 30
    # It does run what atexit was given, in each worker.
    assert all((server.folder / f"exited-{pid}").exists() for pid in workers)


def test_a_reload_of_uwsgi_keeps_the_counts(launch: Launch) -> None:
    need(UWSGI.exists(), "uwsgi")
    # That of a wheel is started by Python, and forgets of which virtual environment.
    program = sys.executable if importlib.util.find_spec("pyuwsgi") else str(UWSGI)
    server = launch(*MASTER, "--binary-path", program)
    before = set(server.visit(60))
    server.process.send_signal(signal.SIGHUP)
    until(lambda: bool(before & set(map(str, server.workers()))), False)
    until(lambda: len(server.workers()), 3)
    server.wait_until_it_answers()
    server.visit(30)
    server.assert_exact(90)


def test_a_killed_uwsgi_worker_takes_nothing_away(launch: Launch) -> None:
    need(UWSGI.exists(), "uwsgi")
    # So long that nothing is folded or written before the kill.
    server = launch(*MASTER, FLASK_TRACK_USAGE_FLUSH_SECONDS="2")
    victim = int(max(server.visit(60)))
    os.kill(victim, signal.SIGKILL)
    until(lambda: victim in server.workers(), False)
    server.visit(21)
    server.assert_exact(81)


# ------------------------------------------------------------------------ several apps

TWO_APPS = """
import os
from flask import Flask
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from flask_usage_metrics import TrackUsage

shop, blog = Flask("shop"), Flask("blog")
for app in (shop, blog):
    app.config.update(TRACK_USAGE_STATE_DIR="state", TRACK_USAGE_FLUSH_SECONDS=5)
    TrackUsage(app, "sqlite:///usage.sqlite3")
    app.add_url_rule("/", "index", lambda: str(os.getpid()))
application = DispatcherMiddleware(shop, {"/blog": blog})
"""


def test_what_a_killed_worker_left_of_an_app_waits_for_no_request_to_it(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO_APPS)
    command = (sys.executable, "-m", "gunicorn", "two:application", "-b", "127.0.0.1:{port}")
    with Server(tmp_path, *command, "-w", "2") as server:
        for _ in range(20):
            server.get("/blog/")
        victims = set(server.workers())
        for victim in victims:
            server.kill(victim)
        until(lambda: bool(victims & set(server.workers())), False)
        server.wait_until_it_answers()

        def agreed() -> float | None:
            total = sum(samples(server.get("/metrics"), "flask_usage_requests_total").values())
            return total if total == server.stored() else None  # all scrapes are of the shop

        until(lambda: (agreed() or 0) >= 20, True)


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
    server.end_all()
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
    until(lambda: int(before) in server.workers(), False)
    server.wait_until_it_answers()
    (after,) = server.visit(30)
    assert after != before
    assert server.total() == 90
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
    # Each is as much of the disk as its process had needed.
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
    for counted in (10, 19, 28):
        server.visit(9)
        until(server.total, counted, 60)  # and not written
        (worker,) = server.workers()
        os.kill(worker, signal.SIGKILL)
        until(lambda worker=worker: server.workers() not in ([], [worker]), True)
    storage.close()
    server.visit(9)
    until(server.stored, 37, 60)
    server.stop()
    assert server.stored() == 37
