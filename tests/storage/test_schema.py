"""The tables of SQL databases: made by many at once, upgraded in place, never narrowed."""

from __future__ import annotations

import re
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from helpers.process import start_python
from helpers.records import START, make_record

from flask_usage_metrics.enrich.clients import describe
from flask_usage_metrics.enrich.clients.browsers import BROWSERS, PLATFORMS
from flask_usage_metrics.errors import StorageUnavailable
from flask_usage_metrics.storage import open_storage
from flask_usage_metrics.storage.sql import SQLStorage, old_rows
from flask_usage_metrics.storage.sql.dialects import open_dialect
from flask_usage_metrics.storage.sql.old_rows import respell
from flask_usage_metrics.storage.sql.schema import Component, Schema, Step
from flask_usage_metrics.storage.sql.storage import VERSION
from flask_usage_metrics.storage.sql.table import COLUMN_NAMES, KEY, TEXT, Index

if TYPE_CHECKING:
    from helpers.databases import MariaDB, PostgreSQL, Server

pytest_plugins = ["helpers.databases"]

# As flask-track-usage declares it: name and type, its numbers being those of 2.0.0.
OLD = {
    "url": sa.String(128),
    "ua_browser": sa.String(16),
    "ua_language": sa.String(16),
    "ua_platform": sa.String(16),
    "ua_version": sa.String(16),
    "blueprint": sa.String(16),
    "view_args": sa.String(64),
    "status": sa.Integer(),
    "remote_addr": sa.String(24),
    "xforwardedfor": sa.String(24),
    "authorization": sa.Boolean(),
    "ip_info": sa.String(1024),
    "path": sa.String(32),
    "speed": sa.Float(),
    "datetime": sa.DateTime(),
    "username": sa.String(128),
    "track_var": sa.String(128),
}
NAMES = list(OLD)
# Of 1.x; of 2.0.0; what its Alembic scripts make of the former; and of the code never released.
STATES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "1.x": (NAMES[:-2], {"ip_info": sa.String(128)}),
    "2.0.0": (NAMES, {}),
    "2.0.0 by Alembic": ([*NAMES[:-2], "track_var", "username"], {}),
    "master": (NAMES, {"path": sa.String(128)}),
}
MOMENT = datetime(2018, 5, 1, 12, tzinfo=timezone.utc)
LONG = "/" + "x" * 70_000


@contextmanager
def opened(url: str, **arguments: Any) -> Iterator[SQLStorage]:
    storage = SQLStorage.from_url(url, **arguments)
    yield storage
    storage.close()


@contextmanager
def connected(url: str) -> Iterator[sa.Connection]:
    """Connect without anything of ours, and commit in the end."""
    engine = sa.create_engine(url)
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def make_old(url: str, state: str = "2.0.0") -> None:
    """Make a table of flask-track-usage, as it does it, with three rows of one second."""
    names, others = STATES[state]
    columns = [sa.Column(name, others.get(name, OLD[name])) for name in names]
    table = sa.Table("flask_usage", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
    for column in columns:
        table.append_column(column)
    row = {
        "url": "http://localhost/app/a?x=1",
        "ua_browser": "chrome",
        "view_args": '{"name": "ann"}',
        "status": 200,
        "remote_addr": "203.0.113.7",
        "authorization": True,
        "path": "/a",
        "speed": 0.25,
        "datetime": MOMENT.replace(tzinfo=None),
        "username": "ann",
        "track_var": '{"a": 1}',
    }
    with connected(url) as connection:
        table.metadata.create_all(connection)
        for status in (200, 404, 500):
            values = {name: value for name, value in row.items() if name in names}
            connection.execute(sa.insert(table).values(values | {"status": status}))


def columns_of(url: str, table: str = "flask_usage") -> list[dict[str, Any]]:
    with connected(url) as connection:
        return [dict(column) for column in sa.inspect(connection).get_columns(table)]


def noted(url: str) -> dict[str, int]:
    with connected(url) as connection:
        rows = connection.exec_driver_sql("SELECT component, version FROM flask_usage_schema")
        return {row.component: row.version for row in rows}


def of_records(steps: Sequence[Step]) -> list[str]:
    """Return what is done to the records' table, and to that of the versions."""
    changes = [change for step in steps for change in step.changes]
    return [
        change
        for change in changes
        if re.search(r"\b(ix_)?flask_usage(_(schema|datetime|record_id))?\b", change)
    ]


# -- upgrades -----------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
def test_a_table_of_flask_track_usage_is_upgraded_in_place(database: str, state: str) -> None:
    make_old(database, state)
    before = [column["name"] for column in columns_of(database)]
    new = make_record(
        started_at=MOMENT.replace(microsecond=123456),
        duration_seconds=0.1234567890123,
        path=LONG,
        query="q" * 70_000,
        blueprint="b" * 300,
        forwarded_for="2001:db8::1, " * 20,
        remote_addr="2001:0db8:0000:0000:0000:0000:0000:0001",
        username="é" * 40_000,
        view_args={"x": "y" * 300},
        ip_info={"x": "y" * 70_000},
        track_var={"x": "🦊" * 40_000},
        browser="b" * 100,
    )
    with opened(database) as storage:
        storage.write([new])
        storage.write([new])
        *old, last = storage.records()
        assert last == new
        assert [record.status for record in old] == [200, 404, 500]
        for record in old:
            assert (record.path, record.url) == ("/a", "http://localhost/app/a?x=1")
            assert (record.started_at, record.duration_seconds) == (MOMENT, 0.25)
            assert (record.browser, record.view_args) == ("chrome", {"name": "ann"})
            assert (record.authorization, record.remote_addr) == (True, "203.0.113.7")
            if state != "1.x":
                assert (record.username, record.track_var) == ("ann", {"a": 1})
        assert list(storage.records(order="newest")) == [last, *old[::-1]]
        assert storage.count(method="") == 3
        assert storage.count(username="Ann") == 0
        assert storage.plan() == []
    after = [column["name"] for column in columns_of(database)]
    # Nobody's SELECT * is put into another order.
    assert after[: len(before)] == before
    assert set(after) == {"id", *COLUMN_NAMES}
    assert noted(database)["records"] == VERSION


def test_what_flask_track_usage_cut_off_is_no_variable(database: str) -> None:
    make_old(database)
    texts = ['{"a": "gold", "b": true}', '{"a": "go', "", "gold", '{"a": "\\u00', '["a"]', "{}"]
    with connected(database) as connection:
        for text in texts:
            connection.execute(
                sa.text(
                    "INSERT INTO flask_usage (datetime, track_var) VALUES (:at, :text)"
                ).bindparams(sa.bindparam("at", type_=sa.DateTime)),
                {"at": MOMENT.replace(tzinfo=None), "text": text},
            )
    with opened(database) as storage:
        found = storage.summarize(by=("track_var.a",))
        assert {one.group["track_var.a"]: one.requests for one in found} == {
            "1": 3,
            "gold": 1,
            None: 6,
        }
        assert storage.count(**{"track_var.a": "gold", "track_var.b": True}) == 1
        storage.write([make_record(track_var={"a": {"b": 1}, "b": "true"})])
        assert storage.count(**{"track_var.b": "true"}) == 2


def test_an_old_table_is_upgraded_by_who_reads_it_first(database: str) -> None:
    make_old(database)
    with opened(database) as storage:
        assert [record.status for record in storage.records()] == [200, 404, 500]
        assert storage.get_usage(limit=1)[0]["username"] == "ann"


def test_rows_of_flask_track_usage_that_still_runs_are_kept(database: str) -> None:
    make_old(database)
    with opened(database) as storage:
        storage.write([make_record()])
        with connected(database) as connection:
            connection.exec_driver_sql(
                "INSERT INTO flask_usage (url, status, path, speed, datetime) "
                "VALUES ('http://h/late', 200, '/late', 0.5, '2026-11-22 09:00:00')"
            )
        # Without an id, before what has one in the same second.
        assert [record.path for record in storage.records()][3:] == ["/late", "/user/ann"]
        assert next(storage.records(order="newest")).path == "/user/ann"


def test_rows_of_flask_track_usage_are_spelled_as_ours_when_told_to(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(old_rows, "_AT_ONCE", 2)
    make_old(database)
    odd = {
        "ua_browser": "safari",
        "ua_version": "17.5.1",
        "ua_platform": "iphone",
        "view_args": "null",
        "remote_addr": "::ffff:203.0.113.7",
        "ip_info": '{"city": "Caf\\u00e9", "zip": 123456789012345678901}',
        "track_var": '{"cut": "o',
    }
    robot = {
        "ua_browser": "google",
        "ua_version": "2.1",
        "track_var": "[1, 2]",
        "ip_info": '{"no JSON any more":  1e999}',
    }
    lone = {"ua_browser": "safari", "ua_platform": "android", "track_var": '{"a":  "\\ud800"}'}
    with opened(database) as storage:
        ours = make_record(browser="chrome", browser_version="1.5", track_var={"a": 1})
        storage.write([ours])
        table = storage.track_table
        with connected(database) as connection:
            # One at a time: each has other columns.
            for row in (odd, robot, lone):
                connection.execute(sa.insert(table).values(row | {"datetime": MOMENT}))
        assert respell(storage.database, table, only_count=True) == 5
        assert respell(storage.database, table) == 5
        assert respell(storage.database, table) == 0
        query = sa.select(*(table.c[name] for name in (*odd, "record_id"))).order_by(table.c.id)
        with connected(database) as connection:
            rows = [tuple(row) for row in connection.execute(query)]
        assert (
            rows[:3]
            == [("Chrome", None, None, '{"name":"ann"}', "203.0.113.7", None, '{"a":1}', None)] * 3
        )
        assert rows[3][:2] == ("chrome", "1.5")
        city = '{"city":"Café","zip":123456789012345678901}'
        assert rows[4:] == [
            ("Safari", "17", "iOS", None, "203.0.113.7", city, '{"cut": "o', None),
            ("google", "2.1", None, None, None, robot["ip_info"], "[1, 2]", None),
            ("Android Browser", None, "Android", None, None, None, lone["track_var"], None),
        ]
        assert next(storage.records(order="newest")) == ours


def test_a_row_that_is_nested_too_deep_for_this_python_hides_no_other(database: str) -> None:
    make_old(database)
    with opened(database) as storage:
        storage.write([make_record()])
        deep = '{"a":' + "[" * 20_000 + "]" * 20_000 + "}"
        with connected(database) as connection:
            connection.execute(sa.update(storage.track_table).values(track_var=deep))
        assert len(list(storage.records())) == len(storage.get_usage()) == 4


# What Werkzeug 2.0.3 told of these, which flask-track-usage stored, cut to 16 characters.
WERKZEUG = [
    ("Windows NT 10.0) {0} Chrome/139.0.0.0 Safari/537.36", "chrome 139.0.0.0 windows"),
    (
        "Windows NT 10.0) {0} Chrome/139.0 Safari/537 Edg/139.0.3405.86",
        "edge 139.0.3405 windows",
    ),
    ("Windows NT 10.0; rv:139.0) Gecko/20100101 Firefox/139.0", "firefox 139.0 windows"),
    ("Windows NT 10.0; Trident/7.0; rv:11.0) like Gecko", "msie 11.0 windows"),
    ("Windows NT 10.0) {0} Chrome/138.0 Safari/537.36 OPR/122.0.0.0", "opera 122.0.0.0 windows"),
    ("Macintosh; Intel Mac OS X 10_15_7) {0} Version/18.5 Safari/605.1", "safari 18.5 macos"),
    (
        "iPhone; CPU iPhone OS 18_5 like Mac OS X) {0} Version/18.5 Mobile/15E Safari/6",
        "safari 18.5 iphone",
    ),
    ("iPad; CPU OS 17_6 like Mac OS X) {0} Version/17.6 Mobile/15E Safari/6", "safari 17.6 ipad"),
    ("iPhone; CPU iPhone OS 18_5 like Mac OS X) {0} CriOS/139.0 Safari/6", "chrome 139.0 iphone"),
    ("Linux; Android 10; K) {0} Chrome/139.0.0.0 Safari/537", "chrome 139.0.0.0 android"),
    ("Linux; U; Android 4.4.2; de-de) {0} Version/4.0 Safari/534.30", "safari 4.0 android"),
    ("X11; Linux x86_64; rv:139.0) Gecko/20100101 Firefox/139.0", "firefox 139.0 linux"),
    ("X11; CrOS x86_64 14541.0.0) {0} Chrome/138.0.0.0 Safari/537.36", "chrome 138.0.0.0 chromeos"),
    ("X11; FreeBSD amd64; rv:128.0) Gecko/20100101 Firefox/128.0", "firefox 128.0 freebsd"),
]


@pytest.mark.parametrize(("agent", "told"), WERKZEUG, ids=[told for _, told in WERKZEUG])
def test_a_browser_is_spelled_as_it_would_be_now(agent: str, told: str) -> None:
    client = describe("Mozilla/5.0 (" + agent.format("AppleWebKit/537.36 (KHTML, like Gecko)"))
    names = ("ua_browser", "ua_version", "ua_platform")
    row = dict.fromkeys(("view_args", "ip_info", "track_var", "remote_addr"))
    row |= dict(zip(names, told.split(), strict=True))
    spelled = old_rows.spelled(row)
    assert [spelled[name] for name in names] == [client.browser, client.version, client.platform]


def test_every_name_of_a_browser_and_platform_is_one_of_ours() -> None:
    assert set(old_rows.BROWSERS.values()) <= BROWSERS
    assert set(old_rows.PLATFORMS.values()) <= PLATFORMS


def test_what_a_plan_says_is_what_is_done(database: str) -> None:
    make_old(database, "1.x")
    with opened(database) as storage:
        planned = storage.plan()
        changes = of_records(planned)
        assert changes[0] == "create the table flask_usage_schema"
        assert any(change.startswith("add the column flask_usage.username") for change in changes)
        assert changes[-2:] == [
            "create the index ix_flask_usage_record_id",
            "create the index ix_flask_usage_datetime",
        ]
        widened = [change for change in changes if change.startswith("widen")]
        assert (widened == []) is database.startswith("sqlite")
        if widened:
            assert any("flask_usage.url from VARCHAR(128) to " in change for change in widened)
            assert not any(".status" in change for change in widened)
        assert len(columns_of(database)) == 16
        with connected(database) as connection:
            assert not sa.inspect(connection).has_table("flask_usage_schema")
        assert storage.migrate() == planned
        assert storage.plan() == storage.migrate() == []
        assert storage.count() == 3


def test_a_plan_for_nothing_yet_makes_nothing(database: str, tmp_path: Path) -> None:
    with opened(database) as storage:
        planned = storage.plan()
        assert of_records(planned) == [
            "create the table flask_usage_schema",
            "create the table flask_usage",
            "create the index ix_flask_usage_record_id",
            "create the index ix_flask_usage_datetime",
        ]
        with pytest.raises(StorageUnavailable, match="there is no"):
            storage.count()
        assert list(tmp_path.iterdir()) == []
        assert [step.changes for step in storage.migrate()] == [step.changes for step in planned]
        assert storage.count() == 0


def test_a_table_without_a_length_is_left_alone(server: Server) -> None:
    with server.storage() as storage:
        storage.write([make_record()])
        name = storage._table.name
        before = columns_of(server.url, name)
        storage.database.schema = Schema(f"{name}_schema", storage.components())
        assert storage.migrate() == []
        assert str(columns_of(server.url, name)) == str(before)


# -- newer, older -------------------------------------------------------------------------------


def test_an_older_version_goes_on_with_a_newer_schema(database: str) -> None:
    with opened(database) as storage:
        storage.write([make_record()])
        with connected(database) as connection:
            connection.exec_driver_sql("ALTER TABLE flask_usage ADD COLUMN from_the_future INTEGER")
            connection.exec_driver_sql("UPDATE flask_usage_schema SET version = 99")
        storage.write([make_record()])
    with opened(database) as storage:
        storage.write([make_record()])
        assert storage.count() == len(list(storage.records())) == 3
        assert storage.migrate() == []
    assert set(noted(database).values()) == {99}


def test_a_process_that_starts_does_not_look_at_tables_again(database: str) -> None:
    with opened(database) as storage:
        storage.write([make_record()])
    with opened(database) as storage:
        seen: list[str] = []
        engine = storage.database.reach().engine
        sa.event.listen(engine, "before_cursor_execute", lambda *event: seen.append(event[2]))
        storage.write([make_record()])
        statements = [
            statement
            for statement in seen
            if "flask_usage" in statement and "INSERT" not in statement
        ]
        assert len(statements) == 1
        assert "flask_usage_schema" in statements[0]


def test_a_table_of_an_earlier_version_gets_the_new_columns(database: str) -> None:
    added = ("utm_source", "utm_medium", "utm_campaign", "ref")
    with opened(database) as storage:
        storage.write([old := make_record(track_var={"a": 1}, username="ann")])
    if database.startswith("sqlite") and sqlite3.sqlite_version_info < (3, 35):
        pytest.skip("SQLite drops no columns")
    with connected(database) as connection:
        for name in added:
            connection.exec_driver_sql(f"ALTER TABLE flask_usage DROP COLUMN {name}")
        connection.exec_driver_sql(
            "UPDATE flask_usage_schema SET version = 1 WHERE component = 'records'"
        )
    with opened(database) as storage:
        new = make_record(utm_source="news", utm_medium="email", utm_campaign="é", ref="hn")
        storage.write([new])
        assert list(storage.records()) == [old, new]
        assert storage.count(utm_source=None) == storage.count(ref="hn") == 1
        assert storage.plan() == []
    assert noted(database)["records"] == VERSION


def test_components_have_versions_of_their_own(database: str) -> None:
    metadata = sa.MetaData()
    table = sa.Table("sums", metadata, sa.Column("what", KEY, primary_key=True))
    table.append_column(sa.Column("note", TEXT))
    index = Index("ix_sums_what", table, ("what",))
    with opened(database) as storage:
        storage.write([make_record()])
        dialect = storage.database.reach()
        records = storage.components()[0]
        both = Schema("flask_usage_schema", [records, Component("sums", 3, (table,), (index,))])
        assert both.ensure(dialect, create=True, wait_seconds=5)
        assert noted(database).items() >= {"records": VERSION, "sums": 3}.items()
        table.append_column(sa.Column("more", TEXT))
        later = Schema("flask_usage_schema", [records, Component("sums", 4, (table,), (index,))])
        assert later.ensure(dialect, create=True, wait_seconds=5)
        assert noted(database).items() >= {"records": VERSION, "sums": 4}.items()
        assert later.upgrade(dialect) == []
        # An older one meets it.
        assert both.ensure(dialect, create=True, wait_seconds=5)
        assert noted(database).items() >= {"records": VERSION, "sums": 4}.items()
    assert [column["name"] for column in columns_of(database, "sums")] == ["what", "note", "more"]


@pytest.mark.parametrize("loss", ["table", "column", "versions", "index"])
def test_what_somebody_drops_is_made_again(database: str, loss: str) -> None:
    with opened(database) as storage:
        storage.write([first := make_record(username="ann")])
        if loss == "index" and database.startswith("sqlite"):
            pytest.skip("SQLite inserts without it, too")
        statement = {
            "table": "DROP TABLE flask_usage",
            "column": "ALTER TABLE flask_usage DROP COLUMN referrer",
            "versions": "DROP TABLE flask_usage_schema",
            "index": "DROP INDEX ix_flask_usage_record_id"
            + (" ON flask_usage" if database.startswith("mysql") else ""),
        }[loss]
        if loss == "column" and database.startswith("sqlite"):
            connected_version = sa.create_engine("sqlite://").dialect.dbapi.sqlite_version_info
            if connected_version < (3, 35):
                pytest.skip("SQLite drops no columns")
        with connected(database) as connection:
            connection.exec_driver_sql(statement)
        storage.write([second := make_record(username="ann")])
        if loss == "index" and database.startswith("mysql"):
            # Nothing tells; a process that starts trusts the version.
            assert [step.changes for step in storage.migrate()] != []
        storage.write([second])
        expected = {"table": [second.id], "index": [first.id, second.id]}
        assert [record.id for record in storage.records(username="ann")] == expected.get(
            loss, [first.id, second.id]
        )


# -- what cannot be upgraded --------------------------------------------------------------------


def blocked(database: str, message: str) -> None:
    """Check that nothing can be written or read, and that it is said why."""
    with opened(database) as storage:
        for use in (
            lambda: storage.write([make_record()]),
            lambda: storage.count(),
            lambda: storage.plan(),
            lambda: storage.migrate(),
        ):
            with pytest.raises(StorageUnavailable, match=message):
                use()


def test_a_view_in_the_way_is_named(database: str) -> None:
    with connected(database) as connection:
        connection.exec_driver_sql("CREATE VIEW flask_usage AS SELECT 1 AS id")
    blocked(database, "flask_usage is a view, but must be a table")


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        (
            "tenant INTEGER NOT NULL",
            "tenant, which is not ours, must have a default or may be null",
        ),
        ("status VARCHAR(10)", "status is VARCHAR.*, but must be INTEGER"),
        ("url INTEGER", "url is INTEGER, but must be"),
        ("datetime VARCHAR(30)", "datetime is VARCHAR.*, but must be"),
        ("username VARCHAR(128) NOT NULL", "username must be allowed to be null"),
    ],
)
def test_a_foreign_column_is_named(database: str, declaration: str, message: str) -> None:
    name = declaration.split()[0]
    serial = {"sqlite": "INTEGER", "postgresql": "SERIAL", "mysql": "INTEGER AUTO_INCREMENT"}
    kind = serial[sa.make_url(database).get_backend_name()]
    with connected(database) as connection:
        other = "" if name == "path" else ", path VARCHAR(32)"
        connection.exec_driver_sql(
            f"CREATE TABLE flask_usage (id {kind} PRIMARY KEY, {declaration}{other})"
        )
    blocked(database, message)


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ("id INTEGER, path VARCHAR(32)", "id does not count up by itself"),
        ("path VARCHAR(32)", "id is missing"),
        ("id VARCHAR(36) PRIMARY KEY", "id is VARCHAR"),
    ],
)
def test_a_table_without_our_key_is_told(database: str, declaration: str, message: str) -> None:
    if database.startswith("sqlite") and declaration.startswith("id INTEGER"):
        pytest.skip("looks as it should to SQLAlchemy")
    with connected(database) as connection:
        connection.exec_driver_sql(f"CREATE TABLE flask_usage ({declaration})")
    blocked(database, message)


def test_foreign_columns_that_can_be_left_out_are_left_alone(database: str) -> None:
    make_old(database)
    with connected(database) as connection:
        for declaration in ("tenant INTEGER NOT NULL DEFAULT 7", "remark VARCHAR(20)"):
            connection.exec_driver_sql(f"ALTER TABLE flask_usage ADD COLUMN {declaration}")
    with opened(database) as storage:
        storage.write([make_record()])
        assert storage.count() == 4
    with connected(database) as connection:
        rows = connection.exec_driver_sql("SELECT DISTINCT tenant, remark FROM flask_usage").all()
    assert rows == [(7, None)]


def test_a_column_that_comes_later_and_must_be_filled_is_named_and_records_wait(
    database: str,
) -> None:
    with opened(database) as storage:
        storage.write([make_record()])
        with connected(database) as connection:
            connection.exec_driver_sql(
                "ALTER TABLE flask_usage ADD COLUMN tenant INTEGER NOT NULL DEFAULT 0"
            )
            if database.startswith("sqlite"):
                pytest.skip("SQLite drops no default")
            connection.exec_driver_sql("ALTER TABLE flask_usage ALTER COLUMN tenant DROP DEFAULT")
        with pytest.raises(StorageUnavailable, match="tenant, which is not ours"):
            storage.write([make_record()])
        with connected(database) as connection:
            connection.exec_driver_sql("ALTER TABLE flask_usage ALTER COLUMN tenant SET DEFAULT 0")
        storage.write([make_record()])
        assert storage.count() == 2


def test_a_view_that_keeps_postgresql_from_widening_is_told(postgresql: PostgreSQL) -> None:
    with postgresql.emptied() as url:
        make_old(url)
        with connected(url) as connection:
            connection.exec_driver_sql("CREATE VIEW urls AS SELECT url FROM flask_usage")
        with opened(url) as storage:
            with pytest.raises(StorageUnavailable, match="used by a view or rule"):
                storage.write([make_record()])
            with connected(url) as connection:
                connection.exec_driver_sql("DROP VIEW urls")
            storage.write([make_record(path=LONG)])
            assert storage.count() == 4


def test_who_may_only_read_can_read(postgresql: PostgreSQL) -> None:
    with postgresql.emptied() as url, opened(url) as storage:
        storage.write([make_record()])
        with connected(url) as connection:
            connection.exec_driver_sql("DROP TABLE flask_usage_schema")
            connection.exec_driver_sql("CREATE ROLE reader LOGIN")
            connection.exec_driver_sql("GRANT SELECT ON flask_usage TO reader")
        try:
            with opened(url.replace("postgres@", "reader@")) as reader:
                assert reader.count() == 1
                with pytest.raises(StorageUnavailable, match="permission denied"):
                    reader.write([make_record()])
        finally:
            with connected(url) as connection:
                connection.exec_driver_sql("DROP OWNED BY reader")
                connection.exec_driver_sql("DROP ROLE reader")


def test_a_table_somebody_holds_is_not_waited_for_long(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_usage_metrics.storage.sql.database.BUSY_SECONDS", 0.5)
    with server.emptied() as url:
        make_old(url)
        engine = sa.create_engine(url)
        with engine.connect() as holder, opened(url) as storage:
            holder.exec_driver_sql("SELECT count(*) FROM flask_usage")
            begin = time.monotonic()
            with pytest.raises(StorageUnavailable):
                storage.write([make_record()])
            assert time.monotonic() - begin < 40  # the servers' own limits are 50 s and more
            holder.rollback()
            storage.write([make_record()])
            assert storage.count() == 4
        engine.dispose()


@pytest.mark.usefixtures("_waits_as_long_as_it_takes")
def test_another_process_that_upgrades_is_waited_for(database: str) -> None:
    with opened(patient(database)) as storage:
        other = open_dialect(database)
        with other.connect() as connection:
            with other.lock(connection, "flask_usage_schema"):
                writer = threading.Thread(target=storage.write, args=([make_record()],))
                writer.start()
                time.sleep(0.3)
                assert writer.is_alive()
            writer.join()
        other.engine.dispose()
        assert storage.count() == 1


def test_a_lock_that_is_never_given_back_is_unavailable(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_usage_metrics.storage.sql.database.BUSY_SECONDS", 0.2)
    with server.storage() as storage:
        other = open_dialect(server.url)
        with (
            other.connect() as connection,
            other.lock(connection, f"{storage._table.name}_schema"),
            pytest.raises(StorageUnavailable),
        ):
            storage.write([make_record()])
        other.engine.dispose()
        storage.write([make_record()])
        assert storage.count() == 1


def test_an_exception_inside_a_lock_undoes_and_releases(database: str) -> None:
    with opened(database) as storage:
        storage.write([make_record()])
        dialect = storage.database.reach()
        with dialect.connect() as connection:
            with suppress(ZeroDivisionError), dialect.lock(connection, "mine"):
                connection.exec_driver_sql("DELETE FROM flask_usage")
                raise ZeroDivisionError
            with dialect.lock(connection, "mine", 0.5):
                pass
        assert storage.count() == 1


# -- many at once -------------------------------------------------------------------------------

WRITER = """
import sys
from helpers.records import make_record
from flask_usage_metrics.storage import open_storage
from flask_usage_metrics.storage.sql import database
database.BUSY_SECONDS = 120.0
storage = open_storage(sys.argv[1])
print("ready", flush=True)
sys.stdin.read()
for number in range(3):
    storage.write([make_record(id=f"{sys.argv[2]}-{number}-{row}") for row in range(20)])
storage.close()
"""


@pytest.fixture
def _waits_as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine others may need longer than the seconds an app would wait at a time."""
    monkeypatch.setattr("flask_usage_metrics.storage.sql.database.BUSY_SECONDS", 120.0)


def patient(url: str) -> str:
    """Return the URL of a database whose connections wait as long as it takes."""
    option = "timeout" if url.startswith("sqlite") else "connect_timeout"
    return f"{url}{'&' if '?' in url else '?'}{option}=120"


@pytest.mark.parametrize("old", [False, True], ids=["new", "old table"])
def test_several_processes_may_begin_at_once(database: str, old: bool) -> None:
    if old:
        make_old(database, "1.x")
    processes = [start_python(WRITER, patient(database), number) for number in range(4)]
    for process in processes:
        assert process.line() == "ready"
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
    assert [process.finish() for process in processes] == [(0, "", "")] * 4
    with opened(database) as storage:
        assert storage.count() == 4 * 3 * 20 + (3 if old else 0)
        assert storage.plan() == []


@pytest.mark.usefixtures("_waits_as_long_as_it_takes")
def test_threads_of_processes_begin_at_once_again_and_again(server: Server) -> None:
    for _ in range(5):
        with server.emptied() as url:
            storages = [SQLStorage.from_url(patient(url)) for _ in range(8)]
            barrier = threading.Barrier(len(storages))
            errors: list[BaseException] = []

            def begin(storage: SQLStorage) -> None:
                try:
                    barrier.wait()  # noqa: B023 - joined below
                    storage.write([make_record()])
                except BaseException as error:  # noqa: BLE001 - the test tells it
                    errors.append(error)  # noqa: B023 - joined below

            threads = [threading.Thread(target=begin, args=(each,)) for each in storages]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert errors == []
            assert storages[0].count() == 8
            for storage in storages:
                storage.close()


# -- the app's own Alembic ----------------------------------------------------------------------


def differences(url: str, metadata: sa.MetaData, **options: Any) -> Sequence[Any]:
    with connected(url) as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, **options})
        return compare_metadata(context, metadata)


def test_alembic_of_the_app_leaves_our_tables_alone(database: str) -> None:
    theirs = sa.MetaData()
    sa.Table("customer", theirs, sa.Column("id", sa.Integer, primary_key=True))
    with connected(database) as connection:
        theirs.create_all(connection)
    with opened(database) as storage:
        storage.write([make_record()])

    def include_name(name: str | None, kind: str, parents: Any) -> bool:
        return not (kind == "table" and name is not None and name.startswith("flask_usage"))

    dropped = {difference[0] for difference in differences(database, theirs)}
    assert "remove_table" in dropped
    assert differences(database, theirs, include_name=include_name) == []

    # If our tables are in the metadata, too, what is compared is objects.
    def include_object(it: Any, name: str | None, kind: str, *_: Any) -> bool:
        return include_name(name, kind, None)

    engine = sa.create_engine(database)
    SQLStorage(engine, theirs)
    engine.dispose()
    assert "flask_usage" in theirs.tables
    assert differences(database, theirs, include_object=include_object) == []


def test_our_table_in_the_metadata_of_the_app_is_known(database: str) -> None:
    theirs = sa.MetaData()
    engine = sa.create_engine(database)
    SQLStorage(engine, theirs)
    assert "record_id" in theirs.tables["flask_usage"].columns
    # As Flask-SQLAlchemy's create_all does, before anything is written.
    theirs.create_all(engine)
    storage = SQLStorage(engine, theirs)
    storage.write([record := make_record(path=LONG, username="ann")])
    storage.write([record])
    assert list(storage.records(username="ann")) == [record]
    assert storage.count(username="Ann") == 0
    assert record.started_at == START
    engine.dispose()


def test_open_storage_makes_tables_of_the_same_schema(mariadb: MariaDB) -> None:
    with mariadb.emptied() as url:
        storage = open_storage(url)
        storage.write([make_record()])
        storage.close()
        with connected(url) as connection:
            collations = connection.exec_driver_sql(
                "SELECT DISTINCT collation_name FROM information_schema.columns "
                "WHERE table_schema = DATABASE() AND collation_name IS NOT NULL"
            ).all()
        assert collations == [("utf8mb4_nopad_bin",)]
