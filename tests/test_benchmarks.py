"""The benchmarks work: each part measures whom it should, and the table says how they compare.

They are run with small sizes, which tells nothing of what anything costs.
"""

from __future__ import annotations

import os
import re
import sys
from math import isfinite
from pathlib import Path

import pytest
from benchmarks.fresh import WHO
from benchmarks.instructions import QUICK
from benchmarks.report import Figure, table
from benchmarks.scrape import NATIVE, SAME
from benchmarks.served import CONTENDERS
from helpers.process import Done, run

ROOT = Path(__file__).parent.parent

DATABASES = {"ours, SQLite", "ours, PostgreSQL", "ours, MariaDB"}
PRESETS = {"full", "balanced", "strict"}

EVERYBODY = {
    "instructions": set(QUICK),
    "servers": set(CONTENDERS),
    "scrape": {"ours, none changed", "ours, gzip, 50 changed", SAME, NATIVE},
    "ingest": {*DATABASES, "ours, JSON lines", "sqlite3.executemany"},
    "reads": DATABASES,
    "memory": set(WHO),
    "imports": set(WHO),
    "enrichment": {"address", "country", "visitor", "user agent", "language", *PRESETS},
}
"""Whom each part has figures of."""

_MISSING = re.compile(
    r"[\w-]+ is (?:missing|not installed)"
    r"|No module named '(?:prometheus_flask_exporter|opentelemetry)"
)


def run_benchmarks(*arguments: str) -> Done:
    # Seconds are enough, but for a busy machine.
    return run(sys.executable, "-m", "tests.benchmarks", *arguments, folder=ROOT, seconds=900)


@pytest.mark.servers
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("part", EVERYBODY)
def test_each_part_measures_everybody(part: str) -> None:
    done = run_benchmarks(part, "--quick")
    if done.returncode and (missing := _MISSING.search(done.stderr)):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing[0])
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line[:1] == "|"]
    head, _, *figures = rows
    assert head[:4] == ["what", "who", "size", "value"]
    measured = {}
    for _, who, _, value, *_ in figures:
        measured[who] = float(value.split()[0].replace(",", ""))
        assert isfinite(measured[who])
    assert measured
    assert EVERYBODY[part] <= measured.keys()


def test_there_are_no_other_parts() -> None:
    done = run_benchmarks("nothing")
    assert done.returncode == 2
    named = re.search(r"there is no part nothing; there are (.*)", done.stderr)
    assert named is not None, done.stderr
    assert set(named[1].split(", ")) == EVERYBODY.keys()


# ------------------------------------------------------------------------ the table


def cells(*figures: Figure) -> list[list[str]]:
    return [line.strip("|").split("|") for line in table(figures).splitlines()[2:]]


@pytest.mark.parametrize(
    ("ours", "shown"),
    [
        pytest.param(30.0, "1.50 of peer", id="more"),
        pytest.param(5.0, "0.25 of peer", id="less"),
        pytest.param(2.0, "1/10.0 of peer", id="much less"),
        pytest.param(0.0, "0.00 of peer", id="nothing"),
    ],
)
def test_a_ratio_is_to_the_figure_of_the_one_named(ours: float, shown: str) -> None:
    peers = [
        Figure("CPU", "peer", 1.0, "µs"),
        Figure("CPU", "peer", 20.0, "µs", 10),
        Figure("CPU", "peer", 3.0, "ms", 10),
        Figure("RSS", "peer", 4.0, "µs", 10),
    ]
    *_, last = cells(*peers, Figure("CPU", "ours", ours, "µs", 10, against="peer"))
    assert last[4].strip() == shown


def test_a_ratio_to_somebody_who_was_not_measured_is_an_error() -> None:
    figures = [
        Figure("CPU", "peer", 1.0, "µs", 10),
        Figure("CPU", "ours", 1.0, "µs", 20, against="peer"),
    ]
    with pytest.raises(ValueError, match="'peer' has no figure for 'CPU'"):
        table(figures)


def test_growth_is_since_the_next_smaller_size() -> None:
    figures = [
        Figure("CPU", "ours", 500.0, "µs", 1000),
        Figure("CPU", "ours", 1.0, "µs", 1),
        Figure("CPU", "ours", 20.0, "µs", 100),
        Figure("CPU", "peer", 9.0, "µs", 500),
        Figure("CPU", "ours", 7.0, "µs"),
    ]
    growths = [row[5].strip() for row in cells(*figures)]
    times = "\N{MULTIPLICATION SIGN}"
    assert growths == [f"{times} 25 for {times} 10", "", f"{times} 20 for {times} 100", "", ""]


def test_a_row_shows_size_value_unit_and_aim() -> None:
    (row,) = cells(Figure("CPU", "ours", 1234.5, "µs", 10_000, aim="<= 2,000"))
    assert [cell.strip() for cell in row] == [
        "CPU",
        "ours",
        "10,000",
        "1,234 µs",
        "",
        "",
        "<= 2,000",
    ]
    assert [row[3].strip() for row in cells(Figure("a", "b", 0.01234, ""))] == ["0.0123"]
