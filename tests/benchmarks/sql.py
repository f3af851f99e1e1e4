"""What a SQL database costs with many rows: python tests/benchmarks/sql.py sqlite [1000000].

Rows of ten days are written, summarized from rows, rolled up, and summarized from the sums; pages
are read, days scanned and pruned. The database is a file, or a server that is started for it:
postgresql or mariadb. Times are medians; compare them only inside one run.
"""

from __future__ import annotations

import random
import sys
import time
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import msgspec

sys.path.insert(0, str(Path(__file__).parent.parent))
import sql_servers
from records import make_record

from flask_usage_metrics.storage.sql import SQLStorage

START = datetime(2026, 11, 1, tzinfo=timezone.utc)
DAYS = 10
NOW = START + timedelta(days=DAYS, minutes=10)
LAST_DAY = {"since": START + timedelta(days=DAYS - 1), "until": START + timedelta(days=DAYS)}
MIDDLE = START + timedelta(days=DAYS / 2)
BY = ("endpoint", "status", "country")


def main(kind: str, count: int) -> None:
    if kind == "sqlite":
        with TemporaryDirectory() as folder:
            measure(f"sqlite:///{folder}/usage.sqlite3", count)
        return
    server = {"postgresql": sql_servers.PostgreSQL, "mariadb": sql_servers.MariaDB}[kind]()
    with closing(server):
        measure(server.url, count)


def measure(url: str, count: int) -> None:
    with closing(SQLStorage.from_url(url)) as storage:
        write(storage, count)
        groups = storage.summarize(BY, **LAST_DAY)
        assert not groups[0].rolled_up
        say(
            f"a day in {len(groups)} groups, from rows",
            took(lambda: storage.summarize(BY, **LAST_DAY), 3),
        )
        roll_up(storage)
        rolled = storage.summarize(BY, **LAST_DAY)
        assert rolled[0].rolled_up
        assert [(one.group, one.requests) for one in rolled] == [
            (one.group, one.requests) for one in groups
        ]
        say("the same, from sums", took(lambda: storage.summarize(BY, **LAST_DAY)))
        say("all by day, from sums", took(lambda: storage.summarize((), every="day")))
        say("a page of 100, in the middle", took(lambda: list(storage.records(MIDDLE, limit=100))))
        tracemalloc.start()
        scanned = sum(1 for _ in storage.records(MIDDLE, MIDDLE + timedelta(days=2)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        print(f"a scan of {scanned:,} records: at most {peak / 1e6:.1f} MB of Python's memory")
        before = time.perf_counter()
        pruned = storage.prune(START + timedelta(days=1))
        say(f"{pruned:,} records pruned", time.perf_counter() - before)


def write(storage: SQLStorage, count: int) -> None:
    rng = random.Random(1)
    endpoints = [f"endpoint{number}" for number in range(12)]
    countries = ["NL", "DE", "US", "FR", "GB", "IN", "JP", "BR", "ES", None]
    usual = make_record()
    spent = 0.0
    for start in range(0, count, 1_000):
        batch = [
            msgspec.structs.replace(
                usual,
                id=f"019aa5c0-0000-7000-8000-{number:012x}",
                started_at=START + timedelta(days=DAYS * number / count),
                endpoint=rng.choice(endpoints),
                country=rng.choice(countries),
                status=rng.choice((200, 200, 200, 200, 302, 404, 500)),
                duration_seconds=rng.expovariate(20),
            )
            for number in range(start, min(start + 1_000, count))
        ]
        before = time.process_time()
        storage.write(batch)
        spent += time.process_time() - before
    print(f"{count:,} records written: {spent / count * 1e6:.1f} µs of CPU each")


def roll_up(storage: SQLStorage) -> None:
    steps = []
    seconds = 0.0
    while seconds < 1:
        before = time.perf_counter()
        seconds = storage.tend(None, NOW)
        steps.append(time.perf_counter() - before)
    say(f"an hour rolled up, of {len(steps)} steps", median(steps))


def took(work: Callable[[], object], times: int = 9) -> float:
    """Return the median seconds of some calls."""
    seconds = []
    for _ in range(times):
        before = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - before)
    return median(seconds)


def say(what: str, seconds: float) -> None:
    print(f"{what}: {seconds * 1e3:.1f} ms")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000)
