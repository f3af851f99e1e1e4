"""An app that is dropped lets go of threads and files, once all that it captured is written."""

from __future__ import annotations

import gc
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, g
from helpers.front_door import Site
from helpers.process import run_python, until
from helpers.watch import alive, descriptors
from prometheus_client import CollectorRegistry

from flask_usage_metrics import TrackUsage, UsageRecord, open_storage
from flask_usage_metrics.errors import StorageUnavailable
from flask_usage_metrics.pipeline.worker import WorkerThread
from flask_usage_metrics.storage import Storage, Writer

Found = dict[str, object]

NOTHING: Found = {"threads": [], "descriptors": 0, "journals": 0, "runs": 0}


def held(folder: Path, threads: list[threading.Thread]) -> Found:
    """Return what is still held of apps whose files are below a folder."""
    gc.collect()
    names = [name for _, folders, files in os.walk(folder) for name in (*folders, *files)]
    return {
        "threads": alive(threads),
        "descriptors": descriptors(folder),
        "journals": sum(name.endswith(".journal") for name in names),
        "runs": sum(name.startswith("g-") for name in names),
    }


def rows(folder: Path) -> int:
    storage = open_storage(f"sqlite:///{folder}/usage.sqlite3")
    assert isinstance(storage, Storage)
    try:
        return storage.count()
    finally:
        storage.close()


def written(registry: CollectorRegistry, sink: str) -> float | None:
    labels = {"sink": sink, "result": "written"}
    return registry.get_sample_value("flask_usage_records_total", labels)


# How an app may be referred to by what it gives us.
def with_a_storage_that_knows_it(app: Flask, given: dict[str, Any]) -> None:
    kept: list[str] = []
    given["storage"] = [given["storage"], lambda data: kept.append(f"{app.name} {data['path']}")]


def with_a_country_function_that_knows_it(app: Flask, given: dict[str, Any]) -> None:
    given["country"] = lambda address: "NL" if app.name == "shop" else None


def with_names_of_users(app: Flask, given: dict[str, Any]) -> None:
    app.config["SECRET_KEY"] = "k"
    app.config["TRACK_USAGE_PRIVACY"] = "balanced"
    given["username"] = lambda: app.name
    given["consumer"] = lambda: app.name


def with_visitors(app: Flask, _: dict[str, Any]) -> None:
    app.config["TRACK_USAGE_VISITORS"] = "daily"
    app.config["TRACK_USAGE_COOKIE"] = True


def with_spans(_: Flask, given: dict[str, Any]) -> None:
    from opentelemetry.sdk.trace import TracerProvider

    given["tracer_provider"] = TracerProvider(shutdown_on_exit=False)


WAYS = {
    "alone": lambda app, given: None,
    "storage": with_a_storage_that_knows_it,
    "country": with_a_country_function_that_knows_it,
    "users": with_names_of_users,
    "visitors": with_visitors,
    "spans": with_spans,
}


@pytest.mark.parametrize("multiprocess", [False, True], ids=["alone", "worker"])
@pytest.mark.parametrize("way", WAYS)
def test_a_dropped_app_writes_what_it_captured_and_lets_go(
    tmp_path: Path, started: list[threading.Thread], way: str, multiprocess: bool
) -> None:
    registry = CollectorRegistry()

    def visit() -> weakref.ref[Flask]:
        app = Flask("shop", instance_path=str(tmp_path))
        app.config["TRACK_USAGE_STATE_DIR"] = tmp_path / "state"
        given: dict[str, Any] = {"storage": f"sqlite:///{tmp_path}/usage.sqlite3"}
        WAYS[way](app, given)
        usage = TrackUsage(app, registry=registry, **given)

        @app.get("/")
        @usage.include
        def index() -> str:
            g.track_var["app"] = app.name
            return app.name

        for _ in range(3):
            overrides = {"wsgi.multiprocess": multiprocess}
            assert app.test_client().get("/", environ_overrides=overrides).text == "shop"
        return weakref.ref(app)

    dropped = visit()
    assert alive(started)  # it is still to be written
    until(lambda: held(tmp_path, started)["threads"], [], 30)
    assert dropped() is None
    # The totals that workers share, and their copy, each with SQLite's log and index.
    kept = {"descriptors": 6, "runs": 1} if multiprocess else {}
    until(lambda: held(tmp_path, started), NOTHING | kept)
    assert rows(tmp_path) == 3
    assert registry.get_sample_value("flask_usage_records_pending", {"sink": "sqlite"}) is None
    assert (written(registry, "metrics"), written(registry, "sqlite")) == (3, 3)


def test_what_dropped_apps_counted_stays_counted(
    tmp_path: Path, started: list[threading.Thread]
) -> None:
    registry = CollectorRegistry()

    def refuse(_: dict[str, Any]) -> None:
        raise ValueError

    def visit(number: int) -> None:
        app = Flask("shop")
        app.config["TRACK_USAGE_STATE_DIR"] = tmp_path / "state"
        TrackUsage(app, [refuse, print], registry=registry)
        app.test_client().get("/")
        shown = registry.get_sample_value(
            "flask_usage_records_total", {"sink": "metrics", "result": "written"}
        )
        assert shown == number

    for number in range(1, 6):
        visit(number)
        until(lambda: held(tmp_path, started), NOTHING)
    failed = {"sink": "refuse", "result": "failed"}
    assert registry.get_sample_value("flask_usage_records_total", failed) == 5
    assert written(registry, "print") == 5
    assert registry.get_sample_value("flask_usage_faults_total", {"part": "sink refuse"}) == 5


class Down(Writer):
    """A storage that is down until it is told otherwise."""

    name = "down"

    def __init__(self) -> None:
        super().__init__()
        self.is_down = True
        self.ids: list[str] = []

    def write(self, batch: Sequence[UsageRecord]) -> None:
        if self.is_down:
            raise StorageUnavailable("down")
        self.ids += [record.id for record in batch]


@pytest.mark.parametrize("disk", [True, False])
def test_a_dropped_app_whose_storage_is_down_goes_on_until_all_is_written(
    tmp_path: Path, started: list[threading.Thread], disk: bool
) -> None:
    registry = CollectorRegistry()
    storage = Down()
    if not disk:
        (tmp_path / "state").write_text("a file in its place")

    def visit() -> None:
        app = Flask("shop")
        app.config["TRACK_USAGE_STATE_DIR"] = tmp_path / "state"
        TrackUsage(app, storage, registry=registry)
        for _ in range(20):
            app.test_client().get("/")

    def pending() -> float | None:
        return registry.get_sample_value("flask_usage_records_pending", {"sink": "down"})

    visit()
    until(pending, 20)
    gc.collect()
    assert pending() == 20
    storage.is_down = False
    until(lambda: held(tmp_path, started), NOTHING, 60)
    assert len(storage.ids) == len(set(storage.ids)) == 20
    assert (written(registry, "metrics"), written(registry, "down")) == (20, 20)


def test_an_app_that_is_dropped_before_its_thread_runs_is_written_without_a_disk_too(
    tmp_path: Path, started: list[threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state").write_text("a file in its place")
    run, dropped = WorkerThread._run, threading.Event()

    def run_late(*arguments: Any) -> None:
        dropped.wait(20)
        run(*arguments)

    monkeypatch.setattr(WorkerThread, "_run", run_late)
    written: list[dict[str, Any]] = []

    def visit() -> None:
        app = Flask("shop")
        app.config["TRACK_USAGE_STATE_DIR"] = tmp_path / "state"
        TrackUsage(app, written.append, registry=CollectorRegistry())
        app.test_client().get("/")

    visit()
    gc.collect()
    dropped.set()
    until(lambda: len(written), 1)
    until(lambda: alive(started), [])


FACTORY = """
import os, resource, sys, threading
from pathlib import Path
from flask import Flask
from prometheus_client import REGISTRY
from flask_usage_metrics import TrackUsage

folder, count = Path(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
usage = TrackUsage()

def make_app(number):
    app = Flask("shop", instance_path=str(folder / str(number % 20)))
    app.config["TRACK_USAGE_STATE_DIR"] = folder / "state"
    app.config["TRACK_USAGE_FLUSH_SECONDS"] = 0.05
    usage.exclude("health")

    @app.get("/")
    @usage.exclude
    def hidden():
        return app.name

    @app.get("/shown")
    def shown():
        return app.name

    usage.init_app(app)
    return app

def kilobytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4

before = 0
threads, files, journals = [], [], []
for number in range(count):
    app = make_app(number)
    for path in ("/", "/shown"):
        assert app.test_client().get(path).status_code == 200
    threads.append(threading.active_count())
    files.append(len(os.listdir("/proc/self/fd")))
    if number % 20 == 0:
        journals.append(len(list(folder.rglob("*.journal"))))
    if number == count // 2:
        before = kilobytes()
print(max(threads), max(files), max(journals), kilobytes() - before)
for app in [app]:
    with app.app_context():
        assert usage.flush()
"""


# Caches fill up in the first two hundred; after that one app leaves less than 1 kB, measured.
@pytest.mark.parametrize(
    ("count", "most_megabytes"),
    [pytest.param(200, 16, id="200"), pytest.param(600, 4, id="600", marks=pytest.mark.slow)],
)
def test_an_app_factory_called_again_and_again_stays_flat(
    tmp_path: Path, count: int, most_megabytes: int
) -> None:
    done = run_python(FACTORY, tmp_path, count, seconds=300)
    assert (done.returncode, done.stderr) == (0, "")
    threads, files, journals, kilobytes = map(int, done.stdout.split())
    assert threads < 100
    assert files < 250
    assert journals < 60
    assert kilobytes < most_megabytes * 1024
    found = 0
    for file in tmp_path.rglob("usage.sqlite3"):
        with sqlite3.connect(file) as connection:
            found += connection.execute("SELECT count(*) FROM flask_usage").fetchone()[0]
        connection.close()
    assert found == count
    assert not list(tmp_path.rglob("*.journal"))


def test_close_gives_up_threads_and_files_at_once(
    make_site: Callable[..., Site], tmp_path: Path, started: list[threading.Thread]
) -> None:
    site = make_site(country=lambda address: "NL")
    for visited in (1, 2):  # the next request opens all again
        site.get()
        assert len(alive(started)) >= 2
        with site.usage as usage:
            assert usage is site.usage
        assert held(tmp_path, started) == NOTHING
        assert rows(tmp_path / "0") == visited
    site.usage.close()
    assert site.samples("flask_usage_records_pending")[(("sink", "sqlite"),)] == 0
    site.assert_agrees()


def test_close_is_for_every_app_of_the_tracker(
    tmp_path: Path, started: list[threading.Thread]
) -> None:
    apps = []
    with TrackUsage(registry=CollectorRegistry()) as usage:
        for number in range(3):
            app = Flask(f"shop{number}", instance_path=str(tmp_path / f"{number}"))
            usage.init_app(app)
            app.test_client().get("/")
            apps.append(app)
        assert len(alive(started)) >= 6
    assert held(tmp_path, started) == NOTHING
    assert [rows(tmp_path / f"{number}") for number in range(3)] == [1, 1, 1]


def test_a_forked_child_that_drops_the_app_takes_nothing_from_its_parent(
    make_site: Callable[..., Site], tmp_path: Path
) -> None:
    site = make_site(FLUSH_SECONDS=30)
    site.get()
    (journal,) = tmp_path.rglob("*.journal")
    pid = os.fork()
    if pid == 0:
        site.app = site.usage = None  # type: ignore[assignment]
        gc.collect()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert journal.exists()
    site.get()
    assert len(site.records()) == 2
    site.assert_agrees()
