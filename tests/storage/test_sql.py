"""Records in PostgreSQL and MariaDB: the contract, and what only a server can do."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from helpers.front_door import Site
from helpers.records import START, make_record, make_records
from storage_contract import StorageContract

from flask_usage_metrics.errors import ConfigError, StorageError, StorageUnavailable
from flask_usage_metrics.storage import open_storage
from flask_usage_metrics.storage.sql import SQLStorage
from flask_usage_metrics.storage.sql.dialects import json_batch

if TYPE_CHECKING:
    from helpers.databases import MariaDB, PostgreSQL, Server

pytest_plugins = ["helpers.databases"]


class TestContractOnPostgreSQL(StorageContract):
    @pytest.fixture
    def storage(self, postgresql: PostgreSQL) -> Iterator[SQLStorage]:  # type: ignore[override]
        with postgresql.storage() as storage:
            yield storage


class TestContractOnMariaDB(StorageContract):
    @pytest.fixture
    def storage(self, mariadb: MariaDB) -> Iterator[SQLStorage]:  # type: ignore[override]
        with mariadb.storage() as storage:
            yield storage


@pytest.fixture
def storage(server: Server) -> Iterator[SQLStorage]:
    with server.storage() as storage:
        yield storage


# -- set-up -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "name", "identity"),
    [
        ("postgresql+psycopg://me:s3cret@db/x", "postgresql", "postgresql+psycopg://me:***@db/x"),
        ("postgresql://me:s3cret@db/x", "postgresql", "postgresql+psycopg://me:***@db/x"),
        ("postgres://me:s3cret@db/x", "postgresql", "postgresql+psycopg://me:***@db/x"),
        ("postgresql://db/x?sslmode=require", "postgresql", "postgresql+psycopg://db/x?sslmode="),
        ("mysql://me:s3cret@db/x", "mysql", "mysql+pymysql://me:***@db/x?charset=utf8mb4"),
        ("mariadb://me:s3cret@db/x", "mysql", "mariadb+pymysql://me:***@db/x?charset=utf8mb4"),
        ("mysql+pymysql://db/x?charset=utf8", "mysql", "mysql+pymysql://db/x?charset=utf8 "),
    ],
)
def test_a_url_names_a_database(url: str, name: str, identity: str) -> None:
    storage = open_storage(url)
    assert storage.name == name
    assert storage.identity.startswith(f"sql {identity}")
    assert "s3cret" not in storage.identity


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql+asyncpg://me:s3cret@db/x", "asyncpg is not supported: .*postgresql.psycopg,"),
        ("mysql+s3cret://me:s3cret@db/x", "is not supported: expected one of mysql.pymysql"),
        ("postgresql://me:s3cret@db:s3cret/x", "not a database URL"),
        ("postgresql://me@db/x?s3cret=s3cret", "an option that psycopg does not know"),
        ("mysql://me@db/x?s3cret=s3cret", "an option that PyMySQL does not know"),
        ("mysql+mysqldb://me:s3cret@db/x", "mysqldb is not installed: pip install 'mysqlclient'"),
    ],
)
def test_a_wrong_url_is_refused_without_repeating_it(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        open_storage(url)
    if "+s3cret" not in url:
        assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "driver", "extra"),
    [
        ("postgresql://me:s3cret@db/x", "psycopg", "postgres"),
        ("mysql://me:s3cret@db/x", "pymysql", "mysql"),
    ],
)
def test_a_missing_driver_is_named_with_what_to_install(
    url: str, driver: str, extra: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, driver, None)
    message = rf"{driver} is not installed: pip install 'flask-usage-metrics\[{extra}\]'$"
    with pytest.raises(ConfigError, match=message) as caught:
        Site(tmp_path, STORAGE=url)
    assert "s3cret" not in str(caught.value)
    assert "db" not in str(caught.value)


@pytest.mark.parametrize("kind", ["postgresql", "mysql"])
def test_a_server_that_is_down_stops_no_app_and_is_not_named(kind: str, tmp_path: Path) -> None:
    storage = open_storage(f"{kind}://s3cret:s3cret@127.0.0.1:9/s3cret")
    with pytest.raises(StorageUnavailable) as caught:
        storage.write([make_record()])
    assert "refused" in str(caught.value) or "cannot connect" in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert "127.0.0.1" not in str(caught.value)
    site = Site(tmp_path, storage)
    assert site.get("/").status_code == 404
    site.close(timeout=0.5)


def test_who_is_not_let_in_is_told_so(server: Server) -> None:
    url = sa.make_url(server.url)
    for wrong in (url.set(database="s3cret"), url.set(username="s3cret", password="s3cret")):
        storage = SQLStorage.from_url(wrong.render_as_string(hide_password=False))
        with pytest.raises(StorageUnavailable, match=r"does not exist|denied") as caught:
            storage.write([make_record()])
        assert "s3cret" not in str(caught.value)
        storage.close()


def test_flask_sqlalchemy_lends_its_engine(server: Server, tmp_path: Path) -> None:
    with server.emptied() as url:
        app = Flask("shop")
        app.config["SQLALCHEMY_DATABASE_URI"] = url
        db = SQLAlchemy(app)
        site = Site(tmp_path, SQLStorage(db=db), app=app)
        app.add_url_rule("/", "index", lambda: "x")
        site.get("/")
        assert site.usage.flush(20)
        assert site.usage.storage.name == sa.make_url(url).get_backend_name()
        assert [record.endpoint for record in site.usage.storage.records()] == ["index"]
        with app.app_context():
            assert db.session.execute(sa.text("SELECT count(*) FROM flask_usage")).scalar() == 1
            db.session.remove()
            db.engine.dispose()
        site.close()


# -- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "poison",
    [
        {"status": 2**31},
        {"status": -(2**31) - 1},
        {"status": "200"},
        {"status": None, "path": 5},
        {"host": 5},
        {"query": 5},
        {"bytes_sent": 2**63},
        {"bytes_sent": 1.5},
        {"username": {"a": "dict"}},
        {"username": b"bytes"},
        {"country": ["DE"]},
        {"duration_seconds": "0.1"},
        {"id": "x" * 256},
        {"id": None},
        {"id": 5},
        {"host": "\udcff"},
    ],
    ids=str,
)
def test_what_no_column_can_hold_is_refused_and_not_changed(
    storage: SQLStorage, poison: dict[str, Any]
) -> None:
    good = make_records(3)
    bad = make_record(**poison)
    for batch in ([*good, bad], [bad]):
        with pytest.raises((ValueError, TypeError, OverflowError, StorageError)) as caught:
            storage.write(batch)
        # Or its batch would be offered for ever.
        assert not isinstance(caught.value, StorageUnavailable)
    assert storage.count() == 0
    storage.write(good)
    assert list(storage.records()) == good


def test_a_refused_value_is_not_repeated_but_its_column_named(storage: SQLStorage) -> None:
    with pytest.raises(ValueError, match=r"^username: Expected") as caught:
        storage.write([make_record(), make_record(username={"s3cret": "s3cret"})])
    assert "s3cret" not in str(caught.value)


def test_what_can_be_told_in_json_is_kept(storage: SQLStorage) -> None:
    key = uuid.UUID(int=7)
    values = {"key": key, "day": date(2026, 1, 2), "at": START, "bytes": b"\x00\xff", "set": {1}}
    storage.write([make_record(view_args=values, track_var={"nan": float("nan"), 5: 2**70})])
    [record] = storage.records()
    assert record.view_args == {
        "key": str(key),
        "day": "2026-01-02",
        "at": "2026-11-22T09:00:00Z",
        "bytes": "AP8=",
        "set": [1],
    }
    assert record.track_var == {"nan": None, "5": 2**70}


def test_a_nul_is_kept_or_left_out_and_nothing_else_with_it(server: Server) -> None:
    with server.storage() as storage:
        odd = make_record(
            path="/a\0b",
            user_agent="\\u0000 \\\\u0000 \0",
            track_var={"k\0": ["v\0w", "\\u0000"]},
        )
        storage.write([make_record(), odd, make_record()])
        read = next(storage.records())
        nul = "" if storage.name == "postgresql" else "\0"
        assert read.path == f"/a{nul}b"
        assert read.user_agent == f"\\u0000 \\\\u0000 {nul}"
        # Inside of JSON there is no NUL, but a way to write one.
        assert read.track_var == odd.track_var
        assert storage.count(path="/ab") == (1 if storage.name == "postgresql" else 0)


def test_a_batch_that_is_long_is_sent_in_parts(
    storage: SQLStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_batch, "MOST_BYTES", 20_000)
    records = make_records(100, track_var={"x": "🦊" * 100})
    records[50] = make_record(started_at=records[50].started_at, path="/" + "x" * 300_000)
    seen: list[str] = []
    engine = storage.database.reach().engine
    storage.write([make_record(started_at=START - timedelta(days=1))])
    sa.event.listen(engine, "before_cursor_execute", lambda *event: seen.append(event[2]))
    storage.write(records)
    assert len([each for each in seen if "record_id" in each and "INSERT" in each]) > 5
    assert list(storage.records(since=START)) == records


def test_a_record_that_no_packet_can_hold_is_refused(mariadb: MariaDB) -> None:
    with mariadb.storage() as storage:
        big = make_record(track_var={"x": "y" * 9_000_000})
        with pytest.raises(StorageError, match="max_allowed_packet") as caught:
            storage.write([make_record(), big])
        assert type(caught.value) is StorageError
        storage.write([fits := make_record(track_var={"x": "y" * 7_000_000})])
        assert list(storage.records()) == [fits]


def test_without_a_strict_mode_nothing_is_clamped(mariadb: MariaDB) -> None:
    with mariadb.emptied() as url:
        engine = sa.create_engine(url, connect_args={"init_command": "SET sql_mode = ''"})
        storage = SQLStorage(engine)
        storage.write([big := make_record(status=70_000, path="x" * 70_000, username="a  ")])
        with pytest.raises(ValueError, match="status"):
            storage.write([make_record(status=2**31)])
        assert list(storage.records()) == [big]
        assert storage.count(username="a") == storage.count(username="A  ") == 0
        engine.dispose()


def test_long_texts_that_begin_alike_are_groups_of_their_own(storage: SQLStorage) -> None:
    paths = ["/" + "x" * 5_000 + end for end in ("a", "b", "A", "a ", "")]
    storage.write([make_record(path=path) for path in paths * 3])
    groups = {each.group["path"]: each.requests for each in storage.summarize(("path",))}
    assert groups == dict.fromkeys(paths, 3)


# -- order and plans ----------------------------------------------------------------------------


@pytest.mark.parametrize("page", [1, 2, 3, 500])
def test_pages_end_anywhere_among_rows_with_and_without_an_id(
    storage: SQLStorage, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write([make_record(started_at=START), *make_records(4)])
    table = storage._table
    with storage.database.reach().engine.begin() as connection:
        for second in (0, 0, 0, 1, 2):
            moment = (START + timedelta(seconds=second)).replace(tzinfo=None)
            connection.execute(sa.insert(table).values(datetime=moment, path="/old"))
        connection.execute(sa.insert(table).values(path="/timeless"))
    records = list(storage.records())
    assert len(records) == 10
    assert records == sorted(records, key=lambda record: (record.started_at, record.id))
    monkeypatch.setattr("flask_usage_metrics.storage.sql.storage.PAGE", page)
    assert list(storage.records()) == records
    assert list(storage.records(order="newest")) == records[::-1]


def test_ids_are_sorted_by_their_characters(storage: SQLStorage) -> None:
    ids = ["a-b", "ab", "aB", "A", "b", "a", "a b", "ä", "Z", "_"]
    storage.write([make_record(id=each) for each in ids])
    assert [record.id for record in storage.records()] == sorted(ids)


@pytest.mark.parametrize("order", ["oldest", "newest"])
def test_pages_are_read_by_the_index_without_sorting_all(storage: SQLStorage, order: Any) -> None:
    for start in range(20):
        first = START + timedelta(seconds=1_000 * start)
        storage.write(
            [make_record(started_at=first + timedelta(seconds=each)) for each in range(1_000)]
        )
    engine = storage.database.reach().engine
    statements: list[tuple[str, Any]] = []
    with engine.connect() as connection:
        quoted = engine.dialect.identifier_preparer.quote(storage._table.name)
        connection.exec_driver_sql(f"ANALYZE {'TABLE ' if storage.name == 'mysql' else ''}{quoted}")
        connection.commit()

    @sa.event.listens_for(engine, "before_cursor_execute")
    def keep(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        statements.append((statement, parameters))

    since = START + timedelta(seconds=500)
    list(storage.records(since, order=order, limit=1_100, status=[200, 404], path=["/user/ann"]))
    statements = [each for each in statements if "record_id" in each[0]]
    assert len(statements) == 3
    with engine.connect() as connection:
        for statement, parameters in statements[:3]:
            rows = connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).all()
            plan = str(rows)
            assert f"ix_{storage._table.name}_datetime" in plan
            assert "filesort" not in plan
            # Of rows of one moment and id PostgreSQL sorts the few there are.
            assert plan.count("Sort  (cost") == plan.count("Incremental Sort  (cost")


# -- at once, and again -------------------------------------------------------------------------


def test_the_same_batches_from_several_are_kept_once(server: Server) -> None:
    with server.storage() as first:
        first.write([make_record(id="first")])
        batches = [make_records(20) for _ in range(15)]
        errors: list[BaseException] = []

        def write(seed: int) -> None:
            storage = SQLStorage.from_url(server.url, table_name=first._table.name)
            try:
                mine = [random.Random(seed).sample(batch, len(batch)) for batch in batches]
                random.Random(seed).shuffle(mine)
                for batch in mine:
                    for attempt in range(20):
                        try:
                            storage.write(batch)
                            break
                        except StorageUnavailable:
                            # As the sink does it: somebody else was quicker, again and again.
                            assert attempt < 19
            except BaseException as error:  # noqa: BLE001 - the test tells it
                errors.append(error)
            finally:
                storage.close()

        threads = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert first.count() == 1 + 15 * 20


def test_a_connection_that_was_lost_is_replaced_at_once(server: Server) -> None:
    with server.storage() as storage:
        storage.write([make_record()])
        server.stop()
        server.start()
        storage.write([make_record()])
        assert storage.count() == 2


def test_a_forked_child_uses_connections_of_its_own(database: str) -> None:
    storage = SQLStorage.from_url(database)
    storage.write(make_records(3))
    inherited = storage.database.reach().engine.pool
    child = os.fork()
    if child == 0:
        code = 1
        try:
            storage.reset_after_fork()
            storage.write([make_record(id="one"), make_record(id="two")])
            code = (
                0
                if storage.count() == 5 and storage.database.reach().engine.pool is not inherited
                else 2
            )
            storage.close()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    # With the connection it had before.
    storage.write([make_record()])
    assert storage.count() == 6
    storage.close()


def test_a_server_that_dies_under_load_loses_and_doubles_nothing(
    server: Server, tmp_path: Path
) -> None:
    with server.emptied() as url:
        site = Site(tmp_path, url, FLUSH_SECONDS=0.05)
        site.app.add_url_rule("/<int:number>", "page", lambda number: f"{number}")
        for number in range(400):
            if number in (100, 250):
                server.stop(immediately=True)
            if number in (180, 330):
                server.start()
            assert site.get(f"/{number}").status_code == 200
            time.sleep(0.002)
        deadline = time.monotonic() + 60
        while not site.usage.flush(5):
            assert time.monotonic() < deadline
        numbers = [record.view_args["number"] for record in site.usage.storage.records()]  # type: ignore[index]
        assert numbers == list(range(400))
        name = site.usage.storage.name
        assert site.account(name) == {"written": 400, "dropped": 0, "failed": 0, "pending": 0}
        site.close()


def test_a_connection_in_use_while_the_storage_is_closed_is_closed_too(server: Server) -> None:
    with server.storage() as storage:
        storage.write([make_record()])
        raw: list[Any] = []

        def use(connection: sa.Connection) -> None:
            raw.append(connection.connection.dbapi_connection)
            storage.close()

        storage.database.run(use, create=False, absent=None)
        assert raw[0].closed if hasattr(raw[0], "closed") else not raw[0].open
        assert storage.count() == 1


def test_a_read_while_the_server_is_down_is_unavailable(server: Server) -> None:
    with server.storage() as storage:
        storage.write([make_record()])
        server.stop()
        try:
            for use in (storage.count, lambda: list(storage.records()), storage.summarize):
                with pytest.raises(StorageUnavailable):
                    use()
            with pytest.raises(StorageUnavailable):
                storage.write([make_record()])
        finally:
            server.start()
        assert storage.count() == 1


def test_what_is_older_is_pruned_in_chunks(
    storage: SQLStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_usage_metrics.storage.sql.storage.DELETED_AT_ONCE", 100)
    storage.write(make_records(950))
    commits: list[int] = []
    sa.event.listen(storage.database.reach().engine, "commit", lambda _: commits.append(1))
    assert storage.prune(datetime(2026, 11, 22, 9, 15, tzinfo=timezone.utc)) == 900
    assert len(commits) > 9
    assert storage.count() == 50
