"""Web servers with a tracked app, for tests of what only real processes do."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import requests

from flask_usage_metrics import open_storage
from flask_usage_metrics.storage import Storage

from .process import Process, free_port

APP = """
import os, time
from flask import Flask, Response
from flask_usage_metrics import TrackUsage
from prometheus_client import Gauge

Gauge("pid", "Who answers.").set_function(os.getpid)
app = Flask("shop")
app.config["TRACK_USAGE_STATE_DIR"] = "state"
app.config.from_prefixed_env()
usage = TrackUsage(app, "sqlite:///usage.sqlite3", country=lambda address: "NL")
app.add_url_rule("/pid", "pid", lambda: str(os.getpid()))
app.add_url_rule("/stream", "stream", lambda: Response(str(n) for n in range(10)))

@app.get("/slow")
def slow():
    time.sleep(3)
    return "x"
"""

GUNICORN = """
import {libraries}
from gunicorn.app.wsgiapp import run
run("gunicorn")
"""

LIBRARIES = "flask, prometheus_client, requests, sqlalchemy"

Own = TypeVar("Own", bound="Server")


class Server:
    """A command that listens on a free loopback port, in a folder with what it writes in ``log``.

    ``with`` ends it as a supervisor does.

    Args:
        folder: Where it runs, and where its files are.
        *command: Its command line, with ``{port}`` where the port goes.
        **environment: Added to the environment.

    Attributes:
        port: Where it listens.
        address: Its URL without a path.
        process: Its first process.
    """

    log_name = "log"
    is_fresh = False
    """Whether it imports all by itself; see `Process`."""

    def __init__(self, folder: Path, *command: str, **environment: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        with (folder / self.log_name).open("a") as log:
            self.process = Process(
                *(part.replace("{port}", str(self.port)) for part in command),
                folder=folder,
                env=environment,
                fresh=self.is_fresh,
                stdin=None,
                stdout=log,
                stderr=log,
            )
        try:
            self.wait_until_it_answers()
        except BaseException:
            self.end_all()
            raise

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_it_answers(self) -> None:
        """Wait until it accepts connections.

        Raises:
            AssertionError: It has ended, or does not in 30 seconds; the message is its log.
        """
        deadline = time.monotonic() + 30
        while self.process.poll() is None and time.monotonic() < deadline:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            time.sleep(0.02)
        raise AssertionError(self.log())

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End it as a supervisor does; return its exit status, also if it has ended before."""
        return self.process.stop(how) if self.process.poll() is None else self.process.returncode

    def kill(self, pid: int) -> None:
        """Kill one of its processes."""
        os.kill(pid, signal.SIGKILL)

    def end_all(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End all its processes at once, the first of them first, so that it starts no others."""
        if self.process.poll() is None:
            for pid in [self.process.pid, *self.workers()]:
                with suppress(ProcessLookupError):
                    os.kill(pid, how)
            self.process.wait(15)

    def workers(self) -> list[int]:
        """Return the ids of the processes that the first has started and that run."""
        return self.process.children()

    def log(self) -> str:
        """Return all it has written so far."""
        return (self.folder / self.log_name).read_text(errors="replace")

    def get(self, path: str = "/") -> str:
        """Return what it answers to a GET, which must be a 200."""
        response = requests.get(self.address + path, timeout=20)
        assert response.status_code == 200
        return response.text

    def stored(self) -> int:
        """Return the number of records in the app's storage."""
        storage = open_storage(f"sqlite:///{self.folder}/usage.sqlite3")
        assert isinstance(storage, Storage)
        storage.is_of_app = True  # none yet is 0
        try:
            return storage.count()
        finally:
            storage.close()


class Gunicorn(Server):
    """gunicorn with the app above.

    Args:
        folder: See `Server`.
        *options: Of gunicorn's command line.
        app: Source of the module ``shop``.
        libraries: What is imported once for all workers, which saves most of the time they take to
            start. Our package, and the app, each imports by itself.
        **environment: See `Server`.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        app: str = APP,
        libraries: str = LIBRARIES,
        **environment: str,
    ) -> None:
        (folder / "shop.py").write_text(app)
        program = GUNICORN.format(libraries=libraries)
        command = (sys.executable, "-c", program, "shop:app", "-b", "127.0.0.1:{port}")
        super().__init__(folder, *command, *options, **environment)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End it, which must go well unless it has ended before."""
        has_ended = self.process.poll() is not None
        status = super().stop(how)
        assert has_ended or status == 0, self.log()
        return status

    def get(self, path: str = "/pid") -> str:
        return super().get(path)
