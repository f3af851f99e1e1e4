"""What reading costs as a table grows: pages, sums, scans, counts; and upkeep: hours, pruning.

Rows of ten days, in SQLite, PostgreSQL and MariaDB, the servers with their default settings. What
shall not grow with the table is a page; what grows with the rows it reads is a scan. Sums by hour
and day make a summary grow with its groups only, so each summary is told twice: from the rows, and
from the sums that upkeep makes of them. Medians, of the wall clock.

    python -m tests.benchmarks reads
    python -m tests.benchmarks.reads --largest    # ten million rows, in SQLite only: ten minutes
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from statistics import median

import sqlalchemy as sa

# The tests' own servers and records, which find each other by their bare names.
sys.path.insert(0, str(Path(__file__).parent.parent))

from flask_usage_metrics.storage.sql import SQLStorage
from flask_usage_metrics.storage.sql.table import COLUMN_NAMES

from .ingest import AT_ONCE, make_batch, started
from .report import Figure, table

START = datetime(2026, 11, 1, tzinfo=timezone.utc)
DAYS = 10
NOW = START + timedelta(days=DAYS, minutes=10)
LAST_DAY = {"since": START + timedelta(days=DAYS - 1), "until": START + timedelta(days=DAYS)}
MIDDLE = START + timedelta(days=DAYS / 2)
BY = ("endpoint", "status", "country")
LARGEST = 10_000_000
COPIES = 10
"""Of so many times fewer rows the largest table is made, in the database: writing takes longer."""


def measure(quick: bool) -> list[Figure]:
    """Return what each way of reading costs, by database and size."""
    sizes = (100,) if quick else (10_000, 100_000, 1_000_000)
    return of_databases(("SQLite", "PostgreSQL", "MariaDB"), sizes)


def of_databases(kinds: Sequence[str], sizes: Sequence[int]) -> list[Figure]:
    figures = []
    for kind in kinds:
        with databases(kind) as new_database:
            for size in sizes:
                with new_database(size) as storage:
                    fill(storage, size)
                    figures += of_storage(storage, f"ours, {kind}", size)
    order = {name: place for place, name in enumerate(dict.fromkeys(one.what for one in figures))}
    return sorted(figures, key=lambda one: order[one.what])


@contextmanager
def databases(kind: str) -> Iterator[Callable[[int], closing[SQLStorage]]]:
    """Have a database; yields what opens a new table in it, for so many rows."""
    if kind == "SQLite":
        with tempfile.TemporaryDirectory() as folder:
            yield lambda size: closing(SQLStorage.from_url(f"sqlite:///{folder}/{size}.sqlite3"))
        return
    with started(kind, "reads") as server:
        yield lambda size: closing(SQLStorage.from_url(server.url, table_name=f"usage_{size}"))


def fill(storage: SQLStorage, size: int) -> None:
    """Write rows that are spread evenly over the days."""
    step = timedelta(days=DAYS) / size
    written = size // COPIES if size >= LARGEST else size
    if written < size:
        step *= COPIES
    for start in range(0, written, AT_ONCE):
        count = min(AT_ONCE, written - start)
        storage.write(make_batch(count, START + start * step, step))
    if written < size:
        copy_rows(storage, COPIES, step)


def copy_rows(storage: SQLStorage, copies: int, step: timedelta) -> None:
    """Copy each row of a SQLite table, with times and ids of its own, into the gap behind it."""
    changed = {
        "datetime": "strftime('%Y-%m-%d %H:%M:%f', datetime, ? || ' seconds') || '000'",
        "record_id": "substr(record_id, 1, 15) || ? || substr(record_id, 17)",
    }
    selected = ", ".join(changed.get(name, name) for name in COLUMN_NAMES)
    statement = (
        f"INSERT INTO flask_usage ({', '.join(COLUMN_NAMES)}) "
        f"SELECT {selected} FROM flask_usage WHERE id <= ?"
    )
    engine = storage.database.reach().engine
    with engine.connect() as connection:
        last = connection.execute(sa.text("SELECT max(id) FROM flask_usage")).scalar_one()
    for copy in range(1, copies):
        later = copy * step.total_seconds() / copies
        with engine.begin() as connection:
            connection.exec_driver_sql(statement, (f"{later:.3f}", f"{copy:x}", last))


def of_storage(storage: SQLStorage, who: str, size: int) -> Iterator[Figure]:
    """Measure one table, which is pruned in the end."""

    def figure(what: str, value: float, unit: str = "ms") -> Figure:
        return Figure(what, who, value, unit, size)

    yield figure("page of 100, in the middle", ms(lambda: list(storage.records(MIDDLE, limit=100))))
    yield figure("count of all", ms(storage.count, 3))
    yield figure("scan of all, a record", seconds(lambda: scan(storage), 1) / size * 1e6, "µs")
    yield figure("peak of Python's memory in a scan of a day", peak(storage), "MB")
    groups = storage.summarize(BY, **LAST_DAY)
    of_all = storage.summarize()
    if groups[0].rolled_up or of_all[0].rolled_up:
        raise SystemExit("reads: there were sums before there was any upkeep")
    a_day, top = "a day by endpoint, status, country", "all by endpoint"
    yield figure(f"{a_day}, from rows", ms(lambda: storage.summarize(BY, **LAST_DAY), 3))
    yield figure(f"{top}, from rows", ms(storage.summarize, 3))
    yield figure("an hour rolled up", roll_up(storage))
    rolled = storage.summarize(BY, **LAST_DAY)
    if not rolled[0].rolled_up or [(one.group, one.requests) for one in rolled] != [
        (one.group, one.requests) for one in groups
    ]:
        raise SystemExit("reads: the sums are not those of the rows")
    yield figure(f"{a_day}, from sums", ms(lambda: storage.summarize(BY, **LAST_DAY)))
    yield figure(f"{top}, from sums", ms(storage.summarize))
    yield figure("all by day, from sums", ms(lambda: storage.summarize((), every="day")))
    start = time.perf_counter()
    pruned = storage.prune(START + timedelta(days=1))
    took = time.perf_counter() - start
    if pruned != size // DAYS:
        raise SystemExit(f"reads: {pruned} rows were pruned")
    yield figure("a day pruned", took * 1e3)


def scan(storage: SQLStorage, since: datetime | None = None, until: datetime | None = None) -> None:
    deque(storage.records(since, until), maxlen=0)


def peak(storage: SQLStorage) -> float:
    """Return the most memory that Python had for reading a day's records one by one, in MB."""
    tracemalloc.start()
    scan(storage, MIDDLE, MIDDLE + timedelta(days=1))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most / 1e6


def roll_up(storage: SQLStorage) -> float:
    """Do all upkeep that is due, and return the median milliseconds of an hour."""
    steps = []
    pause = 0.0
    while pause < 1:
        start = time.perf_counter()
        pause = storage.maintain(None, NOW)
        steps.append(time.perf_counter() - start)
    return median(steps) * 1e3


def ms(work: Callable[[], object], times: int = 9) -> float:
    return seconds(work, times) * 1e3


def seconds(work: Callable[[], object], times: int) -> float:
    """Return the median seconds of some calls."""
    took = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return median(took)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.reads",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--largest", action="store_true", help=f"{LARGEST:,} rows, in SQLite")
    given = parser.parse_args()
    if given.largest:
        print(table(of_databases(("SQLite",), (LARGEST // 10, LARGEST))))
    else:
        print(table(measure(quick=False)))


if __name__ == "__main__":
    main()
