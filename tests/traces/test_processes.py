"""Every span once, whatever ends a process, and from all workers of a server."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import requests
from helpers.collector import Received, Receiver
from helpers.process import Process, until
from helpers.servers import Gunicorn
from helpers.spans import start

from flask_usage_metrics import open_storage
from flask_usage_metrics.storage import Storage

pytestmark = pytest.mark.usefixtures("collector", "environment")

# ------------------------------------------------------------------------ the end of a process


SHOP = """
import os, sys, time
from flask import Flask
from opentelemetry import trace
from flask_usage_metrics import TrackUsage

def provide():
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)

app = Flask("shop")
app.config["TRACK_USAGE_TRACES"] = True
app.config["TRACK_USAGE_STATE_DIR"] = "state"
app.config.from_prefixed_env()

@app.get("/")
def index():
    span = trace.get_current_span().get_span_context()
    with trace.get_tracer("child").start_as_current_span("SELECT"):
        return trace.format_span_id(span.span_id)

def visit(count):
    for _ in range(count):
        assert app.test_client().get("/").status_code == 200
"""


def stored(folder: Path) -> list[str | None]:
    """Ids of the spans of all rows."""
    storage = open_storage(f"sqlite:///{folder}/usage.sqlite3")
    assert isinstance(storage, Storage)
    try:
        return [record.span_id for record in storage.records()]
    finally:
        storage.close()


def assert_once(spans: Sequence[Received], folder: Path, *, children: int = 1) -> None:
    """Spans = rows, each once, and each has had so many children."""
    ours = [span.span_id for span in spans if span.kind == "SERVER"]
    assert sorted(ours) == sorted(map(str, stored(folder)))
    assert sorted(span.parent_id for span in spans if span.kind == "INTERNAL") == sorted(
        children * ours
    )


ENDS = {
    "runs out": ("", 0),
    "exits": ("sys.exit(3)", 3),
    "raises": ("raise ZeroDivisionError", 1),
}
# Whose provider it is and how the process ends have to do with each other only by what is
# registered first to be called in the end.
WHOSE = [
    *(("ours", how) for how in ENDS),
    ("before", "exits"),
    ("after", "raises"),
]


def test_whatever_ends_a_process_all_is_sent_before(tmp_path: Path, collector: Receiver) -> None:
    started: dict[tuple[str, str], Process] = {}
    for provider, how in WHOSE:
        program = [
            SHOP,
            "provide()" if provider == "before" else "",
            'usage = TrackUsage(app, "sqlite:///usage.sqlite3")',
            "provide()" if provider == "after" else "",
            "visit(20)",
            ENDS[how][0],
        ]
        started[provider, how] = start(
            tmp_path / f"{provider} {how}",
            "\n".join(program),
            FLASK_TRACK_USAGE_FLUSH_SECONDS="60",
            OTEL_SERVICE_NAME=f"{provider} {how}",
        )
    ended = {case: process.finish() for case, process in started.items()}
    for (provider, how), (code, _, err) in ended.items():
        assert code == ENDS[how][1], err
        assert err.rpartition("\n")[0][-17:] == ("ZeroDivisionError" if how == "raises" else "")
        spans = collector.of(f"{provider} {how}")
        assert len(spans) == 40
        assert_once(spans, tmp_path / f"{provider} {how}")


def test_the_console_is_a_collector_too(tmp_path: Path) -> None:
    program = [SHOP, 'TrackUsage(app, "sqlite:///usage.sqlite3")', "visit(2)"]
    process = start(tmp_path, "\n".join(program), OTEL_TRACES_EXPORTER="console")
    code, out, err = process.finish()
    assert (code, err) == (0, "")
    spans = json.loads("[" + out.replace("\n}\n{\n", "\n},{\n") + "]")
    ours = [span["context"]["span_id"][2:] for span in spans if span["kind"] == "SpanKind.SERVER"]
    assert sorted(ours) == sorted(map(str, stored(tmp_path)))
    assert len(spans) == 4


@pytest.mark.alone
def test_what_a_failing_collector_leaves_is_sent_by_the_next_process(
    tmp_path: Path, collector: Receiver
) -> None:
    program = "\n".join(
        [
            SHOP,
            'usage = TrackUsage(app, "sqlite:///usage.sqlite3")',
            "visit(10)",
            "print(time.time(), flush=True)",
        ]
    )
    collector.down()
    with Receiver() as hanging:
        hanging.hang_seconds = 60
        cases = {"down": collector, "hanging": hanging}
        processes = [
            start(tmp_path / how, program, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint)
            for how, receiver in cases.items()
        ]
        for code, out, err in [process.finish() for process in processes]:
            assert code == 0, err
            assert time.time() - float(out) < 7
        hanging.down()
        for receiver in cases.values():
            receiver.up()
        assert collector.spans() == hanging.spans() == []
        processes = [
            start(tmp_path / how, program, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint)
            for how, receiver in cases.items()
        ]
        for code, _, err in [process.finish() for process in processes]:
            assert (code, err) == (0, "")
        for how, receiver in cases.items():
            assert len(receiver.ids()) == 20
            assert sorted(receiver.ids()) == sorted(map(str, stored(tmp_path / how)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_sends_its_own_and_nothing_twice(
    tmp_path: Path, collector: Receiver
) -> None:
    program = """
usage = TrackUsage(app, "sqlite:///usage.sqlite3")
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork
visit(5)
assert usage.flush()
visit(5)  # these wait while the process forks
children = []
for _ in range(3):
    pid = os.fork()
    if not pid:
        visit(5)
        sys.exit()
    children.append(pid)
visit(5)
assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 3
visit(5)
"""
    assert start(tmp_path, SHOP + program).finish() == (0, "", "")
    assert len(collector.ids()) == 35
    assert_once(collector.spans(), tmp_path)
    storage = open_storage(f"sqlite:///{tmp_path}/usage.sqlite3")
    processes = {record.span_id: record.process for record in storage.records()}
    storage.close()
    # Nor do two processes share a connection, as what they send would mix.
    users = {(span.peer, processes[span.span_id]) for span in collector.servers()}
    assert len({process for _, process in users}) == 4
    assert len({peer for peer, _ in users}) == len(users)


# ------------------------------------------------------------------------ many workers

APP = (
    SHOP
    + """
usage = TrackUsage(app, "sqlite:///usage.sqlite3")
visit(int(os.environ.get("VISITS", 0)))
"""
)
THREE = ("-w", "3", "--threads", "2", "--graceful-timeout", "10")
LIBRARIES = "flask, opentelemetry.sdk.trace, requests, sqlalchemy"


@pytest.mark.parametrize(
    ("options", "visits"),
    [
        pytest.param(THREE, 0, id="threads"),
        pytest.param((*THREE, "--preload"), 0, id="preloaded"),
        pytest.param((*THREE, "--preload"), 4, id="preloaded-and-in-use"),
    ],
)
def test_all_workers_send_each_span_once(
    tmp_path: Path, collector: Receiver, options: tuple[str, ...], visits: int
) -> None:
    with Gunicorn(tmp_path, *options, app=APP, libraries=LIBRARIES, VISITS=str(visits)) as server:
        answered = [server.get("/") for _ in range(60)]
    assert len(collector.ids()) == 60 + visits
    assert set(answered) <= set(collector.ids())
    assert_once(collector.spans(), tmp_path)
    assert "Traceback" not in server.log()


def test_killed_workers_take_no_span_away(tmp_path: Path, collector: Receiver) -> None:
    answered: set[str] = set()
    stop = threading.Event()

    def load(address: str) -> None:
        session = requests.Session()
        while not stop.is_set():
            with suppress(requests.RequestException):
                answered.add(session.get(f"{address}/", timeout=10).text)

    options = ("-w", "2", "--threads", "2")
    server = Gunicorn(tmp_path, *options, app=APP, libraries=LIBRARIES)
    threads = [threading.Thread(target=load, args=(server.address,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(1, 7):
        until(lambda: len(answered) >= 40 * number, True)  # noqa: B023 - it is called at once
        time.sleep(0.1)
        server.kill(server.workers()[number % 2])
    until(lambda: len(answered) >= 280, True)
    # Now all at once, as the kernel does when there is no more memory.
    workers = server.workers()
    server.process.kill()
    server.process.wait()
    for pid in workers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    stop.set()
    for thread in threads:
        thread.join()
    server.stop()
    with Gunicorn(tmp_path, *options, app=APP, libraries=LIBRARIES) as server:
        answered.add(server.get("/"))
        until(lambda: answered - set(collector.ids()), set())
    spans = collector.ids()
    rows = stored(tmp_path)
    assert answered <= set(map(str, rows))
    # What was sent and not yet noted to be when its worker was killed comes again, as the same.
    assert set(spans) == set(rows)
    # With each of the seven kills once more, at most.
    assert len(rows) == len(set(rows)) <= len(spans) <= 8 * len(rows)
