"""Records in SQLite: the contract, and what only a file, a lock or an old table can do."""

from __future__ import annotations

import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from helpers.front_door import Site
from helpers.old_tables import OLD_TABLE, plain
from helpers.records import START, make_record, make_records
from sqlalchemy.pool import NullPool
from storage_contract import StorageContract, StorageCore, same

from flask_usage_metrics.errors import ConfigError, StorageError, StorageUnavailable
from flask_usage_metrics.records.summary import summarize_records
from flask_usage_metrics.storage import open_storage
from flask_usage_metrics.storage.sql import SQLStorage


# As flask-track-usage 2.0.0 creates it.
@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "usage.sqlite3"


@pytest.fixture
def storage(file: Path) -> Iterator[SQLStorage]:
    with closing(file) as storage:
        yield storage


@contextmanager
def closing(file: Path, timeout: float = 5.0) -> Iterator[SQLStorage]:
    storage = open_storage(f"sqlite:///{file}?timeout={timeout}")
    assert isinstance(storage, SQLStorage)
    storage.is_of_app = True
    yield storage
    storage.close()


class TestContractOnAFile(StorageContract):
    @pytest.fixture
    def storage(self, file: Path) -> Iterator[SQLStorage]:  # type: ignore[override]
        with closing(file) as storage:
            yield storage


class TestContractInMemory(StorageCore):
    @pytest.fixture
    def storage(self) -> Iterator[SQLStorage]:  # type: ignore[override]
        storage = SQLStorage.from_url("sqlite://")
        yield storage
        storage.close()


class TestContractOnAnEngineOfTheCaller(StorageCore):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Iterator[SQLStorage]:  # type: ignore[override]
        engine = sa.create_engine(f"sqlite:///{tmp_path}/theirs.sqlite3")
        yield SQLStorage(engine, table_name='odd "name" of:a %s table')
        engine.dispose()


# -- set-up -------------------------------------------------------------------------------------


def test_nothing_is_opened_or_made_before_the_first_write(storage: SQLStorage, file: Path) -> None:
    assert list(storage.records()) == []
    assert storage.prune(START) == 0
    assert not file.parent.exists()
    storage.write([make_record()])
    assert file.exists()


@pytest.mark.parametrize(
    "url",
    ["sqlite://", "sqlite:///:memory:", "sqlite+pysqlite://"],
)
def test_a_database_in_memory_needs_no_file(url: str) -> None:
    storage = SQLStorage.from_url(url)
    storage.write([make_record()])
    assert storage.count() == 1
    storage.close()


def test_a_relative_file_is_so_to_where_the_process_was_when_the_storage_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    storage = SQLStorage.from_url("sqlite:///sub/usage.sqlite3")
    monkeypatch.chdir(tmp_path)
    storage.write([make_record()])
    storage.close()
    assert (tmp_path / "here/sub/usage.sqlite3").exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite+aiosqlite:///x", r"sqlite\+aiosqlite is not supported: .* sqlite\+pysqlite"),
        ("oracle+nothing://me:s3cret@db/x", "oracle is not supported: expected sqlite, postgresql"),
        ("sqlite://file", "three slashes or four"),
        ("sqlite:///x?mode=ro&timeout=1", "not have 'mode'"),
        ("sqlite:///x?timeout=s3cret", "timeout must be a number"),
        ("s3cret", "not a database URL"),
        ("mysql://me:s3cret@db:s3cret/x", "not a database URL"),
    ],
)
def test_a_wrong_url_is_refused_without_repeating_it(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        SQLStorage.from_url(url)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file::memory:?uri=true"]
)
def test_an_engine_with_a_database_a_thread_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="a database in memory of its own"):
        SQLStorage(sa.create_engine(url))
    with pytest.raises(ConfigError, match="a database in memory of its own"):
        SQLStorage(sa.create_engine(url, poolclass=NullPool))


def test_an_engine_whose_threads_share_a_database_in_memory_is_written_and_read(
    tmp_path: Path,
) -> None:
    engine = sa.create_engine(
        "sqlite://",
        poolclass=sa.pool.StaticPool,
        connect_args={"check_same_thread": False},
    )
    site = Site(tmp_path, SQLStorage(engine))
    site.get()
    assert len(site.records()) == 1
    site.close()
    engine.dispose()


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs an engine or db"):
        SQLStorage()
    with pytest.raises(ValueError, match=r"must be an SQLAlchemy Engine, not str: .*from_url"):
        SQLStorage("sqlite:///x")
    foreign = SimpleNamespace(dialect=SimpleNamespace(name="postgresql"))
    with pytest.raises(ConfigError, match="must be an SQLAlchemy Engine, not SimpleNamespace"):
        SQLStorage(foreign)
    mssql = sa.create_engine("mssql+pymssql://", module=SimpleNamespace(paramstyle="format"))
    with pytest.raises(ConfigError, match="mssql is not supported"):
        SQLStorage(mssql)


def test_the_table_has_the_columns_of_flask_track_usage_first(
    storage: SQLStorage, file: Path
) -> None:
    storage.write([make_record()])
    with plain(file) as connection:
        names = [row[1] for row in connection.execute("PRAGMA table_info(flask_usage)")]
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        stored = connection.execute("SELECT datetime, record_id, url FROM flask_usage").fetchone()
        plan = connection.execute(
            "EXPLAIN QUERY PLAN SELECT * FROM flask_usage WHERE datetime >= 'x' "
            "ORDER BY datetime, record_id, id LIMIT 5"
        ).fetchall()
    # Right behind the definition of the old table, in its order.
    assert names[:18] == re.findall(r"(\w+) (?:INTEGER|VARCHAR|BOOLEAN|FLOAT|DATETIME)", OLD_TABLE)
    assert stored[0] == "2026-11-22 09:00:00.000000"
    assert stored[2] == "https://shop.example/user/ann?tab=orders"
    assert [row[3] for row in plan] == [
        "SEARCH flask_usage USING INDEX ix_flask_usage_datetime (datetime>?)"
    ]


def test_pages_are_read_by_the_index_without_sorting(storage: SQLStorage, file: Path) -> None:
    storage.write(make_records(600))
    statements: list[tuple[str, Any]] = []

    @sa.event.listens_for(storage.database.reach().engine, "before_cursor_execute")
    def keep(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        statements.append((statement, parameters))

    for order in ("oldest", "newest"):
        assert len(list(storage.records(order=order, status=200))) == 600  # type: ignore[arg-type]
    assert len(statements) == 4
    with plain(file) as connection:
        for statement, parameters in statements:
            plan = str(connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall())
            assert "USING INDEX ix_flask_usage_datetime" in plan
            assert "ORDER BY" not in plan


def test_a_batch_is_a_transaction_of_few_statements(storage: SQLStorage) -> None:
    storage.write([make_record()])
    seen: list[str] = []
    engine = storage.database.reach().engine
    sa.event.listen(engine, "before_cursor_execute", lambda *event: seen.append(event[2][:18]))
    sa.event.listen(engine, "commit", lambda _: seen.append("commit"))
    now = datetime.now(timezone.utc)
    storage.write([make_record(started_at=now) for _ in range(500)])
    assert seen == ["INSERT INTO flask_"] * 6 + ["commit"]


def test_what_all_rows_of_a_batch_share_is_a_parameter_once(storage: SQLStorage) -> None:
    now = datetime.now(timezone.utc)
    seen: list[tuple[str, tuple[Any, ...]]] = []

    def write(*hosts: str, **fields: Any) -> dict[str, int]:
        seen.clear()
        storage.write(batch := [make_record(started_at=now, host=host, **fields) for host in hosts])
        written.extend(batch)
        return {host: sum(values.count(host) for _, values in seen) for host in hosts}

    written: list[Any] = []
    write("first.example")
    engine = storage.database.reach().engine
    sa.event.listen(engine, "before_cursor_execute", lambda *event: seen.append(event[2:4]))
    assert write(*["a.example"] * 16) == {"a.example": 1}
    assert write(*["a.example"] * 8, *["b.example"] * 8) == {"a.example": 8, "b.example": 8}
    # What differed once may do so again: the statement stays the same.
    assert write(*["c.example"] * 16) == {"c.example": 16}
    last = seen[0][0]
    assert "username" not in last
    assert write(*["c.example"] * 16, username="ann") == {"c.example": 16}
    assert write(*["c.example"] * 16) == {"c.example": 16}
    assert "username" in seen[0][0]
    assert list(storage.records()) == written
    storage.write(written)
    assert storage.count() == len(written)


def test_a_value_that_some_rows_of_a_batch_lack_is_kept(storage: SQLStorage) -> None:
    now = datetime.now(timezone.utc)
    batch = [
        make_record(started_at=now, username=username, bytes_received=size, blueprint=blueprint)
        for username, size, blueprint in (
            ("ann", None, None),
            (None, 0, None),
            (None, None, "shop"),
            ("", None, None),
        )
    ]
    storage.write(batch)
    storage.write(batch[:1])
    assert list(storage.records()) == batch


def test_times_are_stored_in_one_form_and_urls_whole(storage: SQLStorage, file: Path) -> None:
    moments = [
        START,
        START + timedelta(microseconds=1),
        START.astimezone(timezone(timedelta(hours=2))) + timedelta(microseconds=20),
        START.astimezone(timezone(timedelta(0), "also UTC")) + timedelta(seconds=1.5),
        datetime(999, 1, 2, tzinfo=timezone.utc),
    ]
    records = [make_record(started_at=moment, root_path="/app") for moment in moments]
    records += [make_record(started_at=START + timedelta(hours=1.0001), query="")]
    for record in records:
        storage.write([record])
    again = [make_record(started_at=record.started_at) for record in records]
    storage.write(again)
    storage.write([*again[1:2], make_record(started_at=moments[1])])
    with plain(file) as connection:
        rows = connection.execute("SELECT datetime, url FROM flask_usage ORDER BY id").fetchall()
    texts = [
        "2026-11-22 09:00:00.000000",
        "2026-11-22 09:00:00.000001",
        "2026-11-22 09:00:00.000020",
        "2026-11-22 09:00:01.500000",
        "0999-01-02 00:00:00.000000",
        "2026-11-22 10:00:00.360000",
    ]
    assert [row[0] for row in rows] == [*texts, *texts, texts[1]]
    assert [row[1] for row in rows[:6]] == [record.url for record in records]


@pytest.mark.parametrize("others", [0, 3])
def test_a_time_without_a_zone_is_refused(storage: SQLStorage, others: int) -> None:
    naive = datetime(2026, 11, 22, 9, 0, 0, 1)  # noqa: DTZ001
    later = START + timedelta(microseconds=1)
    for place in range(others + 1):
        batch = [make_record(started_at=later) for _ in range(others)]
        batch.insert(place, make_record(started_at=naive))
        with pytest.raises(ValueError, match="no time zone"):
            storage.write(batch)
    assert storage.count() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", ["duration_seconds", "queue_seconds", "first_byte_seconds"])
def test_a_duration_that_is_not_finite_is_refused(
    storage: SQLStorage, field: str, value: float
) -> None:
    with pytest.raises(ValueError, match="not finite"):
        storage.write([make_record(), make_record(**{field: value})])
    assert storage.count() == 0


def test_integers_that_do_not_fit_are_refused(storage: SQLStorage) -> None:
    with pytest.raises(OverflowError):
        storage.write([make_record(bytes_sent=2**63)])
    assert storage.count() == 0


# -- the db of Flask-SQLAlchemy -----------------------------------------------------------------


class Contextual:
    """Tells its engine in a context only, as Flask-SQLAlchemy 3 does."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self.inside = False

    @property
    def engine(self) -> sa.Engine:
        if not self.inside:
            raise RuntimeError("Working outside of application context.")
        return self._engine

    @contextmanager
    def app_context(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False


def test_db_is_asked_for_its_engine_inside_the_context(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/app.sqlite3")
    db = Contextual(engine)
    with db.app_context():
        early = SQLStorage(db=db)
    early.write([make_record()])
    late = SQLStorage(db=db)
    with pytest.raises(StorageUnavailable, match="app context"):
        late.write([make_record()])
    late.bind_app(db)
    assert late.count() == 1
    engine.dispose()


# -- an old table -------------------------------------------------------------------------------


@pytest.fixture
def old(file: Path) -> Path:
    """A table of flask-track-usage with five rows, three of them in the same second."""
    file.parent.mkdir()
    rows = [
        ("2018-05-01 12:00:00.000000", "http://localhost/a?x=1&y=2", "/a", '{"name": "ann"}', 200),
        ("2018-05-01 12:00:00.000000", "http://localhost/app/b%3Fé", "/b?é", "{}", 500),
        ("2018-05-01 12:00:00.000000", "http://[broken/c", "/c", '{"cut": "in the mid', 404),
        ("2018-05-01 11:00:00.000000", "http://localhost/d", "/d", "null", 200),
        ("2018-05-01 13:00:00", None, None, None, None),
    ]
    with plain(file) as connection:
        connection.execute(OLD_TABLE)
        for moment, url, path, view_args, status in rows:
            connection.execute(
                "INSERT INTO flask_usage (url, path, view_args, status, datetime, speed, "
                "authorization, ua_browser, track_var) VALUES (?, ?, ?, ?, ?, 0.3, 1, 'chrome', ?)",
                (url, path, view_args, status, moment, '{"a": 1}' if status == 200 else None),
            )
    return file


def test_an_old_table_is_read_without_a_write(old: Path, storage: SQLStorage) -> None:
    records = list(storage.records())
    assert [record.path for record in records] == ["/d", "/a", "/b?é", "/c", ""]
    assert list(storage.records(order="newest")) == records[::-1]
    d, a, b, c, empty = records
    assert a.started_at == datetime(2018, 5, 1, 12, tzinfo=timezone.utc)
    assert (a.url, a.host, a.query) == ("http://localhost/a?x=1&y=2", "localhost", "x=1&y=2")
    assert (b.url, b.root_path) == ("http://localhost/app/b%3Fé", "/app")
    assert [a.view_args, b.view_args, c.view_args, d.view_args] == [{"name": "ann"}, {}, None, None]
    assert [a.track_var, b.track_var] == [{"a": 1}, {}]
    assert (a.browser, a.status, a.authorization, a.duration_seconds) == ("chrome", 200, True, 0.3)
    assert (a.endpoint, a.country, a.bytes_sent, a.method) == (None, None, 0, "")
    assert (empty.status, empty.path, empty.host) == (0, "", "")
    assert len({record.id for record in records}) == 5
    assert [record.id for record in records[1:4]] == sorted(record.id for record in records[1:4])


def test_old_and_new_rows_are_read_alike(old: Path, storage: SQLStorage) -> None:
    moment = datetime(2018, 5, 1, 12, tzinfo=timezone.utc)
    new = [make_record(started_at=moment) for _ in range(3)]
    storage.write(new)
    records = list(storage.records())
    assert len(records) == 8
    assert records[4:7] == new
    assert list(storage.records(order="newest")) == records[::-1]
    assert records == sorted(records, key=lambda record: (record.started_at, record.id))
    for limit in range(9):
        assert list(storage.records(limit=limit)) == records[:limit]
    assert storage.count(method="") == 5
    assert storage.count(method=None) == 0
    assert storage.count(status_class="2xx") == 5
    assert storage.count(status=0, path="") == 1
    for by in ((), ("method", "app"), ("status", "client"), ("path",), ("endpoint",)):
        expected = summarize_records(records, by, "hour", storage.bounds)
        assert same(storage.summarize(by, every="hour")) == same(expected)
    with plain(old) as connection:
        assert connection.execute("SELECT max(id), count(*) FROM flask_usage").fetchone() == (8, 8)


def test_a_row_without_a_time_is_left_out(old: Path, storage: SQLStorage) -> None:
    with plain(old) as connection:
        connection.execute("INSERT INTO flask_usage (url) VALUES ('http://h/timeless')")
    assert len(list(storage.records())) == storage.count() == 5
    assert sum(summary.requests for summary in storage.summarize((), every="day")) == 5


@pytest.mark.parametrize("page", [1, 2, 3])
def test_pages_end_anywhere_among_old_and_new_rows(
    old: Path, storage: SQLStorage, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment = datetime(2018, 5, 1, 12, tzinfo=timezone.utc)
    storage.write([make_record(started_at=moment) for _ in range(3)])
    with plain(old) as connection:
        # A process that still runs flask-track-usage writes one more.
        connection.execute(
            "INSERT INTO flask_usage (url, datetime) VALUES ('http://h/', ?)",
            ("2018-05-01 12:00:00.000000",),
        )
    records = list(storage.records())
    assert [record.endpoint for record in records] == [None] * 5 + ["user"] * 3 + [None]
    monkeypatch.setattr("flask_usage_metrics.storage.sql.storage.PAGE", page)
    assert list(storage.records()) == records
    assert list(storage.records(order="newest")) == records[::-1]


def test_a_table_of_version_1_lacks_two_columns_more(file: Path, storage: SQLStorage) -> None:
    file.parent.mkdir()
    with plain(file) as connection:
        connection.execute(
            OLD_TABLE.replace(", username VARCHAR(128)", "").replace("track_var VARCHAR(128), ", "")
        )
        connection.execute(
            "INSERT INTO flask_usage (url, datetime) VALUES ('http://h/x', '2017-01-01 00:00:00')"
        )
    storage.write([record := make_record(username="ann", track_var={"b": 2})])
    assert list(storage.records(username="ann")) == [record]
    assert storage.count() == 2


def test_a_table_migrated_by_alembic_has_its_columns_in_another_order(
    file: Path, storage: SQLStorage
) -> None:
    file.parent.mkdir()
    with plain(file) as connection:
        connection.execute(
            OLD_TABLE.replace(
                "username VARCHAR(128),\n    track_var VARCHAR(128)",
                "track_var VARCHAR(128), username VARCHAR(128)",
            )
        )
        connection.execute(
            "INSERT INTO flask_usage (url, datetime, username, track_var) "
            "VALUES ('http://h/x', '2017-01-01 00:00:00.000000', 'ann', '{\"a\": 1}')"
        )
    [record] = storage.records()
    assert (record.username, record.track_var) == ("ann", {"a": 1})


# -- what may happen to the file ----------------------------------------------------------------


def test_a_locked_database_is_unavailable_and_later_available(file: Path) -> None:
    with closing(file, timeout=0.1) as storage, plain_after(storage, file) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StorageUnavailable, match="locked"):
            storage.write([make_record()])
        assert storage.count() == 1
        other.execute("ROLLBACK")
        storage.write([make_record()])
        assert storage.count() == 2


@contextmanager
def plain_after(storage: SQLStorage, file: Path) -> Iterator[sqlite3.Connection]:
    storage.write([make_record()])
    with plain(file) as connection:
        yield connection


def test_a_new_file_that_is_locked_is_unavailable(file: Path) -> None:
    file.parent.mkdir()
    with closing(file, timeout=0.1) as storage, plain(file) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StorageUnavailable, match="locked"):
            storage.write([make_record()])
        other.execute("ROLLBACK")
        storage.write([make_record()])
        assert storage.count() == 1


def test_a_lock_that_is_given_back_in_time_is_waited_for(file: Path) -> None:
    file.parent.mkdir()
    with closing(file, timeout=60) as storage, plain(file) as other:
        other.execute("BEGIN EXCLUSIVE")
        writer = threading.Thread(target=storage.write, args=([make_record()],))
        writer.start()
        time.sleep(0.3)
        other.execute("ROLLBACK")
        writer.join()
        assert storage.count() == 1


def test_a_path_that_cannot_be_is_unavailable_without_naming_it(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("a file")
    (tmp_path / "folder.sqlite3").mkdir()
    for path in (tmp_path / "plain" / "usage.sqlite3", tmp_path / "folder.sqlite3"):
        with closing(path) as storage:
            with pytest.raises(StorageUnavailable) as caught:
                storage.write([make_record()])
            assert str(tmp_path) not in str(caught.value)
            assert "203.0.113" not in str(caught.value)


def test_a_folder_that_becomes_writable_is_used(tmp_path: Path) -> None:
    blocker = tmp_path / "folder"
    blocker.write_text("")
    with closing(blocker / "usage.sqlite3") as storage:
        with pytest.raises(StorageUnavailable):
            storage.write([make_record()])
        blocker.unlink()
        storage.write([make_record()])
        assert storage.count() == 1


def test_a_corrupt_file_is_unavailable_until_it_is_replaced(
    file: Path, storage: SQLStorage
) -> None:
    file.parent.mkdir()
    file.write_bytes(b"this is not a database, " * 100)
    for _ in range(2):
        with pytest.raises(StorageUnavailable, match="not a database"):
            storage.write([make_record()])
        with pytest.raises(StorageUnavailable, match="not a database"):
            storage.count()
    file.unlink()
    storage.write([make_record()])
    assert storage.count() == 1


def test_a_file_that_could_not_be_set_up_is_opened_anew(file: Path, storage: SQLStorage) -> None:
    file.parent.mkdir()
    with plain(file) as connection:
        connection.execute("CREATE VIEW flask_usage AS SELECT 1 AS id")
    with pytest.raises(StorageUnavailable):
        storage.write([make_record()])
    file.unlink()
    storage.write([make_record()])
    with closing(file) as other:
        assert other.count() == 1


def test_a_file_damaged_while_in_use_is_unavailable(file: Path, storage: SQLStorage) -> None:
    storage.write(make_records(2_000))
    storage.close()
    content = bytearray(file.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    file.write_bytes(content)
    with pytest.raises(StorageUnavailable, match="malformed"):
        list(storage.records())


def test_a_full_disk_is_unavailable(storage: SQLStorage) -> None:
    storage.write([make_record()])

    @sa.event.listens_for(storage.database.reach().engine, "begin")
    def no_more_pages(connection: sa.Connection) -> None:
        connection.exec_driver_sql("PRAGMA max_page_count=1")

    with pytest.raises(StorageUnavailable, match="full"):
        storage.write(make_records(1_000))
    assert storage.count() == 1


def test_a_read_only_database_is_unavailable(tmp_path: Path) -> None:
    file = tmp_path / "usage.sqlite3"
    with closing(file) as storage:
        storage.write([make_record()])
    engine = sa.create_engine(f"sqlite:///file:{file}?mode=ro&uri=true")
    reader = SQLStorage(engine)
    assert reader.count() == 1
    with pytest.raises(StorageUnavailable, match="readonly"):
        reader.write([make_record()])
    engine.dispose()


def test_a_value_that_does_not_fit_is_told_from_a_database_that_is_unavailable(
    storage: SQLStorage,
) -> None:
    with pytest.raises(StorageError) as caught:
        storage.write([make_record(path="/secret"), make_record(username={"a": "dict"})])
    assert type(caught.value) is StorageError
    assert "/secret" not in str(caught.value)


def test_prune_empties_the_write_ahead_log(storage: SQLStorage, file: Path) -> None:
    storage.write(make_records(2_000))
    log = file.with_name(f"{file.name}-wal")
    assert log.stat().st_size > 100_000
    assert storage.prune(START + timedelta(seconds=1_000)) == 1_000
    assert log.stat().st_size == 0


def test_readers_who_never_pause_do_not_let_the_log_grow_without_bound(
    storage: SQLStorage, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_usage_metrics.storage.sql.dialects.sqlite.WAL_BYTES", 2_000_000)
    storage.write([make_record()])
    done = threading.Event()

    def read() -> None:
        with plain(file) as first, plain(file) as second:
            for reader in (first, second) * 100_000:
                if done.is_set():
                    return
                if reader.in_transaction:
                    reader.execute("COMMIT")
                reader.execute("BEGIN")
                reader.execute("SELECT max(id) FROM flask_usage").fetchone()
                time.sleep(0.005)

    reader = threading.Thread(target=read)
    reader.start()
    log = file.with_name(f"{file.name}-wal")
    largest = written = 0
    # By itself the file never gets smaller than it was, up to the limit of a connection.
    while log.stat().st_size >= largest and written < 2_000:
        largest = log.stat().st_size
        storage.write(make_records(50))
        written += 1
    done.set()
    reader.join()
    assert written < 2_000
    assert storage.count() == 1 + written * 50


@pytest.mark.parametrize("how", ["deleted", "replaced", "emptied folder"])
def test_a_file_that_goes_away_is_made_again(file: Path, storage: SQLStorage, how: str) -> None:
    storage.write(make_records(3))
    assert storage.count() == 3
    if how == "deleted":
        file.unlink()
    elif how == "replaced":
        other = file.with_name("other.sqlite3")
        with plain(other) as connection:
            connection.execute(OLD_TABLE)
        # With the log of the old one still there, SQLite would restore it into the new one.
        for path in file.parent.glob(f"{file.name}-*"):
            path.unlink()
        other.replace(file)
    else:
        for path in file.parent.iterdir():
            path.unlink()
        file.parent.rmdir()
    if how == "replaced":
        assert storage.count() == 0
    else:
        with pytest.raises(StorageUnavailable, match="3 records of ours"):
            storage.count()
    record = make_record()
    with pytest.raises(StorageUnavailable, match="3 records of ours; the next is made"):
        storage.write([record])
    storage.write([record])
    storage.write([record])
    with closing(file) as other_storage:
        assert list(other_storage.records()) == [record]
    assert list(storage.records()) == [record]


def test_a_table_that_is_dropped_is_made_again(file: Path, storage: SQLStorage) -> None:
    storage.write([make_record()])
    with plain(file) as connection:
        connection.execute("DROP TABLE flask_usage")
    assert list(storage.records()) == []
    storage.write([make_record()])
    with plain(file) as connection:
        connection.execute("DROP TABLE flask_usage")
    storage.write([make_record()])
    assert storage.count() == 1


def test_the_engine_of_the_caller_stays_open(tmp_path: Path) -> None:
    engine = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool)
    storage = SQLStorage(engine)
    storage.write([make_record()])
    storage.close()
    assert storage.count() == 1
    engine.dispose()


def test_metadata_of_the_caller_describes_the_table(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/x", poolclass=NullPool)
    metadata = sa.MetaData()
    for _ in range(2):
        SQLStorage(engine, metadata).write([make_record()])
    assert "record_id" in metadata.tables["flask_usage"].columns
    metadata.create_all(engine)
    assert SQLStorage(engine).count() == 2


# -- what is deleted is gone --------------------------------------------------------------------


def without_secure_delete(engine: sa.Engine, *, mode: str = "OFF") -> None:
    """Have new connections begin as those of a SQLite that was built without it."""

    @sa.event.listens_for(engine, "connect", insert=True)
    def switch_off(connection: sqlite3.Connection, _: Any) -> None:
        connection.execute(f"PRAGMA secure_delete={mode}").close()


def told_by(engine: sa.Engine) -> tuple[int, str]:
    with engine.connect() as connection:
        return (
            connection.exec_driver_sql("PRAGMA secure_delete").scalar_one(),
            connection.exec_driver_sql("PRAGMA journal_mode").scalar_one(),
        )


def left_of(marker: bytes, file: Path) -> list[str]:
    """Return which files of a database hold some bytes."""
    paths = sorted(file.parent.glob(f"{file.name}*"))
    assert file in paths
    return [path.name for path in paths if marker in path.read_bytes()]


def write_marked(storage: SQLStorage) -> None:
    """Write records of ann, which hold a marker, and of others: some long, some in a row."""
    marker = "M4RK3R"
    # Not among the first rows, of which SQLite makes copies when the table outgrows one page.
    storage.write(make_records(30, username="bob", path="/kept"))
    for number in range(40):
        storage.write(
            [
                make_record(
                    username="ann" if ann else "bob",
                    path=f"/{marker}" if ann else "/kept",
                    user_agent=f"{marker} " * (1 if number % 9 else 900) if ann else "kept",
                    track_var={marker: [marker]} if ann else {"kept": "x" * 50},
                )
                for ann in (number % 3 == row % 2 or number in (20, 21) for row in range(30))
            ]
        )


@pytest.mark.parametrize("whose", ["ours", "theirs", "theirs with a log"])
def test_the_bytes_of_what_is_erased_are_gone_from_the_file(tmp_path: Path, whose: str) -> None:
    file = tmp_path / "usage.sqlite3"
    if whose == "ours":
        storage = SQLStorage.from_url(f"sqlite:///{file}")
    else:
        storage = SQLStorage(sa.create_engine(f"sqlite:///{file}"))
    engine = storage.database.reach().engine
    without_secure_delete(engine)
    if whose == "theirs with a log":
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
    before = told_by(engine)
    assert before == {
        "ours": (1, "delete"),
        "theirs": (0, "delete"),
        "theirs with a log": (0, "wal"),
    }.get(whose)
    write_marked(storage)
    assert left_of(b"M4RK3R", file) != []
    count = storage.count(username="ann")
    assert 400 < count == storage.erase(username="ann")
    assert left_of(b"M4RK3R", file) == []
    assert storage.count() == storage.count(username="bob") == 1_230 - count
    assert told_by(engine)[0] == before[0]
    engine.dispose()
    assert left_of(b"M4RK3R", file) == []
    assert left_of(b"/kept", file) == ["usage.sqlite3"]


def test_the_bytes_of_what_is_pruned_are_gone_too(storage: SQLStorage, file: Path) -> None:
    # Also of the first rows, of which SQLite makes copies when the table outgrows one page.
    without_secure_delete(storage.database.reach().engine)
    storage.write(make_records(2_000, path="/M4RK3R"))
    storage.write(make_records(2_000, path="/kept", step=timedelta(days=1)))
    assert storage.prune(START + timedelta(days=1)) == 2_001
    assert left_of(b"M4RK3R", file) == []
    assert storage.count(path="/kept") == 1_999


def test_erasing_nothing_still_empties_the_log_a_reader_kept(
    storage: SQLStorage, file: Path
) -> None:
    storage.write([make_record(username="ann", path="/M4RK3R")])
    without_waiting = SQLStorage.from_url(f"sqlite:///{file}?timeout=0.05")
    with plain(file) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM flask_usage").fetchone()
        assert without_waiting.erase(username="ann") == 1
        assert left_of(b"M4RK3R", file) != []
        reader.execute("COMMIT")
    assert storage.count() == 0
    assert storage.erase(username="ann") == 0
    assert left_of(b"M4RK3R", file) == []
    without_waiting.close()


@pytest.mark.parametrize("mode", ["OFF", "ON", "FAST"])
@pytest.mark.parametrize("fails", [False, True])
def test_erase_leaves_the_engine_of_the_caller_as_it_was(
    tmp_path: Path, mode: str, fails: bool
) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/usage.sqlite3", pool_size=1, max_overflow=0)
    without_secure_delete(engine, mode=mode)
    before = told_by(engine)
    assert before[0] == ("OFF", "ON", "FAST").index(mode)
    storage = SQLStorage(engine)
    storage.write([make_record(username="ann"), make_record()])
    during: list[int] = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def look(connection: Any, cursor: sqlite3.Cursor, statement: str, *_: Any) -> None:
        if statement.startswith("DELETE"):
            look_on = cursor.connection.execute("PRAGMA secure_delete")
            during.append(look_on.fetchone()[0])
            look_on.close()
            if fails:
                raise sa.exc.OperationalError(statement, None, sqlite3.OperationalError("disk"))

    if fails:
        with pytest.raises(StorageUnavailable, match="disk"):
            storage.erase(username="ann")
    else:
        assert storage.erase(username="ann") == 1
    assert during == [1]
    assert told_by(engine) == before
    assert storage.count() == (2 if fails else 1)
    engine.dispose()


def test_an_engine_that_begins_transactions_itself_can_be_erased_from(tmp_path: Path) -> None:
    # As SQLAlchemy's page on pysqlite advises: then also reading takes part in a transaction.
    engine = sa.create_engine(f"sqlite:///{tmp_path}/usage.sqlite3")

    @sa.event.listens_for(engine, "connect")
    def leave_it_to_us(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    with closing(tmp_path / "usage.sqlite3") as ours:
        ours.write([make_record(username=name) for name in ("ann", "bob")])
        assert SQLStorage(engine).erase(username="ann") == 1
        assert [record.username for record in ours.records()] == ["bob"]
    engine.dispose()


def test_erase_walks_by_the_primary_key_and_writes_only_where_it_must(
    storage: SQLStorage, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_usage_metrics.storage.sql.storage.DELETED_AT_ONCE", 10)
    names = ["ann" if number in (35, 36, 80) else "bob" for number in range(95)]
    storage.write([make_record(username=name) for name in names])
    statements: list[tuple[str, Any]] = []
    transactions: list[int] = []
    engine = storage.database.reach().engine

    @sa.event.listens_for(engine, "before_cursor_execute")
    def keep(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "PRAGMA" not in statement and "INSERT" not in statement:
            statements.append((statement, parameters))

    sa.event.listen(engine, "commit", lambda _: transactions.append(len(statements)))
    assert storage.erase(username="ann") == 3
    verbs = [statement[:6] for statement, _ in statements]
    assert verbs == ["SELECT"] * 5 + ["DELETE"] + ["SELECT"] * 5 + ["DELETE"] + ["SELECT"]
    assert transactions[:13] == list(range(1, 14))
    with plain(file) as connection:
        for statement, parameters in statements[1:]:
            plan = str(connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall())
            assert "USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)" in plan
            assert "ORDER BY" not in plan
    assert storage.count() == storage.count(username="bob") == 92


@pytest.mark.parametrize("at_once", [1, 2, 5_000])
def test_any_key_a_row_can_have_is_walked_to(
    old: Path, storage: SQLStorage, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_usage_metrics.storage.sql.storage.DELETED_AT_ONCE", at_once)
    keys = (-(2**63), -5, 0, 2**62, 2**63 - 1)
    with plain(old) as connection:
        for key in keys:
            connection.execute(
                "INSERT INTO flask_usage (id, username, datetime) VALUES (?, 'ann', '2018-01-01')",
                (key,),
            )
        connection.execute("INSERT INTO flask_usage (id, username) VALUES (7, 'ann')")
    assert storage.count(username="ann") == 5
    assert storage.erase(username="ann") == 5
    assert storage.count() == 5


def test_writers_get_their_turn_while_somebody_is_erased(file: Path) -> None:
    with closing(file) as storage, closing(file, timeout=2) as hasty:
        for _ in range(6):
            storage.write(make_records(5_000, username="ann"))
        done = threading.Event()
        written = 0

        def write() -> None:
            nonlocal written
            while not done.is_set():
                hasty.write([make_record(username="bob")])
                written += 1

        writer = threading.Thread(target=write)
        writer.start()
        assert storage.erase(username="ann") == 30_000
        during = written
        done.set()
        writer.join()
        assert during > 3
        assert storage.count() == written


def test_erase_needs_no_table_and_makes_none(file: Path, storage: SQLStorage) -> None:
    assert storage.erase(username="ann") == 0
    assert not file.parent.exists()
    storage.write([make_record()])
    with plain(file) as connection:
        connection.execute("DROP TABLE flask_usage")
        assert storage.erase(username="ann") == 0
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        assert ("flask_usage",) not in tables.fetchall()


def test_a_locked_database_cannot_be_erased_from_now(file: Path) -> None:
    with closing(file, timeout=0.1) as storage:
        storage.write([make_record(username="ann")])
        with plain(file) as other:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(StorageUnavailable, match="locked"):
                storage.erase(username="ann")
        assert storage.erase(username="ann") == 1


def test_visitors_are_counted_only_when_asked_for(storage: SQLStorage) -> None:
    storage.write([make_record(visitor="v")])
    statements: list[str] = []
    engine = storage.database.reach().engine
    sa.event.listen(engine, "before_cursor_execute", lambda *event: statements.append(event[2]))
    storage.summarize(())
    storage.summarize((), visitors=True)
    assert ["DISTINCT" in each for each in statements if "count(" in each] == [False, True]
