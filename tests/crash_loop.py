"""Kill gunicorn workers at random under load, and check every number; run by hand.

    python tests/crash_loop.py --kills 200
    python tests/crash_loop.py --kills 50 --servers 3

Within one server's life: answered <= counted <= answered + failed, no counter ever falls, every
scrape that is answered is a 200. Over all lives: answered <= stored <= answered + failed. (What a
server that is killed as a whole had counted last is hard to know: that is left to the records.)
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import requests
from helpers.front_door import samples
from helpers.servers import Gunicorn

OPTIONS = ("-w", "4", "--threads", "2", "--graceful-timeout", "10")
COUNTERS = (
    "flask_usage_requests_total",
    "flask_usage_request_duration_seconds_count",
    "flask_usage_response_bytes_total",
    "flask_usage_client_requests_total",
)


class Life:
    """What visitors and a reader saw of one server."""

    def __init__(self, server: Gunicorn) -> None:
        self.server = server
        self.answered = self.failed = self.scrapes = 0
        self.complaints: list[str] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._last: dict[object, float] = {}

    @contextmanager
    def load(self, visitors: int) -> Iterator[None]:
        threads = [threading.Thread(target=self._visit) for _ in range(visitors)]
        threads.append(threading.Thread(target=self._read))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _visit(self) -> None:
        session = requests.Session()
        while not self._stop.is_set():
            try:
                ok = session.get(self.server.address + "/pid", timeout=20).status_code == 200
            except requests.RequestException:
                ok = False
            with self._lock:
                self.answered += ok
                self.failed += not ok
            if not ok:
                time.sleep(0.01)

    def _read(self) -> None:
        while not self._stop.is_set():
            with suppress(requests.RequestException):
                self.scrape()
            time.sleep(0.02)

    def scrape(self) -> float:
        """Return how many requests are counted, and complain of what has fallen."""
        response = requests.get(self.server.address + "/metrics", timeout=20)
        self.scrapes += 1
        if response.status_code != 200:
            self.complaints.append(f"a scrape was answered with {response.status_code}")
            return 0.0
        for name in COUNTERS:
            found = samples(response.text, name)
            for labels, value in found.items():
                if value < self._last.get((name, labels), 0):
                    last = self._last[name, labels]
                    self.complaints.append(f"{name} fell from {last:g} to {value:g}")
                self._last[name, labels] = value
            for key in self._last:
                if key[0] == name and key[1] not in found:  # type: ignore[index]
                    self.complaints.append(f"a series of {name} vanished")
        return sum(samples(response.text, COUNTERS[0]).values())

    def kill(self, rng: random.Random, everybody: bool) -> int:
        """Kill one worker or all; return how many."""
        workers = self.server.workers()
        victims = workers if everybody else rng.sample(workers, min(1, len(workers)))
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(victims)

    def final_count(self) -> float:
        """Wait until what is counted stands still and is enough; return it."""
        last, since = -1.0, time.monotonic()
        deadline = since + 20
        while time.monotonic() < deadline:
            with suppress(requests.RequestException):
                counted = self.scrape()
                if counted != last:
                    last, since = counted, time.monotonic()
            if time.monotonic() - since > 3 and last >= self.answered:
                break
            time.sleep(0.1)
        return last


def kill_all(server: Gunicorn) -> None:
    """End a server as a machine's out-of-memory killer might: the master first."""
    workers = server.workers()
    server.process.kill()
    server.process.wait()
    for pid in workers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    server.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="workers to kill, at least")
    parser.add_argument("--servers", type=int, default=0, help="whole servers to kill as well")
    parser.add_argument("--visitors", type=int, default=6, help="threads that make requests")
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    rng = random.Random(seed)
    complaints: list[str] = []
    answered = failed = kills = scrapes = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for life_number in range(options.servers + 1):
            is_last = life_number == options.servers
            server = Gunicorn(folder, *OPTIONS)
            try:
                life = Life(server)
                target = options.kills * (life_number + 1) // (options.servers + 1)
                with life.load(options.visitors):
                    time.sleep(2)  # each life has some of its own, however few the kills
                    while kills < target:
                        time.sleep(rng.uniform(0.02, 0.9))
                        kills += life.kill(rng, everybody=rng.random() < 0.1)
                    time.sleep(rng.uniform(0, 0.5))
                    if not is_last:
                        kill_all(server)
                before = answered + failed
                answered += life.answered
                failed += life.failed
                scrapes += life.scrapes
                if is_last:
                    counted = life.final_count()
                    # Also what earlier servers left uncounted is counted by this one.
                    most = life.answered + life.failed + before
                    if not life.answered <= counted <= most:
                        complaints.append(f"counted {counted:g} of {life.answered}..{most}")
                    print(f"last life: answered {life.answered}, failed {life.failed}")
                    print(f"counted {counted:g}")
                complaints += life.complaints
            finally:
                server.stop()
        stored = server.stored()
        if not answered <= stored <= answered + failed:
            complaints.append(f"stored {stored} of {answered}..{answered + failed}")
        if not options.servers and counted != stored:
            complaints.append(f"counted {counted:g}, but stored {stored}")
        for line in sorted(set(server.log().splitlines())):
            if "flask_usage" in line or "; " in line or "Traceback" in line:
                print("log:", line)
        left = [str(path.relative_to(folder)) for path in folder.glob("state/*/g-*/*.journal")]
    print(f"answered {answered}, failed {failed}, stored {stored}, scrapes {scrapes}")
    print(f"journals left: {len(left)}")
    print("; ".join(sorted(set(complaints))) if complaints else "every number is right", end=" ")
    print(f"(kills {kills}, whole servers {options.servers}, seed {seed})")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
