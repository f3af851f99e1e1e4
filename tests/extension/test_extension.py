"""TrackUsage, as its user meets it."""

from __future__ import annotations

import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest
from flask import Flask
from helpers.front_door import Site
from helpers.process import run_python
from prometheus_client import CollectorRegistry

import flask_usage_metrics
from flask_usage_metrics import ConfigError, TrackUsage


def test_two_lines_are_enough(tmp_path: Path) -> None:
    program = """
        from flask import Flask
        from flask_usage_metrics import TrackUsage

        app = Flask(__name__, instance_path=INSTANCE)
        usage = TrackUsage(app)

        @app.route("/hello")
        def hello():
            return "hello"

        app.test_client().get("/hello")
        assert 'endpoint="hello"' in app.test_client().get("/metrics").text
        assert usage.flush()
        print([record.endpoint for record in usage.storage.records()])
    """
    program = textwrap.dedent(program).replace("INSTANCE", repr(str(tmp_path / "instance")))
    assert run_python(program) == (0, "['hello']\n", "")
    assert (tmp_path / "instance" / "usage.sqlite3").exists()


def test_the_example_of_flask_track_usage_runs_with_the_import_changed(tmp_path: Path) -> None:
    program = """
        # Create the Flask 'app'
        from flask import Flask, g
        app = Flask(__name__)

        # Set the configuration items manually for the example
        app.config['TRACK_USAGE_USE_FREEGEOIP'] = False
        # You can use a different instance of freegeoip like so
        # app.config['TRACK_USAGE_FREEGEOIP_ENDPOINT'] = 'https://example.org/api/'
        app.config['TRACK_USAGE_INCLUDE_OR_EXCLUDE_VIEWS'] = 'include'

        # We will just print out the data for the example
        from flask_usage_metrics import TrackUsage
        from flask_usage_metrics.storage.printer import PrintWriter
        from flask_usage_metrics.storage.output import OutputWriter

        # Make an instance of the extension and put two writers
        t = TrackUsage(app, [
            PrintWriter(),
            OutputWriter(transform=lambda s: "OUTPUT: " + str(s))
        ])

        # Include the view in the metrics
        @t.include
        @app.route('/')
        def index():
            g.track_var["optional"] = "something"
            return "Hello"

        # Run the application!
        app.test_client().get("/")
        app.test_client().get("/nowhere")
    """
    done = run_python(program, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("'track_var': {'optional': 'something'}") == 1
    assert done.stderr.count("OUTPUT: {") == 1
    assert "/nowhere" not in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["instance"]


KEYS_OF_FLASK_TRACK_USAGE = {
    "url": str,
    "user_agent": object,
    "server_name": str,
    "blueprint": type(None),
    "view_args": dict,
    "status": int,
    "remote_addr": str,
    "xforwardedfor": str,
    "authorization": bool,
    "ip_info": type(None),
    "path": str,
    "speed": float,
    "date": int,
    "content_length": int,
    "request": str,
    "url_args": dict,
    "username": type(None),
    "track_var": dict,
}


def test_a_callable_is_handed_a_fresh_dict_with_the_18_keys(make_site: Callable[..., Site]) -> None:
    first: list[dict[str, Any]] = []
    second: list[dict[str, Any]] = []

    def spoil(data: dict[str, Any]) -> None:
        first.append(dict(data))
        data["track_var"]["x"] = data["view_args"]["y"] = "spoiled"
        data.clear()

    site = make_site([spoil, second.append])
    site.app.add_url_rule("/<name>", "index", lambda name: "hello")
    site.get("/ann?q=1&q=2", headers={"X-Forwarded-For": "10.0.0.1", "User-Agent": "curl/8.5"})
    assert site.usage.flush()
    (data,) = second
    for key, kind in KEYS_OF_FLASK_TRACK_USAGE.items():
        assert isinstance(data[key], kind), key
    assert data["request"] == "GET http://localhost/ann?q=1&q=2 HTTP/1.1"
    assert data["url_args"] == {"q": "1"}
    assert (data["content_length"], data["view_args"]) == (5, {"name": "ann"})
    assert str(data["user_agent"]) == data["user_agent"].string == "curl/8.5"
    assert data["server_name"] == "shop"
    assert {"id", "country", "endpoint", "method", "client"} <= data.keys()
    assert first[0]["url"] == data["url"]


@pytest.mark.parametrize("how", ["constructor", "init_app", "both", "setting"])
def test_a_storage_is_accepted_everywhere(how: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/usage.sqlite3"
    app = Flask("shop")
    given = {"constructor": url, "both": "print:"}.get(how)
    if how == "setting":
        app.config["TRACK_USAGE_STORAGE"] = url
    usage = TrackUsage(storage=given, registry=CollectorRegistry())
    usage.init_app(app, url if how in ("init_app", "both") else None)
    app.test_client().get("/nowhere")
    assert usage.flush()
    assert usage.storage.count() == 1
    usage.storage.close()


def test_init_app_again_changes_nothing(site: Site) -> None:
    site.app.add_url_rule("/", "index", lambda: "x")
    site.usage.init_app(site.app)
    site.get()
    assert len(site.records()) == 1


def test_an_app_is_tracked_by_one(site: Site) -> None:
    with pytest.raises(ConfigError, match="'shop' is tracked already, with another TrackUsage"):
        TrackUsage(site.app)
    with pytest.raises(ConfigError, match="'shop' is tracked already, with another storage"):
        site.usage.init_app(site.app, "print:")


def test_after_routes_and_blueprints_exist() -> None:
    stored: list[Any] = []
    app = Flask("shop")
    app.add_url_rule("/", "index", lambda: "x")
    usage = TrackUsage(app, stored.append, registry=CollectorRegistry())
    app.test_client().get("/")
    assert usage.flush()
    assert stored[0]["endpoint"] == "index"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"storage": 5},
            "storage must be a URL, a storage, a callable or a list of these, not int",
        ),
        ({"storage": "nosql://x"}, "nosql"),
        ({"storage": [print, None]}, "storage must be"),
        ({"country": "NL"}, "country must be a callable or None, not str"),
        ({"username": "ann"}, "username must be a callable or None, not str"),
    ],
)
def test_a_wrong_argument_is_an_error_at_set_up(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrackUsage(Flask("shop"), registry=CollectorRegistry(), **arguments)


def test_without_an_app_the_error_says_what_to_do() -> None:
    usage = TrackUsage(registry=CollectorRegistry())
    with pytest.raises(RuntimeError, match=r"call init_app\(app\) first"):
        usage.flush()
    apps = [Flask("one"), Flask("two")]
    for app in apps:
        usage.init_app(app, [])
    assert usage.flush()
    with pytest.raises(RuntimeError, match=r"several apps: enter the context of one"):
        usage.storage  # noqa: B018
    with apps[0].app_context(), pytest.raises(RuntimeError, match="none of the app's storages"):
        usage.storage  # noqa: B018


@pytest.fixture
def tracked_pair(
    tmp_path: Path,
) -> Iterator[tuple[TrackUsage, Flask, list[Any], Flask, list[Any]]]:
    """One tracker on two apps that write only when told to, and what each has stored."""
    usage = TrackUsage(registry=CollectorRegistry())
    one, two = Flask("one"), Flask("two")
    stored: tuple[list[Any], list[Any]] = ([], [])
    for app, items in zip((one, two), stored, strict=True):
        app.config.update(TRACK_USAGE_FLUSH_SECONDS=3600, TRACK_USAGE_STATE_DIR=tmp_path)
        usage.init_app(app, items.append)
        app.test_client().get("/")
    yield usage, one, stored[0], two, stored[1]
    usage.close()


def test_flush_is_of_every_app_of_the_tracker_or_of_the_current_one(
    tracked_pair: tuple[TrackUsage, Flask, list[Any], Flask, list[Any]],
) -> None:
    usage, one, first, two, second = tracked_pair
    with one.app_context():
        assert usage.flush()
    assert (len(first), len(second)) == (1, 0)
    one.test_client().get("/")
    assert usage.flush()
    assert (len(first), len(second)) == (2, 1)
    other = Flask("other")
    with TrackUsage(other, [], registry=CollectorRegistry()), other.app_context():
        two.test_client().get("/")
        assert usage.flush()
    assert (len(first), len(second)) == (2, 2)


def test_a_storage_that_hangs_takes_no_time_from_the_other_apps(tmp_path: Path) -> None:
    usage = TrackUsage(registry=CollectorRegistry())
    hung, stored = threading.Event(), list[Any]()
    storages: list[Any] = [lambda data: hung.wait(), stored.append, lambda data: hung.wait()]
    apps = [Flask(f"shop{number}") for number in range(len(storages))]
    for app, storage in zip(apps, storages, strict=True):
        app.config.update(TRACK_USAGE_FLUSH_SECONDS=3600, TRACK_USAGE_STATE_DIR=tmp_path)
        usage.init_app(app, storage)
        app.test_client().get("/")
    try:
        assert not usage.flush(timeout=0.3)
        assert len(stored) == 1
    finally:
        hung.set()
        usage.close()


def test_a_mode_that_there_is_not_is_not_implemented() -> None:
    for mode in ("", "all", None, 5):
        app = Flask("shop")
        app.config["TRACK_USAGE_INCLUDE_OR_EXCLUDE_VIEWS"] = mode
        with pytest.raises(NotImplementedError, match="'include' or 'exclude'") as caught:
            TrackUsage(app, [], registry=CollectorRegistry())
        assert isinstance(caught.value, ConfigError)


def test_nothing_is_opened_or_started_before_the_first_request(tmp_path: Path) -> None:
    program = f"""
        import os, threading
        from flask import Flask
        from flask_usage_metrics import TrackUsage
        app = Flask("shop", instance_path={str(tmp_path / "instance")!r})
        before = len(os.listdir("/proc/self/fd"))
        TrackUsage(app)
        assert len(os.listdir("/proc/self/fd")) == before
        assert threading.active_count() == 1
        assert not os.path.exists(app.instance_path)
    """
    assert run_python(program) == (0, "", "")


def test_the_public_names_are_these() -> None:
    assert set(flask_usage_metrics.__all__) == {
        "ConfigError",
        "StorageUnavailable",
        "Summary",
        "TrackUsage",
        "UsageMetricsError",
        "UsageRecord",
        "open_storage",
    }
    for name in flask_usage_metrics.__all__:
        assert getattr(flask_usage_metrics, name).__doc__


def test_country_function_labels_both_counter_and_record(make_site: Callable[..., Site]) -> None:
    site = make_site(country=lambda address: "nl" if address == "203.0.113.9" else None)
    site.get("/nowhere")
    assert site.counted() == {("GET", "__unmatched__", "404", "NL"): 1}
    assert site.only_record().country == "NL"
    site.assert_agrees()


def test_country_header_is_believed_from_trusted_proxies_only(
    make_site: Callable[..., Site],
) -> None:
    site = make_site(COUNTRY="header:CF-IPCountry", TRUSTED_PROXIES=["10.0.0.0/8"])
    for peer in ("10.1.2.3", "203.0.113.9"):
        site.get(
            "/",
            environ_base={"REMOTE_ADDR": peer},
            headers={"CF-IPCountry": "DE", "X-Forwarded-For": "198.51.100.7"},
        )
    found = [(record.remote_addr, record.country) for record in site.records()]
    assert found == [("198.51.100.7", "DE"), ("203.0.113.9", None)]
    site.assert_agrees()


class Service(BaseHTTPRequestHandler):
    """A country service on loopback that answers when `free` is set."""

    free = threading.Event()
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.free.wait(10)
        body = b'{"country_code": "JP", "city": "Tokyo"}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def service() -> Iterator[str]:
    Service.free.clear()
    Service.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/json/"
        Service.free.set()
        server.shutdown()
        thread.join()


def test_neither_a_visitor_nor_a_scrape_waits_for_a_country_service(
    make_site: Callable[..., Site], service: str
) -> None:
    site = make_site(COUNTRY=None, USE_FREEGEOIP=True, FREEGEOIP_ENDPOINT=service)
    visitor = {"environ_base": {"REMOTE_ADDR": "8.8.8.8"}}
    started = time.monotonic()
    for _ in range(3):
        site.get("/nowhere", **visitor)
    # It was asked and has not answered: what waits for it is counted by a later scrape.
    assert site.counted() == {}
    assert site.account("sqlite")["pending"] == 3
    assert time.monotonic() - started < 2
    Service.free.set()
    assert [(record.country, record.ip_info) for record in site.records()] == [
        ("JP", {"country_code": "JP", "city": "Tokyo"})
    ] * 3
    assert site.counted() == {("GET", "__unmatched__", "404", "JP"): 3}
    assert Service.asked == ["/json/8.8.8.8"]
    site.assert_agrees()


def test_importing_it_loads_nothing_that_is_used_later_or_never() -> None:
    program = """
        import sys
        import flask_usage_metrics
        late = {"sqlalchemy", "requests", "iptocc", "maxminddb", "ua_parser", "opentelemetry"}
        print(sorted(late & sys.modules.keys()))
    """
    assert run_python(program, fresh=True) == (0, "[]\n", "")


@pytest.mark.skipif(find_spec("ua_parser_rs") is None, reason="the extra [ua] is not installed")
def test_ua_parser_is_loaded_before_the_first_visitor_comes(tmp_path: Path) -> None:
    program = f"""
        import sys, threading
        from flask import Flask
        from flask_usage_metrics import TrackUsage

        class Watch:
            loaders = []

            def find_spec(self, name, path, target=None):
                if name == "ua_parser":
                    self.loaders.append(threading.current_thread().name)

        sys.meta_path.insert(0, Watch())
        app = Flask("shop", instance_path={str(tmp_path)!r})
        usage = TrackUsage(app, [])
        print(Watch.loaders)
        app.test_client().get("/", headers={{"User-Agent": "Mozilla/5.0 (X11) Firefox/126.0"}})
        assert usage.flush()
        print(Watch.loaders)
    """
    assert run_python(program) == (0, "['MainThread']\n" * 2, "")


def test_an_app_that_has_answered_already_is_told_so(make_site: Callable[..., Site]) -> None:
    app = Flask("shop")
    app.add_url_rule("/", "index", lambda: "x")
    assert app.test_client().get("/").text == "x"
    with pytest.raises(ConfigError, match="'shop' has answered a request already: call"):
        TrackUsage(app)
    assert app.test_client().get("/").text == "x"
    site = make_site(app=app, METRICS_PATH=None)
    site.get()
    assert [record.endpoint for record in site.records()] == ["index"]
