"""Draw the dashboards as pictures, to look at them: python tests/screenshots/draw.py --output DIR.

There is no Grafana without its server. But its components are on npm, and what a dashboard shows
is in its JSON and in Prometheus: this asks a real Prometheus that scrapes the demo for what each
panel wants, and has render.tsx draw the answers in a headless Chromium. So a person sees what a
test cannot: what is cut off, in the wrong unit, empty, noise. Not run in CI.

It needs node, npm, chromium and prometheus.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import stdev
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

import requests

HERE = Path(__file__).parent
GRAFANA = HERE.parents[1] / "grafana"
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from helpers.prometheus import Prometheus  # noqa: E402
from helpers.servers import Gunicorn  # noqa: E402

from flask_usage_metrics.demo import comparison, visitors  # noqa: E402

WIDTH, GAP, CELL, HEADER = 1600, 8, 30, 64
STEP = 5  # seconds between points; Grafana's would be that of the scrapes, often 15

EVERYTHING = """
from flask import request
from opentelemetry.sdk.trace import TracerProvider
from flask_usage_metrics.demo import create_app

PARTNERS = ("acme", "globex", "initech")

def consumer():
    if request.authorization:
        return PARTNERS[len(request.headers["X-Forwarded-For"]) % 3]

app = create_app("sqlite:///usage.sqlite3", consumer=consumer, tracer_provider=TracerProvider())
"""
NOTHING = """
from flask_usage_metrics.demo import create_app

app = create_app("sqlite:///usage.sqlite3")
"""


def main() -> None:
    options = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="screenshots-")))
        page = bundle(options.modules or install(folder), folder)
        if options.prometheus:
            source, end = options.prometheus, options.end or time.time()
        else:
            source = stack.enter_context(measuring(folder, options))
            end = time.time()
        start = end - 60 * (options.range or options.minutes)
        for file in sorted(options.dashboards):
            dashboard = json.loads(file.read_text())
            shown = Asked(source, start, end, dashboard, options).page
            draw(shown, page, options.output / f"{file.stem}.png", options.height)
            for panel in shown["panels"] if options.panels else []:
                draw(alone(panel, shown), page, options.output / name(file, panel), None)
        print(f"--prometheus {source} --end {end:.0f}")
        while options.hold:
            time.sleep(1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for the pictures")
    add("--modules", type=Path, help="a node_modules with what package.json lists; else installed")
    add("--minutes", type=float, default=3, help="how long visitors come")
    add("--range", type=float, help="minutes that are shown; else as long as visitors come")
    add("--quiet", action="store_true", help="three visits only, and nothing opt-in is on")
    add("--panels", action="store_true", help="a picture of each panel, too")
    add("--height", type=int, help="of a dashboard's picture; else all of it")
    add("--no-exemplars", action="store_true", help="as Prometheus is without its switch for them")
    add("--choose", action="append", default=[], help="one that cannot be All: endpoint=shop.home")
    add("--hold", action="store_true", help="let Prometheus go on, until Ctrl-C")
    add("--prometheus", help="draw from that one (see --hold) and start nothing")
    add("--end", type=float, help="with --prometheus: end of what is shown")
    add("dashboards", type=Path, nargs="*", default=[*(GRAFANA / "dashboards").glob("*.json")])
    options = parser.parse_args()
    for file in options.dashboards:
        if not file.is_file():  # said before visitors came for minutes
            parser.error(f"{file} is no file: expected such as grafana/dashboards/….json")
    return options


# ---- A shop, its visitors, and a Prometheus that watches.


@contextmanager
def measuring(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """Yield the address of a Prometheus that has seen visitors, and print who came."""
    environment = {"FLASK_TRACK_USAGE_VISITORS": "daily", "FLASK_TRACK_USAGE_STATE_DIR": "state"}
    if options.quiet:
        environment = {"FLASK_TRACK_USAGE_SLO": "null", "FLASK_TRACK_USAGE_STATE_DIR": "state"}
    rules = sorted((GRAFANA / "rules").glob("*.yml"))
    workers = ("--workers", "3", "--threads", "4")
    app = NOTHING if options.quiet else EVERYTHING
    with (
        Gunicorn(folder, *workers, app=app, **environment) as server,
        Prometheus(folder, f"127.0.0.1:{server.port}", rules=rules) as prometheus,
    ):
        seconds = 60 * options.minutes
        time.sleep(4)  # so that the counters are seen at 0
        if options.quiet:
            for path in ("/", "/product/1", "/cart"):
                visitors.ask(server.port, "GET", path, {"X-Forwarded-For": "145.97.20.1"})
                time.sleep(seconds / 3)
        else:
            let_visitors_in(server.port, seconds)
        time.sleep(3)
        print(counted(server.port))
        yield prometheus.address


def let_visitors_in(port: int, seconds: float) -> None:
    begun, stopped = time.monotonic(), Event()
    with ThreadPoolExecutor(8) as pool:
        for number in range(8):
            todo = paced(random.Random(number), begun, seconds)
            pool.submit(visitors.send, port, todo, 0.0, stopped)
        time.sleep(seconds)
        stopped.set()


def paced(rng: random.Random, begun: float, seconds: float) -> Iterator[visitors.Visit]:
    """Yield visits, more and fewer of them as time goes on, and a while of failing checkouts."""
    for visit in visitors.visits(rng):
        gone = (time.monotonic() - begun) / seconds
        time.sleep(rng.expovariate(1) * 0.3 / (1.3 - math.cos(9 * gone)))
        yield visit
        if 0.55 < gone < 0.68 and rng.random() < 0.07:
            yield "POST", "/checkout", visit[2], "card=fine&instalments=0"


def counted(port: int) -> str:
    """Return what the app itself says, to compare pictures with."""
    sums = comparison.read_counted(port)
    text = f"{sums.total()} requests\n"
    for index, label in enumerate(("endpoint", "status", "country")):
        by: Counter[str] = Counter()
        for key, count in sums.items():
            by[key[index]] += count
        text += f"by {label}: " + ", ".join(f"{k} {n}" for k, n in by.most_common(12)) + "\n"
    return text


# ---- What a dashboard shows.


class Asked:
    """A dashboard with Prometheus' answers to what its panels ask."""

    def __init__(
        self,
        source: str,
        start: float,
        end: float,
        dashboard: dict[str, Any],
        options: argparse.Namespace,
    ) -> None:
        self.source, self.dashboard = source, dashboard
        self.exemplars = not options.no_exemplars
        self.step = max(STEP, math.ceil((end - start) / 600))
        self.start, self.end = start // self.step * self.step, end // self.step * self.step
        seconds = int(self.end - self.start)
        self.words = {
            "__rate_interval": f"{4 * STEP if self.step == STEP else self.step + STEP}s",
            "__interval": f"{self.step}s",
            "__range": f"{seconds}s",
            "__range_s": f"{seconds}",
        }
        self.shown: dict[str, str] = {}
        given = dict(text.split("=", 1) for text in options.choose)
        for variable in dashboard["templating"]["list"]:
            self._choose(variable, given.get(variable["name"]))
        self.page = self._answer()

    def _choose(self, variable: dict[str, Any], given: str | None) -> None:
        """Choose what Grafana would: all, or the first in the list."""
        name, query = variable["name"], variable.get("query", "")
        query = query if isinstance(query, str) else query["query"]
        if variable["type"] == "datasource":
            shown = value = "Prometheus"
        elif variable.get("includeAll"):
            shown, value = "All", variable["allValue"]
        elif given:
            shown = value = given
        elif found := re.fullmatch(r"label_values\((.+),\s*(\w+)\)", self._fill(query)):
            chosen = self._get(f"label/{found[2]}/values", **{"match[]": found[1]})
            shown = value = sorted(chosen)[0] if chosen else ""
        else:
            shown = value = variable["current"]["value"]
        self.words[name], self.shown[variable["label"]] = value, shown

    def _fill(self, text: str) -> str:
        pattern = r"\$\{(\w+)(?::\w+)?\}|\$(\w+)"
        return re.sub(pattern, lambda word: self.words[word[1] or word[2]], text)

    def _get(self, what: str, **parameters: Any) -> Any:
        window = {"start": self.start, "end": self.end, **parameters}
        answer = requests.get(f"{self.source}/api/v1/{what}", params=window, timeout=30).json()
        if answer["status"] != "success":
            raise SystemExit(f"{answer['error']}\n{parameters}")
        return answer["data"]

    def _ask(self, target: dict[str, Any]) -> dict[str, Any]:
        expression, instant = self._fill(target["expr"]), target.get("instant")
        if instant:
            found = self._get("query", query=expression, time=self.end)
            if found["resultType"] == "scalar":
                found["result"] = [{"metric": {}, "value": found["result"]}]
            series = [{"metric": s["metric"], "values": [s["value"]]} for s in found["result"]]
        else:
            found = self._get("query_range", query=expression, step=self.step)
            times = range(int(self.start), int(self.end) + 1, self.step)
            series = [
                {"metric": s["metric"], "values": [[at, dict(s["values"]).get(at)] for at in times]}
                for s in found["result"]
            ]
        exemplars = []
        if target.get("exemplar") and self.exemplars:
            found = self._get("query_exemplars", query=expression)
            exemplars = self._apart([exemplar for one in found for exemplar in one["exemplars"]])
        return {
            "refId": target["refId"],
            "expr": expression,
            "format": target.get("format", "time_series"),
            "legend": target.get("legendFormat", "__auto"),
            "series": series,
            "exemplars": exemplars,
        }

    def _apart(self, exemplars: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Choose those that Grafana's data source keeps: in each step two deviations apart."""
        values = [float(exemplar["value"]) for exemplar in exemplars]
        gap, kept = 2 * stdev(values) if values[1:] else 0.0, {}
        for exemplar in sorted(exemplars, key=lambda one: -float(one["value"])):
            here = kept.setdefault(exemplar["timestamp"] // self.step, [])
            if not here or float(here[-1]["value"]) - float(exemplar["value"]) > gap:
                here.append(exemplar)
        return [exemplar for here in kept.values() for exemplar in here]

    def _answer(self) -> dict[str, Any]:
        panels, bottom = [], 0
        for panel in unfolded(self.dashboard["panels"]):
            column = (WIDTH - GAP) / 24
            place = panel["gridPos"]
            panels.append({
                "panel": panel,
                "left": GAP + place["x"] * column,
                "top": HEADER + place["y"] * (CELL + GAP),
                "width": place["w"] * column - GAP,
                "height": place["h"] * (CELL + GAP) - GAP,
                "answers": [self._ask(target) for target in panel.get("targets") or []],
            })  # fmt: skip
            bottom = max(bottom, place["y"] + place["h"])
        for mark in self.dashboard["annotations"]["list"]:
            if expression := mark.get("expr"):
                series = self._get("query_range", query=self._fill(expression), step=self.step)
                print(f"{self.dashboard['title']}: {mark['name']}: {len(series['result'])}")
        return {
            "title": self.dashboard["title"],
            "variables": self.shown,
            "words": self.words,
            "from": self.start,
            "to": self.end,
            "step": self.step,
            "panels": panels,
            "width": WIDTH,
            "height": HEADER + bottom * (CELL + GAP),
        }


def unfolded(panels: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the panels at their places when all rows are open."""
    lower = 0
    for panel in panels:
        panel = {**panel, "gridPos": {**panel["gridPos"], "y": panel["gridPos"]["y"] + lower}}
        yield panel
        inside = panel.get("panels") or []
        if not inside:
            continue
        top = min(one["gridPos"]["y"] for one in inside)
        for one in inside:
            y = one["gridPos"]["y"] - top + panel["gridPos"]["y"] + 1
            yield {**one, "gridPos": {**one["gridPos"], "y": y}}
        lower += max(one["gridPos"]["y"] + one["gridPos"]["h"] for one in inside) - top


def alone(panel: dict[str, Any], page: dict[str, Any]) -> dict[str, Any]:
    """Return a page with one panel only."""
    size = {"width": int(panel["width"]), "height": int(panel["height"]) + HEADER}
    return {**page, **size, "panels": [{**panel, "left": 0, "top": HEADER}]}


def name(file: Path, panel: dict[str, Any]) -> str:
    title = re.sub(r"\W+", "-", panel["panel"]["title"].lower()).strip("-")
    return f"{file.stem}--{panel['panel']['id']:02}-{title}.png"


# ---- Pictures.


def install(folder: Path) -> Path:
    """Install Grafana's components; 0.5 GB, some minutes."""
    shutil.copy(HERE / "package.json", folder)
    flags = ("--ignore-scripts", "--legacy-peer-deps", "--no-audit", "--no-fund")
    subprocess.run(["npm", "install", *flags], cwd=folder, check=True)
    return folder / "node_modules"


def bundle(modules: Path, folder: Path) -> Path:
    """Make the page that draws data.json; returns its folder."""
    page = folder / "page"
    page.mkdir()
    loaders = ("--loader:.woff2=dataurl", "--loader:.woff=empty", "--loader:.ttf=empty")
    define = '--define:process.env.NODE_ENV="production"'
    esbuild = ["node", str(modules / "esbuild" / "bin" / "esbuild"), str(HERE / "render.tsx")]
    subprocess.run(
        [*esbuild, "--bundle", "--jsx=automatic", "--log-level=error", define, *loaders,
         f"--outfile={page / 'page.js'}"],
        env={**os.environ, "NODE_PATH": str(modules)}, check=True,
    )  # fmt: skip
    (page / "public").mkdir()
    icons = modules / "@grafana" / "ui" / "dist" / "public" / "img"
    (page / "public" / "build").mkdir()
    (page / "public" / "build" / "img").symlink_to(icons)
    (page / "index.html").write_text(
        '<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="page.css">'
        "<style>body{margin:0;overflow:hidden}</style>"
        '<div id="page"></div><script src="page.js"></script>'
    )
    return page


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def draw(page: dict[str, Any], folder: Path, picture: Path, height: int | None) -> None:
    """Have Chromium draw a page."""
    (folder / "data.json").write_text(json.dumps(page))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=folder))
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    try:
        found = subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--virtual-time-budget=15000", "--enable-logging=stderr", "--v=0",
             f"--window-size={page['width']},{height or page['height']}",
             f"--user-data-dir={folder.parent / 'chromium'}",
             f"--screenshot={picture.absolute()}", address],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    console = [
        line for line in found.stderr.splitlines() if "CONSOLE" in line and "i18n" not in line
    ]
    print(picture, *console, sep="\n  ")


if __name__ == "__main__":
    main()
