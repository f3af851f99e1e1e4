"""A small shop with simulated visitors, for the README: python -m flask_usage_metrics.demo."""

from __future__ import annotations

import argparse
import logging
import os
import random
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timezone
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

from flask import Blueprint, Flask, Response, abort, g, redirect, request, url_for
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from werkzeug.serving import make_server
from werkzeug.wrappers import Response as AnyResponse

from flask_usage_metrics import TrackUsage, UsageMetricsError

HOST = "127.0.0.1"
VISITORS = 8  # at a time


def create_app(storage: Any = None, **options: Any) -> Flask:
    """Make the shop for a server such as gunicorn: 'flask_usage_metrics.demo:create_app()'."""
    return make_app(storage, **options)[0]


def make_app(storage: Any, **options: Any) -> tuple[Flask, TrackUsage]:
    """Make the shop; what is wrong with the arguments, those of TrackUsage, is a ConfigError."""
    app = Flask("shop", static_folder=None)
    # The visitors all come from this machine; whom they speak for is in X-Forwarded-For.
    app.config["TRACK_USAGE_TRUSTED_PROXIES"] = [HOST]
    # One checkout in twenty-five crashes, and a search may take long: so that there is an error
    # budget to watch being used up.
    app.config["TRACK_USAGE_SLO"] = {"availability": 0.99, "latency": (0.95, 0.05)}
    app.config.from_prefixed_env()
    # A registry of its own, so that a second shop in this process counts from zero.
    usage = TrackUsage(app, storage, **{"registry": CollectorRegistry(), **options})
    app.register_blueprint(make_shop())
    app.register_blueprint(make_api())
    app.logger.disabled = True  # some checkouts crash on purpose: not a traceback for each
    return app, usage


def make_shop() -> Blueprint:
    """Make the pages that people and crawlers visit."""
    shop = Blueprint("shop", __name__)

    @shop.get("/")
    def home() -> str:
        return "<h1>A small shop</h1>" + "<p>Tea, pots and cups.</p>" * 20

    @shop.get("/product/<int:number>")
    def product(number: int) -> str:
        work(0.004)
        return f"<h1>Product {number}</h1>" if 1 <= number <= 40 else abort(404)

    @shop.get("/search")
    def search() -> str:
        work(0.02)
        g.track_var["q"] = request.args["q"]  # is kept with the record
        return "<ul>" + "<li>A product</li>" * 10 + "</ul>"

    @shop.route("/cart", methods=["GET", "POST"])
    def cart() -> str | AnyResponse:
        work(0.005)
        return redirect(url_for("shop.cart"), 303) if request.method == "POST" else "<h1>Cart</h1>"

    @shop.post("/checkout")
    def checkout() -> tuple[str, int]:
        work(0.04)
        if (problem := {"declined": 402, "late": 409}.get(request.form["card"])) is not None:
            return "<h1>Sorry</h1>", problem
        rate = 100 / int(request.form["instalments"])  # nobody thought of 0
        return f"<h1>Thank you</h1><p>{rate:.2f} a month.</p>", 201

    @shop.get("/feed.xml")
    def feed() -> AnyResponse:
        response = Response("<feed>" + "<entry/>" * 50 + "</feed>", mimetype="application/atom+xml")
        response.set_etag("monday")
        return response.make_conditional(request)

    return shop


def make_api() -> Blueprint:
    """Make the endpoints that programs call."""
    api = Blueprint("api", __name__, url_prefix="/api")

    @api.get("/stock/<int:number>")
    def stock(number: int) -> dict[str, int]:
        return {"product": number, "pieces": 7 * number % 12}

    @api.post("/orders")
    def order() -> tuple[dict[str, str], int]:
        work(0.01)
        return ({"is": "ordered"}, 201) if request.authorization else ({"error": "who?"}, 401)

    @api.get("/orders.csv")
    def export() -> Response:
        lines = (f"{number},{number % 40 + 1},{number % 3 + 1}\n" for number in range(1000))
        return Response(lines, mimetype="text/csv")  # sent line by line

    return api


def work(seconds: float) -> None:
    """Take about so long, as a database would."""
    time.sleep(random.expovariate(1 / seconds))


# Country, its share, a network registered there, the language people prefer.
PLACES = """
US 14 73.15.20. en     US 6 2601:640:1:: en   GB 8 86.130.20. en    DE 8 80.187.100. de
FR 6 90.76.20. fr      NL 6 145.97.20. nl     IN 6 49.36.10. hi     CA 4 99.224.10. en
ES 4 88.6.20. es       IT 4 79.20.10. it      JP 4 126.10.20. ja    BR 4 177.32.10. pt
DE 3 2003:c0:8f:: de   CH 3 85.0.10. de       PL 3 83.20.10. pl     SE 3 85.224.10. sv
AU 3 1.128.10. en      MX 3 189.128.10. es    IE 2 86.40.10. en     AT 2 62.178.10. de
BE 2 81.240.10. nl     PT 2 85.240.10. pt     NO 2 84.208.10. nb    DK 2 80.160.10. da
FI 2 84.248.10. fi     TR 2 88.224.10. tr     KR 2 121.130.10. ko   ID 2 36.64.10. id
VN 2 14.160.10. vi     ZA 2 105.224.10. en    GR 1 79.128.10. el    IL 1 79.176.10. he
AE 1 86.96.10. ar      TW 1 114.32.10. zh     SG 1 116.86.10. en    PH 1 112.198.10. en
NZ 1 122.56.10. en     AR 1 190.16.10. es     CL 1 190.160.10. es   KE 1 105.160.10. en"""

# What a kind of visitor does, in this order: how likely, method, target, form.
SHOPPING = """
.6 GET /               .5 GET /search?q=tea   .9 GET /product/{n}   .6 GET /product/{n}
.4 GET /product/{n}    .2 GET /search?q=cup   .3 GET /product/{n}   .3 POST /cart product={n}
.3 GET /cart           .16 POST /checkout card=fine&instalments=3   .04 POST /checkout card=late
.05 POST /checkout card=declined              .04 POST /checkout card=fine&instalments=0"""
CRAWLING = """
1 GET /product/{n}     .8 GET /product/{n}    .8 GET /product/{n}   .5 GET /product/{n}
.5 GET /product/{n}    .3 GET /product/99     .3 GET /feed.xml"""
CALLING = """
1 GET /api/stock/{n}   .6 GET /api/stock/{n}  .5 POST /api/orders product={n}
.3 GET /api/orders.csv"""
READING = "1 GET /feed.xml"
SCANNING = "1 GET /.env  .8 GET /wp-login.php  .5 POST / x=1"

CHROME = "AppleWebKit/537.36 (KHTML, like Gecko) Chrome/137.0.0.0"
SAFARI = "AppleWebKit/605.1.15 (KHTML, like Gecko) Version/18.5"
AI = "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible;"
# Share of the visitors, what they do, network (empty: one of `PLACES`), User-Agent.
KINDS = (
    (19, SHOPPING, "", f"Mozilla/5.0 (Windows NT 10.0; Win64; x64) {CHROME} Safari/537.36"),
    (18, SHOPPING, "", f"Mozilla/5.0 (Linux; Android 10; K) {CHROME} Mobile Safari/537.36"),
    (15, SHOPPING, "", "Mozilla/5.0 (iPhone; CPU iPhone OS 18_5 like Mac OS X) "
     f"{SAFARI} Mobile/15E148 Safari/604.1"),
    (7, SHOPPING, "", "Mozilla/5.0 (X11; Linux x86_64; rv:139.0) Gecko/20100101 Firefox/139.0"),
    (4, CRAWLING, "66.249.66.",
     "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)"),
    (3, CRAWLING, "20.171.207.", f"{AI} GPTBot/1.2; +https://openai.com/gptbot)"),
    (3, CRAWLING, "216.73.216.", f"{AI} ClaudeBot/1.0; +claudebot@anthropic.com)"),
    (4, "1 GET /product/{n}", "20.171.208.", f"{AI} ChatGPT-User/1.0; +https://openai.com/bot"),
    (6, CALLING, "46.4.10.", "python-requests/2.32.3"),
    (2, CALLING, "", "curl/8.5.0"),
    (8, "1 HEAD /", "167.99.10.",
     "Mozilla/5.0+(compatible; UptimeRobot/2.0; http://www.uptimerobot.com/)"),
    (5, READING, "51.15.20.", "FreshRSS/1.24.1 (Linux; https://freshrss.org)"),
    (2, SCANNING, "45.146.164.", "Mozilla/5.0 zgrab/0.x"),
)  # fmt: skip


Visit = tuple[str, str, dict[str, str], str]
"""A request: method, target, headers, form."""


def visits(rng: random.Random) -> Iterator[Visit]:
    """Yield what visitors send, one after the other, without end."""
    places = re.findall(r"(..) (\d+) (\S+) (..)", PLACES)
    shares = [int(share) for _, share, _, _ in places]
    while True:
        _, way, network, agent = rng.choices(KINDS, [kind[0] for kind in KINDS])[0]
        country, _, home, language = rng.choices(places, shares)[0]
        # A number without leading zeros ends an address of IPv4 as well as one of IPv6.
        address = f"{network or home}{rng.randint(1, 254)}"
        headers = {"User-Agent": agent, "X-Forwarded-For": address}
        if way == SHOPPING:
            headers["Accept-Language"] = f"{language}-{country},{language};q=0.9,en;q=0.5"
        if way == READING and rng.random() < 0.7:
            headers["If-None-Match"] = '"monday"'
        if way == CALLING and rng.random() < 0.7:
            headers["Authorization"] = "Basic cGFydG5lcjpzZWNyZXQ="  # partner:secret
        for chance, step in re.findall(r"(\S+) ([A-Z]+ \S+(?: \S+=\S+)?)", way):
            number = str(min(int(rng.expovariate(0.12)) + 1, 40))  # some sell better than others
            if rng.random() < float(chance):
                method, target, *form = step.replace("{n}", number).split()
                yield method, target, headers, "".join(form)


def send(port: int, todo: Iterator[Visit], pause_seconds: float, stopped: Event) -> int:
    """Send requests until there are no more, or until stopped; returns how many were sent."""
    sent = 0
    while not stopped.wait(pause_seconds * random.random()) and (visit := next(todo, None)):
        sent += 1
        with suppress(OSError, HTTPException):  # what got no answer is missing in the sums
            ask(port, *visit)
    return sent


def ask(
    port: int, method: str, target: str, headers: dict[str, str] | None = None, form: str = ""
) -> str:
    """Send one request to the shop and return the body of its answer."""
    kind = {"Content-Type": "application/x-www-form-urlencoded"} if form else {}
    with closing(HTTPConnection(HOST, port, timeout=10)) as connection:
        connection.request(method, target, form or None, {**(headers or {}), **kind})
        return connection.getresponse().read().decode()


Sums = Counter[tuple[str, str, str]]
"""Requests by endpoint, status and country."""


def read_stored(usage: TrackUsage, since: datetime) -> Sums:
    """Add up the stored records, in the metrics' words for what is not known."""
    sums: Sums = Counter()
    for summary in usage.storage.summarize(by=("endpoint", "status", "country"), since=since):
        endpoint, status, country = summary.group.values()
        sums[endpoint or "__unmatched__", str(status), country or "ZZ"] = summary.requests
    return sums


def read_counted(port: int) -> Sums:
    """Scrape /metrics and add up the requests that were counted."""
    sums: Sums = Counter()
    for family in text_string_to_metric_families(ask(port, "GET", "/metrics")):
        if family.name == "flask_usage_requests":  # the parser takes _total away
            for _, labels, value, *_ in family.samples:
                sums[labels["endpoint"], labels["status"], labels["country"]] += int(value)
    return sums


def differences(stored: Sums, counted: Sums, sent: int) -> list[str]:
    """Say where the two disagree with each other, or with what was sent; empty if nowhere."""
    found = [
        f"{' '.join(key)}: {stored[key]:,} stored, {counted[key]:,} counted"
        for key in sorted(stored.keys() | counted.keys())
        if stored[key] != counted[key]
    ]
    if not sent == stored.total() == counted.total():
        totals = f"{stored.total():,} stored, {counted.total():,} counted"
        found.append(f"in all: {sent:,} sent, {totals}")
    return found


def table(stored: Sums, counted: Sums, shown: int = 25) -> str:
    """Lay the two side by side, the busiest first; what is not shown is in the last two lines."""
    keys = sorted(stored.keys() | counted.keys(), key=lambda key: (-counted[key], key))
    lines = [(*key, stored[key], counted[key]) for key in keys[:shown]]
    if rest := keys[shown:]:
        sums = (sum(stored[key] for key in rest), sum(counted[key] for key in rest))
        lines.append((f"... and {len(rest):,} more", "", "", *sums))
    lines.append(("total", "", "", stored.total(), counted.total()))
    head = f"{'endpoint':16}  status  country  {'stored':>9}  {'counted':>9}"
    rows = [f"{a:16}  {b:6}  {c:7}  {d:9,}  {e:9,}" for a, b, c, d, e in lines]
    return "\n".join([head, *rows])


def live_line(port: int, usage: TrackUsage, since: datetime) -> str:
    """Describe in one line what was seen so far."""
    rows = usage.storage.count(since)  # first, as what is counted next is written later
    counted = read_counted(port)
    busiest: Counter[str] = Counter()
    for (endpoint, _, _), requests in counted.items():
        busiest[endpoint] += requests
    errors = sum(counted[key] for key in counted if key[1].startswith("5"))
    return (
        f"{counted.total():,} requests, {rows:,} rows, {errors:,} errors, "
        f"{len({key[2] for key in counted} - {'ZZ'})} countries, "
        f"busiest: {max(busiest, key=busiest.__getitem__, default='-')}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns 0, 1 if storage and metrics disagree, or 2 if it cannot run."""
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
                print("Ctrl-C ends it.", flush=True)
                return run(port, usage, options.requests, options.seed)
        except (UsageMetricsError, RuntimeError) as error:
            print(f"demo: {error}", file=sys.stderr)
            return 2


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
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
    """Let the visitors in, watch them, and compare in the end; returns the exit code."""
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
    """Let visitors into a shop that others serve; returns the exit code."""
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
    """Let the visitors in until all is sent or Ctrl-C; returns how many requests were sent."""
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
    """Print what was seen so far, in place on a terminal, until all is sent or Ctrl-C."""
    live = sys.stdout.isatty()
    with suppress(KeyboardInterrupt):
        while wait(sendings, 0.5 if live else 3.0).not_done:
            line = describe()
            print(f"\r{line:79.79}" if live else line, end="" if live else "\n", flush=True)
    print("\n" * live)


if __name__ == "__main__":
    sys.exit(main())
