"""A server with the README's two lines in an empty folder, whose every scrape is held to account.

A shown value never falls, whoever is asked and when; the histogram is the counter in each scrape;
and in the end all that can be asked say one number, which is that of the rows in the default
storage and of the requests that were answered.
"""

from __future__ import annotations

import copy
import http.client
import os
import signal
import socket
import sqlite3
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

from flask_usage_metrics.runtime.processes import started

from .front_door import samples
from .process import until
from .servers import Server

APP = """
import os
from flask import Flask
from flask_usage_metrics import TrackUsage

app = application = Flask(__name__)
usage = TrackUsage(app)
app.add_url_rule("/", "index", lambda: str(os.getpid()))
"""

_GONE = (OSError, http.client.HTTPException)


class Watched(Server):
    """A command that serves `APP`; ``with`` also reads its metrics all the time.

    Args:
        folder: See `Server`.
        *command: See `Server`.
        app: Source of the module ``shop``.
        where: Path in the folder of the Unix socket that it listens on; None: the port.
        **environment: See `Server`.

    Attributes:
        answered: Requests that were answered.
        failed: Requests that were cut: each may be counted or not, but the same everywhere.
        scrapes: Scrapes that were answered.
        most: The largest number of requests that a scrape has shown.
        complaints: What was wrong with a scrape.
    """

    def __init__(
        self,
        folder: Path,
        *command: str,
        app: str = APP,
        where: str | None = None,
        **environment: str,
    ) -> None:
        (folder / "shop.py").write_text(app)
        self._where = None if where is None else str(folder / where)
        self.answered = self.failed = self.scrapes = 0
        self.complaints: list[str] = []
        self.most = 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        super().__init__(folder, *command, **environment)

    def __enter__(self) -> Watched:
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._reader.join()
        self.end_all()

    def at(self, port: int) -> Watched:
        """Return another server that the same command has started."""
        other = copy.copy(self)
        other.port = port
        other.answered = other.failed = other.scrapes = 0
        other.most, other.complaints = 0.0, []
        return other

    def wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + 30
        while self.process.poll() is None and time.monotonic() < deadline:
            with suppress(OSError), closing(self._connection()) as connection:
                connection.connect()
                return
            time.sleep(0.02)
        raise AssertionError(self.log())

    def end_all(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End all its processes, and what these have started."""
        pids = [self.process.pid, *self.descendants()] if self.process.poll() is None else []
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, how)
        self.process.wait(15)

    def descendants(self) -> list[int]:
        """Return the ids of all processes that come from the first one and run."""
        found, unseen = [], [self.process.pid]
        while unseen:
            pid = unseen.pop()
            for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
                with suppress(OSError):
                    children = [int(child) for child in tasks.read_text().split()]
                    found += [child for child in children if started(child)]
                    unseen += children
        return found

    # ------------------------------------------------------------------------ visitors

    def visit(self, times: int, at_once: int = 4) -> Counter[int]:
        """Make requests; return how many each process answered, by its id."""
        with ThreadPoolExecutor(at_once) as visitors:
            answers = visitors.map(lambda _: self.visit_once(), range(times))
        return Counter(pid for pid in answers if pid is not None)

    def visit_once(self) -> int | None:
        """Make a request; return the id of the process that answered, or None if none did."""
        text = self._ask("/")
        with self._lock:
            self.answered += text is not None
            self.failed += text is None
        return None if text is None else int(text)

    def visit_others(self, than: set[int]) -> None:
        """Make requests until the server has only processes that are not among some."""
        until(lambda: bool(than & {*self.visit(4), *self.descendants()}), False, 30)

    # ------------------------------------------------------------------------ the reader

    def scrape(self) -> str | None:
        """Read the metrics, and complain of what cannot be; None if nobody answered."""
        with self._lock:
            before = self.most
        text = self._ask("/metrics")
        if text is None:
            return None
        counted = total(text)
        observed = total(text, "flask_usage_request_duration_seconds_count")
        with self._lock:
            self.scrapes += 1
            self.most = max(self.most, counted)
            if counted < before:
                self.complaints.append(f"a scrape fell from {before:g} to {counted:g}")
            if counted != observed:
                self.complaints.append(f"counter {counted:g}, histogram {observed:g}")
        return text

    def assert_one_number(self, *, stored: bool = True, seconds: float = 15) -> None:
        """Wait until counter, histogram, rows and answers agree; whoever is asked says the same.

        Args:
            stored: Whether the rows can be written at all.
            seconds: How long it may take.
        """
        until(lambda: self._disagreement(stored), "", seconds)
        for _ in range(8):  # whoever answers
            assert not (told := self._disagreement(stored)), told
        assert not self.complaints, self.complaints[:5]

    def _disagreement(self, stored: bool) -> str:
        text = self.scrape()
        if text is None:
            return f"no answer: {self.log()[-1_000:]}"
        counted, rows = total(text), self.stored() if stored else None
        shared = total(text, "flask_usage_totals_shared")
        agrees = (
            self.answered <= counted <= self.answered + self.failed
            and shared == 1
            and rows in (counted, None)
        )
        answered = f"answered {self.answered} (+{self.failed})"
        return "" if agrees else f"{answered}, counted {counted:g}, {rows} rows, shared {shared:g}"

    def stored(self) -> int:
        """Return the number of rows in the default storage."""
        path = self.folder / "instance" / "usage.sqlite3"
        if not path.exists():
            return 0
        with suppress(sqlite3.OperationalError), closing(sqlite3.connect(path)) as storage:
            return int(storage.execute("SELECT count(*) FROM flask_usage").fetchone()[0])
        return -1

    def totals(self) -> list[Path]:
        """Return the files in which the workers share their totals."""
        return sorted((self.folder / "instance").glob("usage-state/*/g-*/totals.sqlite3"))

    def _read(self) -> None:
        while not self._stop.wait(0.05):
            self.scrape()

    def _ask(self, path: str) -> str | None:
        with suppress(*_GONE), closing(self._connection()) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            text = answer.read().decode()
            if answer.status == 200:
                return text
            if path == "/metrics" and answer.status != 503:  # of a proxy whose worker has gone
                self.complaints.append(f"a scrape was answered {answer.status}")
        return None

    def _connection(self) -> http.client.HTTPConnection:
        if self._where is None:
            return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        return _UnixConnection(self._where)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def total(text: str, name: str = "flask_usage_requests_total") -> float:
    """Return the sum of a metric's samples."""
    return sum(samples(text, name).values())
