"""flask-track-usage's hooks: sums by each of their names, and functions called for each record.

What `get_sum` returns is in the contract of storages.
"""

from __future__ import annotations

import functools
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from helpers.front_door import Site
from helpers.process import Process, start_python
from helpers.records import make_record, make_records
from storage_contract import SUMS

from flask_usage_metrics import StorageUnavailable, UsageRecord, summarization
from flask_usage_metrics.errors import ConfigError, RecordsRejected
from flask_usage_metrics.storage import Storage, Writer
from flask_usage_metrics.storage.compat import as_dict
from flask_usage_metrics.storage.jsonl import JSONLinesStorage
from flask_usage_metrics.storage.printer import PrintStorage
from flask_usage_metrics.storage.sql import SQLStorage
from flask_usage_metrics.summarization import Summation, find_summation, sumGeo, sumUrl, sumUrls

# In flask-track-usage's code, in its documentation, and what people may make of these.
NAMES = {
    "sumUrl": ["sumUrl", "sumUrls"],
    "sumRemote": ["sumRemote", "sumRemotes"],
    "sumUserAgent": ["sumUserAgent", "sumUserAgents"],
    "sumLanguage": ["sumLanguage", "sumLanguages", "sumLanugages"],
    "sumServer": ["sumServer", "sumServers"],
    "sumVisitor": ["sumVisitor", "sumVisitors"],
    "sumGeo": ["sumGeo", "sumGeos"],
}


class Own(Storage):
    """As written for flask-track-usage: nothing but these three methods."""

    def set_up(self, kind: str = "list") -> None:
        self.kind = kind
        self.items: list[dict[str, Any]] = []

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


class Failing(Own):
    """Keeps records, and fails in a way of its own."""

    name = "failing"

    def set_up(self, fail: Callable[[Sequence[UsageRecord]], object]) -> None:
        super().set_up()
        self.fail = fail

    def write(self, batch: Sequence[UsageRecord]) -> None:
        self.fail(batch)
        super().write(batch)


@pytest.fixture(params=["sqlite", "jsonl", "own"])
def make_storage(request: Any, tmp_path: Path) -> Iterator[Callable[..., Storage]]:
    """Make storages of a kind, of one place."""
    engine = sa.create_engine(f"sqlite:///{tmp_path}/usage.sqlite3")

    def make(**options: Any) -> Storage:
        if request.param == "sqlite":
            return SQLStorage(engine, **options)
        if request.param == "jsonl":
            return JSONLinesStorage(tmp_path / "usage.jsonl", **options)
        return Own(kind="set", **options)

    yield make
    engine.dispose()


def visit(site: Site, count: int, path: str = "/nowhere") -> None:
    for _ in range(count):
        assert site.get(path).status_code == 404


def kept(storage: Storage) -> list[str]:
    return sorted(item["path"] for item in storage.get_usage())


# -- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "names"), NAMES.items())
def test_every_documented_name_is_its_sum(name: str, names: list[str]) -> None:
    [(field, key)] = [(field, key) for known, field, key in SUMS if known == name]
    for written in names:
        summation = getattr(summarization, written)
        assert (summation.name, summation.field) == (name, field)
        assert (summation.key or summation.field) == key
        assert find_summation(written) is summation
        assert find_summation(summation) is summation


# -- what may be given as hooks -----------------------------------------------------------------


def test_sums_and_functions_are_hooks(make_storage: Callable[..., Storage]) -> None:
    def function(**data: Any) -> None: ...

    every_name = [name for names in NAMES.values() for name in names]
    for hooks in (
        None,
        [],
        sumUrl,
        "sumUrls",
        function,
        functools.partial(function, more=1),
        [sumUrl, function, "sumLanugages"],
        (sumUrls, sumGeo),
        {"sumVisitor"},
        every_name,
        [getattr(summarization, name) for name in every_name],
    ):
        make_storage(hooks=hooks)


def test_hooks_of_a_storage_are_its_last_argument(tmp_path: Path) -> None:
    """As `SQLStorage(engine, metadata, table_name, db, hooks)`."""

    class Old(Own):
        def set_up(  # type: ignore[override]
            self, engine: str, metadata: Any = None, hooks: Any = None
        ) -> None:
            super().set_up()
            self.given = (engine, metadata, hooks)

    seen: list[str] = []

    def hook(**data: Any) -> None:
        seen.append(data["id"])

    for storage in (Old("e", None, [sumUrl, hook]), Old(engine="e", hooks=[sumUrl, hook])):
        assert storage.given == ("e", None, [sumUrl, hook])
        storage.call_hooks([make_record(id="x")], pytest.fail)
    assert seen == ["x", "x"]
    with pytest.raises(ConfigError):
        Old("e", None, "sumUrlz")
    with pytest.raises(TypeError, match="engine"):
        Old(hooks=hook)


def test_hooks_of_the_sql_storage_may_be_given_by_position() -> None:
    seen: list[str] = []

    def hook(**data: Any) -> None:
        seen.append(data["id"])

    engine = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool)
    storage = SQLStorage(engine, None, "usage_of_shop", None, [sumUrl, hook])
    assert isinstance(storage, SQLStorage)
    storage.call_hooks([make_record(id="x")], pytest.fail)
    assert seen == ["x"]
    engine.dispose()


class Instance:
    def __call__(self, **data: Any) -> None: ...


class Arguments:
    def __init__(self, **kwargs: Any) -> None: ...


class OddlySetUp(Instance):
    def set_up(self, storage: Storage) -> None: ...


async def coroutine(**data: Any) -> None: ...


@functools.wraps(coroutine)
def decorated(*_: Any, **data: Any) -> None: ...


def strict(url: str, status: int) -> None: ...


@functools.wraps(strict)
def lenient(url: str, **others: Any) -> None: ...


def hello_world(*kwargs: Any) -> None: ...


@pytest.mark.parametrize("hook", [Instance(), lenient, {}.update, decorated])
def test_what_can_be_called_with_a_record_is_a_hook(hook: Any) -> None:
    Own(hooks=[hook])


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (
            "sumUrlz",
            "^hooks: there is no sum 'sumUrlz': expected sumUrl, .*, sumGeo, or a function",
        ),
        ("", "^hooks: there is no sum ''"),
        (Summation("sumUrl", "path"), "^hooks: there is no sum Summation"),
        (5, r"^hooks must be sums \(sumUrl, .*sumGeo\), .* or functions.* not int$"),
        ([None], "not NoneType$"),
        ([["sumUrl"]], "not list$"),
        ({"sumUrl": 1}, "not dict$"),
        (Instance, r"^hooks: Instance must be like class Instance: def __init__\(self, \*\*kwargs"),
        (Summation, "hooks: Summation must be like class Summation"),
        (dict, r"^hooks must be sums .* not dict$"),
        (Arguments, r"^hooks must be sums .* not Arguments$"),
        (OddlySetUp(), r"^hooks: OddlySetUp\.set_up must be like def set_up\(self, \*\*kwargs\)$"),
        (strict, r"^hooks: strict must be like def strict\(\*\*data\)$"),
        (hello_world, r"must be like def hello_world\(\*\*data\)"),
        (lambda data: None, r"must be like def <lambda>\(\*\*data\)"),
        (coroutine, "hooks: coroutine must be like"),
        (functools.partial(strict), "hooks: partial must be like"),
        (len, r"len must be like def len\(\*\*data\)"),
    ],
)
def test_what_is_no_hook_is_refused_at_once(
    hook: Any, message: str, make_storage: Callable[..., Storage]
) -> None:
    for hooks in [hook] if isinstance(hook, list) else [hook, [sumUrl, hook]]:
        with pytest.raises(ConfigError, match=message):
            make_storage(hooks=hooks)


def test_what_cannot_be_read_has_no_sums(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"^hooks: PrintWriter cannot be read, so .* sumUrl of"):
        PrintStorage(hooks=["sumUrls"])
    seen: list[str] = []

    def hook(**data: Any) -> None:
        seen.append(data["_parent_class_name"])

    PrintStorage(hooks=hook).call_hooks(make_records(2), pytest.fail)
    assert seen == ["PrintWriter", "PrintWriter"]


# -- classes and instances ----------------------------------------------------------------------


class Counting:
    """A hook as flask-track-usage has them: given as a class, or as an instance of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.events: list[Any] = [("made", args, kwargs)]

    def set_up(self, **kwargs: Any) -> None:
        self.storage: Storage = kwargs["_parent_self"]
        self.events.append(("set up", kwargs["_parent_class_name"], kwargs))

    def __call__(self, **data: Any) -> None:
        self.events.append((data["_parent_class_name"], data["_parent_self"], data["path"]))


def test_a_class_is_made_an_instance_and_set_up_then_called(
    make_storage: Callable[..., Storage], make_site: Callable[..., Site]
) -> None:
    made: list[Counting] = []

    class Known(Counting):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    instance = Counting()
    hooks = [Known, instance, sumUrls]
    storage = make_storage(hooks=hooks)
    own = {"kind": "set"} if isinstance(storage, Own) else {}
    parent = {"_parent_class_name": type(storage).__name__, "_parent_self": storage}
    arguments = {**own, "hooks": hooks, **parent}
    [hook] = made
    assert hook.events == [
        ("made", (), arguments),
        ("set up", type(storage).__name__, arguments),
    ]
    assert instance.events == [("made", (), {}), hook.events[1]]
    site = make_site(storage)
    visit(site, 2)
    assert site.usage.flush()
    for each in (hook, instance):
        assert each.storage is storage
        assert each.events[2:] == [(type(storage).__name__, storage, "/nowhere")] * 2


def test_hooks_are_set_up_when_all_are_made_and_the_storage_is_set_up() -> None:
    events: list[str] = []

    class Noting:
        def __init__(self, **kwargs: Any) -> None:
            events.append(f"made for {kwargs['_parent_self'].kind}")

        def set_up(self, **kwargs: Any) -> None:
            events.append("set up")

        def __call__(self, **data: Any) -> None: ...

    Own(kind="set", hooks=[Noting, Noting])
    assert events == ["made for set"] * 2 + ["set up"] * 2


def test_what_the_set_up_of_a_hook_raises_is_raised() -> None:
    class Unhappy(Counting):
        def set_up(self, **kwargs: Any) -> None:
            raise LookupError("no table of sums")

    with pytest.raises(LookupError, match="no table of sums"):
        Own(hooks=[Unhappy])


def test_a_storage_that_is_called_keeps_the_dict_then_calls_its_hooks(
    make_storage: Callable[..., Storage],
) -> None:
    calls: list[dict[str, Any]] = []

    def hook(**data: Any) -> None:
        assert kept(storage) == ["/x"]
        calls.append(data)

    def broken(**data: Any) -> None:
        raise LookupError

    storage = make_storage(hooks=[hook, broken])
    data = {"path": "/x", "mine": 1}
    with pytest.raises(LookupError):
        storage(data)
    parent = {"_parent_class_name": type(storage).__name__, "_parent_self": storage}
    assert calls == [{"path": "/x", "mine": 1, **parent}]
    assert data == {"path": "/x", "mine": 1}


def test_a_hook_and_a_function_may_pass_records_on_to_other_storages(
    tmp_path: Path, make_site: Callable[..., Site]
) -> None:
    copies = [JSONLinesStorage(tmp_path / f"{name}.jsonl") for name in ("hook", "function")]

    def hook(**data: Any) -> None:
        copies[0](data)

    first = JSONLinesStorage(tmp_path / "first.jsonl", hooks=hook)
    site = make_site([first, lambda data: copies[1](data)])
    visit(site, 3)
    records = site.records()
    assert len(records) == 3
    for copy in copies:
        assert list(copy.records()) == records
    assert site.faults() == {}


def test_an_instance_of_a_sum_is_the_sum() -> None:
    assert sumUrl() is sumUrl
    Own(hooks=[sumUrl(), sumGeo()])


# -- what functions are called with -------------------------------------------------------------


def test_a_function_is_called_once_a_record_after_it_was_kept(
    make_storage: Callable[..., Storage], make_site: Callable[..., Site]
) -> None:
    calls: list[dict[str, Any]] = []
    threads: set[str] = set()

    def hook(**data: Any) -> None:
        assert data["path"] in kept(storage)
        threads.add(threading.current_thread().name)
        calls.append(data)

    storage = make_storage(hooks=hook)
    site = make_site(storage)
    for number in range(20):
        visit(site, 1, f"/{number}")
    assert site.usage.flush()
    assert kept(storage) == sorted(data["path"] for data in calls)
    assert len(calls) == len({data["id"] for data in calls}) == 20
    assert threads == {f"flask_usage_metrics {storage.name}"}
    assert site.faults() == {}


def test_each_call_gets_a_dict_of_its_own_as_flask_track_usage_made_it() -> None:
    calls: list[dict[str, Any]] = []

    def spoil(**data: Any) -> None:
        data["track_var"]["a"].append("spoiled")
        data.clear()

    def hook(**data: Any) -> None:
        calls.append(data)

    storage = Own(hooks=[spoil, hook])
    record = make_record(track_var={"a": [1]})
    storage.call_hooks([record], pytest.fail)
    [data] = calls
    assert data.pop("_parent_class_name") == "Own"
    assert data.pop("_parent_self") is storage
    expected = as_dict(record)
    assert str(data.pop("user_agent")) == str(expected.pop("user_agent")) == record.user_agent
    assert data == expected
    assert record.track_var == {"a": [1]}
    assert (storage.kind, storage.items) == ("list", [])


def test_records_and_hooks_keep_their_order() -> None:
    calls: list[tuple[str, str]] = []
    storage = Own(
        hooks=[
            lambda **data: calls.append(("first", data["id"])),
            sumUrl,
            lambda **data: calls.append(("second", data["id"])),
        ]
    )
    records = make_records(2)
    storage.call_hooks(records, pytest.fail)
    assert calls == [(hook, record.id) for record in records for hook in ("first", "second")]


def test_a_storage_that_does_not_call_our_constructor_has_no_hooks() -> None:
    class Bare(Writer):
        def __init__(self) -> None:
            """Without calling the base class."""

    Bare().call_hooks(make_records(1), pytest.fail)


# -- functions that fail ------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_hook_that_raises_harms_neither_record_nor_other_hooks(
    error: type[BaseException],
    make_storage: Callable[..., Storage],
    make_site: Callable[..., Site],
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[str] = []

    def broken(**data: Any) -> None:
        raise error("secret-token")

    def sound(**data: Any) -> None:
        seen.append(data["path"])

    storage = make_storage(hooks=[broken, sound])
    site = make_site(storage)
    visit(site, 20)
    assert site.usage.flush()
    assert kept(storage) == seen == ["/nowhere"] * 20
    assert site.account(storage.name) == {"written": 20, "failed": 0, "dropped": 0, "pending": 0}
    assert site.samples("flask_usage_sink_up")[(("sink", storage.name),)] == 1
    assert site.faults() == {"hook broken": 20}
    assert [message for message in caplog.messages if "hook" in message] == [
        f"hook broken: {error.__name__}; the record is kept all the same; mend the hook"
    ]
    assert "secret-token" not in caplog.text


def test_records_that_were_refused_are_given_to_no_hook(make_site: Callable[..., Site]) -> None:
    seen: list[str] = []

    class Picky(Own):
        def store(self, data: dict[str, Any]) -> None:
            if data["path"] == "/poison":
                raise ValueError
            super().store(data)

    storage = Picky(hooks=lambda **data: seen.append(data["path"]))
    site = make_site(storage)
    for path in ("/a", "/poison", "/b", "/poison", "/c"):
        visit(site, 1, path)
    assert site.usage.flush()
    assert seen == ["/a", "/b", "/c"] == kept(storage)
    assert site.account("picky") == {"written": 3, "failed": 2, "dropped": 0, "pending": 0}


@pytest.mark.parametrize("positions", [[0], [0, 0, 7, -1], [], [0, 1, 2], [True]])
def test_only_positions_in_the_batch_are_refused(
    positions: list[int], make_site: Callable[..., Site]
) -> None:
    seen: list[str] = []

    def refuse(batch: Sequence[UsageRecord]) -> None:
        raise RecordsRejected(positions, "ValueError")

    site = make_site(
        Failing(refuse, hooks=lambda **data: seen.append(data["path"])), FLUSH_SECONDS=0.3
    )
    for path in ("/0", "/1", "/2"):
        visit(site, 1, path)
    assert site.usage.flush()
    account = site.account("failing")
    assert account["written"] == len(seen)
    assert account["written"] + account["failed"] == 3
    assert account["pending"] == 0


def test_a_batch_that_is_offered_again_reaches_the_hooks_when_it_is_kept(
    make_site: Callable[..., Site],
) -> None:
    seen: list[str] = []
    failures = iter([StorageUnavailable, RuntimeError, OSError])

    def refuse(_batch: Sequence[UsageRecord]) -> None:
        for error in failures:
            raise error

    site = make_site(Failing(refuse, hooks=lambda **data: seen.append(data["id"])))
    visit(site, 5)
    assert site.usage.flush()
    assert len(seen) == len(set(seen)) == 5


def test_of_a_batch_that_is_taken_apart_hooks_see_each_kept_record_once(
    make_site: Callable[..., Site],
) -> None:
    seen: list[str] = []

    def refuse(batch: Sequence[UsageRecord]) -> None:
        if any(record.path == "/poison" for record in batch):
            raise ValueError

    storage = Failing(refuse, hooks=lambda **data: seen.append(data["path"]))
    site = make_site(storage)
    for number in range(10):
        visit(site, 1, f"/{number}")
        if number == 4:
            visit(site, 1, "/poison")
    assert site.usage.flush()
    assert seen == [f"/{number}" for number in range(10)] == kept(storage)


def test_flush_waits_for_the_hooks(make_site: Callable[..., Site]) -> None:
    go_on = threading.Event()
    seen: list[str] = []

    def slow(**data: Any) -> None:
        go_on.wait(10)
        seen.append(data["path"])

    site = make_site(Own(hooks=slow))
    visit(site, 3)
    assert not site.usage.flush(0.3)
    assert (seen, site.account("own")["pending"]) == ([], 3)
    go_on.set()
    assert site.usage.flush()
    assert seen == ["/nowhere"] * 3


# -- several processes --------------------------------------------------------------------------

APP = """
import os, signal, sys
from pathlib import Path
import sqlalchemy as sa
from flask import Flask
from flask_usage_metrics import TrackUsage
from flask_usage_metrics.storage.jsonl import JSONLinesStorage
from flask_usage_metrics.storage.sql import SQLStorage
from flask_usage_metrics.summarization import sumUrl

kind, folder = sys.argv[1], sys.argv[2]

def note(**data):
    with open(f"{folder}/seen", "a") as seen:
        seen.write(data["id"] + "\\n")

def make(*hooks):
    if kind == "jsonl":
        return JSONLinesStorage(f"{folder}/usage.jsonl", hooks=[sumUrl, "sumServer", *hooks])
    engine = sa.create_engine(f"sqlite:///{folder}/usage.sqlite3", connect_args={"timeout": 60})
    return SQLStorage(engine, hooks=[sumUrl, "sumServer", *hooks])

app = Flask("shop")
app.config["TRACK_USAGE_STATE_DIR"] = f"{folder}/state"

@app.get("/page/<int:number>")
def page(number):
    return "x" * number
"""


def start(code: str, kind: str, folder: Path) -> Process:
    return start_python(APP + textwrap.dedent(code), kind, folder)


def storage_of(kind: str, folder: Path) -> tuple[Storage, Callable[[], None]]:
    if kind == "jsonl":
        return JSONLinesStorage(folder / "usage.jsonl"), lambda: None
    engine = sa.create_engine(f"sqlite:///{folder}/usage.sqlite3")
    return SQLStorage(engine), engine.dispose


@pytest.mark.parametrize("kind", ["sqlite", "jsonl"])
def test_sums_are_right_however_many_processes_write(kind: str, tmp_path: Path) -> None:
    code = """
        app.config["TRACK_USAGE_FLUSH_SECONDS"] = 0.01
        usage = TrackUsage(app, make(note))
        with app.test_client() as client:
            for round in range(50):
                for number in (1, 2):
                    assert client.get(f"/page/{number}").status_code == 200
        assert usage.flush(60)
    """
    workers = [start(code, kind, tmp_path) for _ in range(3)]
    assert [worker.finish() for worker in workers] == [(0, "", "")] * 3
    storage, end = storage_of(kind, tmp_path)
    for every, rows in storage.get_sum("sumUrl").items():
        hits = dict.fromkeys(["http://localhost/page/1", "http://localhost/page/2"], 0)
        transfer = dict(hits)
        for row in rows:
            hits[row["url"]] += row["hits"]
            transfer[row["url"]] += row["transfer"]
        assert list(hits.values()) == [150, 150], every
        assert list(transfer.values()) == [150, 300], every
    assert sum(row["hits"] for row in storage.get_sum("sumServer", target="shop")["month"]) == 300
    seen = (tmp_path / "seen").read_text().split()
    assert sorted(seen) == sorted(record.id for record in storage.records())
    end()


@pytest.mark.parametrize("kind", ["sqlite", "jsonl"])
def test_after_a_kill_in_a_hook_it_sees_the_records_again(kind: str, tmp_path: Path) -> None:
    killed = start(
        """
        def die(**data):
            note(**data)
            os.kill(os.getpid(), signal.SIGKILL)

        TrackUsage(app, make(die))
        with app.test_client() as client:
            client.get("/page/1")
        signal.pause()
        """,
        kind,
        tmp_path,
    )
    assert killed.finish().stderr == ""
    assert killed.returncode == -9
    storage, end = storage_of(kind, tmp_path)
    # It was kept before the hook was called.
    [record] = storage.records()
    survivor = start(
        """
        import time
        usage = TrackUsage(app, make(note))
        with app.test_client() as client:
            client.get("/page/2")
        deadline = time.monotonic() + 30
        while Path(folder, "seen").read_text().count("\\n") < 3 and time.monotonic() < deadline:
            assert usage.flush(30)
            time.sleep(0.05)
        """,
        kind,
        tmp_path,
    )
    assert survivor.finish().stderr == ""
    seen = (tmp_path / "seen").read_text().split()
    assert len(seen) == 3
    assert seen.count(record.id) == 2
    assert sorted(row["hits"] for row in storage.get_sum("sumUrl")["month"]) == [1, 1]
    end()


# -- rows of flask-track-usage ------------------------------------------------------------------

OLD_TABLE = """
CREATE TABLE flask_usage (
    id INTEGER PRIMARY KEY, url VARCHAR(128), ua_browser VARCHAR(16), ua_language VARCHAR(16),
    ua_platform VARCHAR(16), ua_version VARCHAR(16), blueprint VARCHAR(16), view_args VARCHAR(64),
    status INTEGER, remote_addr VARCHAR(24), xforwardedfor VARCHAR(24), authorization BOOLEAN,
    ip_info VARCHAR(1024), path VARCHAR(32), speed FLOAT, datetime DATETIME, username VARCHAR(128),
    track_var VARCHAR(128)
)
"""
OLD_ROW = """
INSERT INTO flask_usage (url, ua_language, status, remote_addr, path, datetime)
VALUES (?, ?, 200, ?, ?, '2018-06-03 12:30:00.000000')
"""


def test_rows_of_flask_track_usage_are_summed_up_as_they_are(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/old.sqlite3")
    # Of the second the path was cut, and the third is not as we would put it together.
    urls = ["http://shop.example/?a=%20b", "http://shop.example/long/path", "http://x/a%20b"]
    with engine.begin() as connection:
        connection.exec_driver_sql(OLD_TABLE)
        for url, path in zip(urls, ["/", "/long/pa", "/a b"], strict=True):
            for language in ("de", None):
                connection.exec_driver_sql(OLD_ROW, (url, language, "203.0.113.7", path))
    storage = SQLStorage(engine, hooks=["sumUrl"])
    storage.write([make_record(language="de")])

    def sums(name: str, key: str) -> list[tuple[str, int, int]]:
        rows = storage.get_sum(name, end_date=datetime(2020, 1, 1))["month"]  # noqa: DTZ001
        return sorted((row[key], row["hits"], row["transfer"]) for row in rows)

    assert sums("sumUrl", "url") == sorted((url, 2, 0) for url in urls)
    for url in urls:
        assert storage.count(url=url) == len(list(storage.records(url=url))) == 2
        assert len(storage.get_sum("sumUrl", target=url)["hour"]) == 1
    assert sums("sumLanguage", "language") == [("de", 3, 0)]
    assert sums("sumRemote", "remote_addr") == [("203.0.113.7", 6, 0)]
    # They do not know the app, and read as records of the app "".
    assert sums("sumServer", "server_name") == [("", 6, 0)]
    assert storage.count(app="") == 6
    for unknown in ("sumUserAgent", "sumVisitor", "sumGeo"):
        assert sums(unknown, "") == []
    engine.dispose()
