"""What a scrape costs the worker that answers it, beside client_python's encoders.

All contenders are timed in turns in one worker process, by its CPU time. Ours are whole requests
for ``/metrics``; of client_python it is the encoder alone, which does not even compress:

- on the same registry, so that it tells the same samples;
- on its own Counter and Histogram with the same labels and values, which is what a scrape of
  prometheus_flask_exporter consists of.

With four workers each of them counts a quarter, and any answers for all.

    python -m tests.benchmarks.scrape 10000    # so many label sets only
"""

from __future__ import annotations

import gc
import gzip
import multiprocessing
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

from flask import Flask
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.exposition import generate_latest as encode_text
from prometheus_client.openmetrics.exposition import generate_latest as encode_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text
from werkzeug.test import EnvironBuilder, run_wsgi_app

from flask_usage_metrics import TrackUsage
from flask_usage_metrics.enrich.country.answer import ISO_CODES
from flask_usage_metrics.metrics.exposition.collector import collector_of
from flask_usage_metrics.metrics.names import DURATION, REQUEST_LABELS, REQUESTS
from flask_usage_metrics.metrics.shape import Shape

# To be run by itself, too.
sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers.records import make_record

from .report import Figure, table

LABEL_SETS = (100, 1_000, 10_000)
WORKERS = (1, 4)
CHANGED = 50
"""Label sets that are counted between two scrapes: 15 seconds of a small shop."""

FORMATS = {"text": "text/plain", "OpenMetrics": "application/openmetrics-text"}
ENCODERS = {"text": encode_text, "OpenMetrics": encode_openmetrics}
READERS = {"text": read_text, "OpenMetrics": read_openmetrics}
SAME, NATIVE = "client_python", "client_python, its own metrics"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Worker:
    """One process of the app, and what it is compared with.

    Args:
        label_sets: How many there will be.
        state: Folder for what the workers share.
        is_one_of_many: As the server says.
    """

    def __init__(self, label_sets: int, state: str, is_one_of_many: bool) -> None:
        countries = sorted(ISO_CODES)
        self._names = [
            (f"page{number // len(countries)}", countries[number % len(countries)])
            for number in range(label_sets)
        ]
        shape = Shape(max_series=label_sets + 1)  # and that of the request below
        self._registry = CollectorRegistry()
        self._app = Flask("shop")
        self._app.config.from_mapping(
            TRACK_USAGE_MAX_SERIES=shape.max_series, TRACK_USAGE_STATE_DIR=state
        )
        self._is_one_of_many = is_one_of_many
        TrackUsage(self._app, [], registry=self._registry)
        self._totals = collector_of(self._registry, shape, "").totals
        self._get("/")  # joins the other workers

        self._native = CollectorRegistry()
        labels = REQUEST_LABELS
        self._counter = Counter(REQUESTS.name, REQUESTS.help, labels, registry=self._native)
        self._histogram = Histogram(
            DURATION.name, DURATION.help, labels, registry=self._native, buckets=shape.buckets
        )

    def count(self, places: Iterable[int]) -> None:
        """Count a request of each of these label sets."""
        records = [
            make_record(endpoint=endpoint, country=country, duration_seconds=_seconds(place))
            for place in places
            for endpoint, country in [self._names[place]]
        ]
        self._totals.add(records, {})
        self._totals.sync()

    def count_natively(self, places: Iterable[int]) -> None:
        """Count the same in client_python's own metrics."""
        for place in places:
            labels = ("GET", self._names[place][0], "200", self._names[place][1])
            self._counter.labels(*labels).inc()
            self._histogram.labels(*labels).observe(_seconds(place))

    def scrape(self, form: str, is_packed: bool) -> float:
        """Answer a scrape; return its CPU time in seconds."""
        return _cpu_seconds(lambda: self._scraped(form, is_packed))

    def encode(self, form: str, who: str) -> float:
        """Let client_python encode the same; return its CPU time in seconds."""
        registry = self._registry if who == SAME else self._native
        return _cpu_seconds(lambda: ENCODERS[form](registry))

    def check(self) -> None:
        """Tell ours and theirs apart.

        Raises:
            SystemExit: They do not tell the same samples.
        """
        for form, encode in ENCODERS.items():
            plain, packed = self._scraped(form, False), gzip.decompress(self._scraped(form, True))
            same, native = encode(self._registry), encode(self._native)
            ours = _samples(form, plain)
            if packed != plain or ours != _samples(form, same):
                raise SystemExit(f"scrape: ours and client_python's samples differ, in {form}")
            theirs = _samples(form, native)
            if not theirs or {key: ours.get(key) for key in theirs} != theirs:
                raise SystemExit(f"scrape: ours and native samples differ, in {form}")

    def _scraped(self, form: str, is_packed: bool) -> bytes:
        return self._get("/metrics", Accept=FORMATS[form], Accept_Encoding="gzip" * is_packed)

    def _get(self, path: str, **headers: str) -> bytes:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        environ = EnvironBuilder(path, headers=given).get_environ()
        environ["wsgi.multiprocess"] = self._is_one_of_many
        body, _, _ = run_wsgi_app(self._app.wsgi_app, environ)
        return b"".join(body)


def measure(quick: bool, label_sets: Sequence[int] = LABEL_SETS) -> list[Figure]:
    """Return the CPU time of a scrape, for each size and number of workers."""
    sizes, rounds = ((50,), 2) if quick else (label_sets, 5)
    return [
        figure
        for workers in WORKERS
        for size in sizes
        for figure in _figures(size, workers, rounds)
    ]


def _figures(label_sets: int, workers: int, rounds: int) -> Iterator[Figure]:
    seconds: dict[tuple[str, str], list[float]] = {}
    with _started(label_sets, workers) as (answering, *others):

        def count(places: Sequence[int]) -> None:
            for number, worker in enumerate((answering, *others)):
                worker("count", places[number::workers])
            answering("count_natively", places)

        def time(form: str, who: str, *call: Any) -> None:
            seconds.setdefault((form, who), []).append(answering(*call))

        everything = range(label_sets)
        chance = random.Random(label_sets)
        count(everything)
        for _ in range(rounds):
            for form in FORMATS:
                for packing in ("", ", gzip"):
                    # All anew, as for the first scrape.
                    count(everything)
                    time(form, f"ours{packing}, all changed", "scrape", form, bool(packing))
                    time(form, f"ours{packing}, none changed", "scrape", form, bool(packing))
                    count(chance.sample(everything, min(CHANGED, label_sets)))
                    some = f"ours{packing}, {CHANGED} changed"
                    time(form, some, "scrape", form, bool(packing))
                for who in (SAME, NATIVE):
                    time(form, who, "encode", form, who)
        answering("check")
    for (form, who), measured in seconds.items():
        yield Figure(
            f"CPU of a scrape, {form}, {workers} {'worker' if workers == 1 else 'workers'}",
            who,
            median(measured) * 1e3,
            "ms",
            size=label_sets,
            against=None if who == SAME else SAME,
            aim="<= 1/20" if label_sets == max(LABEL_SETS) and who.startswith("ours") else "",
        )


@contextmanager
def _started(label_sets: int, workers: int) -> Iterator[list[Callable[..., Any]]]:
    """Start worker processes of one server; yield what calls a method of each."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as state:
        ends = [context.Pipe() for _ in range(workers)]
        processes = [
            context.Process(target=_work, args=(end, label_sets, state, workers > 1))
            for _, end in ends
        ]
        for process in processes:
            process.start()

        def call(pipe: Any, *what: Any) -> Any:
            pipe.send(what)
            answer = pipe.recv()
            if isinstance(answer, BaseException):
                raise answer
            return answer

        try:
            yield [lambda *what, pipe=pipe: call(pipe, *what) for pipe, _ in ends]
        finally:
            for pipe, _ in ends:
                pipe.send(())
            for process in processes:
                process.join()


def _work(pipe: Any, label_sets: int, state: str, is_one_of_many: bool) -> None:
    disable_created_metrics()
    worker = Worker(label_sets, state, is_one_of_many)
    while what := pipe.recv():
        name, *arguments = what
        try:
            pipe.send(getattr(worker, name)(*arguments))
        except BaseException as error:  # noqa: BLE001 - it is raised where the call came from
            pipe.send(error)


def _seconds(place: int) -> float:
    """Return a duration that a binary number holds exactly, so that sums do not depend on order."""
    return place * 37 % 1024 / 512


def _samples(form: str, text: bytes) -> Samples:
    """Return the samples of an exposition that do not change from scrape to scrape."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in READERS[form](text.decode())
        for sample in family.samples
    }


def _cpu_seconds(work: Callable[[], object]) -> float:
    gc.collect()
    start = process_time()
    work()
    return process_time() - start


if __name__ == "__main__":
    print(table(measure(quick=False, label_sets=[*map(int, sys.argv[1:])] or LABEL_SETS)))
