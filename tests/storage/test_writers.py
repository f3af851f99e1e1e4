"""Storages that are only written to, what may be given as a storage, and the base classes."""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from helpers.front_door import Site
from helpers.records import START, make_record, make_records
from storage_contract import KEYS_OF_FLASK_TRACK_USAGE

from flask_usage_metrics.errors import ConfigError, RecordsRejected
from flask_usage_metrics.records.query import Every, Filter, Order
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.records.summary import Summary, summarize_records
from flask_usage_metrics.storage import Storage, Writer, as_writer, open_storage
from flask_usage_metrics.storage.compat import UserAgent
from flask_usage_metrics.storage.jsonl import JSONLinesStorage
from flask_usage_metrics.storage.output import OutputWriter
from flask_usage_metrics.storage.printer import PrintStorage, PrintWriter
from flask_usage_metrics.storage.sql import SQLStorage
from flask_usage_metrics.storage.writer import CallableWriter

# -- print --------------------------------------------------------------------------------------


def test_print_writer_prints_the_dict_of_each_record(capsys: pytest.CaptureFixture[str]) -> None:
    PrintWriter().write(make_records(2))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "'path': '/user/ann'" in lines[0]
    assert "'user_agent': <UserAgent 'Chrome'/'126'>" in lines[0]
    assert PrintStorage is PrintWriter


@pytest.mark.parametrize("closed", [True, False])
def test_a_broken_standard_output_is_counted(closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    broken = io.StringIO() if closed else Broken()
    if closed:
        broken.close()
    monkeypatch.setattr(sys, "stdout", broken)
    with pytest.raises(RecordsRejected) as caught:
        PrintWriter().write(make_records(3))
    assert list(caught.value.positions) == [0, 1, 2]


# -- output -------------------------------------------------------------------------------------


def test_output_writer_writes_what_transform_makes_of_it() -> None:
    class Output(io.StringIO):
        flushed = 0

        def flush(self) -> None:
            self.flushed += 1

    output = Output()
    OutputWriter(output, transform=lambda data: f"{data['path']};").write(make_records(2))
    assert output.getvalue() == "/user/ann;/user/ann;"
    assert output.flushed == 2


def test_output_writer_takes_the_standard_error_of_the_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    writer = OutputWriter()
    monkeypatch.setattr(sys, "stderr", later := io.StringIO())
    writer.write([make_record()])
    assert later.getvalue().startswith("{'id': '019aa5c0")


def test_output_writer_refuses_what_cannot_be_written_to(tmp_path: Path) -> None:
    for wrong in (object(), 5, "name"):
        with pytest.raises(TypeError, match="must have write and writable"):
            OutputWriter(wrong)
    (tmp_path / "x").write_text("")
    with (tmp_path / "x").open() as readable, pytest.raises(ValueError, match="open for writing"):
        OutputWriter(output=readable)


# -- callables ----------------------------------------------------------------------------------


def test_a_callable_gets_a_fresh_dict_a_record_with_all_keys() -> None:
    seen: list[dict[str, Any]] = []
    record = make_record(view_args={"a": [1]}, query="q=1&q=2&empty=")
    for writer in (CallableWriter(seen.append), CallableWriter(seen.append)):
        writer.write([record])
        seen[0]["view_args"]["a"].append("changed")
        seen[0]["more"] = 1
    second = seen[1]
    assert set(second) >= KEYS_OF_FLASK_TRACK_USAGE
    assert set(type(record).__struct_fields__) <= set(second)
    assert "more" not in second
    assert second["view_args"] == {"a": [1]}
    assert record.view_args == {"a": [1]}
    assert second["url_args"] == {"q": "1", "empty": ""}
    assert second["date"] == int(START.timestamp())
    assert second["request"] == f"GET {record.url} HTTP/1.1"
    assert second["server_name"] == "shop"
    agent = second["user_agent"]
    assert isinstance(agent, UserAgent)
    assert str(agent) == agent.string == record.user_agent
    assert (agent.browser, agent.version, agent.platform, agent.language) == (
        "Chrome",
        "126",
        "Linux",
        "de-DE",
    )


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, StopIteration])
def test_a_callable_that_raises_loses_only_its_record(error: type[BaseException]) -> None:
    kept: list[str] = []

    def picky(data: dict[str, Any]) -> None:
        if data["status"] == 500:
            raise error
        kept.append(data["id"])

    records = [make_record(status=status) for status in (200, 500, 200, 500)]
    with pytest.raises(RecordsRejected) as caught:
        CallableWriter(picky).write(records)
    assert list(caught.value.positions) == [1, 3]
    assert caught.value.reason == error.__name__
    assert kept == [records[0].id, records[2].id]


def test_the_name_of_a_callable_is_short_and_printable() -> None:
    def function(data: dict[str, Any]) -> None: ...

    assert CallableWriter(function).name == "function"
    assert CallableWriter(lambda data: None).name == "<lambda>"
    assert CallableWriter(functools.partial(function)).name == "partial"
    assert CallableWriter([].append).name == "append"
    function.__name__ = "odd\n" + "x" * 100
    assert CallableWriter(function).name == "odd_" + "x" * 60


# -- subclasses ---------------------------------------------------------------------------------


class Remembering(Storage):
    """As written for flask-track-usage: nothing but these three methods."""

    def set_up(self, start: int, *, step: int = 1) -> None:
        self.items: list[dict[str, Any]] = []
        self.start, self.step = start, step

    def store(self, data: dict[str, Any]) -> None:
        self.items.append(data)

    def _get_usage(
        self,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
        limit: int = 500,
        page: int = 1,
    ) -> list[dict[str, Any]]:
        return self.items[:limit]


def test_a_subclass_written_for_flask_track_usage_works() -> None:
    storage = Remembering(3, step=2)
    assert (storage.start, storage.step) == (3, 2)
    storage.write(make_records(2))
    assert [item["path"] for item in storage.get_usage(limit=1)] == ["/user/ann"]
    storage(storage.items[0])
    assert len(storage.items) == 3
    with pytest.raises(NotImplementedError, match=r"Remembering does not offer records\(\)"):
        next(iter(storage.records()))
    with pytest.raises(NotImplementedError, match=r"Remembering does not offer prune\(\)"):
        storage.prune(START)
    with pytest.raises(NotImplementedError, match=r"Remembering does not offer erase\(\)"):
        storage.erase(username="ann")
    with pytest.raises(ValueError, match="username must not be None"):
        storage.erase(username=None)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match=r"Remembering does not offer records\(\)"):
        storage.get_sum("sumVisitor")


class Adding(Storage):
    """As written before there were visitors: reads by `select`, adds up by an own `aggregate`."""

    def __init__(self) -> None:
        """Without calling the base class."""
        self.kept: list[UsageRecord] = []

    def write(self, batch: Sequence[UsageRecord]) -> None:
        self.kept.extend(batch)

    def select(self, wanted: Filter, order: Order, limit: int | None) -> Iterator[UsageRecord]:
        assert limit is None
        return (record for record in self.kept if wanted.matches(record))

    def aggregate(  # type: ignore[override]
        self, wanted: Filter, fields: Sequence[str], every: Every | None
    ) -> list[Summary]:
        records = self.select(wanted, "oldest", None)
        return summarize_records(records, fields, every, self.bounds)


def test_a_storage_that_adds_up_by_itself_need_not_know_of_visitors() -> None:
    storage = Adding()
    storage.write([make_record(visitor="v"), make_record(visitor="w", remote_addr="2001:db8::1")])
    [summary] = storage.summarize(())
    assert (summary.requests, summary.visitors) == (2, None)
    assert storage.summarize((), remote_addr="2001:DB8::1", visitors=False)[0].requests == 1
    assert [row["visitor"] for row in storage.get_sum("sumVisitor")["hour"]] == ["v", "w"]
    with pytest.raises(TypeError, match="visitors"):
        storage.summarize((), visitors=True)


def test_an_app_configures_storages_that_do_not_call_our_constructor(
    make_site: Callable[..., Site],
) -> None:
    adding, remembering = Adding(), Remembering(3)
    site = make_site([adding, remembering], BUCKETS=(0.5, 1.0), PRIVACY="strict")
    for storage in (adding, remembering):
        assert storage.bounds == (0.5, 1.0)
        assert storage.pseudonyms is not None
        assert storage.wanted(None, None, {"username": "ann"}).any_of["username"][1:]
    assert Adding().bounds == Storage.bounds
    assert Adding().pseudonyms is None
    site.get("/")
    assert site.usage.flush()
    assert len(adding.kept) == len(remembering.items) == 1


def test_a_storage_without_a_name_is_named_after_its_class() -> None:
    class Own(Remembering):
        def __init__(self) -> None:
            """Without calling the base class."""

    class Named(Own):
        name = "mine"

    class Further(Named):
        pass

    assert Remembering(1).name == "remembering"
    assert Own().name == "own"
    assert Named().name == Further().name == "mine"
    named = Own()
    named.name = "this one"
    assert (named.name, Own().name) == ("this one", "own")


def test_a_writer_that_overrides_nothing_says_so() -> None:
    with pytest.raises(RecordsRejected) as caught:
        Writer().write([make_record()])
    assert caught.value.reason == "NotImplementedError"


# -- what is given as a storage -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "kind", "name"),
    [
        ("print:", PrintWriter, "print"),
        ("PRINT://", PrintWriter, "print"),
        ("sqlite:///usage.sqlite3", SQLStorage, "sqlite"),
        ("sqlite://", SQLStorage, "sqlite"),
        ("sqlite+pysqlite:////tmp/usage.sqlite3", SQLStorage, "sqlite"),
        ("jsonl:///usage.jsonl", JSONLinesStorage, "jsonl"),
    ],
)
def test_a_url_names_a_storage(
    url: str, kind: type, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for storage in (open_storage(url), as_writer(url, "storage")):
        assert type(storage) is kind
        assert storage.name == name
        storage.close()
    assert list(tmp_path.iterdir()) == []


def test_three_slashes_are_relative_and_four_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in ("sqlite", "jsonl"):
        for url in (f"{kind}:///a/relative.{kind}", f"{kind}:///{tmp_path}/b/absolute.{kind}"):
            storage = open_storage(url)
            storage.write([make_record()])
            storage.close()
        assert (tmp_path / f"a/relative.{kind}").exists()
        assert (tmp_path / f"b/absolute.{kind}").exists()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "usage.sqlite3",
        "/s3cret/file",
        "s3cret",
        "oracle+oracledb://me:s3cret@db/x",
        "mssql+pyodbc://me:s3cret@db/x",
        "redis://:s3cret@db",
        "mongodb://me:s3cret@db/x",
        "couchdb://me:s3cret@db/x",
        "clickhouse://me:s3cret@db/x",
        "http://me:s3cret@db/x",
        "sqlite://me:s3cret@db/x",
        "sqlite:s3cret",
        "sqlite3:///s3cret",
        "jsonl:s3cret",
        "jsonl://s3cret",
        "jsonl:///",
        "print:s3cret",
        "print:///s3cret",
    ],
)
def test_any_other_url_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^storage URL") as opened:
        open_storage(url)
    with pytest.raises(ConfigError, match=r"^TRACK_USAGE_STORAGE") as configured:
        as_writer(url, "TRACK_USAGE_STORAGE")
    for caught in (opened, configured):
        assert "s3cret" not in str(caught.value)
        assert ":///" in str(caught.value)


def test_as_writer_takes_a_storage_or_a_callable() -> None:
    storage = PrintWriter()
    assert as_writer(storage, "storage") is storage
    assert isinstance(as_writer(print, "storage"), CallableWriter)
    assert as_writer(print, "storage").name == "print"


@pytest.mark.parametrize("given", [None, 5, b"print:", {}, [print]])
def test_as_writer_says_what_it_expects(given: Any) -> None:
    with pytest.raises(
        ConfigError,
        match="^storage must be a URL, a storage, a callable or a list of these, "
        f"not {type(given).__name__}$",
    ):
        as_writer(given, "storage")


def test_a_class_instead_of_a_storage_gets_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"not the class PrintWriter: .*PrintWriter\(\.\.\.\)"):
        as_writer(PrintWriter, "TRACK_USAGE_STORAGE")


def test_a_storage_of_the_app_may_have_a_method_configure_of_its_own(
    make_site: Callable[..., Site],
) -> None:
    class Own(Remembering):
        def configure(self, host: str) -> None:
            raise AssertionError(host)

    site = make_site(storage=Own(3), BUCKETS=(1.0, 2.0))
    assert site.usage.storage.bounds == (1.0, 2.0)
