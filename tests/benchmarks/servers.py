"""CPU time, throughput and latency under gunicorn, driven by wrk: ours, bare Flask and the peers.

One worker, so that all a contender does is in one process under one GIL, of the kind gthread with
4 threads: several requests are under way at once, and connections are kept alive. The kind sync
would open a connection for each request, and wait for one that has nothing to ask yet.

Every contender gets the same load, twice:

- saturated: 8 connections that ask again at once. What comes of it is the throughput, and the CPU
  time of the worker process, in all its threads, until it has nothing left to do. Latency is only
  the reverse of throughput here (8 / requests a second), so its p50 is not shown.
- with pauses: the same connections, each of which waits 4 to 12 ms, at random, before it asks
  again: some 900 requests a second, a quarter to a half of what bare Flask can. Few requests wait
  for another one, so that p99 shows what else stalls them: a background thread that holds the GIL.

The worker has one core for itself, and wrk has the others: where threads of one process are on two
cores, each change of the GIL's holder wakes the other core, which costs more than all else that is
measured here (bare Flask 700 µs a request instead of 220), and how often it happens is chance.
PostgreSQL's own processes are not in the CPU time, but compete for all cores: with two of them they
take throughput, and add latency, that a database elsewhere would not.

The contenders take turns, in another order each round; shown are the medians of the rounds. What
was counted, and stored, has to agree with what wrk saw answered, or there are no figures.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from prometheus_client.parser import text_string_to_metric_families

# The tests' own servers, which find each other by their bare names.
sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers import databases
from helpers.servers import Gunicorn

from flask_usage_metrics.storage.sql import SQLStorage

from .report import Figure, table
from .served import BARE, CONTENDERS, METRICS, POSTGRESQL, SQLITE, worker_core
from .variants import USER_AGENTS

ROOT = Path(__file__).parents[2]
CONNECTIONS = 8

PAUSE = "function delay() return math.random(4, 12) end"  # ms

SCRIPT = """
local agents = {%(agents)s}
local number = 0

function request()
  number = number + 1
  local headers = {
    ["Host"] = "shop.example",
    ["User-Agent"] = agents[number %% #agents + 1],
    ["Accept"] = "text/html,application/xhtml+xml,*/*;q=0.8",
    ["Accept-Language"] = "en-GB,en;q=0.8",
    ["Referer"] = "https://shop.example/",
  }
  return wrk.format("GET", "/hello/visitor" .. number %% 51 .. "?page=2", headers)
end

%(pause)s

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\\n{"requests": %%d, "seconds": %%f, "errors": %%d, "p50": %%f, "p99": %%f}\\n',
    summary.requests,
    summary.duration / 1e6,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout,
    latency:percentile(50),
    latency:percentile(99)
  ))
end
"""


@dataclass(frozen=True)
class Load:
    """What wrk saw.

    Attributes:
        requests: That were answered.
        seconds: How long it ran.
        p50: Half of the answers took no longer, in µs.
        p99: As p50, of 99 in 100.
    """

    requests: int
    seconds: float
    p50: float
    p99: float


@dataclass(frozen=True)
class Run:
    """One contender in one round.

    Attributes:
        cpu_seconds: What the saturated load cost the worker.
        saturated: One of the two loads.
        paused: The other one.
    """

    cpu_seconds: float
    saturated: Load
    paused: Load


def measure(quick: bool) -> list[Figure]:
    """Return the figures of all contenders, each against bare Flask."""
    if shutil.which("wrk") is None:
        raise SystemExit("servers: wrk is missing (apt install wrk)")
    rounds, seconds = (1, 1) if quick else (5, 6)
    runs: dict[str, list[Run]] = {name: [] for name in CONTENDERS}
    with closing(postgresql()) as server:
        for number in range(rounds):
            names = list(CONTENDERS)
            for name in names[number:] + names[:number]:
                runs[name].append(run(name, server, seconds=seconds, warm_up=not quick))
    shown: tuple[tuple[str, str, str, Callable[[Run], float]], ...] = (
        ("CPU a request", "µs", "", lambda run: run.cpu_seconds / run.saturated.requests * 1e6),
        (
            "requests a second, saturated",
            "",
            ">= 0.95",
            lambda run: run.saturated.requests / run.saturated.seconds,
        ),
        ("p99, saturated", "ms", "<= 1.1", lambda run: run.saturated.p99 / 1e3),
        (
            "requests a second, with pauses",
            "",
            ">= 0.95",
            lambda run: run.paused.requests / run.paused.seconds,
        ),
        ("p50, with pauses", "ms", "", lambda run: run.paused.p50 / 1e3),
        ("p99, with pauses", "ms", "<= 1.1", lambda run: run.paused.p99 / 1e3),
    )
    return [
        Figure(
            what,
            name,
            median(map(value, runs[name])),
            unit,
            against=BARE,
            aim=aim if name in (METRICS, SQLITE, POSTGRESQL) else "",
        )
        for what, unit, aim, value in shown
        for name in CONTENDERS
    ]


def postgresql() -> databases.PostgreSQL:
    # The tests' own way to say so would skip a test.
    if not (shutil.which("initdb") or list(Path("/usr/lib/postgresql").glob("*/bin/initdb"))):
        raise SystemExit("servers: initdb is missing (apt install postgresql)")
    return databases.PostgreSQL()


def run(name: str, server: databases.PostgreSQL, *, seconds: int, warm_up: bool) -> Run:
    """Put a contender under both loads, in a process and a folder of its own."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        if name == POSTGRESQL:
            storage = stack.enter_context(server.emptied())
        else:
            storage = f"sqlite:///{folder}/usage.sqlite3"
        gunicorn = stack.enter_context(served(name, folder, storage))
        gunicorn.get("/hello/first")  # by now the worker is there
        (worker,) = gunicorn.workers()
        answered = 1
        loads = [load(gunicorn, folder, seconds=1)] if warm_up else []
        before = cpu_seconds(worker)
        loads.append(load(gunicorn, folder, seconds=seconds))
        spent = cpu_seconds(worker) - before
        loads.append(load(gunicorn, folder, seconds=seconds, pause=PAUSE))
        answered += sum(done.requests for done in loads)
        # A request under way when wrk ends is counted by us, and not by wrk.
        agree(name, gunicorn, storage, answered, spare=CONNECTIONS * len(loads))
    return Run(spent, *loads[-2:])


class Measured(Gunicorn):
    """gunicorn as anybody starts it."""

    is_fresh = True


@contextmanager
def served(name: str, folder: Path, storage: str) -> Iterator[Gunicorn]:
    """Start gunicorn, and end it."""
    options = ("--workers", "1", "--worker-class", "gthread", "--threads", "4")
    app = (
        "from tests.benchmarks.served import make\n"
        f"app = make({name!r}, {str(folder)!r}, {storage!r})\n"
    )
    path = os.pathsep.join([str(folder), str(ROOT)])
    with Measured(folder, *options, app=app, PYTHONPATH=path) as gunicorn:
        yield gunicorn


def load(gunicorn: Gunicorn, folder: Path, *, seconds: int, pause: str = "") -> Load:
    """Have wrk ask for some seconds."""
    script = folder / "load.lua"
    agents = ", ".join(map(json.dumps, USER_AGENTS))
    script.write_text(SCRIPT % {"agents": agents, "pause": pause})
    command = [*elsewhere(), "wrk", "--threads", "1", "--connections", str(CONNECTIONS)]
    command += ["--duration", str(seconds), "--script", str(script), gunicorn.address]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        told = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise SystemExit(f"servers: wrk: {done.stdout}{done.stderr}") from None
    if told.pop("errors") or not told["requests"]:
        raise SystemExit(f"servers: not all was answered\n{done.stdout}{gunicorn.log()}")
    return Load(**told)


def elsewhere() -> list[str]:
    """Return what runs a command on the cores the worker is not on."""
    others = os.sched_getaffinity(0) - {worker_core()}
    return ["taskset", "--cpu-list", ",".join(map(str, sorted(others)))] if others else []


def cpu_seconds(pid: int) -> float:
    """Return what a process has used, in all its threads, once it has nothing left to do."""
    used, since = -1.0, time.monotonic()
    deadline = since + 60
    # Longer than TRACK_USAGE_FLUSH_SECONDS.
    while time.monotonic() < min(since + 0.8, deadline):
        time.sleep(0.05)
        # After the name, which is in brackets: utime and stime (man 5 proc_pid_stat).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        now = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        if now != used:
            used, since = now, time.monotonic()
    return used


def agree(name: str, gunicorn: Gunicorn, storage: str, answered: int, spare: int) -> None:
    """See that everything was counted, and stored."""
    if name not in (METRICS, SQLITE, POSTGRESQL):
        return
    deadline = time.monotonic() + 60
    with ExitStack() as stack:
        reader = None
        if name != METRICS:
            reader = stack.enter_context(closing(SQLStorage.from_url(storage)))
            reader.is_of_app = True  # none yet is 0
        # A request that wrk no longer waited for may still be under way.
        while True:
            counted = requests_counted(gunicorn)
            stored = reader.count() if reader else counted
            if stored == counted and answered <= counted <= answered + spare:
                return
            if time.monotonic() > deadline:
                raise SystemExit(
                    f"servers: {name}: {counted} requests counted and {stored} rows"
                    f" of {answered} answered"
                )
            time.sleep(0.1)


def requests_counted(gunicorn: Gunicorn) -> int:
    """Return what the sum of the requests' counter is in a scrape."""
    with urllib.request.urlopen(f"{gunicorn.address}/metrics", timeout=60) as response:
        families = text_string_to_metric_families(response.read().decode())
    return sum(
        int(sample.value)
        for family in families
        for sample in family.samples
        if sample.name == "flask_usage_requests_total"
    )


if __name__ == "__main__":
    print(table(measure(quick="--quick" in sys.argv)))
