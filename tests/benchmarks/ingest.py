"""Rows a second into each storage, and what a row costs: beside an idle thread, and a busy one.

Written is what the product writes, batches of `delivery.BATCH_RECORDS`, into tables that hold some
rows already. SQLite is also written to by the sqlite3 module alone: the same values, made ready
before, into the same table by ``executemany``.

*Beside a busy thread* means that another thread computes in Python all the time. What becomes of
its own pace is told as well. Of servers, also what a row costs their processes. Medians; a batch
of one storage and a batch of the next take turns in each round.

    python -m tests.benchmarks ingest
"""

from __future__ import annotations

import itertools
import os
import random
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from statistics import median

import msgspec
import pytest
from helpers import databases
from helpers.records import make_record

from flask_usage_metrics.pipeline.delivery.retries import BATCH_RECORDS
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.storage import open_storage
from flask_usage_metrics.storage.sql.table import COLUMN_NAMES, to_columns

from .report import Figure
from .variants import USER_AGENTS

FLOOR = "sqlite3.executemany"
SERVERS = {"PostgreSQL": databases.PostgreSQL, "MariaDB": databases.MariaDB}
AT_ONCE = 4096
"""Records of a write that only fills a table."""

ALONE_SECONDS = 0.3
"""How long the busy thread computes before anything is written, to know its own pace."""

LONGEST_SECONDS = 3.0
"""How long is written beside it at most."""

_serial = itertools.count(1)


def measure(quick: bool, sizes: Sequence[int] = (100_000, 1_000_000)) -> list[Figure]:
    """Return rows a second, CPU a row, and the pace of a busy thread, by storage and size."""
    sizes = (500,) if quick else sizes
    batches, rounds = (2, 1) if quick else (16, 5)
    figures = []
    for size in sizes:
        with ExitStack() as stack:
            contenders = [stack.enter_context(sink(size)) for sink in SINKS]
            for _ in range(rounds):
                for contender in contenders:
                    contender.measure(batches)
                for contender in contenders:
                    contender.measure_beside_busy(batches)
            figures += [figure for contender in contenders for figure in contender.figures(size)]
    # By what was measured, then by who, then by size.
    order = {name: place for place, name in enumerate(dict.fromkeys(one.what for one in figures))}
    who = [contender.who for contender in contenders]
    return sorted(figures, key=lambda one: (order[one.what], who.index(one.who), one.size))


@dataclass
class Contender:
    """A storage, or what it is compared with, and what was measured of it.

    Attributes:
        who: Its name in the table.
        prepare: Makes what `write` takes, outside of what is measured.
        write: Writes a batch.
        pid: Of the server.
    """

    who: str
    prepare: Callable[[list[UsageRecord]], object]
    write: Callable[[object], object]
    pid: int | None = None
    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    server_cpu: list[float] = field(default_factory=list)
    busy_rates: list[float] = field(default_factory=list)
    busy_paces: list[float] = field(default_factory=list)

    def measure(self, batches: int) -> None:
        """Write some batches."""
        prepared = self._batches(batches)
        served = cpu_of(self.pid) if self.pid else 0.0
        cpu, wall = time.thread_time(), time.perf_counter()
        for batch in prepared:
            self.write(batch)
        wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
        rows = batches * BATCH_RECORDS
        self.rates.append(rows / wall)
        self.cpu.append(cpu / rows)
        if self.pid:
            self.server_cpu.append((cpu_of(self.pid) - served) / rows)

    def measure_beside_busy(self, batches: int) -> None:
        """Write some batches while another thread computes."""
        prepared = self._batches(batches)
        with Busy() as busy:
            before, start = busy.turns, time.perf_counter()
            time.sleep(ALONE_SECONDS)
            alone = (busy.turns - before) / (time.perf_counter() - start)
            before, start = busy.turns, time.perf_counter()
            written, took = 0, 0.0
            while written < len(prepared) and took < LONGEST_SECONDS:
                self.write(prepared[written])
                written += 1
                took = time.perf_counter() - start
            beside = (busy.turns - before) / took
        self.busy_rates.append(written * BATCH_RECORDS / took)
        self.busy_paces.append(beside / alone)

    def figures(self, size: int) -> Iterator[Figure]:
        is_sqlite = self.who in (FLOOR, "ours, SQLite")
        against = FLOOR if is_sqlite else None
        aim = ">= 80,000 rows/s" if self.who == "ours, SQLite" else ""
        yield self._figure("rows written", self.rates, "rows/s", size, aim=aim)
        yield self._figure("CPU a row written", self.cpu, "µs", size, against)
        if self.server_cpu:
            yield self._figure("CPU of the server a row", self.server_cpu, "µs", size)
        busy = "rows written beside a busy thread"
        yield self._figure(busy, self.busy_rates, "rows/s", size, against)
        yield self._figure("pace of the busy thread, of its own alone", self.busy_paces, "%", size)

    def _figure(
        self,
        what: str,
        values: list[float],
        unit: str,
        size: int,
        against: str | None = None,
        aim: str = "",
    ) -> Figure:
        value = median(values) * {"µs": 1e6, "%": 100}.get(unit, 1)
        return Figure(what, self.who, value, unit, size, against, aim)

    def _batches(self, count: int) -> list[object]:
        return [self.prepare(make_batch(BATCH_RECORDS)) for _ in range(count)]


class Busy:
    """Another thread, which computes in Python all the time.

    Attributes:
        turns: How far it came.
    """

    def __init__(self) -> None:
        self.turns = 0
        self._is_over = False
        self._thread = threading.Thread(target=self._compute, daemon=True)

    def __enter__(self) -> Busy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._thread.join()

    def _compute(self) -> None:
        while not self._is_over:
            sum(range(100))
            self.turns += 1


# -- who is compared ----------------------------------------------------------------------------


@contextmanager
def to_sqlite(size: int) -> Iterator[Contender]:
    with (
        tempfile.TemporaryDirectory() as folder,
        ours("ours, SQLite", f"sqlite:///{folder}/usage.sqlite3", size) as contender,
    ):
        yield contender


@contextmanager
def to_sqlite_bare(size: int) -> Iterator[Contender]:
    """Into the table that we made, by the sqlite3 module."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "usage.sqlite3")
        with ours(FLOOR, f"sqlite:///{file}", size):
            pass
        # Columns without any value are left out, which ours does as well.
        named = [column[0] is not None for column in to_columns(make_batch(1))]
        names = list(itertools.compress(COLUMN_NAMES, named))
        statement = (
            f"INSERT INTO flask_usage ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
            " ON CONFLICT DO NOTHING"
        )

        def prepare(batch: list[UsageRecord]) -> object:
            return list(zip(*itertools.compress(to_columns(batch), named), strict=True))

        def write(rows: object) -> None:
            connection.executemany(statement, rows)  # type: ignore[arg-type]
            connection.commit()

        with closing(sqlite3.connect(file)) as connection:
            connection.execute("PRAGMA synchronous=NORMAL").close()
            yield Contender(FLOOR, prepare, write)


@contextmanager
def to_server(kind: str, size: int) -> Iterator[Contender]:
    with started(kind, "ingest") as server, ours(f"ours, {kind}", server.url, size) as contender:
        contender.pid = server.pid
        yield contender


@contextmanager
def to_json_lines(size: int) -> Iterator[Contender]:
    with (
        tempfile.TemporaryDirectory() as folder,
        ours("ours, JSON lines", f"jsonl:///{folder}/usage.jsonl", size) as contender,
    ):
        yield contender


SINKS: tuple[Callable[[int], object], ...] = (
    to_sqlite,
    to_sqlite_bare,
    lambda size: to_server("PostgreSQL", size),
    lambda size: to_server("MariaDB", size),
    to_json_lines,
)


@contextmanager
def ours(who: str, url: str, size: int) -> Iterator[Contender]:
    """Open a storage of ours that has so many rows."""
    with closing(open_storage(url)) as storage:
        for start in range(0, size, AT_ONCE):
            storage.write(make_batch(min(AT_ONCE, size - start)))
        # What is compiled for the first batch is not for each.
        storage.write(make_batch(BATCH_RECORDS))
        yield Contender(who, list, storage.write)  # type: ignore[arg-type]


@contextmanager
def started(kind: str, part: str) -> Iterator[databases.Server]:
    """Start a database server.

    Raises:
        SystemExit: It is not installed.
    """
    try:
        server = SERVERS[kind]()
    except (pytest.skip.Exception, pytest.fail.Exception):
        package = {"PostgreSQL": "postgresql", "MariaDB": "mariadb-server"}[kind]
        raise SystemExit(f"{part}: {kind} is missing (apt install {package})") from None
    with closing(server):
        yield server


def cpu_of(pid: int) -> float:
    """Return the CPU seconds of a process and its children so far."""
    ticks = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            numbers = (folder / "stat").read_text().rpartition(")")[2].split()
            if pid in (int(folder.name), int(numbers[1])):
                ticks += int(numbers[11]) + int(numbers[12])
    return ticks / os.sysconf("SC_CLK_TCK")


# -- what is written ----------------------------------------------------------------------------


def make_batch(
    count: int, started_at: datetime | None = None, step: timedelta = timedelta(microseconds=1)
) -> list[UsageRecord]:
    """Return records of visits that differ as those of a shop do.

    Args:
        count: How many.
        started_at: When the first one was; None: now.
        step: Time from one to the next.
    """
    first = started_at or datetime.now(timezone.utc)
    usual = make_record()
    records = []
    for number in range(count):
        serial = next(_serial)
        page = _random.randrange(200)
        client = _random.randrange(500)
        status = _random.choice((200, 200, 200, 200, 302, 404, 500))
        agent = _random.randrange(len(USER_AGENTS))
        records.append(
            msgspec.structs.replace(
                usual,
                id=f"019aa5c0-0000-7000-8000-{serial:012x}",
                started_at=first + number * step,
                duration_seconds=_random.expovariate(20),
                path=f"/shop/{page}",
                query=f"page={page % 7}" if page % 3 else "",
                endpoint=f"endpoint{page % 12}",
                rule=f"/shop/<int:page{page % 12}>",
                view_args={"page": page},
                status=status,
                bytes_sent=_random.randrange(100_000),
                remote_addr=f"203.0.{client // 250}.{client % 250}",
                country=_random.choice(COUNTRIES),
                user_agent=USER_AGENTS[agent],
                browser_version=str(120 + agent),
                referrer="https://shop.example/" if client % 2 else None,
            )
        )
    return records


COUNTRIES = ("NL", "DE", "US", "FR", "GB", "IN", "JP", "BR", "ES", None)
_random = random.Random(1)
