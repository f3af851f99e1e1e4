"""Memory of a worker: at rest, after many requests, and with a full table of metrics.

Each process is fresh. What is told is its resident set, in MB of 10^6 bytes, when what was captured
is folded and written, and the garbage collected. *At rest* means that its app has answered one
request. Beside the libraries means that the bare app imports prometheus_client and SQLAlchemy too,
as any app with metrics and a database does; elsewhere it is a plain app, which imports neither.

A worker that gunicorn forks with ``--preload`` shares pages with its parent: told besides is what
such a worker has for itself (``Private`` in smaps), also after one request.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

from flask import Flask

from .fresh import BARE, EXPORTER, OURS, TRACES_AND_METRICS, WHO, fresh_processes, set_up
from .report import Figure
from .variants import Flush, requests, serve

BATCH = 500
"""Requests between two flushes: half a second at 1 000 requests a second."""

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
WITH_METRICS = (BARE, "ours, metrics", EXPORTER, TRACES_AND_METRICS)
AIM = "<= 12"


def measure(quick: bool) -> list[Figure]:
    """Return the memory of a worker, and how much more it is than the bare app's."""
    many, label_sets, processes = (1000, 500, 1) if quick else (100_000, 10_000, 3)
    asked: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
        "alone": (WHO, ("--requests", str(many))),
        "beside": (WHO, ("--with-libraries",)),
        "forked": (WHO, ("--forked",)),
        "full": (WITH_METRICS, ("--label-sets", str(label_sets))),
    }
    with fresh_processes("memory", quick=quick) as run, ThreadPoolExecutor(os.cpu_count()) as pool:
        # Leaves byte code.
        firsts = () if quick else WHO
        list(pool.map(lambda who: run(who, "--label-sets", "10", "--with-libraries"), firsts))
        running = {
            (how, who): [pool.submit(run, who, *arguments) for _ in range(processes)]
            for how, (everybody, arguments) in asked.items()
            for who in everybody
        }
        found = {task: [done.result() for done in several] for task, several in running.items()}

    def megabytes(how: str, point: str) -> dict[str, float]:
        return {
            who: median(result[point] for result in found[how, who]) / 1e6 for who in asked[how][0]
        }

    rest, worked = megabytes("alone", "rest"), megabytes("alone", "worked")
    return [
        *(
            Figure("RSS after requests", who, value, "MB", size, against=BARE)
            for size, values in ((1, rest), (many, worked))
            for who, value in values.items()
        ),
        *over_bare("RSS after requests", rest, size=1),
        *over_bare("RSS after requests", worked, size=many),
        *over_bare("RSS at rest, beside the libraries", megabytes("beside", "rest"), AIM),
        *over_bare("own memory of a forked worker at rest", megabytes("forked", "own")),
        *over_bare("RSS with label sets, scraped", megabytes("full", "worked"), size=label_sets),
    ]


def over_bare(
    what: str, values: dict[str, float], aim: str = "", *, size: int | None = None
) -> list[Figure]:
    return [
        Figure(
            f"{what}, over {BARE}", who, value - values[BARE], "MB", size, aim=aim * (who in OURS)
        )
        for who, value in values.items()
        if who != BARE
    ]


# ------------------------------------------------------------------------ in a process of its own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("who", choices=WHO)
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--label-sets", type=int, default=0)
    parser.add_argument("--with-libraries", action="store_true")
    parser.add_argument("--forked", action="store_true")
    given = parser.parse_args()

    if given.with_libraries:
        import_module("prometheus_client")
        import_module("sqlalchemy")
    app = Flask("shop")
    app.add_url_rule("/hello/<name>", "hello", lambda name: "hello")
    pages = -(-given.label_sets // len(METHODS))
    for number in range(pages):
        app.add_url_rule(f"/{number}", f"page{number}", lambda: "hello", methods=METHODS)
    flush = set_up(given.who, app, BATCH)
    if given.forked:
        in_child(app, flush)
    answer(app, flush, requests()[:1])
    told = {"rest": memory("Rss")}
    answer(app, flush, islice(cycle(requests()), given.requests))
    if pages:
        answer(app, flush, each_label_set(pages))
        scrape(app, flush, given.who)
    told["worked"] = memory("Rss")
    print(json.dumps(told), flush=True)
    os._exit(0)


def in_child(app: Flask, flush: Flush | None) -> None:
    """Answer a request in a forked child, as a worker does, and tell what it has for itself."""
    if os.fork() == 0:
        answer(app, flush, requests()[:1])
        print(json.dumps({"own": memory("Private_Clean", "Private_Dirty")}), flush=True)
        os._exit(0)
    os.wait()
    os._exit(0)


def answer(app: Flask, flush: Flush | None, asked: Iterable[dict[str, Any]]) -> None:
    remaining = iter(asked)
    while batch := list(islice(remaining, BATCH)):
        for environ in batch:
            serve(app, environ)
        if flush is not None and flush() is False:
            raise RuntimeError("not all was written")


def each_label_set(pages: int) -> Iterable[dict[str, Any]]:
    """Yield requests that differ in what all count by: the endpoint and the method."""
    environ = requests()[0]
    for number in range(pages):
        for method in METHODS:
            yield {**environ, "REQUEST_METHOD": method, "PATH_INFO": f"/{number}"}


def scrape(app: Flask, flush: Flush | None, who: str) -> None:
    if who == TRACES_AND_METRICS:
        # Read by `flush`; what a scraper is then sent is made by an exporter of its own.
        assert flush is not None
        flush()
    elif who != BARE:
        text = app.test_client().get("/metrics").text
        counted = len(re.findall(r'^flask_\w+_bucket\{.*le="\+Inf"', text, re.MULTILINE))
        if counted < len(app.url_map._rules) - 10:
            raise RuntimeError(f"{counted} label sets at /metrics")


def memory(*kinds: str) -> int:
    """Return bytes of this process, by their names in smaps."""
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    sizes = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines[1:])}
    return sum(int(sizes[kind]) * 1024 for kind in kinds)


if __name__ == "__main__":
    main()
