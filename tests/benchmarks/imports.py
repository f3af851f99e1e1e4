"""Time that a worker takes to start: imports, set-up, the first request and what comes of it.

Each process is fresh, the contenders take turns, and byte code is there. What is told is the
median, in milliseconds of the CPU time of the whole process, or of a clock:

- *import*, after Flask, prometheus_client and SQLAlchemy, which any app with metrics and a
  database imports anyway;
- *set-up and first request*, over those of the bare app;
- *first visitor's wait*: the first request by the clock;
- *first batch*: what is done behind that visitor's back, in a thread of ours or when spans are
  exported;
- *slowest request meanwhile*: of visitors who come during that, by the clock;
- *start of a plain app*: all imports but Flask's, set-up and first request, over the bare app's,
  in an app that imports neither prometheus_client nor SQLAlchemy itself.

Where it goes: ``python -X importtime -c 'import flask_usage_metrics'``.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
from importlib import import_module
from statistics import median
from time import perf_counter, process_time, sleep
from typing import Any

from flask import Flask

from .fresh import BARE, EXPORTER, OURS, TRACES, TRACES_AND_METRICS, WHO, fresh_processes, set_up
from .report import Figure
from .variants import Flush, requests, serve

TRACED = ("opentelemetry.instrumentation.flask", "opentelemetry.sdk.trace.export")
IMPORTED: dict[str, tuple[str, ...]] = {
    BARE: (),
    **dict.fromkeys(OURS, ("flask_usage_metrics",)),
    EXPORTER: ("prometheus_flask_exporter",),
    TRACES: TRACED,
    TRACES_AND_METRICS: (*TRACED, "opentelemetry.sdk.metrics.export"),
}
AIM = "<= 60"


def measure(quick: bool) -> list[Figure]:
    """Return what each contender takes to start."""
    found: dict[str, list[dict[str, float]]] = {who: [] for who in WHO}
    with fresh_processes("imports", quick=quick) as run:
        for who in () if quick else WHO:
            run(who)  # leaves byte code
        for _ in range(1 if quick else 9):
            for who in WHO:
                plain = {f"plain, {what}": took for what, took in run(who, "--plain").items()}
                found[who].append({**run(who), **run(who, "--busy"), **plain})

    def milliseconds(what: str) -> dict[str, float]:
        return {
            who: median(result[what] for result in several) * 1e3 for who, several in found.items()
        }

    figures = []
    for clock in ("CPU", "wall"):
        took = milliseconds(f"import, {clock}")
        figures += [
            Figure(f"import, {clock}", who, took[who], "ms", aim=AIM * (who in OURS))
            # All of ours import the same.
            for who in (OURS[0], EXPORTER, TRACES, TRACES_AND_METRICS)
        ]
    started = milliseconds("set-up and first request")
    figures += [
        Figure(f"set-up and first request over {BARE}, CPU", who, took - started[BARE], "ms")
        for who, took in started.items()
        if who != BARE
    ]
    for what in ("first visitor's wait", "first batch, CPU", "slowest request meanwhile"):
        figures += [Figure(what, who, took, "ms") for who, took in milliseconds(what).items()]
    for clock in ("CPU", "wall"):
        took = milliseconds(f"plain, start, {clock}")
        figures += [
            Figure(f"start of a plain app over {BARE}, {clock}", who, took[who] - took[BARE], "ms")
            for who in took
            if who != BARE
        ]
    return figures


# ------------------------------------------------------------------------ in a process of its own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("who", choices=WHO)
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--plain", action="store_true")
    given = parser.parse_args()

    for name in () if given.plain else ("prometheus_client", "sqlalchemy"):
        import_module(name)
    start_cpu, start = process_time(), perf_counter()
    cpu, wall = process_time(), perf_counter()
    for name in IMPORTED[given.who]:
        import_module(name)
    told = {"import, CPU": process_time() - cpu, "import, wall": perf_counter() - wall}

    app = Flask("shop")
    app.add_url_rule("/hello/<name>", "hello", lambda name: "hello")
    asked = requests()
    cpu = process_time()
    flush = set_up(given.who, app, 500) or (lambda: None)
    wall = perf_counter()
    serve(app, asked[0])
    told["first visitor's wait"] = perf_counter() - wall
    told["set-up and first request"] = process_time() - cpu
    told |= {"start, CPU": process_time() - start_cpu, "start, wall": perf_counter() - start}
    if given.busy:
        told = {"slowest request meanwhile": slowest(app, asked, meanwhile=flush)}
    else:
        cpu = process_time()
        flush()
        told["first batch, CPU"] = process_time() - cpu
    print(json.dumps(told), flush=True)
    os._exit(0)


def slowest(app: Flask, asked: list[dict[str, Any]], meanwhile: Flush) -> float:
    """Return the seconds of the slowest of at least a hundred requests, two milliseconds apart."""
    thread = threading.Thread(target=meanwhile)
    waits: list[float] = []
    due = perf_counter()
    thread.start()
    while thread.is_alive() or len(waits) < 100:
        serve(app, asked[len(waits) % 100])
        # Since it came, not since it was begun: who holds the interpreter may keep it waiting.
        waits.append(perf_counter() - due)
        due += 0.002
        sleep(max(0.0, due - perf_counter()))
    return max(waits)


if __name__ == "__main__":
    main()
