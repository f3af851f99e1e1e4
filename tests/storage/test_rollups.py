"""Sums by hour and day are what the rows were, whatever is written, pruned or erased when."""

from __future__ import annotations

import itertools
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from helpers.examples import examples
from helpers.front_door import Site
from helpers.process import start_python, until
from helpers.records import UTC, make_record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flask_usage_metrics import UsageRecord
from flask_usage_metrics.pipeline.delivery import sink as delivery
from flask_usage_metrics.records.summary import Summary, summarize_records
from flask_usage_metrics.storage import Storage
from flask_usage_metrics.storage.jsonl import JSONLinesStorage
from flask_usage_metrics.storage.sql import SQLStorage
from flask_usage_metrics.storage.sql.rollup_tables import DIMENSIONS
from flask_usage_metrics.storage.sql.rollups import mark_dirty

pytest_plugins = ["helpers.databases"]

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
MONDAY = datetime(2026, 11, 16, tzinfo=UTC)
NOW = MONDAY + 5 * DAY + timedelta(minutes=30)
RANGES: list[tuple[datetime | None, datetime | None]] = [
    (None, None),
    (MONDAY + 5 * HOUR, MONDAY + 49 * HOUR),
    (MONDAY + 2 * DAY, None),
    (None, MONDAY + 2 * DAY + 7 * HOUR),
    (MONDAY + 2 * DAY, MONDAY + 2 * DAY + 3 * HOUR),
    (NOW + 40 * DAY, None),
]
HOURS = (0, 4, 5, 6, 9, 17, 23)
"""Of each day: with each edge of these ranges between two of them, or within one."""
UNEVEN = [(MONDAY + 17 * HOUR + timedelta(seconds=1234.5), MONDAY + 81.9 * HOUR)]
"""From and to within an hour: exact only where there are rows."""
CONDITIONS = {"status_class": "5xx", "country": ["NL", None]}
Question = tuple[Sequence[str], Any, dict[str, Any]]
"""Fields, period and conditions of a summary."""
TELLING: list[Question] = [
    ((), None, {}),
    (DIMENSIONS, "hour", {}),
    (DIMENSIONS, "day", {}),
    (("endpoint",), "month", CONDITIONS),
]
"""Summaries of both tables of sums, in total and one by one, that differ if any sum is wrong."""
BY_ENDPOINT: list[Question] = [(("endpoint",), every, {}) for every in (None, "hour", "day")]
ALL: list[Question] = [
    (fields, every, conditions)
    for fields in ((), ("endpoint",), DIMENSIONS)
    for every in (None, "hour", "day", "month")
    for conditions in (({}, CONDITIONS) if fields else ({},))
]
EVENTS = ["write", "write late", "maintain", "keep", "prune", "erase"]
_serial = itertools.count(1)


def visit(moment: datetime, rng: random.Random) -> UsageRecord:
    return make_record(
        started_at=moment,
        endpoint=rng.choice(["cart", "home", None]),
        method=rng.choice(["GET", "POST", "POST", "get", "BREW", "_OTHER"]),
        status=rng.choice([200, 200, 404, 500, 503]),
        country=rng.choice(["NL", "DE", None]),
        client=rng.choice(["human", "script"]),
        duration_seconds=rng.choice([0.001, 0.005, 0.07, 0.5, 3.0, 20.0]),
        bytes_sent=rng.choice([0, 10, 2**40]),
        username=rng.choice(["ann", "bob"]),
        visitor=rng.choice("abcdefg"),
        first_byte_seconds=rng.choice([None, None, 0.25, 2.0]),
    )


def visits(
    count: int, seed: int = 1, *, days: float = 5, hours: Sequence[int] = HOURS
) -> list[UsageRecord]:
    """Make records of these hours of the first days."""
    rng = random.Random(seed)
    starts = [number for number in range(int(24 * days)) if number % 24 in hours]
    return [
        visit(MONDAY + timedelta(seconds=3_600 * (rng.choice(starts) + rng.random())), rng)
        for _ in range(count)
    ]


def maintain(storage: SQLStorage, *, keep: timedelta | None = None, now: datetime = NOW) -> None:
    """Let it do all there is to do."""
    while storage.maintain(keep, now) < 1:
        pass


def assert_sums(
    storage: SQLStorage,
    records: Sequence[UsageRecord],
    ranges: Sequence[tuple[datetime | None, datetime | None]] = RANGES,
    questions: Sequence[Question] = TELLING,
) -> None:
    """Assert that summaries are those of these records."""
    for since, end in ranges:
        for fields, every, conditions in questions:
            wanted = storage.wanted(since, end, dict(conditions))
            expected = summarize_records(
                filter(wanted.matches, records), fields, every, storage.bounds
            )
            found = storage.summarize(fields, since, end, every=every, **conditions)
            assert plain(found) == plain(expected), (since, end, fields, every)


def plain(summaries: Sequence[Summary]) -> list[Any]:
    return [
        (
            one.start,
            one.group,
            one.requests,
            one.errors,
            one.bytes_sent,
            pytest.approx(one.duration_seconds_sum),
            one.streams,
            pytest.approx(one.first_byte_seconds_sum),
            one.p50,
            one.p95,
            one.p99,
        )
        for one in summaries
    ]


def rows(storage: SQLStorage, table: str, condition: str = "1 = 1") -> int:
    def count(connection: sa.Connection) -> int:
        statement = f"SELECT count(*) FROM {table} WHERE {condition}"
        return int(connection.exec_driver_sql(statement).scalar_one())

    return storage.database.run(count, create=False, absent=0)


@contextmanager
def storage_in(database: str, table_name: str = "flask_usage") -> Iterator[SQLStorage]:
    storage = SQLStorage.from_url(database, table_name=table_name)
    storage.is_of_app = True  # as `maintain` is called by a sink of an app
    yield storage
    storage.close()


@pytest.fixture
def storage(database: str) -> Iterator[SQLStorage]:
    with storage_in(database) as storage:
        yield storage


def test_they_are_what_the_rows_are(storage: SQLStorage) -> None:
    records = visits(600)
    storage.write(records)
    assert_sums(storage, records)
    assert not any(one.rolled_up for one in storage.summarize())
    maintain(storage)
    assert_sums(storage, records, [*RANGES, *UNEVEN], ALL)
    assert all(one.rolled_up for one in storage.summarize())
    assert not any(one.rolled_up for one in storage.summarize(("path",)))
    assert not any(one.rolled_up for one in storage.summarize(visitors=True))
    assert [one.visitors for one in storage.summarize((), visitors=True)] == [7]
    assert 100 <= rows(storage, "flask_usage_hourly") <= 600
    assert rows(storage, "flask_usage_daily") > 5


def test_they_stay_when_the_rows_are_pruned(storage: SQLStorage) -> None:
    records = visits(600)
    storage.write(records)
    pruned = storage.prune(MONDAY + 2 * DAY + timedelta(minutes=20))
    assert 200 < pruned < 280
    assert storage.count() == 600 - pruned
    assert_sums(storage, records)
    assert storage.prune(NOW + DAY) == 600 - pruned
    assert storage.count() == 0
    assert rows(storage, "flask_usage_hourly", "NOT frozen") == 0
    assert_sums(storage, records)
    maintain(storage)
    assert_sums(storage, records)


def test_methods_that_strangers_make_up_are_one(storage: SQLStorage) -> None:
    moment = MONDAY + timedelta(minutes=5)
    records = [make_record(started_at=moment, method=f"X{number}") for number in range(300)]
    records.append(make_record(started_at=moment))
    storage.write(records)
    maintain(storage)
    assert rows(storage, "flask_usage_hourly") == rows(storage, "flask_usage_daily") == 2
    assert_sums(storage, records)
    # Which they were is told by the rows.
    assert [summary.requests for summary in storage.summarize(method="X7")] == [1]
    assert [summary.group for summary in storage.summarize("method", method=["X7", "X8"])] == [
        {"method": "_OTHER"}
    ]
    assert storage.count(method="X7") == 1
    assert [one.requests for one in storage.summarize(method=["GET"])] == [1]
    maintain(storage, keep=DAY)
    assert storage.count() == 0
    by_method = {one.group["method"]: one.requests for one in storage.summarize("method")}
    assert by_method == {"_OTHER": 300, "GET": 1}


def test_sums_of_older_versions_that_kept_every_method_are_read(storage: SQLStorage) -> None:
    records = visits(200)
    storage.write(records)
    maintain(storage)
    before = rows(storage, "flask_usage_hourly")

    def as_before(connection: sa.Connection) -> None:
        for table in ("flask_usage_hourly", "flask_usage_daily"):
            statement = f"UPDATE {table} SET method = 'BREW' WHERE method = '_OTHER'"
            connection.exec_driver_sql(statement)

    storage.database.run(as_before, create=False, absent=None)
    assert rows(storage, "flask_usage_hourly", "method = 'BREW'") > 0
    assert_sums(storage, records)
    # Pruning subtracts from them, and a day is rolled up anew.
    storage.prune(MONDAY + 30 * HOUR)
    late = visit(MONDAY + 29 * HOUR, random.Random(5))
    storage.write([late])
    maintain(storage)
    assert_sums(storage, [*records, late], RANGES[:1])
    assert rows(storage, "flask_usage_hourly") <= 3 * before


def test_rows_that_come_late_are_in_them(storage: SQLStorage) -> None:
    records = visits(300)
    storage.write(records)
    maintain(storage, keep=3 * DAY)  # some hours have rows, some none any more
    assert 0 < storage.count() < 300
    late = visits(50, seed=2)
    storage.write(late)
    storage.write(late[:20])  # once more: nothing is counted twice
    assert_sums(storage, records + late)
    assert rows(storage, "flask_usage_upkeep", "what = 'late'") > 20
    maintain(storage)
    assert rows(storage, "flask_usage_upkeep", "what = 'late'") == 0
    assert_sums(storage, records + late)
    maintain(storage, keep=2 * DAY)
    assert_sums(storage, records + late)


@pytest.mark.parametrize(
    ("now", "marked"),
    [
        (MONDAY + timedelta(minutes=3), []),
        (MONDAY + timedelta(minutes=4), ["2026-11-15 23"]),
        (MONDAY + timedelta(minutes=59), ["2026-11-15 23"]),
        (MONDAY + HOUR + timedelta(minutes=4), ["2026-11-15 23", "2026-11-16 00"]),
    ],
)
def test_an_hour_is_marked_a_minute_before_it_could_be_rolled_up(
    storage: SQLStorage, now: datetime, marked: list[str]
) -> None:
    storage.migrate()
    second = timedelta(seconds=1)
    eastern = (MONDAY - second).astimezone(timezone(timedelta(hours=5, minutes=30)))
    moments = [MONDAY - second, eastern, MONDAY + second, now, now + second]

    def mark(connection: sa.Connection) -> list[str]:
        mark_dirty(storage._sums, connection, moments, now)
        found = connection.exec_driver_sql("SELECT note FROM flask_usage_upkeep ORDER BY note")
        return list(found.scalars())

    assert storage.database.run(mark, create=False, absent=[]) == marked


def test_rows_that_are_erased_are_not_in_them(storage: SQLStorage) -> None:
    records = visits(300)
    storage.write(records)
    maintain(storage)
    assert storage.erase(username="ann") > 100
    left = [record for record in records if record.username != "ann"]
    assert_sums(storage, left)
    maintain(storage)
    assert_sums(storage, left)


@pytest.mark.slow
@settings(
    max_examples=examples(12),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 10_000), events=st.lists(st.sampled_from(EVENTS), max_size=10))
def test_any_order_of_events_leaves_them_right(database: str, seed: int, events: list[str]) -> None:
    rng = random.Random(seed)
    with storage_in(database, f"usage_{next(_serial)}") as storage:
        now = MONDAY
        counted: list[UsageRecord] = []
        for event in events:
            now += rng.choice([timedelta(minutes=7), HOUR, 5 * HOUR, DAY])
            if event in ("write", "write late"):
                back = timedelta(minutes=5) if event == "write" else now - MONDAY
                batch = [visit(now - back * rng.random(), rng) for _ in range(rng.randint(1, 6))]
                storage.write(batch)
                counted += batch
            elif event == "maintain":
                maintain(storage, now=now)
            elif event == "keep":
                maintain(storage, keep=DAY, now=now)
            elif event == "prune":
                storage.prune(now - rng.choice([timedelta(), timedelta(minutes=20), 7 * HOUR, DAY]))
            else:
                gone = {record.id for record in storage.records(username="ann")}
                storage.erase(username="ann")
                counted = [record for record in counted if record.id not in gone]
            assert_sums(storage, counted, [(None, None)], BY_ENDPOINT)


def test_what_was_pruned_leaves_the_write_ahead_log_too(tmp_path: Path) -> None:
    with storage_in(f"sqlite:///{tmp_path}/usage.sqlite3") as storage:
        storage.write(visits(300))
        log = tmp_path / "usage.sqlite3-wal"
        maintain(storage)
        assert log.stat().st_size > 0
        maintain(storage, keep=DAY)
        assert log.stat().st_size == 0


def test_rows_whose_time_somebody_spelled_otherwise_are_pruned_too(tmp_path: Path) -> None:
    with storage_in(f"sqlite:///{tmp_path}/usage.sqlite3") as storage:
        storage.write(visits(5))

        def insert(connection: sa.Connection) -> None:
            for moment in ("2018-01-01", "2018-01-01 10:00:00", "2018-01-01T10:00:00"):
                connection.exec_driver_sql(
                    "INSERT INTO flask_usage (datetime) VALUES (?)", (moment,)
                )

        storage.database.run(insert, create=True, absent=None)
        maintain(storage)
        assert storage.prune(MONDAY - DAY) == 3
        assert storage.count() == 5


# ------------------------------------------------------------------------ buckets


def test_sums_by_other_bounds_are_read_by_the_bounds_of_now(storage: SQLStorage) -> None:
    storage.bounds = (0.01, 0.1, 1.0)
    storage.write([make_record(started_at=MONDAY, duration_seconds=s) for s in (0.05, 0.05, 0.5)])
    maintain(storage)
    storage.bounds = (0.1, 0.2, 2.0)
    storage.write([make_record(started_at=MONDAY + HOUR, duration_seconds=0.15)])
    maintain(storage)
    [one] = storage.summarize(())
    assert one.requests == 4
    # 2 at most 0.1, 1 at most 0.2; of the 0.5 it is only known that it was at most 1.
    assert (one.p50, one.p95) == (0.1, pytest.approx(0.2 + 1.8 * 0.8))


def test_there_may_be_more_bounds_than_columns(storage: SQLStorage) -> None:
    storage.bounds = [number / 100 for number in range(1, 101)]
    storage.write(
        [make_record(started_at=MONDAY, duration_seconds=n / 1000) for n in range(1, 1001)]
    )
    [exact] = storage.summarize(())
    maintain(storage)
    [one] = storage.summarize(())
    assert one.rolled_up
    assert not exact.rolled_up
    for name in ("p50", "p95", "p99"):
        assert getattr(one, name) == pytest.approx(getattr(exact, name), abs=0.05)


# ------------------------------------------------------------------------ several at once


def test_whoever_reads_meanwhile_sees_every_request_once(database: str) -> None:
    records = visits(1_000, days=2)
    with storage_in(database) as storage, storage_in(database) as reader:
        storage.write(records)
        done = threading.Event()

        def keep_up() -> None:
            maintain(storage)
            maintain(storage, keep=4 * DAY)
            storage.prune(NOW)
            done.set()

        thread = threading.Thread(target=keep_up)
        thread.start()
        seen = []
        while not done.is_set():
            seen += [one.requests for one in reader.summarize(())]
        thread.join()
    assert len(seen) > 3
    assert set(seen) == {1_000}


def test_several_may_tend_and_write_late_at_once(database: str) -> None:
    records = visits(400)
    late = [visits(40, seed=seed) for seed in range(2, 8)]

    def work(batches: Sequence[Sequence[UsageRecord]]) -> None:
        with storage_in(database) as own:
            for batch in batches:
                for number in range(0, len(batch), 10):
                    own.write(batch[number : number + 10])
                    own.maintain(3 * DAY, NOW)

    with storage_in(database) as storage:
        storage.write(records)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(work, [late[:2], late[2:4], late[4:]]))
        everything = [*records, *itertools.chain(*late)]
        assert_sums(storage, everything, [(None, None)])
        maintain(storage, keep=3 * DAY)
        assert_sums(storage, everything, [(None, None)])
        assert storage.count(until=NOW - 3 * DAY) == 0


def test_a_row_that_is_written_while_its_hour_is_pruned_is_counted(database: str) -> None:
    hour = [make_record(started_at=MONDAY + timedelta(minutes=n)) for n in range(60)]
    late = make_record(started_at=MONDAY + timedelta(minutes=30, seconds=30))
    with storage_in(database) as storage, storage_in(database) as other:
        storage.write(hour)
        maintain(storage)
        engine = storage.database.reach().engine
        # Where the database has the writer wait, that is until all is pruned.
        writer = threading.Thread(target=other.write, args=([late],))

        @sa.event.listens_for(engine, "before_cursor_execute")
        def write_late(_: Any, __: Any, statement: str, *___: Any) -> None:
            if statement.startswith("DELETE FROM flask_usage ") and writer.ident is None:
                writer.start()
                writer.join(0.5)

        assert storage.prune(MONDAY + HOUR) in (60, 61)
        writer.join()
        assert_sums(storage, [*hour, late], [(None, None)])
        maintain(storage)
        assert_sums(storage, [*hour, late], [(None, None)])


def test_one_at_a_time_tends_and_the_others_do_not_wait(database: str) -> None:
    with storage_in(database) as storage, storage_in(database) as other:
        storage.write(visits(50))
        storage.maintain(None, NOW)
        dialect = other.database.reach()
        with (
            dialect.engine.connect() as connection,
            dialect.lock(connection, storage._sums.upkeep.name),
        ):
            before = time.monotonic()
            assert storage.maintain(DAY, NOW) >= 10
            assert time.monotonic() - before < 4  # others wait for 5 s
        assert storage.maintain(DAY, NOW) < 1


KILLED = """
import sys
from datetime import datetime, timedelta, timezone
from flask_usage_metrics.storage.sql import SQLStorage

storage = SQLStorage.from_url(sys.argv[1])
now = datetime.fromisoformat(sys.argv[2])
print("ready", flush=True)
while storage.maintain(timedelta(days=4), now) < 1:
    pass
print("done", flush=True)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_them_right(database: str) -> None:
    records = visits(400, days=2.5, hours=range(24))
    with storage_in(database) as storage:
        storage.write(records)
        rng = random.Random(5)
        said = ""
        kills = 0
        while "done" not in said:
            with start_python(KILLED, database, NOW.isoformat()) as process:
                assert process.stdout is not None
                said = process.line()
                try:
                    process.wait(rng.uniform(0.005, 0.2) if kills < 8 else 60)
                except subprocess.TimeoutExpired:
                    kills += 1
                    process.kill()
                said += process.stdout.read()
            assert_sums(storage, records, [(None, None)], BY_ENDPOINT)
        assert kills > 2
        assert 0 < storage.count() < 300


# ------------------------------------------------------------------------ in an app


@pytest.mark.slow
def test_an_app_keeps_its_records_so_long_and_their_sums_for_ever(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "MAINTAIN_SECONDS", 0.1)
    site = make_site(RETENTION_DAYS=1.5)
    site.app.add_url_rule("/", "index", lambda: "x")
    storage = site.usage.storage
    today = datetime.now(UTC)
    storage.write([make_record(started_at=today - n * HOUR, endpoint="old") for n in range(72)])
    site.get()
    assert site.usage.flush()
    until(lambda: storage.count(endpoint="old"), 36, 30)
    [old, new] = storage.summarize()
    assert (old.group, old.requests, old.rolled_up) == ({"endpoint": "old"}, 72, True)
    assert (new.group, new.requests) == ({"endpoint": "index"}, 1)
    assert sum(one.requests for one in storage.summarize((), every="day")) == 73
    assert site.faults() == {}


def test_a_storage_that_cannot_be_tended_is_none_of_a_visitors_business(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "MAINTAIN_SECONDS", 0.0)

    class Simple(Storage):
        def write(self, batch: Sequence[UsageRecord]) -> None:
            kept.extend(batch)

    kept: list[UsageRecord] = []
    site = make_site(Simple(), RETENTION_DAYS=1)
    for _ in range(3):
        assert site.get("/nowhere").status_code == 404
    assert site.usage.flush()
    assert len(kept) == 3
    until(lambda: site.faults().get("sink simple", 0) > 0, True)
    assert site.account("simple")["written"] == 3


def test_records_in_a_file_are_kept_so_long_too(
    make_site: Callable[..., Site], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "MAINTAIN_SECONDS", 0.1)
    site = make_site(f"jsonl:///{tmp_path}/usage.jsonl", RETENTION_DAYS=2)
    storage = site.usage.storage
    today = datetime.now(UTC)
    storage.write([make_record(started_at=today - n * DAY) for n in range(5)])
    site.get("/nowhere")
    until(lambda: site.usage.flush() and storage.count(), 3)


def test_nothing_is_pruned_where_nothing_is_old(tmp_path: Path) -> None:
    class Watched(JSONLinesStorage):
        def prune(self, before: datetime) -> int:
            pruned.append(before)
            return super().prune(before)

    pruned: list[datetime] = []
    storage = Watched(tmp_path / "usage.jsonl")
    storage.write(visits(5))
    assert storage.maintain(6 * DAY, NOW) == storage.maintain(DAY, MONDAY) == 3600
    assert pruned == []
    assert storage.maintain(DAY, NOW) == 3600
    assert pruned == [NOW - DAY]
    storage.close()


def test_a_storage_that_was_closed_is_left_alone_until_there_are_records_again(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "MAINTAIN_SECONDS", 0.0)

    class Tended(Storage):
        def write(self, batch: Sequence[UsageRecord]) -> None:
            pass

        def maintain(self, keep: timedelta | None, now: datetime) -> float:
            calls.append(keep)
            return 0.01

    calls: list[timedelta | None] = []
    site = make_site(Tended(), RETENTION_DAYS=2)
    site.get("/nowhere")
    until(lambda: len(calls) > 3, True)
    assert set(calls) == {2 * DAY}
    site.close()

    def is_left_alone() -> bool:
        before = len(calls)
        time.sleep(0.3)  # 30 calls, else
        return len(calls) == before

    until(is_left_alone, True)
    before = len(calls)
    site.get("/nowhere")
    until(lambda: len(calls) > before, True)
