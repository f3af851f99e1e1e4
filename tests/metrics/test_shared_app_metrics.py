"""The app's own client_python metrics are right with several workers, without any set-up."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from random import Random

import pytest
import requests
from helpers.front_door import samples
from helpers.process import run_python, until
from helpers.servers import Gunicorn
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from flask_usage_metrics.metrics.app_families import AppFamily, AppSample
from flask_usage_metrics.metrics.app_sums import added, shown

MODES = ("all", "liveall", "min", "livemin", "max", "livemax", "sum", "livesum")

APP = f"""
import os, sys, time
from flask import Flask, request
from flask_usage_metrics import TrackUsage
from prometheus_client import REGISTRY, Counter, Enum, Gauge, Histogram, Info, Summary
from prometheus_client.metrics_core import GaugeMetricFamily

app = Flask("shop")
app.config["TRACK_USAGE_STATE_DIR"] = "state"
app.config.from_prefixed_env()
usage = TrackUsage(app, "sqlite:///usage.sqlite3", country=lambda address: "NL")

orders = Counter("orders", "Orders.")
paid = Counter("paid", "Paid.", ["way"])
seconds = Histogram("seconds", "Time.", ["shop"], buckets=[0.5, 2, 10])
sizes = Summary("sizes", "Sizes.")
level = {{mode: Gauge(f"level_{{mode}}", "Mode.", multiprocess_mode=mode) for mode in {MODES!r}}}
recent = Gauge("level_mostrecent", "Mode.", multiprocess_mode="mostrecent")
plain = Gauge("plain", "Mode not chosen.", ["shelf"])
build = Info("build", "Build.")
state = Enum("state", "State.", states=["open", "busy", "shut"])
Gauge("asked", "A callback.").set_function(os.getpid)
made_early = Counter("made_early", "Counted where the app is loaded.")
made_early.inc(5)

class Custom:
    calls = 0
    def collect(self):
        Custom.calls += 1
        yield GaugeMetricFamily("custom_pid", "Who answers.", value=os.getpid())

REGISTRY.register(Custom())

@app.get("/pid")
def pid():
    time.sleep(0.01)
    return str(os.getpid())

@app.get("/order")
def order():
    orders.inc(exemplar={{"trace_id": "a1"}})
    paid.labels(request.args.get("way", "cash")).inc(2)
    seconds.labels("x").observe(1, exemplar={{"trace_id": "b2"}})
    seconds.labels("x").observe(20)
    sizes.observe(0.1)
    return str(os.getpid())

@app.get("/set")
def set_all():
    value = float(request.args["value"])
    for gauge in level.values():
        gauge.set(value)
    recent.set(value)
    plain.labels("low").set(value)
    build.info({{"version": request.args["value"]}})
    state.state(request.args["state"])
    return str(os.getpid())

@app.get("/late")
def late():
    if "late" not in REGISTRY._names_to_collectors:
        Counter("late", "Made by a request.").inc(3)
    return str(os.getpid())

@app.get("/calls")
def calls():
    return f"{{os.getpid()}} {{Custom.calls}}"
"""


def ask_every_worker(server: Gunicorn, path: str, count: int = 3) -> dict[int, str]:
    """Ask until each worker has answered; return the last answer of each."""
    found: dict[int, str] = {}

    def have_all_answered() -> bool:
        for text in threads.map(lambda _: server.get(path), range(8)):
            found[int(text.split()[0])] = text
        workers = server.workers()
        return len(workers) == count and found.keys() >= set(workers)

    with ThreadPoolExecutor(8) as threads:
        until(have_all_answered, True, 30)
    return {pid: found[pid] for pid in server.workers()}


def scrapes(server: Gunicorn, times: int = 12) -> list[str]:
    """Return what several scrapes showed, which more than one worker answered."""
    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(lambda _: server.get("/metrics"), range(times)))


def every_scrape(server: Gunicorn, name: str, expected: dict[object, float]) -> None:
    until(lambda: samples(server.get("/metrics"), name), expected)
    for text in scrapes(server):
        assert samples(text, name) == expected, name


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Gunicorn]:
    def started(*options: str, **environment: str) -> Gunicorn:
        return Gunicorn(tmp_path, *options, app=APP, **environment)

    return started


@pytest.fixture
def server(start: Callable[..., Gunicorn]) -> Iterator[Gunicorn]:
    with start("-w", "3") as running:
        yield running


def order(server: Gunicorn, times: int) -> list[int]:
    with ThreadPoolExecutor(4) as threads:
        return [int(text) for text in threads.map(lambda _: server.get("/order"), range(times))]


def assert_orders(server: Gunicorn, count: int) -> None:
    every_scrape(server, "orders_total", {(): count})
    way = (("way", "cash"),)
    shop = ("shop", "x")
    text = server.get("/metrics")
    assert samples(text, "paid_total") == {way: 2 * count}
    assert samples(text, "seconds_bucket") == {
        (("le", "0.5"), shop): 0,
        (("le", "2.0"), shop): count,
        (("le", "10.0"), shop): count,
        (("le", "+Inf"), shop): 2 * count,
    }
    assert samples(text, "seconds_count") == {(shop,): 2 * count}
    assert samples(text, "seconds_sum") == {(shop,): 21 * count}
    assert samples(text, "sizes_count") == {(): count}
    assert samples(text, "sizes_sum") == {(): pytest.approx(count / 10)}


def test_any_worker_answers_for_all_also_for_those_that_were_killed(server: Gunicorn) -> None:
    pids = set(ask_every_worker(server, "/pid"))
    assert set(order(server, 40)) <= pids
    assert_orders(server, 40)
    every_scrape(server, "made_early_total", {(): 15})
    server.kill(min(pids))
    until(lambda: len(set(server.workers()) - pids), 1, 30)
    order(server, 10)
    assert_orders(server, 50)
    os.kill(server.process.pid, signal.SIGHUP)
    until(lambda: len(set(server.workers()) & pids), 0, 30)
    order(server, 10)
    assert_orders(server, 60)


def test_recycled_workers_take_nothing_away(start: Callable[..., Gunicorn]) -> None:
    for options in (("-w", "3"), ("-w", "1")):
        with start(*options, "--max-requests", "7", "--graceful-timeout", "9") as server:
            before = 0.0
            for count in range(1, 61):
                server.get("/order")
                if not count % 5:
                    shown = samples(server.get("/metrics"), "orders_total").get((), 0.0)
                    assert shown >= before
                    before = shown
            until(lambda s=server: samples(s.get("/metrics"), "orders_total"), {(): 60})


def test_gauges_are_combined_by_their_mode_over_the_living(server: Gunicorn) -> None:
    pids = sorted(ask_every_worker(server, "/pid"))
    values = dict(zip(pids, (3.0, 7.0, 5.0), strict=True))
    for pid, value in values.items():
        _set(server, pid, value, "busy" if value == 7 else "shut")
    last = [*values.values()][-1]
    _assert_gauges(server, values, last)
    every_scrape(server, "build_info", {(("version", str(last)),): 1})
    shut = {"open": 0.0, "busy": 0.0, "shut": 1.0}
    every_scrape(server, "state", {(("state", name),): n for name, n in shut.items()})
    plain = {(("pid", str(pid)), ("shelf", "low")): value for pid, value in values.items()}
    every_scrape(server, "plain", plain)
    server.kill(pids[0])
    until(lambda: len(server.workers()) == 3 and pids[0] not in server.workers(), True, 30)
    ask_every_worker(server, "/pid")
    new = (set(server.workers()) - set(pids)).pop()
    del values[pids[0]]
    _assert_gauges(server, {**values, new: 0.0}, last)
    every_scrape(server, "build_info", {(("version", str(last)),): 1})
    every_scrape(server, "state", {(("state", name),): n for name, n in shut.items()})


def _set(server: Gunicorn, pid: int, value: float, state: str) -> None:
    """Have one worker set its gauges, while the others are stopped."""
    others = [other for other in server.workers() if other != pid]
    for other in others:
        os.kill(other, signal.SIGSTOP)
    try:
        assert server.get(f"/set?value={value}&state={state}") == str(pid)
        until(lambda: samples(server.get("/metrics"), "level_mostrecent"), {(): value})
    finally:
        for other in others:
            with suppress(ProcessLookupError):
                os.kill(other, signal.SIGCONT)


def _assert_gauges(server: Gunicorn, values: dict[int, float], last: float) -> None:
    for mode, combine in (("min", min), ("max", max), ("sum", sum)):
        for name in (mode, f"live{mode}"):
            every_scrape(server, f"level_{name}", {(): combine(values.values())})
    each = {(("pid", str(pid)),): value for pid, value in values.items()}
    every_scrape(server, "level_all", each)
    every_scrape(server, "level_liveall", each)
    every_scrape(server, "level_mostrecent", {(): last})


def test_both_formats_can_be_parsed_and_keep_exemplars(server: Gunicorn) -> None:
    ask_every_worker(server, "/pid")
    order(server, 12)
    assert_orders(server, 12)
    response = requests.get(
        server.address + "/metrics",
        headers={"Accept": "application/openmetrics-text; version=1.0.0"},
        timeout=20,
    )
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    (total,) = [one for one in families["orders"].samples if one.name == "orders_total"]
    assert total.value == 12
    assert total.exemplar is not None
    assert total.exemplar.labels == {"trace_id": "a1"}
    found = [one for one in families["seconds"].samples if one.exemplar is not None]
    assert [(one.labels["le"], one.exemplar.labels["trace_id"]) for one in found] == [("2.0", "b2")]
    assert families["seconds"].documentation == "Time."
    created = [one for one in families["orders"].samples if one.name == "orders_created"]
    assert len(created) == 1
    names = [name for name in families if name in ("orders", "paid", "seconds", "sizes", "plain")]
    assert names == ["orders", "paid", "seconds", "sizes", "plain"]
    filtered = server.get("/metrics?name[]=orders_total&name[]=paid_total")
    assert samples(filtered, "orders_total") == {(): 12}
    assert samples(filtered, "seconds_count") == {}


def test_a_metric_that_one_worker_has_is_shown_by_all(server: Gunicorn) -> None:
    ask_every_worker(server, "/pid")
    server.get("/late")
    every_scrape(server, "late_total", {(): 3})


def test_the_apps_own_code_is_never_called_by_a_sync(server: Gunicorn) -> None:
    before = ask_every_worker(server, "/calls")
    order(server, 20)
    every_order = {(): 20.0}
    until(lambda: samples(server.get("/metrics"), "orders_total"), every_order)
    told = samples(server.get("/metrics"), "custom_pid")
    assert told[()] in before
    scraped = 20
    calls = ask_every_worker(server, "/calls")
    for pid, text in before.items():
        # Once for each scrape that it answered, and not for its syncs.
        assert int(calls[pid].split()[1]) - int(text.split()[1]) <= scraped
    quiet = ask_every_worker(server, "/calls")
    order(server, 30)
    assert {pid: ask_every_worker(server, "/calls")[pid] for pid in quiet} == quiet
    assert [*samples(server.get("/metrics"), "asked")] == [()]


@pytest.mark.parametrize("how", ["emptied", "deleted", "damaged"])
def test_a_lost_file_is_made_anew(server: Gunicorn, tmp_path: Path, how: str) -> None:
    pids = set(ask_every_worker(server, "/pid"))
    order(server, 30)
    assert_orders(server, 30)
    server.kill(min(pids))
    until(lambda: len(set(server.workers()) - pids), 1, 30)
    ask_every_worker(server, "/pid")
    assert_orders(server, 30)
    (path,) = (tmp_path / "state").glob("*/g-*/app-metrics.sqlite3")
    # Each has seen what the others hold.
    until(lambda: len(ask_every_worker(server, "/pid")), 3)
    if how == "emptied":
        os.truncate(path, 0)
    elif how == "deleted":
        path.unlink()
    else:
        path.write_bytes(b"x" * path.stat().st_size)
    for text in scrapes(server):
        assert samples(text, "orders_total") == {(): 30}
    order(server, 10)
    assert_orders(server, 40)


def test_what_was_counted_before_a_fork_is_counted_once(start: Callable[..., Gunicorn]) -> None:
    with start("-w", "3", "--preload") as server:
        pids = set(ask_every_worker(server, "/pid"))
        every_scrape(server, "made_early_total", {(): 5})
        server.kill(min(pids))
        until(lambda: len(set(server.workers()) - pids), 1, 30)
        ask_every_worker(server, "/pid")
        order(server, 10)
        assert_orders(server, 10)
        every_scrape(server, "made_early_total", {(): 5})


def test_one_process_shows_what_it_always_showed(start: Callable[..., Gunicorn]) -> None:
    with start("-w", "1") as server:
        server.get("/set?value=4&state=busy")
        text = server.get("/metrics")
        assert samples(text, "plain") == {(("shelf", "low"),): 4}
        for mode in (*MODES, "mostrecent"):
            assert samples(text, f"level_{mode}") == {(): 4}


def test_client_pythons_own_way_stays_in_force(
    start: Callable[..., Gunicorn], tmp_path: Path
) -> None:
    (tmp_path / "files").mkdir()
    folder = str(tmp_path / "files")
    with start("-w", "2", PROMETHEUS_MULTIPROC_DIR=folder) as server:
        ask_every_worker(server, "/pid", 2)
        order(server, 10)
        every_scrape(server, "orders_total", {(): 10})
        assert not list((tmp_path / "state").glob("*/g-*/app-metrics.sqlite3"))


def test_a_locked_file_shows_what_was_shared_last(server: Gunicorn, tmp_path: Path) -> None:
    ask_every_worker(server, "/pid")
    order(server, 30)
    assert_orders(server, 30)
    (path,) = (tmp_path / "state").glob("*/g-*/app-metrics.sqlite3")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        order(server, 10)
        for text in scrapes(server, 6):
            assert samples(text, "orders_total") == {(): 30}
    assert_orders(server, 40)


SHARING = """
import os, sys
from pathlib import Path
from prometheus_client import CollectorRegistry, Counter, Gauge
from flask_usage_metrics.metrics.shared_app_metrics import SharedAppMetrics
from flask_usage_metrics.runtime.faults import Faults

registry = CollectorRegistry()
faults = Faults()
orders = Counter("orders", "Orders.", ["n"], registry=registry)
shared = SharedAppMetrics(registry)
shared.share(Path("state/app-metrics.sqlite3"), is_alone=False, is_several=True, faults=faults)

def shown(name):
    family = shared.families().get(name)
    return None if family is None else sum(s.value for s in family.samples if "total" in s.name)
"""


def test_more_samples_than_can_be_shared_stay_the_workers_own(tmp_path: Path) -> None:
    done = run_python(
        f"""{SHARING}
few = Counter("few", "Few.", registry=registry)
few.inc()
for n in range(10_001):  # two samples each
    orders.labels(n).inc()
for _ in range(3):
    print(shown("orders"), shown("few"), faults.counts())
""",
        folder=tmp_path,
    )
    assert done.stdout.splitlines() == ["None 1.0 {'multiprocess': 1}"] * 3, done.stderr


def test_a_fork_while_a_metric_is_locked_hangs_no_child(tmp_path: Path) -> None:
    done = run_python(
        f"""{SHARING}
orders.labels(1).inc(3)
assert shown("orders") == 3
with registry._lock, orders._lock, orders._metrics["1",]._value._lock:
    child = os.fork()
    if not child:
        os._exit(7)  # it got here
print(os.waitpid(child, 0)[1] >> 8)
""",
        folder=tmp_path,
    )
    assert done.stdout == "7\n", done.stderr


def test_values_that_json_and_utf8_do_not_have_are_shared(tmp_path: Path) -> None:
    done = run_python(
        f"""{SHARING}
level = Gauge("level", "Level.", ["n"], registry=registry, multiprocess_mode="max")
level.labels("inf").set(float("inf"))
level.labels("\\udc80").set(float("nan"))
for _ in range(2):
    family = shared.families()["level"]
    print([(sample.labels["n"].encode(), sample.value) for sample in family.samples])
    assert not faults.counts(), faults.counts()
""",
        folder=tmp_path,
    )
    expected = "[(b'inf', inf), (b'\\\\udc80', nan)]"
    assert done.stdout.splitlines() == [expected] * 2, done.stderr


@given(
    st.lists(st.floats(0, 1e12), min_size=2, max_size=12),
    st.randoms(use_true_random=False),
)
def test_a_sum_is_the_same_in_whichever_order_workers_end(
    counted: list[float], random: Random
) -> None:
    workers = [family_of(value) for value in counted]
    (total,) = added(workers).samples
    while len(workers) > 1:
        random.shuffle(workers)
        workers = [added([workers.pop(), workers.pop()], exactly=True), *workers]
        (now,) = added([*workers, family_of(0.0)]).samples
        assert now.value == total.value


def family_of(value: float) -> AppFamily:
    return AppFamily("paid", "Paid.", "counter", "", "", [AppSample("paid_total", (), value)])


def test_buckets_of_two_versions_of_an_app_never_fall_from_one_bound_to_the_next() -> None:
    def histogram(*buckets: tuple[str, float]) -> AppFamily:
        samples = [AppSample("seconds_bucket", (), count, bound) for bound, count in buckets]
        count = sum(count for _, count in buckets)
        samples.append(AppSample("seconds_count", (), count))
        return AppFamily("seconds", "Time.", "histogram", "", "", samples)

    old, new = histogram(("1.0", 5), ("+Inf", 1)), histogram(("0.5", 3), ("+Inf", 2))
    metric = shown({0: old, 7: new}, own=7, is_several=True)
    assert [(sample.labels.get("le"), sample.value) for sample in metric.samples] == [
        ("0.5", 3),
        ("1.0", 8),
        ("+Inf", 11),
        (None, 11),
    ]
