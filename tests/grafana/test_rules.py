"""The rules for Prometheus: on made-up series by promtool, and in a real outage of a real app."""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
import requests
from helpers.process import need, run, until
from helpers.prometheus import Prometheus
from helpers.servers import Gunicorn

from flask_usage_metrics.metrics.names import DESCRIPTIONS

RULES = Path(__file__).parents[2] / "grafana" / "rules"
CASES = sorted(path.name for path in RULES.glob("tests/*.yml"))
RECORDING, ALERTS = "flask-usage-recording.yml", "flask-usage-alerts.yml"


def promtool(*arguments: str, folder: Path) -> tuple[bool, str]:
    """Return whether promtool is content, and what it says."""
    binary = shutil.which("promtool")
    need(binary, "promtool")
    done = run(binary, *arguments, folder=folder, seconds=120, stderr=subprocess.STDOUT)
    return done.returncode == 0, done.stdout


def changed(folder: Path, change: Callable[[str], str]) -> Path:
    """Copy the rules to a folder, changed, with their tests as they are."""
    copy = folder / "rules"
    shutil.copytree(RULES, copy)
    for path in copy.glob("*.yml"):
        path.write_text(change(path.read_text()))
    return copy


@pytest.mark.servers
def test_promtool_has_no_objections() -> None:
    files = sorted(path.name for path in RULES.glob("*.yml"))
    assert files == [ALERTS, RECORDING]
    content, said = promtool("check", "rules", "--lint=all", "--lint-fatal", *files, folder=RULES)
    assert content, said


@pytest.mark.servers
@pytest.mark.parametrize("case", CASES)
def test_on_made_up_series(case: str) -> None:
    content, said = promtool("test", "rules", case, folder=RULES / "tests")
    assert content, said


@pytest.mark.servers
@pytest.mark.parametrize("case", CASES)
def test_on_made_up_series_as_prometheus_3_reads_windows(tmp_path: Path, case: str) -> None:
    # Without the sample at a window's very beginning: a window that is a millisecond shorter.
    copy = changed(tmp_path, lambda text: scaled(text, 1, less_milliseconds=1))
    content, said = promtool("test", "rules", case, folder=copy / "tests")
    assert content, said


def guard(window: str, least: float) -> str:
    errors = "job_slo:flask_usage_slo_errors:rate5m"
    return f"and\n            30 * sum_over_time({errors}[{window}]) > {least}"


@pytest.mark.servers
@pytest.mark.parametrize(
    ("condition", "case"),
    [
        *(pytest.param(guard(w, 2.5), "quiet", id=f"budget-{w}") for w in ("1h", "6h", "1d", "3d")),
        pytest.param(
            guard("15m", 4.5).replace("job_slo:flask_usage_slo", "job:flask_usage_requests"),
            "thresholds",
            id="errors",
        ),
        pytest.param(
            "and ignoring (quantile)\n"
            "            30 * sum_over_time(job:flask_usage_requests:rate5m[15m]) > 95",
            "thresholds",
            id="latency",
        ),
        pytest.param(
            "and\n            avg_over_time(job:flask_usage_requests:rate5m[1h] offset 6d23h30m)"
            " > 1",
            "traffic",
            id="traffic",
        ),
        pytest.param(" and flask_usage_records_pending > 0", "measuring", id="refused"),
    ],
)
def test_what_keeps_an_alert_silent_is_its_guard(tmp_path: Path, condition: str, case: str) -> None:
    assert sum(path.read_text().count(condition) for path in RULES.glob("*.yml")) == 1
    copy = changed(tmp_path, lambda text: text.replace(condition, ""))
    content, said = promtool("check", "rules", RECORDING, ALERTS, folder=copy)
    assert content, said
    content, said = promtool("test", "rules", f"{case}.yml", folder=copy / "tests")
    assert not content
    assert "FAILED" in said


def test_guards_count_with_the_interval_of_the_rates_they_add_up() -> None:
    recording, alerts = ((RULES / name).read_text() for name in (RECORDING, ALERTS))
    intervals = set(re.findall(r"interval: (\d+)s", recording))
    assert set(re.findall(r"(\d+) \* sum_over_time", alerts)) == intervals == {"30"}


def test_each_series_that_is_read_is_exposed_or_recorded() -> None:
    text = "".join((RULES / name).read_text() for name in (RECORDING, ALERTS))
    text = re.sub(r"^ *#.*|^ *(summary|description): .*", "", text, flags=re.MULTILINE)
    recorded = set(re.findall(r"record: (\S+)", text))
    exposed = {
        described.name + "_bucket" * (described.kind == "histogram") for described in DESCRIPTIONS
    }
    read = set(re.findall(r"\b(?:job\w*:)?flask_usage_\w+(?::\w+)?", text)) - {
        "flask_usage_metrics"  # the logger
    }
    assert read <= recorded | exposed
    assert recorded <= read


# ------------------------------------------------------------------------ for real


SHOP = """
from pathlib import Path
from flask import Flask
from flask_usage_metrics import TrackUsage

app = Flask("shop")
app.config.update(
    TRACK_USAGE_STATE_DIR="state",
    TRACK_USAGE_COUNTRY=None,
    TRACK_USAGE_SLO={"availability": 0.999, "latency": (0.9, 3.0)},
)
usage = TrackUsage(app, "sqlite:///usage.sqlite3")
app.add_url_rule("/", "index", lambda: Path("prices").read_text())
"""

Alert = tuple[str, str]
"""Name, and which objective and window, or which storage, it is about."""

BURNS = {("FlaskUsageErrorBudgetBurn", f"availability {w}") for w in ("1h", "6h", "1d", "3d")}


class Shop:
    """An app that is visited twenty times a second, and a Prometheus with the rules, in a hurry.

    A minute of the rules is a second here, the scrape interval's as well.
    """

    def __init__(self, folder: Path, prometheus: Prometheus) -> None:
        self.prices = folder / "prices"
        self.records = folder / "usage.sqlite3"
        self.prometheus = prometheus

    def firing(self) -> set[Alert]:
        return {
            about(alert["labels"])
            for alert in self.prometheus.alerts()
            if alert["state"] == "firing"
        }

    def ever_fired(self) -> set[Alert]:
        query = 'present_over_time(ALERTS{alertstate="firing"}[10m])'
        return {about(found["metric"]) for found in self.prometheus.query(query)}

    def wait_until_measured(self) -> None:
        """Wait until all is recorded of both objectives, and some more for what may fire."""
        query = 'job_slo:flask_usage_slo_errors:ratio_rate3d{job="shop"}'

        def ratios() -> dict[str, str]:
            found = self.prometheus.query(query)
            return {series["metric"]["slo"]: series["value"][1] for series in found}

        until(ratios, {"availability": "0", "latency": "0"})
        time.sleep(5)
        assert self.ever_fired() == set()


def about(labels: dict[str, str]) -> Alert:
    assert labels["job"] == "shop", labels
    what = [labels[name] for name in ("slo", "long_window", "sink") if name in labels]
    return labels["alertname"], " ".join(what)


def scaled(text: str, factor: int, less_milliseconds: int = 0) -> str:
    """Return rules whose windows, intervals and patience are a fraction of what they are.

    What is looked for a week ago stays as far away.
    """

    def shorter(match: re.Match[str]) -> str:
        milliseconds = int(match[2]) * {"s": 1_000, "m": 60_000, "h": 3_600_000}.get(
            match[3], 86_400_000
        )
        less = less_milliseconds if match[1] == "[" else 0
        return f"{match[1]}{milliseconds // factor - less}ms"

    text = re.sub(r"(\[|\bfor: |\binterval: )(\d+)([smhd])\b", shorter, text)
    return text.replace("30 * sum_over_time", f"{30 / factor} * sum_over_time")


@contextmanager
def visitors(address: str) -> Iterator[None]:
    """Visit a page twenty times a second, whatever comes of it."""
    over = threading.Event()

    def visit() -> None:
        with requests.Session() as session:
            while not over.wait(0.05):
                with suppress(requests.RequestException):
                    session.get(address, timeout=20)

    thread = threading.Thread(target=visit)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    rules = changed(tmp_path, lambda text: scaled(text, 60))
    (tmp_path / "prices").write_text("tea 3")
    with (
        Gunicorn(tmp_path, "-w", "2", app=SHOP) as server,
        visitors(server.address),
        Prometheus(
            tmp_path, f"127.0.0.1:{server.port}", rules=sorted(rules.glob("*.yml"))
        ) as prometheus,
    ):
        yield Shop(tmp_path, prometheus)


@pytest.mark.servers
def test_an_app_that_fails_pages_until_it_is_mended(shop: Shop) -> None:
    shop.wait_until_measured()
    shop.prices.unlink()
    until(shop.firing, BURNS, 20)
    shop.prices.write_text("tea 3")
    # The shortest window is clean again after 5 "minutes".
    until(shop.firing, BURNS - {("FlaskUsageErrorBudgetBurn", "availability 1h")}, 20)
    assert shop.ever_fired() == BURNS


@pytest.mark.servers
def test_a_storage_that_cannot_be_written_to_is_told_until_it_can(shop: Shop) -> None:
    shop.wait_until_measured()
    down = {("FlaskUsageSinkDown", "sqlite")}
    with closing(sqlite3.connect(shop.records, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        until(shop.firing, down, 30)
        other.execute("ROLLBACK")
    until(shop.firing, set(), 30)
    assert shop.ever_fired() == down
    (lost,) = shop.prometheus.query('sum(flask_usage_records_total{result!="written"})')
    assert lost["value"][1] == "0"
