"""The demo's command: serves the shop, lets visitors in, compares storage and metrics."""

from __future__ import annotations

import argparse
import logging
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timezone
from http.client import HTTPException
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread

from flask import Flask
from werkzeug.serving import make_server

from flask_usage_metrics import TrackUsage, UsageMetricsError
from flask_usage_metrics.demo.comparison import (
    differences,
    live_line,
    read_counted,
    read_stored,
    table,
)
from flask_usage_metrics.demo.shop import make_app
from flask_usage_metrics.demo.visitors import HOST, VISITORS, ask, send, visits


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return 0, 1 if storage and metrics disagree, or 2 if it cannot run."""
    options = parse(arguments)
    if options.visit is not None:
        return visit(options.visit, options.requests, options.seed)
    try:
        # Not left to the server, which would end the process with a message of its own.
        listener = socket.create_server((HOST, options.port))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        print(f"demo: port {options.port}: {reason}; choose another --port", file=sys.stderr)
        return 2
    with listener, TemporaryDirectory(prefix="flask-usage-demo-") as folder:
        file = Path(folder, "usage.sqlite3").as_posix()
        try:
            app, usage = make_app(options.storage or f"sqlite:///{file}")
            with closing(usage.storage), serving(app, listener) as port:
                print(f"shop:    http://{HOST}:{port}/\nmetrics: http://{HOST}:{port}/metrics")
                if not options.storage:  # which may hold a password
                    print(f"records: {file} (removed at the end)")
                if find_spec("iptocc") is None:
                    print("Countries stay unknown: pip install 'flask-usage-metrics[country]'")
                print("Rows follow their requests by half a second. Ctrl-C ends it.", flush=True)
                return run(port, usage, options.requests, options.seed)
        except (UsageMetricsError, RuntimeError) as error:
            print(f"demo: {error}", file=sys.stderr)
            return 2


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; exits with 2 if it is wrong.

    Args:
        arguments: Those of the command; None: those of this process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m flask_usage_metrics.demo",
        description="A small Flask shop with simulated visitors from all over the world, "
        "and what flask_usage_metrics counts and stores of them. Ctrl-C ends it.",
    )
    add = parser.add_argument
    add("--requests", type=int, metavar="N", help="send exactly N requests, print what was stored "
        "beside what was counted, and end: with exit code 0 if they agree, else 1")  # fmt: skip
    add("--storage", metavar="URL", help="where to keep the records, such as "
        "sqlite:///demo.sqlite3 (default: a temporary file, removed at the end)")  # fmt: skip
    add("--port", type=int, default=0, help="port on 127.0.0.1 (default: a free one)")
    add("--visit", type=int, metavar="PORT", help="only send visitors, to a shop that is served "
        "already, such as by gunicorn 'flask_usage_metrics.demo:create_app()'")  # fmt: skip
    add("--seed", type=int, default=1, help="the same seed sends the same requests (default: 1)")
    options = parser.parse_args(arguments)
    if options.requests is not None and options.requests < 1:
        parser.error(f"argument --requests: must be 1 or more, not {options.requests}")
    for name, port in (("port", options.port), ("visit", options.visit or 0)):
        if not 0 <= port < 65536:
            parser.error(f"argument --{name}: must be from 0 to 65535, not {port}")
    return options


@contextmanager
def serving(app: Flask, listener: socket.socket) -> Iterator[int]:
    """Serve the app over HTTP, a thread for each request; yields the port."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else there is a line for each request
    port = listener.getsockname()[1]
    server = make_server(HOST, port, app, threaded=True, fd=listener.fileno())
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield port
    finally:
        server.shutdown()
        thread.join()


def run(port: int, usage: TrackUsage, requests: int | None, seed: int) -> int:
    """Let the visitors in, watch them, then compare; return the exit code.

    Args:
        port: The shop's.
        usage: What tracks the shop.
        requests: Requests to send; None: until Ctrl-C.
        seed: The same one sends the same requests.
    """
    since = datetime.now(timezone.utc)  # a storage that was kept has older records, too
    sent = let_in(port, requests, seed, lambda: live_line(port, usage, since))
    # The last answers have arrived, but the server may not be through with them yet.
    until = time.monotonic() + 5.0
    while (counted := read_counted(port)).total() < sent and time.monotonic() < until:
        time.sleep(0.05)
    usage.flush()
    stored = read_stored(usage, since)
    print(table(stored, counted) + "\n")
    if found := differences(stored, counted, sent):
        print("Storage and /metrics differ:", *found, sep="\n  ")
        return 1
    print(f"Storage and /metrics agree: {sent:,} requests sent, stored and counted.")
    return 0


def visit(port: int, requests: int | None, seed: int) -> int:
    """Let visitors into a shop that others serve; return the exit code."""
    try:
        ask(port, "GET", "/")
    except (OSError, HTTPException) as error:
        print(f"demo: port {port}: {error}", file=sys.stderr)
        return 2
    print("Ctrl-C ends it.", flush=True)
    sent = let_in(port, requests, seed, lambda: f"metrics: http://{HOST}:{port}/metrics")
    print(f"{sent + 1:,} requests sent.")
    return 0


def let_in(port: int, requests: int | None, seed: int, describe: Callable[[], str]) -> int:
    """Let the visitors in until all is sent or Ctrl-C; return the number of requests sent."""
    stopped, pause_seconds = Event(), 0.3 if requests is None else 0.0
    with ThreadPoolExecutor(VISITORS) as pool:
        sendings = []
        try:
            for number in range(VISITORS):
                # A seed and a share for each, so that it does not matter who is faster.
                share = None if requests is None else (requests + number) // VISITORS
                todo = islice(visits(random.Random(f"{seed}-{number}")), share)
                sendings.append(pool.submit(send, port, todo, pause_seconds, stopped))
            watch(sendings, describe)
        finally:
            stopped.set()
    return sum(sending.result() for sending in sendings)


def watch(sendings: list[Future[int]], describe: Callable[[], str]) -> None:
    """Print a line now and then, in place on a terminal, until all is sent or Ctrl-C."""
    live = sys.stdout.isatty()
    with suppress(KeyboardInterrupt):
        while wait(sendings, 0.5 if live else 3.0).not_done:
            line = describe()
            print(f"\r{line:79.79}" if live else line, end="" if live else "\n", flush=True)
    print("\n" * live)


if __name__ == "__main__":
    sys.exit(main())
