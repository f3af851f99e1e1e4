"""The demo's shop under gunicorn, visited, and a Prometheus that saw it: what dashboards show."""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import requests
from helpers.dashboards import substituted
from helpers.process import need, run, until
from helpers.prometheus import Prometheus
from helpers.servers import Gunicorn

from flask_usage_metrics import UsageRecord, open_storage
from flask_usage_metrics.demo import comparison, visitors
from flask_usage_metrics.storage import Storage

# All that is opt-in is on. A consumer that cannot be named is a fault of ours to be counted.
SHOP = """
from flask import g, request
from flask_usage_metrics.demo import create_app

def consumer():
    if request.path == "/.env":
        raise LookupError
    if request.path.startswith("/api/"):
        return request.authorization.username if request.authorization else "nobody"

app = create_app("sqlite:///usage.sqlite3", consumer=consumer)

@app.before_request
def note_plan():
    g.track_var["plan"] = ["free", "gold"][len(request.path) % 2]
"""
OPTIONS = {
    "FLASK_TRACK_USAGE_STATE_DIR": "state",
    "FLASK_TRACK_USAGE_VISITORS": "daily",
    "FLASK_TRACK_USAGE_LABELS": "plan",
    "FLASK_TRACK_USAGE_TRACES": "true",
    "OTEL_TRACES_EXPORTER": "none",
}

SENT = 800
WEEK_SECONDS = 7 * 86400
A_WEEK_AGO_PER_SECOND = 5.0


class Live(NamedTuple):
    """The shop, after it was visited twice by the same visitors.

    Prometheus does not know when between two scrapes something happened, and assumes that it
    went on after the last scrape. All series have their first sample at the start of the range,
    and their last in the same scrape, so all increases are stretched alike.

    Attributes:
        records: Of the second time; the first was before Prometheus knew the shop.
        idle: When Prometheus knew the shop, and nobody visited it; in seconds since 1970.
        end: When all was over, likewise.
        range_seconds: From the first scrape until the end.
        stretch: How much larger an increase is made.
    """

    prometheus: Prometheus
    records: list[UsageRecord]
    instance: str
    idle: float
    end: float
    range_seconds: int
    stretch: float

    def ask(self, what: str, **parameters: Any) -> Any:
        """Return what Prometheus answers; it must understand."""
        address = f"{self.prometheus.address}/api/v1/{what}"
        answer = requests.get(address, params=parameters, timeout=20).json()
        assert answer["status"] == "success", (answer, parameters)
        return answer["data"]

    def series(self, target: dict[str, Any], values: dict[str, str]) -> list[dict[str, Any]]:
        """Return what a query of a panel gets: ``{"metric": labels, "values": [...]}``.

        Args:
            values: Of the variables.
        """
        # A rate over all of the range is an increase, which can be foretold.
        seconds = self.range_seconds
        expression = substituted(
            target["expr"], values, range_seconds=seconds, rate_interval=f"{seconds}s"
        )
        if target.get("instant"):
            found = self.ask("query", query=expression, time=self.end)["result"]
            return [{"metric": it["metric"], "values": [it["value"]]} for it in found]
        span = {"start": self.end - 10, "end": self.end, "step": 1}
        result: list[dict[str, Any]] = self.ask("query_range", query=expression, **span)["result"]
        return result


@contextmanager
def visited_shop(folder: Path) -> Iterator[Live]:
    """Run the shop and Prometheus in a folder until all visitors were there.

    Missing tools of Prometheus skip the test at a desk, and fail it in CI.
    """
    need(shutil.which("promtool"), "promtool")
    with Gunicorn(folder, "--workers=3", "--threads=4", app=SHOP, **OPTIONS) as server:
        send(server.port)
        until(lambda: comparison.read_counted(server.port).total(), SENT)
        instance = f"127.0.0.1:{server.port}"
        remember_a_week_ago(folder, instance)
        with Prometheus(folder, instance) as prometheus:

            def value(expression: str) -> float:
                found = prometheus.query(expression)
                return float(found[0]["value"][1]) if found else 0.0

            until(lambda: value("count_over_time(flask_usage_workers[1m])") >= 4, True)
            idle = time.time()
            send(server.port)
            until(lambda: value("sum(flask_usage_requests_total)"), 2 * SENT)
            until(lambda: value("sum(flask_usage_records_pending)"), 0)
            ((first, _), *_) = prometheus.query("flask_usage_workers[5m]")[0]["values"]
            # A millisecond before the first: Prometheus 3 leaves out what is just at the start.
            start = first - 0.001
            seconds = math.ceil(time.time() - start)
            end = start + seconds
            until(lambda: time.time() > end + 1, True)  # and the last scrape before it is in
            increase = value(f"sum(increase(flask_usage_requests_total[{seconds}s] @ {end}))")
            scrapes = value(f"count_over_time(flask_usage_workers[{seconds}s] @ {end})")
            # At most by a tenth more than the mean time between two scrapes.
            assert 1 <= increase / SENT <= 1 + 1.1 / (scrapes - 1)
            records = stored(folder, since=idle)
            assert len(records) == SENT
            yield Live(prometheus, records, instance, idle, end, seconds, increase / SENT)


def send(port: int) -> None:
    """Let the same visitors in as ever."""
    todo = list(islice(visitors.visits(random.Random("dashboards")), SENT))
    # Nobody knows the country of a private address.
    todo[::40] = [("GET", "/", {"X-Forwarded-For": "10.0.0.1"}, "")] * len(todo[::40])
    with ThreadPoolExecutor(visitors.VISITORS) as pool:
        shares = [iter(todo[number :: visitors.VISITORS]) for number in range(visitors.VISITORS)]
        assert sum(pool.map(lambda share: visitors.send(port, share, 0.0, Event()), shares)) == SENT


def remember_a_week_ago(folder: Path, instance: str) -> None:
    """Let Prometheus have been there a week ago, for a quarter of an hour."""
    labels = f'job="shop",instance="{instance}",method="POST",endpoint="shop.checkout"'
    series = f'flask_usage_requests_total{{{labels},status="201",country="US"}}'
    start = time.time() - WEEK_SECONDS - 300
    samples = [
        f"{series} {A_WEEK_AGO_PER_SECOND * after} {start + after}" for after in range(0, 900, 5)
    ]
    text = ["# TYPE flask_usage_requests counter", *samples, "# EOF\n"]
    (folder / "week-ago").write_text("\n".join(text))
    command = ("promtool", "tsdb", "create-blocks-from", "openmetrics", "week-ago", "prometheus")
    done = run(*command, folder=folder)
    assert done.returncode == 0, done.stderr


def stored(folder: Path, since: float) -> list[UsageRecord]:
    storage = open_storage(f"sqlite:///{folder}/usage.sqlite3")
    assert isinstance(storage, Storage)
    try:
        return list(storage.records(since=datetime.fromtimestamp(since, timezone.utc)))
    finally:
        storage.close()
