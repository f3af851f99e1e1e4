"""The app's own client_python metrics of several processes, from files and from /proc."""

from __future__ import annotations

import logging
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
from helpers.examples import examples
from helpers.process import Process, start_python
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Info,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
    values,
)
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from flask_usage_metrics.metrics.exposition.app_metrics import merged_registry, process_metrics
from flask_usage_metrics.metrics.exposition.app_metrics_files import (
    MultiprocessFiles,
    multiprocess_files,
)
from flask_usage_metrics.runtime.faults import Faults

MODES = ("all", "liveall", "min", "livemin", "max", "livemax", "sum", "livesum")
RECENT = ("mostrecent", "livemostrecent")

WORKER = f"""
import sys
from prometheus_client import Counter, Gauge, Histogram, Summary

number = int(sys.argv[1])
orders = Counter("orders", "Orders.", ["shop"])
orders.labels('a"b\\n').inc(number)
orders.labels(str(number)).inc()
Counter("plain", "No labels.").inc(number / 2)
many = Counter("many", "More than a page of memory.", ["n"])
for n in range(200):
    many.labels(n).inc(n)
seconds = Histogram("seconds", "Time.", ["shop"], buckets=[0.5, 2, 10])
for value in (0.25, 1, 4, 16):
    seconds.labels("x").observe(value * number)
Histogram("other", "Time.").observe(number)
Summary("sizes", "Sizes.", ["shop"]).labels("x").observe(number)
for mode in {MODES + RECENT!r}:
    Gauge(f"gauge_{{mode}}", "Mode.", ["shop"], multiprocess_mode=mode).labels("x").set(number)
    Gauge(f"unset_{{mode}}", "Mode.", multiprocess_mode=mode)
"""

WAIT = """
print("ready", flush=True)
sys.stdin.readline()
"""


QUIET = Faults()


class Workers:
    """Processes of a server that use client_python's multiprocess mode."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: list[Process] = []

    def start(self, number: int, code: str = "") -> Process:
        folder = {"PROMETHEUS_MULTIPROC_DIR": str(self.folder)}
        worker = start_python(WORKER + code + WAIT, number, env=folder)
        self.running.append(worker)
        assert worker.line() == "ready"
        return worker

    def kill(self, worker: Process) -> None:
        with worker:
            self.running.remove(worker)

    def kill_all(self) -> None:
        for worker in list(self.running):
            self.kill(worker)

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self.running]


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Three workers that run, and one that was killed."""
    made = Workers(tmp_path_factory.mktemp("shared"))
    try:
        dead = made.start(1000)
        for number in (3, 1, 2):
            made.start(number)
        made.kill(dead)
        yield made
    finally:
        made.kill_all()


@pytest.fixture
def folder(workers: Workers, tmp_path: Path) -> Path:
    """A copy of the workers' files."""
    return Path(shutil.copytree(workers.folder, tmp_path / "copy"))


@pytest.fixture
def faults() -> Faults:
    return Faults()


def contents(metrics: Iterable[Metric]) -> dict[str, tuple[str, str, list[object]]]:
    """Return families by name; what is there twice is there twice."""
    found = [
        (
            metric.name,
            (
                metric.type,
                metric.documentation,
                sorted((s.name, sorted(s.labels.items()), s.value) for s in metric.samples),
            ),
        )
        for metric in metrics
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def values_of(metrics: Iterable[Metric], name: str) -> dict[tuple[str, ...], float]:
    return {
        tuple(sample.labels.values()): sample.value
        for metric in metrics
        for sample in metric.samples
        if sample.name == name
    }


def left_out(faults: Faults) -> int:
    """Return how many files were left out, not counting that this process came too late."""
    return faults.counts()["multiprocess"] - 1


def test_files_add_up_as_client_python_says(folder: Path, faults: Faults, workers: Workers) -> None:
    (dead,) = {int(path.stem.rsplit("_", 1)[1]) for path in folder.iterdir()} - {*workers.pids}
    mine = contents(MultiprocessFiles(str(folder), faults).collect())
    mark_process_dead(dead, str(folder))
    assert mine == contents(MultiProcessCollector(None, str(folder)).collect())
    assert left_out(faults) == 0
    assert len(mine) == 26


def test_killed_workers_leave_their_counts_and_no_live_gauges(
    folder: Path, faults: Faults, workers: Workers
) -> None:
    metrics = list(MultiprocessFiles(str(folder), faults).collect())
    assert values_of(metrics, "plain_total") == {(): 503.0}
    assert values_of(metrics, "orders_total")['a"b\n',] == 1006.0
    assert values_of(metrics, "sizes_sum") == {("x",): 1006.0}
    assert values_of(metrics, "gauge_max") == {("x",): 1000.0}
    assert values_of(metrics, "gauge_livemax") == {("x",): 3.0}
    assert values_of(metrics, "gauge_sum") == {("x",): 1006.0}
    assert values_of(metrics, "gauge_livesum") == {("x",): 6.0}
    assert values_of(metrics, "gauge_livemostrecent") == {("x",): 2.0}
    assert values_of(metrics, "gauge_liveall") == {
        ("x", str(pid)): value for pid, value in zip(workers.pids, (3.0, 1.0, 2.0), strict=True)
    }
    assert len(values_of(metrics, "gauge_all")) == 4


def test_an_identifier_that_is_no_process_id_is_never_dead(
    folder: Path, faults: Faults, workers: Workers
) -> None:
    (folder / f"gauge_liveall_{workers.pids[0]}.db").rename(folder / "gauge_liveall_web-1.db")
    metrics = MultiprocessFiles(str(folder), faults).collect()
    assert values_of(metrics, "gauge_liveall")["x", "web-1"] == 3.0


def test_a_mode_that_is_not_known_yet_shows_each_process(
    folder: Path, faults: Faults, workers: Workers
) -> None:
    for path in folder.glob("gauge_sum_*.db"):
        path.rename(path.with_name(path.name.replace("_sum_", "_median_")))
    mine = contents(MultiprocessFiles(str(folder), faults).collect())
    theirs = contents(MultiProcessCollector(None, str(folder)).collect())
    assert mine["gauge_sum"] == theirs["gauge_sum"]
    assert len(mine["gauge_sum"][2]) == 4


def test_what_is_merged_can_be_parsed_in_both_formats(folder: Path, faults: Faults) -> None:
    files = MultiprocessFiles(str(folder), faults)
    source = merged_registry(CollectorRegistry(), files, ())
    text = contents(parse_text(generate_latest(source).decode()))
    openmetrics = contents(parse_openmetrics(generate_openmetrics(source).decode()))
    assert {name.removesuffix("_total") for name in text} == set(openmetrics)
    assert openmetrics == contents(files.collect())


def replaced(old: bytes, new: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes().replace(old, new))


def overwritten(position: int, number: int) -> Callable[[Path], object]:
    def overwrite(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[position : position + 4] = struct.pack("i", number)
        path.write_bytes(content)

    return overwrite


def made_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def made_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def made_a_link_to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:5]),
    "cut in an entry": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "text": lambda path: path.write_text("this is no metric at all " * 100),
    "much too long": overwritten(0, 2**31 - 1),
    "negatively long": overwritten(0, -1),
    "a length with which client_python runs for ever": overwritten(8, -20),
    "not UTF-8": replaced(b"Orders.", b"\xff\xfe\xfd...."),
    "not text": replaced(b'{"shop": "3"}', b'{"shop": 333}'),
    "not JSON": replaced(b'["orders"', b'{"orders"'),
    "of another family": replaced(b'["orders"', b'["border"'),
    "a folder": made_a_folder,
    "a pipe": made_a_pipe,
    "gone": made_a_link_to_nowhere,
    "of another type": lambda path: path.rename(path.with_name("meter_" + path.name)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_bad_file_is_left_out_alone_and_counted(
    damage: Callable[[Path], object], folder: Path, faults: Faults, workers: Workers
) -> None:
    damage(folder / f"counter_{workers.pids[0]}.db")
    files = MultiprocessFiles(str(folder), faults)
    metrics = list(files.collect())
    assert left_out(faults) == 1
    assert values_of(metrics, "plain_total") == {(): 501.5}
    assert values_of(metrics, "sizes_count") == {("x",): 4.0}
    list(files.collect())
    assert left_out(faults) == 1  # a killed worker may leave one for ever
    (folder / "counter_0.db").write_bytes(b"")
    list(files.collect())
    assert left_out(faults) == 2


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all files")
def test_a_file_that_may_not_be_read_is_left_out(folder: Path, faults: Faults) -> None:
    for path in folder.glob("counter_*.db"):
        path.chmod(0)
    metrics = contents(MultiprocessFiles(str(folder), faults).collect())
    assert left_out(faults) == 4
    assert "plain" not in metrics


def test_files_of_others_are_nobodys_business(folder: Path, faults: Faults) -> None:
    (folder / "README").write_text("x")
    (folder / ".hidden.db").write_text("x")
    list(MultiprocessFiles(str(folder), faults).collect())
    assert left_out(faults) == 0


def test_a_file_that_was_made_just_now_is_empty_but_good(folder: Path, faults: Faults) -> None:
    (folder / "counter_1.db").write_bytes(bytes(1 << 16))
    list(MultiprocessFiles(str(folder), faults).collect())
    assert left_out(faults) == 0


def test_a_lone_surrogate_is_written_as_an_escape(tmp_path: Path, faults: Faults) -> None:
    started = Workers(tmp_path)
    try:
        started.start(1, 'orders.labels("\\udcff").inc(7)\n')
        files = MultiprocessFiles(str(tmp_path), faults)
        assert values_of(files.collect(), "orders_total")["\\udcff",] == 7.0
        source = merged_registry(CollectorRegistry(), files, ())
        assert rb'orders_total{shop="\\udcff"} 7.0' in generate_latest(source)
        assert left_out(faults) == 0
    finally:
        started.kill_all()


@pytest.mark.parametrize("mode", ["sum", "min", "all"])
def test_a_changed_help_text_or_mode_makes_no_second_series(
    mode: str, folder: Path, faults: Faults, workers: Workers
) -> None:
    for path in folder.glob(f"*_{workers.pids[0]}.db"):
        path.write_bytes(path.read_bytes().replace(b"Mode.", b"MODE."))
    for path in folder.glob(f"gauge_all_{workers.pids[0]}.db"):
        path.rename(path.with_name(f"gauge_{mode}_{workers.pids[0]}.db"))
    metrics = list(MultiprocessFiles(str(folder), faults).collect())
    contents(metrics)
    for metric in metrics:
        series = [(s.name, *sorted(s.labels.items())) for s in metric.samples]
        assert len(series) == len(set(series))
    assert values_of(metrics, "gauge_livesum") == {("x",): 6.0}


def test_a_name_that_was_of_another_type_is_shown_as_one_type(
    tmp_path: Path, faults: Faults
) -> None:
    started = Workers(tmp_path)
    try:
        started.start(1, 'Gauge("queue", "Q.", multiprocess_mode="sum").set(4)\n')
        started.start(2, 'Summary("queue", "Q.").observe(4)\n')
        metrics = list(MultiprocessFiles(str(tmp_path), faults).collect())
        assert contents(metrics)["queue"][0] == "gauge"
        assert values_of(metrics, "queue") == {(): 4.0}
        assert values_of(metrics, "queue_count") == {}
    finally:
        started.kill_all()


def test_a_missing_folder_is_reported_and_gives_nothing(
    tmp_path: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    files = MultiprocessFiles(str(tmp_path / "missing"), faults)
    caplog.clear()
    assert list(files.collect()) == list(files.collect()) == []
    assert [record.message for record in caplog.records] == [
        "multiprocess: FileNotFoundError (No such file or directory); "
        "no metrics are merged from PROMETHEUS_MULTIPROC_DIR; "
        "set PROMETHEUS_MULTIPROC_DIR, to an empty folder, where the server is started"
    ]
    assert left_out(faults) == 2


@settings(max_examples=examples(500), deadline=None)
@given(
    data=st.data(),
    changes=st.lists(
        st.one_of(
            st.tuples(st.just("byte"), st.integers(0, 2999), st.integers(0, 255)),
            st.tuples(st.just("number"), st.integers(0, 700), st.integers(-(2**31), 2**31 - 1)),
            st.tuples(st.just("cut"), st.integers(0, 2999), st.just(0)),
            st.tuples(st.just("junk"), st.integers(0, 2999), st.binary(max_size=40)),
        ),
        max_size=4,
    ),
)
def test_no_damage_makes_a_scrape_fail(
    data: st.DataObject, changes: Sequence[tuple[str, int, object]], workers: Workers
) -> None:
    victim = data.draw(st.sampled_from(sorted(path.name for path in workers.folder.iterdir())))
    folder = workers.folder.with_name("damaged")
    folder.mkdir(exist_ok=True)
    content = bytearray((workers.folder / victim).read_bytes()[:3000])
    for kind, position, value in changes:
        if kind == "byte":
            content[position : position + 1] = bytes((value,))
        elif kind == "number":
            content[position * 4 : position * 4 + 4] = struct.pack("i", value)
        elif kind == "cut":
            del content[position:]
        else:
            content[position:position] = value
    (folder / "counter_1.db").write_bytes((workers.folder / victim).read_bytes())
    (folder / victim).write_bytes(content)
    try:
        source = merged_registry(CollectorRegistry(), MultiprocessFiles(str(folder), QUIET), ())
        generate_latest(source)
        generate_openmetrics(source)
    finally:
        shutil.rmtree(folder)


class Custom:
    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("custom", "Of the app.", value=1)


@pytest.fixture
def registry() -> CollectorRegistry:
    """An app's registry, most of it client_python's default; this process counted 1 order."""
    made = CollectorRegistry(auto_describe=True)
    Counter("orders", "Orders.", ["shop"], registry=made).labels("here").inc()
    Counter("only_here", "Not in the files.", registry=made).inc()
    Gauge("process_orders", "Looks like one of client_python's.", registry=made).set(5)
    Info("app", "Of the app.", registry=made).info({"version": "1"})
    made.register(Custom())
    ProcessCollector(registry=made)
    PlatformCollector(registry=made)
    GCCollector(registry=made)
    return made


def test_files_replace_what_this_process_has_counted(
    registry: CollectorRegistry, folder: Path, faults: Faults, workers: Workers
) -> None:
    files = MultiprocessFiles(str(folder), faults)
    metrics = list(merged_registry(registry, files, workers.pids).collect())
    found = contents(metrics)
    assert found["orders"] == contents(files.collect())["orders"]
    assert ("here",) not in values_of(metrics, "orders_total")
    assert found["custom"][2] == [("custom", [], 1.0)]
    assert {"only_here", "app", "python_info", "seconds", "process_orders"} <= set(found)
    assert not any(name.startswith("python_gc_") for name in found)
    assert values_of(metrics, "process_orders") == {(): 5.0}


def test_names_filter_samples_after_merging(
    registry: CollectorRegistry, folder: Path, faults: Faults, workers: Workers
) -> None:
    source = merged_registry(registry, MultiprocessFiles(str(folder), faults), workers.pids)
    names = {
        "orders_total",
        "seconds_bucket",
        "process_open_fds",
        "python_info",
        "custom",
        "python_gc_collections_total",
        "seconds",  # a family, not a sample
        "nothing",
    }
    metrics = list(source.restricted_registry(names).collect())
    shown = {sample.name for metric in metrics for sample in metric.samples}
    assert shown == names - {"python_gc_collections_total", "seconds", "nothing"}
    assert set(contents(metrics)) == {
        "orders",
        "seconds",
        "process_open_fds",
        "python_info",
        "custom",
    }
    whole = contents(source.collect())
    assert contents(metrics)["orders"] == whole["orders"]
    assert contents(source.collect()) == whole
    assert list(source.restricted_registry(["nothing"]).collect()) == []


def test_nothing_to_merge_leaves_the_registry_as_it_is(registry: CollectorRegistry) -> None:
    assert merged_registry(registry, None, ()) is registry
    assert merged_registry(registry, None, [os.getpid()]) is registry


def test_a_failing_collector_of_the_app_leaves_the_files(folder: Path, faults: Faults) -> None:
    (folder / "counter_7.db").write_bytes(b"")
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))
    metrics = list(merged_registry(registry, MultiprocessFiles(str(folder), faults), ()).collect())
    assert values_of(metrics, "plain_total") == {(): 503.0}
    assert left_out(faults) == 2


def test_a_failing_collector_fails_as_ever_without_files() -> None:
    class Failing:
        def collect(self) -> Iterable[Metric]:
            raise LookupError

    registry = CollectorRegistry()
    registry.register(Failing())
    with pytest.raises(LookupError):
        list(merged_registry(registry, None, [1, 2]).collect())


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc")
class TestProcessMetrics:
    def test_processes_are_summed(self, workers: Workers) -> None:
        alone = [
            {name: value for metric in metrics for name, _, value, *_ in metric.samples}
            for metrics in (
                ProcessCollector(pid=lambda pid=pid: pid, registry=None).collect()
                for pid in workers.pids
            )
        ]
        together = {
            name: value
            for metric in process_metrics(workers.pids)
            for name, _, value, *_ in metric.samples
        }
        assert set(together) == set(alone[0])
        assert len(together) == 6
        for name, value in together.items():
            combine = min if name == "process_start_time_seconds" else sum
            assert value == pytest.approx(combine(one[name] for one in alone), rel=0.02), name
        assert together["process_resident_memory_bytes"] > 10_000_000

    def test_vanished_processes_are_skipped(self, workers: Workers) -> None:
        with start_python("") as gone:
            gone.finish()
        names = [metric.name for metric in process_metrics([*workers.pids, gone.pid])]
        assert names == [metric.name for metric in process_metrics(workers.pids)]
        assert list(process_metrics([gone.pid])) == []
        assert list(process_metrics([])) == []

    def test_they_replace_those_of_this_process_only(
        self, registry: CollectorRegistry, workers: Workers
    ) -> None:
        metrics = list(merged_registry(registry, None, workers.pids).collect())
        sums = {metric.name for metric in process_metrics(workers.pids)}
        assert sums < set(contents(metrics))
        memory = values_of(metrics, "process_virtual_memory_bytes")
        assert memory == values_of(process_metrics(workers.pids), "process_virtual_memory_bytes")
        without = merged_registry(CollectorRegistry(), None, workers.pids)
        assert list(without.collect()) == []

    def test_their_types_and_names_are_client_pythons(
        self, registry: CollectorRegistry, workers: Workers
    ) -> None:
        alone = contents(parse_text(generate_latest(registry).decode()))
        several = contents(
            parse_text(generate_latest(merged_registry(registry, None, workers.pids)).decode())
        )
        assert {name for name in alone if "_gc_" not in name} == set(several)
        for name, (kind, text, _) in several.items():
            assert alone[name][:2] == (kind, text)


@pytest.mark.parametrize("variable", ["PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"])
def test_a_variable_that_was_set_too_late_is_reported_in_one_sentence(
    variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, faults: Faults,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    assert not values.ValueClass._multiprocess
    assert multiprocess_files(faults) is None
    monkeypatch.setenv(variable, str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert isinstance(multiprocess_files(faults), MultiprocessFiles)
    assert [record.message for record in caplog.records] == [
        "multiprocess: PROMETHEUS_MULTIPROC_DIR was set after prometheus_client had been imported; "
        "this worker's own metrics are not shared; "
        "set PROMETHEUS_MULTIPROC_DIR, to an empty folder, where the server is started"
    ]


def test_a_worker_answers_for_all_and_reports_nothing(tmp_path: Path) -> None:
    started = Workers(tmp_path)
    try:
        started.start(1)
        started.start(
            2,
            """
import os
from prometheus_client import REGISTRY, generate_latest
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.metrics.exposition.app_metrics import merged_registry
from flask_usage_metrics.metrics.exposition.app_metrics_files import multiprocess_files

faults = Faults()
source = merged_registry(REGISTRY, multiprocess_files(faults), [os.getpid(), os.getppid()])
with open(os.environ["PROMETHEUS_MULTIPROC_DIR"] + "/scrape", "wb") as file:
    file.write(generate_latest(source))
assert not faults.counts()
""",
        )
        text = (tmp_path / "scrape").read_text()
        families = contents(parse_text(text))
        assert families["plain"][2] == [("plain_total", [], 1.5)]
        assert "process_open_fds" in families
        assert text.count("# TYPE orders_total counter") == 1
        assert "orders_created" not in text
    finally:
        started.kill_all()
