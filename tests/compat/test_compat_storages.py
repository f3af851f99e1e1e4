"""Storages, hooks and the table, as code written for flask-track-usage uses them."""

from __future__ import annotations

import inspect
import io
import json
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from helpers.old_app import FIREFOX, Own, Shop, user

from flask_usage_metrics import TrackUsage
from flask_usage_metrics.storage import Storage, Writer
from flask_usage_metrics.storage.output import OutputWriter
from flask_usage_metrics.storage.printer import PrintStorage, PrintWriter
from flask_usage_metrics.storage.sql import SQLStorage

# -- storages that are written to ----------------------------------------------------------------


class Unwritable(io.StringIO):
    def writable(self) -> bool:
        return False


def test_print_writer_prints_the_dict(
    make_shop: Callable[..., Shop], capsys: pytest.CaptureFixture[str]
) -> None:
    assert PrintStorage is PrintWriter
    make_shop(PrintStorage()).get()
    assert "'path': '/'" in capsys.readouterr().out


def test_output_writer_writes_what_transform_makes_and_nothing_else(
    make_shop: Callable[..., Shop],
) -> None:
    output = io.StringIO()
    shop = make_shop(OutputWriter(output=output, transform=lambda data: f"[{data['path']}]"))
    shop.get()
    shop.get("/x")
    assert output.getvalue() == "[/][/x]"


def test_output_writer_has_str_and_standard_error_by_default(
    make_shop: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", output := io.StringIO())
    make_shop(OutputWriter()).get()
    assert "'path': '/'" in output.getvalue()


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: OutputWriter(output=object()), TypeError),
        (lambda: OutputWriter(output=Unwritable()), ValueError),
        (lambda: SQLStorage(), ValueError),
        (lambda: SQLStorage("sqlite://"), Exception),
    ],
)
def test_wrong_arguments_of_a_storage_raise(
    make: Callable[[], Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        make()


def test_the_constructors_take_the_same_arguments() -> None:
    taken = {
        kind: list(inspect.signature(kind.set_up).parameters)[1:]
        for kind in (SQLStorage, OutputWriter, PrintWriter)
    }
    assert taken[SQLStorage] == ["engine", "metadata", "table_name", "db", "hooks"]
    assert taken[OutputWriter] == ["output", "transform"]


def test_a_subclass_of_storage_is_set_up_stores_and_reads(make_shop: Callable[..., Shop]) -> None:
    own = Own(3, step=2)
    assert own.arguments == (3, 2)
    make_shop(own).get()
    moment = datetime(2018, 1, 1)  # noqa: DTZ001 - as they had it
    assert [item["path"] for item in own.get_usage(moment, None, 5, page=2)] == ["/"]
    assert own.arguments == (moment, None, 5, 2)


@pytest.mark.parametrize("wrong", [(), None, ["x"], [{}, None]])
def test_a_subclass_that_returns_no_list_of_dicts_is_told(wrong: Any) -> None:
    own = Own(3)
    own.items = wrong
    with pytest.raises(TypeError, match=r"^Own\._get_usage must return a list of dicts$"):
        own.get_usage()


def test_a_subclass_of_writer_needs_only_store(make_shop: Callable[..., Shop]) -> None:
    paths: list[str] = []

    class Paths(Writer):
        def store(self, data: dict[str, Any]) -> None:
            paths.append(data["path"])

    make_shop(Paths()).get()
    assert paths == ["/"]
    Paths()({"path": "/by hand"})
    assert paths == ["/", "/by hand"]


@pytest.mark.parametrize("base", [Storage, Writer])
def test_a_subclass_without_its_methods_is_not_implemented(base: type[Writer]) -> None:
    with pytest.raises(NotImplementedError):
        base().store({})
    with pytest.raises(NotImplementedError):
        base()({})
    if base is Storage:
        with pytest.raises(NotImplementedError):
            Storage().get_usage()


def test_a_storage_is_called_with_a_record_and_returns_it(
    make_storage: Callable[..., Storage], make_shop: Callable[..., Shop]
) -> None:
    storage = make_storage()
    shop = make_shop(lambda data: storage(data))
    shop.get()
    [item] = storage.get_usage()
    assert item["path"] == "/"
    data = {"url": "http://h/x", "path": "/x", "status": 200, "date": 0}
    assert storage(data) is data
    assert len(storage.get_usage()) == 2


# -- the table -----------------------------------------------------------------------------------


COLUMNS = [
    *("id", "url", "ua_browser", "ua_language", "ua_platform", "ua_version", "blueprint"),
    *("view_args", "status", "remote_addr", "xforwardedfor", "authorization", "ip_info", "path"),
    *("speed", "datetime", "username", "track_var"),
]


@pytest.mark.parametrize("table_name", ["flask_usage", "my_usage"])
def test_the_table_has_its_name_and_columns_in_order(
    table_name: str, engine: sa.Engine, make_shop: Callable[..., Shop]
) -> None:
    metadata = sa.MetaData()
    storage = SQLStorage(engine=engine, metadata=metadata, table_name=table_name)
    make_shop(storage).get()
    assert [column["name"] for column in sa.inspect(engine).get_columns(table_name)][
        : len(COLUMNS)
    ] == COLUMNS
    assert storage.table_name == table_name
    assert metadata.tables[table_name] is storage.track_table


def test_ones_own_sql_reads_what_it_read(engine: sa.Engine, make_shop: Callable[..., Shop]) -> None:
    shop = make_shop(storage := SQLStorage(engine))
    shop.app.add_url_rule("/user/<name>", "user", user)
    shop.get("/user/ann", headers={"User-Agent": FIREFOX}, auth=("ann", "x"))
    with engine.connect() as connection:
        row = connection.execute(sa.select(storage.track_table)).mappings().one()
    assert type(row["datetime"]) is datetime
    assert row["datetime"].tzinfo is None
    assert type(row["speed"]) is float
    assert (row["id"], row["url"], row["path"]) == (1, "http://localhost/user/ann", "/user/ann")
    assert (row["status"], row["remote_addr"], row["blueprint"]) == (200, "127.0.0.1", None)
    assert (row["authorization"], row["username"]) == (True, "ann")
    assert json.loads(row["view_args"]) == {"name": "ann"}
    assert json.loads(row["track_var"]) == {"plan": "free"}
    assert (row["ip_info"], row["xforwardedfor"], row["ua_language"]) == (None, None, None)


def test_a_model_of_ones_own_may_declare_the_table(
    make_shop: Callable[..., Shop], tmp_path: Path
) -> None:
    db = SQLAlchemy()
    shop = make_shop()
    app = Flask("blog", instance_path=str(tmp_path))
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path}/blog.sqlite3"
    app.config["TRACK_USAGE_DELIVERY"] = "inline"
    db.init_app(app)

    class Usage(db.Model):  # type: ignore[name-defined, misc]
        __tablename__ = "flask_usage"
        id = db.Column(db.Integer, primary_key=True)
        url = db.Column(db.String(128))
        status = db.Column(db.Integer)

    with app.app_context():
        db.create_all()
        usage = TrackUsage()
        usage.init_app(app, [SQLStorage(db=db), shop.kept])
        app.test_client().get("/nowhere")
        found = db.session.execute(db.select(Usage)).scalar_one()
        assert (found.url, found.status) == ("http://localhost/nowhere", 404)
        assert usage.storage.get_usage()[0]["url"] == found.url
        db.session.remove()
        db.engine.dispose()
    usage.close()


# -- hooks ---------------------------------------------------------------------------------------


class Hook:
    """As its documentation of hooks has them."""

    seen: ClassVar[list[Any]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def set_up(self, **kwargs: Any) -> None:
        self.seen.append(kwargs["_parent_class_name"])

    def __call__(self, **data: Any) -> None:
        self.seen.append((data["_parent_self"].get_usage()[0]["path"], data["path"]))


def hook_function(**data: Any) -> None:
    Hook.seen.append((data["_parent_self"].get_usage()[0]["path"], data["path"]))


@pytest.mark.parametrize("make", [lambda: Hook, Hook, lambda: hook_function])
def test_a_hook_is_set_up_and_called_once_the_record_is_kept(
    make: Callable[[], Any], make_storage: Callable[..., Storage], make_shop: Callable[..., Shop]
) -> None:
    Hook.seen.clear()
    hook = make()
    shop = make_shop(storage := make_storage(hooks=[hook]))
    shop.get("/x")
    expected: list[Any] = [] if hook is hook_function else [type(storage).__name__]
    assert Hook.seen == [*expected, ("/x", "/x")]
    storage({"path": "/y", "date": 2_000_000_000})
    assert Hook.seen[len(expected) + 1 :] == [("/y", "/y")]


@pytest.mark.parametrize("make", [PrintWriter, lambda **kwargs: Own(1, **kwargs)])
def test_every_base_takes_hooks(
    make: Callable[..., Writer], make_shop: Callable[..., Shop]
) -> None:
    seen: list[str] = []

    def hook(**data: Any) -> None:
        seen.append(data["_parent_class_name"])

    storage = make(hooks=[hook])
    make_shop(storage).get()
    assert seen == [type(storage).__name__]
