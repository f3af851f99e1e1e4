"""A tracked app under a real gunicorn, for tests that kill its workers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import requests

from flask_usage_metrics import open_storage
from flask_usage_metrics.storage import Storage

APP = """
import os, time
from flask import Flask, Response
from flask_usage_metrics import TrackUsage

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


class Gunicorn:
    """gunicorn with the app above, in a folder, on a free loopback port.

    Args:
        folder: Where it runs; the app's files are there.
        *options: Of gunicorn's command line.
        app: Source of the module ``shop``.
        **environment: Added to the environment.
    """

    def __init__(self, folder: Path, *options: str, app: str = APP, **environment: str) -> None:
        self.folder = folder
        (folder / "shop.py").write_text(app)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._log = (folder / "log").open("a")
        command = [sys.executable, "-m", "gunicorn", "shop:app", "-b", f"127.0.0.1:{self.port}"]
        self.process = subprocess.Popen(
            [*command, *options],
            cwd=folder,
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": str(folder), **environment},
        )
        self.wait_until_it_answers()

    def __enter__(self) -> Gunicorn:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_it_answers(self) -> None:
        for _ in range(400):
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise AssertionError(self.log())

    def stop(self) -> None:
        """End it as a supervisor does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                assert self.process.wait(40) == 0
            finally:
                self.process.kill()
                self.process.wait()
        self._log.close()

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def get(self, path: str = "/pid") -> str:
        response = requests.get(self.address + path, timeout=20)
        assert response.status_code == 200
        return response.text

    def workers(self) -> list[int]:
        """Process ids of the workers that run."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def stored(self) -> int:
        storage = open_storage(f"sqlite:///{self.folder}/usage.sqlite3")
        assert isinstance(storage, Storage)
        try:
            return storage.count()
        finally:
            storage.close()


def until(what: object, expected: object, seconds: float = 15.0) -> None:
    """Wait until a function returns what is expected; fail with what it returns instead."""
    deadline = time.monotonic() + seconds
    while (found := what()) != expected:  # type: ignore[operator]
        assert time.monotonic() < deadline, f"{found!r} instead of {expected!r}"
        time.sleep(0.05)
