"""What every readable storage promises; a test class of a backend inherits it."""

from __future__ import annotations

import threading
import tracemalloc
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from helpers.examples import examples
from helpers.records import START, UTC, make_record, make_records
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flask_usage_metrics.records.address import normalise
from flask_usage_metrics.records.query import (
    EQUALITY_FILTERS,
    GROUP_FIELDS,
    Filter,
    as_utc,
    next_start,
    truncate,
)
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.records.summary import BUCKETS, Summary, summarize_records
from flask_usage_metrics.storage import Storage
from flask_usage_metrics.storage.compat import as_dict
from flask_usage_metrics.summarization import (
    SUMMATIONS,
    Summation,
    find_summation,
    sumVisitor,
)

SECOND = timedelta(seconds=1)
END_OF_TIME = datetime.max.replace(tzinfo=UTC)
# The storage is emptied by each example itself, and each backend is an "executor".
SUPPRESSED = [
    HealthCheck.function_scoped_fixture,
    HealthCheck.differing_executors,
    HealthCheck.too_slow,
]
HOSTILE = [
    "emoji 🦊 and äöü ß 漢字",
    'it\'s "quoted" `so`',
    "%s %(x)s %% :x ?1 $1 @p {0} {x}",
    "back\\slash \\u0000 \\' \\x00",
    "'); DROP TABLE flask_usage; --",
    "line\nfeed\rreturn\ttab \x01\x1f\x7f\x85\u2028\ufeff\uffff",
    "x" * 100_000,
    "",
    " ",
    "null",
    "NULL",
    "123",
    "1e5",
]


KEYS_OF_FLASK_TRACK_USAGE = {
    *("url", "user_agent", "server_name", "blueprint", "view_args", "status", "remote_addr"),
    *("xforwardedfor", "authorization", "ip_info", "path", "speed", "date", "content_length"),
    *("request", "url_args", "username", "track_var"),
}
# Sum, what of the record it is by, what a row names that.
SUMS = [
    ("sumUrl", "url", "url"),
    ("sumRemote", "remote_addr", "remote_addr"),
    ("sumUserAgent", "user_agent", "user_agent_string"),
    ("sumLanguage", "language", "language"),
    ("sumServer", "app", "server_name"),
    ("sumVisitor", "visitor", "visitor"),
    ("sumGeo", "country", "country"),
]
# What differs only in a way that a database may overlook.
ALIKE = [None, "v1", "V1", "v2", "", "v1 ", "é", "e\u0301"]
TARGETS = [
    *("v1", "é", "", "nobody", "DE", "2001:DB8::1"),
    *("https://shop.example/user/ann?a=1", "https://shop.example/user/ann"),
]


# What a cleaned record may hold: no NUL, no surrogate; everything else an attacker may type.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
json_objects = st.dictionaries(texts, json_values, max_size=3)
variables = st.dictionaries(st.sampled_from(["plan", "Plan", "größe-1"]), json_values, max_size=2)


def any_records() -> st.SearchStrategy[UsageRecord]:
    """Return a strategy for records with few distinct groups, whose every field varies."""
    seconds = st.integers(0, 20 * 10**9).map(lambda nanoseconds: nanoseconds / 1e9)
    sizes = st.integers(0, 2**40)
    maybe = st.none() | texts
    return st.builds(
        make_record,
        started_at=st.integers(0, 4 * 86400 * 10**6).map(
            lambda microseconds: (
                datetime(2025, 12, 29, tzinfo=UTC) + timedelta(microseconds=microseconds)
            )
        ),
        duration_seconds=st.sampled_from([0.0, 0.005, 0.05, 0.3, 10.0, 11.0]) | seconds,
        method=st.sampled_from(["GET", "POST", "get"]),
        scheme=st.sampled_from(["http", "https"]),
        host=texts,
        root_path=texts,
        path=st.sampled_from(["/", "/a", "/A", "/a_b", "/a%b", "/axb", "/ä"]) | texts,
        query=texts,
        protocol=texts,
        endpoint=st.sampled_from([None, "user", "shop.cart", "User"]),
        rule=st.sampled_from([None, "/user/<name>"]),
        blueprint=st.sampled_from([None, "shop", "shop.admin"]),
        view_args=st.none() | json_objects,
        status=st.sampled_from([0, 200, 204, 301, 404, 500, 503, 599, 600]),
        exception=st.sampled_from([None, "ValueError"]),
        bytes_sent=sizes,
        bytes_received=st.none() | sizes,
        remote_addr=maybe,
        forwarded_for=maybe,
        country=st.sampled_from([None, "DE", "US"]),
        ip_info=st.none() | json_objects,
        user_agent=maybe,
        browser=st.sampled_from([None, "Chrome"]),
        browser_version=maybe,
        platform=st.sampled_from([None, "Linux"]),
        language=st.sampled_from([None, "de"]),
        client=st.sampled_from(["human", "ai-agent"]),
        referrer=maybe,
        authorization=st.booleans(),
        username=maybe,
        visitor=maybe,
        track_var=json_objects | variables,
        trace_id=maybe,
        span_id=maybe,
        queue_seconds=st.none() | seconds,
        first_byte_seconds=st.none() | seconds,
        app=st.sampled_from(["shop", "blog"]),
        process=texts,
        consumer=maybe,
        utm_source=st.sampled_from([None, "news", "News"]),
        utm_medium=maybe,
        utm_campaign=maybe,
        ref=maybe,
    )


def visits() -> st.SearchStrategy[UsageRecord]:
    """Return a strategy for records of few people, around the turn of a year."""
    begin = datetime(2025, 12, 30, 22, tzinfo=UTC)
    return st.builds(
        make_record,
        started_at=st.integers(0, 50 * 3600).map(lambda second: begin + second * SECOND)
        | st.sampled_from([begin, datetime(2026, 1, 1, tzinfo=UTC)]),
        endpoint=st.sampled_from(["user", "cart"]),
        bytes_sent=st.integers(0, 1000),
        username=st.sampled_from([None, "ann", "Ann", "bob", ""]),
        host=st.sampled_from(["shop.example", "Shop.example"]),
        query=st.sampled_from(["", "a=1", "a=2", "A=1"]),
        visitor=st.sampled_from(ALIKE),
        user_agent=st.sampled_from(ALIKE),
        language=st.sampled_from(ALIKE),
        app=st.sampled_from(ALIKE[1:]),
        country=st.sampled_from([None, "DE", "US"]),
        remote_addr=st.sampled_from([None, "203.0.113.7", "2001:db8::1", "2001:DB8::1"]),
    )


def moments() -> st.SearchStrategy[datetime]:
    """Return a strategy for bounds among the times of `visits`."""
    begin = datetime(2025, 12, 30, 20, tzinfo=UTC)
    return st.integers(0, 54 * 3600).map(lambda second: begin + second * SECOND) | st.sampled_from(
        [
            begin,
            datetime(2025, 12, 31, tzinfo=UTC),
            datetime(2026, 1, 1, tzinfo=UTC),
            datetime(2026, 1, 1),  # noqa: DTZ001 - naive means UTC
            datetime(2026, 1, 1, 3, tzinfo=timezone(timedelta(hours=3))),
            datetime(2025, 12, 1, tzinfo=UTC),
            END_OF_TIME,
        ]
    )


def naive_sums(
    records: list[UsageRecord],
    field: str,
    key: str,
    start: datetime | None,
    end: datetime | None,
    limit: int,
    page: int,
    target: str | None,
) -> dict[str, list[dict[str, Any]]]:
    """Do what `get_sum` promises, one record and one bucket at a time."""
    spelled = {target, normalise(target)} if target and field == "remote_addr" else {target}
    sums: dict[str, list[dict[str, Any]]] = {}
    for every, kept in (("hour", 4), ("day", 3), ("month", 2)):

        def bucket(moment: datetime, kept: int = kept) -> datetime:
            return datetime(*[*moment.timetuple()[:kept], 1][: max(kept, 3)], tzinfo=UTC)

        rows: dict[tuple[datetime, str], dict[str, Any]] = {}
        for record in records:
            begin = bucket(record.started_at)
            value = getattr(record, field)
            if value is None or (target is not None and value not in spelled):
                continue
            if start is not None and end is None and begin != bucket(start):
                continue
            if start is not None and end is not None and begin < start:
                continue
            if end is not None and begin > end:
                continue
            row = rows.setdefault(
                (begin, value),
                {"date": begin.replace(tzinfo=None), "hits": 0, "transfer": 0, key: value},
            )
            row["hits"] += 1
            row["transfer"] += record.bytes_sent
        ordered = sorted(rows.values(), key=lambda row: row[key])
        ordered.sort(key=lambda row: (row["date"], row["hits"]), reverse=True)
        pages = [ordered[first : first + limit] for first in range(0, len(ordered), limit or 1)]
        sums[every] = dict(enumerate(pages, 1)).get(max(page, 1), [])
    return sums


def in_order(records: list[UsageRecord]) -> list[UsageRecord]:
    return sorted(records, key=lambda record: (record.started_at, record.id))


def same(summaries: list[Summary]) -> list[Any]:
    """Return summaries for comparison; a sum of floats depends on the order in its last bits."""
    return [
        (
            list(summary.group.items()),
            summary.start,
            summary.requests,
            summary.errors,
            summary.bytes_sent,
            pytest.approx(summary.duration_seconds_sum, rel=1e-9),
            summary.streams,
            pytest.approx(summary.first_byte_seconds_sum, rel=1e-9),
            summary.p50,
            summary.p95,
            summary.p99,
            summary.visitors,
        )
        for summary in summaries
    ]


class StorageCore:
    """The part of the contract that depends on how a storage connects: transactions, threads.

    For another way to reach a database that is tested with the whole contract already.
    """

    bytes_per_record_read = 0
    """Bytes that reading may remember of each wanted record."""

    @pytest.fixture
    def storage(self) -> Storage:
        raise NotImplementedError

    # -- before anything is written -------------------------------------------------------------

    def test_an_unused_storage_has_no_records(self, storage: Storage) -> None:
        storage.is_of_app = True
        assert list(storage.records()) == []
        assert list(storage.records(order="newest", limit=3, endpoint="user")) == []
        assert storage.count() == 0
        assert storage.summarize() == []
        assert storage.summarize((), every="day") == []
        assert storage.summarize((), visitors=True) == []
        assert storage.get_usage() == []
        assert storage.get_sum("sumVisitor") == {"hour": [], "day": [], "month": []}
        assert storage.prune(START) == 0
        assert storage.erase(username="ann") == 0

    def test_an_empty_batch_changes_nothing(self, storage: Storage) -> None:
        storage.write([])
        assert storage.count() == 0

    # -- what was written is read ---------------------------------------------------------------

    def test_a_record_is_read_as_it_was_written(self, storage: Storage) -> None:
        full = make_record(
            ip_info={"country": "DE", "nested": [1, 2.5, None, {"ä": "\\"}]},
            track_var={"a": {"b": {"c": [True, False, 2**62, -1, 1e300, 0.1]}}},
            authorization=True,
            queue_seconds=0.25,
            first_byte_seconds=0.125,
            bytes_received=7,
            exception="ValueError",
            started_at=datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
        )
        bare = make_record(
            view_args=None, endpoint=None, rule=None, remote_addr=None, user_agent=None, query=""
        )
        storage.write([full, bare])
        assert list(storage.records()) == [full, bare]
        read = next(storage.records())
        assert read.started_at.tzinfo is UTC
        assert type(read.authorization) is bool

    def test_a_batch_of_any_size_is_kept(self, storage: Storage) -> None:
        records = make_records(1_501)
        sizes = [1, 2, 3, 511, 512, 472]
        assert sum(sizes) == len(records)
        start = 0
        for size in sizes:
            storage.write(records[start : start + size])
            start += size
        assert list(storage.records()) == records

    def test_writing_a_batch_again_changes_nothing(self, storage: Storage) -> None:
        records = make_records(5)
        storage.write(records)
        storage.write(records)
        storage.write([*records[2:], records[2], *(extra := make_records(1, path="/extra"))])
        assert list(storage.records()) == in_order([*records, *extra])
        assert storage.count() == 6
        assert sum(summary.requests for summary in storage.summarize()) == 6
        assert storage.prune(START + SECOND) == 2

    @pytest.mark.parametrize(
        "poison",
        [
            {"path": "/\ud800"},
            {"duration_seconds": float("nan")},
            {"duration_seconds": float("inf")},
            {"queue_seconds": float("nan")},
            {"first_byte_seconds": float("inf")},
            {"track_var": {"x": object()}},
            {"started_at": datetime(2026, 1, 1)},  # noqa: DTZ001 - naive is the point
        ],
        ids=[
            "surrogate",
            "nan",
            "infinity",
            "nan elsewhere",
            "infinity elsewhere",
            "no JSON",
            "naive time",
        ],
    )
    def test_what_cannot_be_kept_raises_and_nothing_of_the_batch_is_kept(
        self, storage: Storage, poison: dict[str, Any]
    ) -> None:
        storage.write([make_record()])
        with pytest.raises((ValueError, TypeError, OverflowError)):
            storage.write([make_record(), make_record(**poison), make_record()])
        assert storage.count() == 1

    # -- ranges, order, limit -------------------------------------------------------------------

    def test_a_range_includes_its_start_but_not_its_end(self, storage: Storage) -> None:
        records = make_records(5)
        storage.write(records)
        assert list(storage.records(START + SECOND, START + 3 * SECOND)) == records[1:3]
        assert storage.count(START + SECOND, START + 3 * SECOND) == 2
        assert list(storage.records(until=START)) == []
        assert list(storage.records(since=START + 4 * SECOND)) == records[4:]
        microsecond = timedelta(microseconds=1)
        assert storage.count(START + microsecond, START + 4 * SECOND + microsecond) == 4

    def test_ties_longer_than_a_page_are_read_once(self, storage: Storage) -> None:
        records = [make_record() for _ in range(1_203)]
        storage.write(records)
        assert list(storage.records()) == in_order(records)
        assert list(storage.records(order="newest")) == in_order(records)[::-1]

    # -- sums -----------------------------------------------------------------------------------

    def test_periods_begin_on_the_hour_the_day_and_the_first(self, storage: Storage) -> None:
        storage.write([make_record(started_at=datetime(2026, 2, 28, 23, 59, 59, 999999, UTC))])
        storage.write([make_record(started_at=datetime(2026, 3, 1, tzinfo=UTC))])
        starts = {
            every: [summary.start for summary in storage.summarize((), every=every)]
            for every in ("hour", "day", "month")
        }
        march = datetime(2026, 3, 1, tzinfo=UTC)
        assert starts == {
            "hour": [datetime(2026, 2, 28, 23, tzinfo=UTC), march],
            "day": [datetime(2026, 2, 28, tzinfo=UTC), march],
            "month": [datetime(2026, 2, 1, tzinfo=UTC), march],
        }

    # -- flask-track-usage's way of reading -----------------------------------------------------

    def test_errors_are_the_statuses_from_500_to_599(self, storage: Storage) -> None:
        statuses = [0, 499, 500, 599, 600, 999]
        storage.write([make_record(status=status) for status in statuses])
        assert storage.summarize(())[0].errors == 2
        assert storage.count(status_class="5xx") == 2
        assert sum(record.is_server_error for record in storage.records()) == 2

    # -- pruning --------------------------------------------------------------------------------

    def test_prune_deletes_what_is_older_and_says_how_many(self, storage: Storage) -> None:
        records = make_records(10)
        storage.write(records)
        assert storage.prune(START) == 0
        assert storage.prune(START + 4 * SECOND) == 4
        assert storage.prune(START + 4 * SECOND) == 0
        assert list(storage.records()) == records[4:]
        storage.write(more := make_records(1, path="/more"))
        assert list(storage.records(limit=1)) == more

    def test_prune_deletes_any_number(self, storage: Storage) -> None:
        storage.write(make_records(10_001))
        assert storage.prune(START + 10_000 * SECOND) == 10_000
        assert storage.count() == 1

    # -- erasing --------------------------------------------------------------------------------

    def test_an_erased_record_can_be_written_again(self, storage: Storage) -> None:
        records = make_records(3, username="ann")
        storage.write(records)
        assert storage.erase(username="ann") == 3
        storage.write(records[1:])
        assert list(storage.records()) == records[1:]

    def test_erase_takes_any_number_of_names_and_what_no_record_can_hold(
        self, storage: Storage
    ) -> None:
        storage.write([make_record(username=name) for name in ("ann", "bob", "x", "")])
        assert storage.erase(username=["\ud800", "ann\0", "ANN", " ann", "an"]) == 0
        assert storage.erase(username=[*map(str, range(40_000)), "bob", "\ud800", "ann"]) == 2
        assert [record.username for record in storage.records()] == ["x", ""]

    def test_erase_deletes_any_number(self, storage: Storage) -> None:
        records = make_records(10_001, username="ann")
        others = [make_record(started_at=record.started_at) for record in records[::7]]
        for start in range(0, len(records), 700):
            storage.write([*records[start : start + 700], *others[start // 7 : start // 7 + 100]])
        assert storage.count() == 10_001 + 1_429
        assert storage.erase(username="ann") == 10_001
        assert list(storage.records()) == others

    def test_erasing_while_others_write_loses_nothing_of_others(self, storage: Storage) -> None:
        storage.write(make_records(50, username="ann"))
        kept: list[UsageRecord] = []
        written = 50
        errors: list[BaseException] = []
        done = threading.Event()

        def write() -> None:
            nonlocal written
            try:
                for _ in range(40):
                    batch = [make_record(username=name) for name in ["ann", "bob"] * 5]
                    storage.write(batch)
                    written += 5
                    kept.extend(record for record in batch if record.username == "bob")
            except BaseException as error:  # noqa: BLE001 - the test tells it
                errors.append(error)
            finally:
                done.set()

        writer = threading.Thread(target=write)
        writer.start()
        erased = 0
        while not done.is_set():
            erased += storage.erase(username="ann")
        writer.join()
        assert errors == []
        assert erased + storage.count(username="ann") == written
        storage.erase(username="ann")
        assert list(storage.records()) == in_order(kept)

    def test_two_may_erase_at_once(self, storage: Storage) -> None:
        for _ in range(5):
            storage.write(make_records(200, username="ann"))
            storage.write(make_records(10, username="bob"))
        erased: list[int] = []
        threads = [
            threading.Thread(target=lambda: erased.append(storage.erase(username="ann")))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(erased) == 3
        assert sum(erased) == 1_000
        assert storage.count() == storage.count(username="bob") == 50

    # -- together -------------------------------------------------------------------------------

    def test_threads_write_and_read_at_once_and_nothing_is_lost(self, storage: Storage) -> None:
        batches = [[make_records(31, path=f"/{thread}") for _ in range(10)] for thread in range(4)]
        errors: list[BaseException] = []

        def guarded(work: Any) -> threading.Thread:
            def run() -> None:
                try:
                    work()
                except BaseException as error:  # noqa: BLE001 - the test tells it
                    errors.append(error)

            return threading.Thread(target=run)

        def read() -> None:
            while any(writer.is_alive() for writer in writers):
                seen = [record.id for record in storage.records()]
                assert len(seen) == len(set(seen))
                assert storage.count(path="/1") % 31 == 0

        writers = [
            guarded(lambda mine=mine: [storage.write(batch) for batch in mine]) for mine in batches
        ]
        readers = [guarded(read) for _ in range(2)]
        for thread in (*writers, *readers):
            thread.start()
        for thread in (*writers, *readers):
            thread.join()
        assert errors == []
        expected = [record for mine in batches for batch in mine for record in batch]
        assert list(storage.records()) == in_order(expected)

    def test_writing_goes_on_while_somebody_reads(self, storage: Storage) -> None:
        records = make_records(1_200)
        storage.write(records)
        reading = storage.records()
        first = [next(reading) for _ in range(700)]
        storage.write([make_record(started_at=START - SECOND)])
        assert storage.prune(START + SECOND * 300) == 301
        assert [*first, *reading] == records

    def test_an_unfinished_reading_holds_nothing(self, storage: Storage) -> None:
        storage.write(make_records(600))
        reading = storage.records()
        next(reading)
        storage.close()
        del reading
        storage.write([make_record()])

    def test_memory_does_not_grow_with_the_records(self, storage: Storage) -> None:
        count = 10_000
        for _ in range(count // 1_000):
            storage.write(make_records(1_000))
        next(storage.records())
        tracemalloc.start()
        try:
            assert sum(1 for _ in storage.records()) == count
            assert storage.count() == count
            assert storage.summarize()[0].requests == count
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        # All records at once take 30 MB.
        assert peak < 4_000_000 + count * self.bytes_per_record_read

    def test_close_and_flush_may_come_at_any_time(self, storage: Storage) -> None:
        storage.flush()
        storage.close()
        storage.close()
        storage.reset_after_fork()
        storage.write([make_record()])
        storage.flush()
        assert storage.count() == 1
        storage.close()


class StorageContract(StorageCore):
    """The whole contract; to be inherited with a fixture `storage`, empty and never used."""

    # -- before anything is written -------------------------------------------------------------

    def test_no_records_are_no_group(self, storage: Storage) -> None:
        storage.write([make_record()])
        assert storage.summarize((), status=404) == []
        assert storage.summarize(("endpoint",), status=404) == []

    # -- what was written is read ---------------------------------------------------------------

    @given(records=st.lists(any_records(), max_size=10))
    @settings(
        max_examples=examples(25),
        deadline=None,
        database=None,
        suppress_health_check=SUPPRESSED,
    )
    def test_any_record_is_read_as_it_was_written(
        self, storage: Storage, records: list[UsageRecord]
    ) -> None:
        storage.delete(Filter())
        storage.write(records)
        assert list(storage.records()) == in_order(records)

    @pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
    def test_hostile_text_is_only_text(self, storage: Storage, text: str) -> None:
        record = make_record(
            id=f"id {text[:100]}",
            path=text,
            query=text,
            endpoint=text,
            username=text,
            user_agent=text,
            method=text,
            app=text,
            view_args={text: text},
            track_var={text: [text]},
        )
        storage.write([record, make_record(username="other", path="/other")])
        assert list(storage.records(username=text, path=text)) == [record]
        assert storage.count(path_prefix=[text[:10] or "nothing"]) == (1 if text else 0)
        assert [summary.group for summary in storage.summarize("username", username=text)] == [
            {"username": text}
        ]

    def test_deep_json_is_kept(self, storage: Storage) -> None:
        deep: Any = "bottom"
        for _ in range(200):
            deep = {"a": [deep]}
        record = make_record(track_var={"deep": deep})
        storage.write([record])
        assert list(storage.records()) == [record]

    # -- ranges, order, limit -------------------------------------------------------------------

    def test_a_naive_time_is_utc_and_an_aware_one_is_converted(self, storage: Storage) -> None:
        records = make_records(3)
        storage.write(records)
        naive = (START + SECOND).replace(tzinfo=None)
        elsewhere = (START + SECOND).astimezone(timezone(timedelta(hours=-5)))
        assert list(storage.records(naive)) == records[1:]
        assert list(storage.records(elsewhere)) == records[1:]
        assert storage.prune(naive) == 1

    def test_records_are_ordered_by_time_then_id(self, storage: Storage) -> None:
        moments = [START + SECOND * second for second in (2, 0, 1, 1, 1, 0)]
        records = [
            make_record(started_at=moment, id=f"{key}")
            for moment, key in zip(moments, ["f", "d", "c", "a", "b", "e"], strict=True)
        ]
        for record in records:
            storage.write([record])
        oldest = [record.id for record in storage.records()]
        assert oldest == ["d", "e", "a", "b", "c", "f"]
        assert [record.id for record in storage.records(order="newest")] == oldest[::-1]

    @pytest.mark.parametrize("limit", [0, 1, 2, 499, 500, 501, 1_000, 5_000])
    def test_a_limit_is_the_most_that_is_read(self, storage: Storage, limit: int) -> None:
        records = make_records(1_000)
        storage.write(records)
        assert list(storage.records(limit=limit)) == records[:limit]
        assert list(storage.records(limit=limit, order="newest")) == records[::-1][:limit]

    def test_wrong_arguments_are_refused_at_once(self, storage: Storage) -> None:
        with pytest.raises(TypeError, match="unknown filter 'endpont'"):
            storage.records(endpont="x")
        with pytest.raises(TypeError, match="unknown filter"):
            storage.count(endpont="x")
        with pytest.raises(TypeError, match="unknown filter"):
            storage.summarize(endpont="x")
        with pytest.raises(ValueError, match="order"):
            storage.records(order="upwards")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="limit"):
            storage.records(limit=-1)
        with pytest.raises(ValueError, match="status_class"):
            storage.records(status_class="9xx")
        with pytest.raises(ValueError, match="cannot group by 'query'"):
            storage.summarize("query")
        with pytest.raises(ValueError, match="every"):
            storage.summarize(every="week")  # type: ignore[arg-type]

    # -- filters --------------------------------------------------------------------------------

    @pytest.mark.parametrize("field", EQUALITY_FILTERS)
    def test_every_field_filters_by_equality(self, storage: Storage, field: str) -> None:
        one, other = (404, 500) if field == "status" else ("One", "other")
        if field == "url":
            records = [make_record(query=value) for value in (one, other, one)]
            one, other = records[0].url, records[1].url
        else:
            records = [make_record(**{field: value}) for value in (one, other, one)]
        nullable = field not in ("method", "status", "client", "path", "url", "app")
        unknown = [make_record(**{field: None})] if nullable else []
        storage.write([*records, *unknown])
        assert list(storage.records(**{field: one})) == [records[0], records[2]]
        assert list(storage.records(**{field: [one, other]})) == records
        assert list(storage.records(**{field: None})) == unknown
        assert list(storage.records(**{field: {other, None}})) == [records[1], *unknown]
        assert list(storage.records(**{field: ()})) == []
        assert list(storage.records(**{field: str(one).lower()})) == []
        assert storage.count(**{field: (one, None)}) == 2 + len(unknown)

    def test_any_variable_filters_and_groups_by_its_text(self, storage: Storage) -> None:
        values = {
            "gold": ["gold"],
            "Gold": ["Gold"],
            "gold ": ["gold "],
            "5": [5, "5"],
            "true": [True, "true"],
            "false": [False],
            "0.1": [0.1],
            "1e22": [1e22],
            "0.30000000000000004": [0.1 + 0.2],
            str(2**63 - 1): [2**63 - 1],
            "null": ["null"],
            "": [""],
            **{text: [text] for text in HOSTILE[:6]},
            None: [None, [1], {"plan": "gold"}],
        }
        records = [
            make_record(track_var={"x": "gold", "plan": value, "größe-1": 1})
            for those in values.values()
            for value in those
        ]
        records.append(make_record(track_var={}))
        storage.write(records)
        expected = {text: len(those) for text, those in values.items()}
        expected[None] += 1
        found = storage.summarize(by=("track_var.plan",))
        assert {one.group["track_var.plan"]: one.requests for one in found} == expected
        for text, those in values.items():
            for value in (text, *(one for one in those if not isinstance(one, list | dict))):
                assert storage.count(**{"track_var.plan": value}) == expected[text], value
        plans = {"track_var.plan": ["gold", 5, True]}
        assert len(list(storage.records(**plans))) == 5
        assert [one.requests for one in storage.summarize("track_var.größe-1", **plans)] == [5]
        assert storage.count(**{"track_var.plan": [["gold"], {"a": 1}, float("nan")]}) == 0
        assert storage.count(**{"track_var.plan": [10**400, -(2**70)]}) == 0
        assert storage.count(**{"track_var.größe-1": None}) == 1
        assert storage.delete(storage.wanted(None, None, plans)) == 5
        assert storage.count() == len(records) - 5

    @pytest.mark.parametrize("key", ["", "1", "a b", "a'b", 'a"b', "a\\", "a.b", "a]", "%s", "x\n"])
    def test_a_variable_of_an_odd_name_is_refused(self, storage: Storage, key: str) -> None:
        with pytest.raises(TypeError, match=r"unknown filter .track_var"):
            storage.count(**{f"track_var.{key}": "x"})
        with pytest.raises(ValueError, match=r"cannot group by .track_var"):
            storage.summarize(by=(f"track_var.{key}",))

    def test_filters_hold_all_at_once(self, storage: Storage) -> None:
        records = [
            make_record(endpoint=endpoint, status=status)
            for endpoint in ("a", "b")
            for status in (200, 404)
        ]
        storage.write(records)
        assert list(storage.records(endpoint="b", status_class="4xx")) == [records[3]]

    def test_a_value_of_another_type_is_no_match(self, storage: Storage) -> None:
        storage.write([make_record(status=200, path="200")])
        assert storage.count(status="200") == 0
        assert storage.count(path=200) == 0
        assert storage.count(status=[2**70, 200]) == 1
        assert storage.count(path=["\ud800", "200\0", "200"]) == 1
        assert storage.count(path=["\ud800", "200\0"]) == 0

    def test_many_values_are_any_of(self, storage: Storage) -> None:
        records = make_records(3, path="/x")
        storage.write([*records, make_record(path="/y")])
        paths = [f"/{number}" for number in range(40_000)]
        assert list(storage.records(path=[*paths, "/x"])) == records
        assert storage.count(path=paths) == 0

    def test_a_status_class_is_a_hundred(self, storage: Storage) -> None:
        records = [make_record(status=status) for status in (0, 99, 400, 499, 500, 599, 600, 200)]
        storage.write(records)
        assert [r.status for r in storage.records(status_class="4xx")] == [400, 499]
        assert [r.status for r in storage.records(status_class=["5xx", "2XX"])] == [500, 599, 200]

    @pytest.mark.parametrize("filter_name", ["endpoint", "status", "status_class", "path_prefix"])
    def test_a_list_of_nothing_holds_for_nothing(self, storage: Storage, filter_name: str) -> None:
        storage.write([make_record()])
        assert storage.count() == 1
        assert storage.count(**{filter_name: []}) == 0
        assert list(storage.records(**{filter_name: []})) == []

    @pytest.mark.parametrize(
        "prefix", ["/a_", "/a%", "/A", "/ä", "/a", "", "/a*", "/[", "/a_b/c/d"]
    )
    def test_a_path_prefix_is_literal_and_case_sensitive(
        self, storage: Storage, prefix: str
    ) -> None:
        paths = ["/a_b", "/axb", "/a%b", "/A", "/a", "/ä/x", "/Ä", "/a*", "/[x]", "", "/a_b/c"]
        records = [make_record(path=path) for path in paths]
        storage.write(records)
        wanted = [record for record in records if record.path.startswith(prefix)]
        assert list(storage.records(path_prefix=prefix)) == wanted
        assert list(storage.records(path_prefix=[prefix, "/Ä"])) == [
            record for record in records if record.path.startswith((prefix, "/Ä"))
        ]

    def test_an_address_is_found_however_it_is_spelled(self, storage: Storage) -> None:
        new = make_record(remote_addr="2001:db8::1")
        # As other programs wrote it, before ours did.
        old = make_record(remote_addr="2001:DB8::1")
        short = make_record(remote_addr="203.0.113.7")
        storage.write([new, old, short, make_record(remote_addr=None)])
        for spelled, found in {
            "2001:DB8::1": [new, old],
            "2001:db8::1": [new],
            "[2001:DB8:0::1%eth0]:443": [new],
            " ::ffff:203.0.113.7": [short],
            "203.0.113.7:51234": [short],
            "203.0.113": [],
            "": [],
            "x" * 100_000: [],
        }.items():
            assert list(storage.records(remote_addr=spelled)) == found
            assert storage.count(remote_addr=spelled) == len(found)
            assert sum(
                summary.requests for summary in storage.summarize((), remote_addr=spelled)
            ) == len(found)
        assert storage.count(remote_addr=["2001:DB8::1", None, "203.0.113.7:1"]) == 4
        # What else is read is no address.
        assert storage.count(visitor="2001:DB8::1", path="203.0.113.7:1") == 0
        assert storage.erase(remote_addr=["::FFFF:203.0.113.7", "2001:DB8::1"]) == 3
        assert [record.remote_addr for record in storage.records()] == [None]

    def test_a_user_is_found_under_pseudonyms_too(self, storage: Storage) -> None:
        names = ["ann", "4e07", "ef2d", "bob", "a", None]
        records = [make_record(username=name, visitor=name) for name in names]
        storage.write(records)
        assert storage.count(username="ann") == 1
        storage.pseudonyms = lambda name: ["4e07", "ef2d"] if name == "ann" else []
        assert list(storage.records(username="ann")) == records[:3]
        assert list(storage.records(username=["bob", "ann"])) == records[:4]
        assert storage.count(username="ann") == 3
        assert storage.count(username=("ann", None)) == 4
        assert storage.count(username="bob") == storage.count(username=None) == 1
        assert storage.count(visitor="ann") == 1
        groups = [summary.group["username"] for summary in storage.summarize(["username"])]
        assert sorted(map(str, groups)) == sorted(map(str, names))
        assert storage.summarize((), username="ann")[0].requests == 3
        assert storage.get_sum("sumVisitor", target="ann")["day"][0]["hits"] == 1
        assert storage.erase(username="ann", visitor="ann") == 1
        assert storage.erase(username="ann") == 2
        assert list(storage.records()) == records[3:]

    # -- sums -----------------------------------------------------------------------------------

    @given(
        records=st.lists(any_records(), min_size=1, max_size=25),
        by=st.lists(
            st.sampled_from([*GROUP_FIELDS, "track_var.plan", "track_var.größe-1"]),
            max_size=3,
            unique=True,
        ),
        every=st.sampled_from([None, "hour", "day", "month"]),
        filters=st.fixed_dictionaries(
            {},
            optional={
                "endpoint": st.lists(st.sampled_from([None, "user", "User"])),
                "status": st.sampled_from([200, 500, [200, 404, 0]]),
                "country": st.sampled_from([None, "DE", ["DE", None]]),
                "method": st.sampled_from(["GET", ["get", None]]),
                "status_class": st.sampled_from(["5xx", ["2xx", "5xx"]]),
                "path_prefix": st.sampled_from(["/", "/a", "/a_", ["/A", "/a%"]]),
                "track_var.plan": st.sampled_from([None, ["", True, 0], [None, False, "null"]]),
                "since": st.just(datetime(2025, 12, 30, 12, tzinfo=UTC)),
                "until": st.just(datetime(2026, 1, 1, tzinfo=UTC)),
            },
        ),
    )
    @settings(
        max_examples=examples(40),
        deadline=None,
        database=None,
        suppress_health_check=SUPPRESSED,
    )
    def test_sums_are_those_of_the_records(
        self, storage: Storage, records: list[UsageRecord], by: list[str], every: Any, filters: Any
    ) -> None:
        storage.delete(Filter())
        storage.write(records)
        conditions = {k: v for k, v in filters.items() if k not in ("since", "until")}
        wanted = Filter.parse(filters.get("since"), filters.get("until"), conditions)
        matching = [record for record in in_order(records) if wanted.matches(record)]
        assert list(storage.records(**filters)) == matching
        assert list(storage.records(order="newest", **filters)) == matching[::-1]
        assert storage.count(**filters) == len(matching)
        expected = summarize_records(matching, by, every, BUCKETS)
        assert same(storage.summarize(by, every=every, **filters)) == same(expected)

    @given(
        records=st.lists(visits(), max_size=30),
        by=st.lists(st.sampled_from(["endpoint", "username", "visitor"]), max_size=2, unique=True),
        every=st.sampled_from([None, "hour", "day", "month"]),
        endpoint=st.sampled_from(["user", ["user", "cart"]]),
    )
    @settings(
        max_examples=examples(30),
        deadline=None,
        database=None,
        suppress_health_check=SUPPRESSED,
    )
    def test_visitors_are_counted_once_a_group(
        self, storage: Storage, records: list[UsageRecord], by: list[str], every: Any, endpoint: Any
    ) -> None:
        storage.delete(Filter())
        storage.write(records)
        summaries = storage.summarize(by, every=every, visitors=True, endpoint=endpoint)
        for summary in summaries:
            seen = {
                record.visitor
                for record in records
                if record.endpoint in endpoint
                and all(getattr(record, field) == value for field, value in summary.group.items())
                and (every is None or truncate(record.started_at, every) == summary.start)
            }
            assert summary.visitors == len(seen - {None})
        # Nothing else depends on it.
        without = storage.summarize(by, every=every, endpoint=endpoint)
        assert [summary.visitors for summary in without] == [None] * len(summaries)
        assert same(without) == [(*summary[:-1], None) for summary in same(summaries)]

    def test_quantiles_are_estimated_as_prometheus_does(self, storage: Storage) -> None:
        durations = [0.005, 0.006, 0.01, 0.02, 20.0]
        storage.write([make_record(duration_seconds=duration) for duration in durations])
        [summary] = storage.summarize(())
        # 1 record up to 0.005, 2 up to 0.01, 1 up to 0.025, 1 above all bounds.
        assert summary.p50 == pytest.approx(0.005 + 0.005 * (2.5 - 1) / 2)
        assert summary.p95 == summary.p99 == 10.0
        assert summary.duration_seconds_sum == pytest.approx(sum(durations))

    def test_first_bytes_of_streams_are_added_up(self, storage: Storage) -> None:
        firsts = [None, 0.25, 0.0, 2.0]
        storage.write([make_record(first_byte_seconds=seconds) for seconds in firsts])
        [summary] = storage.summarize(())
        assert (summary.requests, summary.streams) == (4, 3)
        assert summary.first_byte_seconds_sum == pytest.approx(2.25)
        assert storage.summarize((), country="NL") == []

    def test_bounds_of_the_buckets_can_be_others(self, storage: Storage) -> None:
        storage.bounds = (1.0, 2.0)
        storage.write([make_record(duration_seconds=1.5)])
        [summary] = storage.summarize(())
        assert summary.p50 == 1.5

    def test_big_sums_are_exact(self, storage: Storage) -> None:
        storage.write([make_record(bytes_sent=2**53 + 1) for _ in range(3)])
        assert storage.summarize(())[0].bytes_sent == 3 * (2**53 + 1)

    # -- flask-track-usage's way of reading -----------------------------------------------------

    def test_get_usage_has_the_shape_of_flask_track_usage(self, storage: Storage) -> None:
        objects = {"a": 1, "b": ["é", None]}
        older_record = make_record(
            started_at=START - SECOND, track_var=objects, ip_info=objects, view_args={}
        )
        storage.write([make_record(), older_record])
        newest, older = storage.get_usage()
        assert newest == {
            "url": "https://shop.example/user/ann?tab=orders",
            "user_agent": {
                "browser": "Chrome",
                "language": "de-DE",
                "platform": "Linux",
                "version": "126",
            },
            "blueprint": None,
            "view_args": '{"name": "ann"}',
            "status": 200,
            "remote_addr": "203.0.113.7",
            "xforwardedfor": None,
            "authorization": False,
            "ip_info": None,
            "path": "/user/ann",
            "speed": 0.012345678,
            "date": START.replace(tzinfo=None),
            "username": None,
            "track_var": None,
        }
        assert older["track_var"] == older["ip_info"] == '{"a": 1, "b": ["é", null]}'
        assert older["view_args"] is None

    def test_get_usage_includes_both_bounds_and_has_pages(self, storage: Storage) -> None:
        records = make_records(7)
        storage.write(records)

        def seconds(**arguments: Any) -> list[int]:
            return [item["date"].second for item in storage.get_usage(**arguments)]

        end = START + 4 * SECOND
        assert seconds(start_date=START + SECOND, end_date=end) == [4, 3, 2, 1]
        assert seconds(start_date=END_OF_TIME) == []
        assert seconds(end_date=END_OF_TIME, limit=2) == [6, 5]
        assert seconds(limit=3) == [6, 5, 4]
        assert seconds(limit=3, page=2) == [3, 2, 1]
        assert seconds(limit=3, page=3) == [0]
        assert seconds(limit=3, page=4) == []
        assert seconds(limit=3, page=0) == seconds(limit=3, page=-5) == [6, 5, 4]
        assert seconds(limit=0) == []

    # -- flask-track-usage's way of writing -----------------------------------------------------

    def test_a_dict_it_is_called_with_is_kept_at_once(self, storage: Storage) -> None:
        record = make_record(track_var={"a": [1]}, ip_info={"b": None}, username="ann")
        data = as_dict(record)
        assert storage(data) is data
        assert list(storage.records()) == [record]
        assert data.keys() == as_dict(record).keys()
        storage(data)
        storage.write([record])
        assert list(storage.records()) == [record]
        # As flask-track-usage made it: of another request each time.
        for field in UsageRecord.__struct_fields__:
            if field not in KEYS_OF_FLASK_TRACK_USAGE:
                del data[field]
        storage(data)
        storage.store(data)
        first, second, third = storage.get_usage()
        assert first == second == third
        assert len({kept.id for kept in storage.records()}) == 3
        other = next(kept for kept in storage.records() if kept.id != record.id)
        assert (other.method, other.scheme, other.query) == ("GET", "https", "tab=orders")

    def test_an_item_of_get_usage_can_be_kept_again(self, storage: Storage) -> None:
        storage.write([make_record(track_var={"a": [1]}, view_args={"name": "é"}, username="ann")])
        [item] = storage.get_usage()
        storage(item)
        assert storage.get_usage() == [item, item]

    @pytest.mark.parametrize("keys", [(), ("url",), ("path", "status"), ("date", "track_var")])
    def test_some_keys_are_a_record(self, storage: Storage, keys: tuple[str, ...]) -> None:
        whole = as_dict(make_record(track_var={"a": 1}))
        data = {key: whole[key] for key in keys}
        before = datetime.now(UTC)
        storage(data)
        [record] = storage.records()
        [item] = storage.get_usage()
        assert storage.count() == storage.count(status=200 if "status" in keys else 0) == 1
        assert item["url"] == (data.get("url") or f"://{data.get('path', '')}")
        assert item["track_var"] == ('{"a": 1}' if "track_var" in keys else None)
        if "date" in keys:
            assert record.started_at == START
        else:
            assert before <= record.started_at <= datetime.now(UTC)

    def test_a_dict_that_cannot_be_kept_is_an_error_of_the_caller(self, storage: Storage) -> None:
        for data in ({"status": "fine"}, {"date": "soon"}, {"speed": float("nan")}):
            with pytest.raises((ValueError, TypeError)):
                storage(data)
        for name, largest in (("status", 2**31), ("bytes_received", 2**63)):
            with pytest.raises(ValueError, match=f"{name}: the number is too large"):
                storage({name: largest})
        with pytest.raises(ValueError, match="bytes_sent: invalid literal"):
            storage({"content_length": "much"})
        for junk in ([], None, "x", [("status", 200)]):
            with pytest.raises(TypeError, match="a record must be a dict, not "):
                storage(junk)  # type: ignore[arg-type]
        storage.is_of_app = True
        assert storage.count() == 0

    @given(
        records=st.lists(visits(), max_size=40),
        start=st.none() | moments(),
        end=st.none() | moments(),
        limit=st.sampled_from([0, 1, 3, 500]),
        page=st.sampled_from([1, 1, 2, 3, 0, -1]),
        target=st.none() | st.sampled_from(TARGETS),
        named=st.sampled_from(SUMS),
        how=st.sampled_from(["sum", "name", "plural"]),
    )
    @settings(
        max_examples=examples(150),
        deadline=None,
        database=None,
        suppress_health_check=SUPPRESSED,
    )
    def test_get_sum_is_what_one_counts_by_hand(
        self,
        storage: Storage,
        records: list[UsageRecord],
        start: datetime | None,
        end: datetime | None,
        limit: int,
        page: int,
        target: str | None,
        named: tuple[str, str, str],
        how: str,
    ) -> None:
        name, field, key = named
        hook = {"sum": find_summation(name), "name": name, "plural": f"{name}s"}[how]
        storage.delete(Filter())
        storage.write(records)
        assert storage.get_sum(hook, start, end, limit, page, target) == naive_sums(
            records, field, key, as_utc(start), as_utc(end), limit, page, target
        )

    @given(records=st.lists(any_records(), max_size=8), named=st.sampled_from(SUMS))
    @settings(
        max_examples=examples(40),
        deadline=None,
        database=None,
        suppress_health_check=SUPPRESSED,
    )
    def test_any_sum_agrees_with_count_and_summarize(
        self, storage: Storage, records: list[UsageRecord], named: tuple[str, str, str]
    ) -> None:
        name, field, key = named
        storage.delete(Filter())
        storage.write(records)
        [everything] = storage.summarize(()) or [None]
        [unknown] = storage.summarize((), **{field: None}) or [None]
        for every, rows in storage.get_sum(name).items():
            for row in rows:
                start = row["date"].replace(tzinfo=UTC)
                one = {field: row[key]}
                until = next_start(start, every)  # type: ignore[arg-type]
                # One address may be spelled in two ways, which count separately in sums.
                summaries = storage.summarize((field,), start, until, **one)
                [summary] = [found for found in summaries if found.group == one]
                assert (row["hits"], row["transfer"]) == (summary.requests, summary.bytes_sent)
                if len(summaries) == 1:
                    assert row["hits"] == storage.count(start, until, **one)
            for sums, name_of_sum in (("hits", "requests"), ("transfer", "bytes_sent")):
                assert sum(row[sums] for row in rows) == sum(
                    sign * getattr(summary, name_of_sum)
                    for sign, summary in ((1, everything), (-1, unknown))
                    if summary is not None
                )

    @pytest.mark.parametrize(("name", "field", "key"), SUMS)
    def test_a_row_is_named_as_by_flask_track_usage(
        self, storage: Storage, name: str, field: str, key: str
    ) -> None:
        records = [
            make_record(
                query=f"page={number}",
                remote_addr=f"203.0.113.{number}",
                user_agent=f"agent {number}",
                language=f"l{number}",
                app=f"app {number}",
                visitor=f"v{number}",
                country="DE" if number == 1 else "US",
                bytes_sent=number,
            )
            for number in (2, 1, 2)
        ]
        storage.write(records)
        two, one = (
            {
                "date": START.replace(tzinfo=None),
                "hits": hits,
                "transfer": transfer,
                key: getattr(record, field),
            }
            for record, hits, transfer in ((records[0], 2, 4), (records[1], 1, 1))
        )
        sums = storage.get_sum(name)
        assert list(sums) == ["hour", "day", "month"]
        assert sums["hour"] == [two, one]
        midnight = START.replace(tzinfo=None, hour=0)
        assert sums["day"] == [row | {"date": midnight} for row in (two, one)]
        assert sums["month"] == [row | {"date": midnight.replace(day=1)} for row in (two, one)]
        assert storage.get_sum(f"{name}s", target=one[key])["hour"] == [one]
        assert storage.get_sum(name, limit=1, page=2)["hour"] == [one]

    def test_there_are_these_sums_and_no_others(self) -> None:
        assert [
            (summation.name, summation.field, summation.key or summation.field)
            for summation in SUMMATIONS
        ] == SUMS

    def test_get_sum_means_the_hours_days_and_months_flask_track_usage_means(
        self, storage: Storage
    ) -> None:
        moments = [
            datetime(2026, 1, 31, 23, 59, 59, 999_999, UTC),
            datetime(2026, 2, 1, tzinfo=UTC),
            datetime(2026, 2, 1, 0, 30, tzinfo=UTC),
            datetime(2026, 2, 28, 12, tzinfo=UTC),
            datetime(2026, 3, 1, tzinfo=UTC),
        ]
        storage.write([make_record(started_at=moment, visitor="v") for moment in moments])
        storage.write([make_record(started_at=moments[2], visitor=None)])

        def dates(**bounds: Any) -> dict[str, list[tuple[str, int]]]:
            return {
                every: [(row["date"].strftime("%m-%d %H"), row["hits"]) for row in rows]
                for every, rows in storage.get_sum(sumVisitor, **bounds).items()
            }

        [row] = storage.get_sum("sumVisitors", moments[2])["hour"]
        assert row == {
            "date": datetime(2026, 2, 1),  # noqa: DTZ001 - naive is the promise
            "hits": 2,
            "transfer": 2 * 1234,
            "visitor": "v",
        }
        # Only a start: what contains it.
        assert dates(start_date=datetime(2026, 2, 1, 0, 59, tzinfo=UTC)) == {
            "hour": [("02-01 00", 2)],
            "day": [("02-01 00", 2)],
            "month": [("02-01 00", 3)],
        }
        # Both: what begins between them, and then the whole of it.
        assert dates(start_date=moments[1], end_date=datetime(2026, 2, 28, 12, 0, tzinfo=UTC)) == {
            "hour": [("02-28 12", 1), ("02-01 00", 2)],
            "day": [("02-28 00", 1), ("02-01 00", 2)],
            "month": [("02-01 00", 3)],
        }
        assert dates(start_date=moments[2], end_date=moments[4]) == {
            "hour": [("03-01 00", 1), ("02-28 12", 1)],
            "day": [("03-01 00", 1), ("02-28 00", 1)],
            "month": [("03-01 00", 1)],
        }
        assert dates(start_date=moments[4], end_date=moments[0]) == {
            "hour": [],
            "day": [],
            "month": [],
        }
        # Only an end.
        assert dates(end_date=moments[0])["month"] == [("01-01 00", 1)]
        assert len(dates(end_date=moments[3])["hour"]) == 3
        # In other words for the same moments.
        east = timezone(timedelta(hours=14))
        assert dates(start_date=moments[2].astimezone(east)) == dates(start_date=moments[2])
        naive = moments[2].replace(tzinfo=None)
        assert dates(end_date=naive) == dates(end_date=moments[2])

    def test_get_sum_knows_no_end_of_time(self, storage: Storage) -> None:
        beginning = datetime.min.replace(tzinfo=UTC)
        records = [make_record(started_at=when, visitor="v") for when in (START, END_OF_TIME)]
        storage.write(records)

        def hits(start: datetime | None = None, end: datetime | None = None) -> list[int]:
            sums = storage.get_sum("sumVisitor", start, end)
            return [sum(row["hits"] for row in rows) for rows in sums.values()]

        assert hits() == hits(None, END_OF_TIME) == hits(beginning, END_OF_TIME) == [2, 2, 2]
        assert hits(END_OF_TIME) == [1, 1, 1]
        assert hits(END_OF_TIME, END_OF_TIME) == [0, 0, 0]
        assert hits(END_OF_TIME.replace(minute=0, second=0, microsecond=0), END_OF_TIME) == [
            1,
            0,
            0,
        ]
        assert hits(beginning) == [0, 0, 0]

    @pytest.mark.parametrize(
        "hook",
        [
            *("url", "sumVisitorss", "sumurl", "", None, 5, [], ["sumUrl"], print),
            *(Summation("sumX", "path"), Summation("sumUrl", "path"), Summation),
        ],
    )
    def test_a_sum_that_there_is_not_is_not_implemented(self, storage: Storage, hook: Any) -> None:
        with pytest.raises(
            NotImplementedError, match=r"there is no sum .*: expected sumUrl, .*sumGeo$"
        ):
            storage.get_sum(hook)

    def test_a_sum_of_less_than_nothing_is_refused(self, storage: Storage) -> None:
        with pytest.raises(ValueError, match="limit must not be negative, but it is -1"):
            storage.get_sum("sumVisitor", limit=-1)

    # -- erasing --------------------------------------------------------------------------------

    @given(
        records=st.lists(visits(), max_size=40),
        whom=st.fixed_dictionaries(
            {},
            optional={
                "username": st.sampled_from(["ann", "", "nobody", ["ann", "bob"], {"Ann"}]),
                "visitor": st.sampled_from(["v1", "é", ["V1", "v2", ""], ("nobody",)]),
                "remote_addr": st.sampled_from(
                    ["203.0.113.7:80", "2001:DB8::1", "2001:db8::1", ["203.0.113.7", "x"]]
                ),
            },
        ).filter(bool),
    )
    @settings(
        max_examples=examples(40),
        deadline=None,
        database=None,
        suppress_health_check=SUPPRESSED,
    )
    def test_erase_deletes_exactly_what_count_counts(
        self, storage: Storage, records: list[UsageRecord], whom: dict[str, Any]
    ) -> None:
        storage.delete(Filter())
        storage.write(records)
        doomed = list(storage.records(**whom))
        assert storage.count(**whom) == len(doomed)
        assert storage.erase(**whom) == len(doomed)
        left = [record for record in in_order(records) if record not in doomed]
        assert list(storage.records()) == left
        assert list(storage.records(order="newest")) == left[::-1]
        assert storage.count() == len(left)
        assert storage.erase(**whom) == storage.count(**whom) == 0

    @pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
    def test_hostile_text_erases_nobody_else(self, storage: Storage, text: str) -> None:
        others = [f"{text}x", text[:-1] + "\u00df", text.swapcase() + "?", "%", "*", None]
        rest: list[UsageRecord] = []
        for field in ("username", "visitor", "remote_addr"):
            storage.write([make_record(**{field: text}) for _ in range(2)])
            storage.write(kept := [make_record(**{field: other}) for other in others])
            rest += kept
            assert storage.erase(**{field: text}) == 2
            assert list(storage.records()) == in_order(rest)

    def test_who_is_unknown_is_nobody(self, storage: Storage) -> None:
        records = [make_record(), make_record(username="ann", visitor="v")]
        storage.write(records)
        with pytest.raises(ValueError, match="needs a username, a visitor or a remote_addr"):
            storage.erase()
        for field in ("username", "visitor", "remote_addr"):
            wrong: Any
            for wrong in (None, [None], ["ann", None], (None, "v"), {None}):
                with pytest.raises(ValueError, match=f"{field} must not be None"):
                    storage.erase(**{field: wrong})
            for wrong in ([], (), set(), frozenset()):
                with pytest.raises(ValueError, match=f"{field} must not be an empty list"):
                    storage.erase(**{field: wrong})
            for wrong in (5, ["ann", 5], b"ann", {"ann": 1}, True):
                with pytest.raises(TypeError, match=f"{field} must be a str, not "):
                    storage.erase(**{field: wrong})
        with pytest.raises(ValueError, match="visitor must not be None"):
            storage.erase(username="ann", visitor=None)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="remote_addr must not be an empty list"):
            storage.erase(username="ann", remote_addr=[])
        with pytest.raises(TypeError):
            storage.erase(status=200)  # type: ignore[call-arg]
        assert list(storage.records()) == records

    def test_a_wrong_pseudonym_erases_nobody_else(self, storage: Storage) -> None:
        storage.write(records := [make_record(username=name) for name in ("a", None, "4e07")])
        for wrong in ([None], ["4e07", None], None):
            storage.pseudonyms = lambda name, wrong=wrong: wrong
            with pytest.raises(ValueError, match="username must not be None"):
                storage.erase(username="ann")
        assert list(storage.records()) == records
        # One text is one name, not one for each of its characters.
        storage.pseudonyms = lambda name: "4e07a"
        assert storage.erase(username="ann") == 0
        storage.pseudonyms = lambda name: "4e07"
        assert storage.erase(username="ann") == 1
