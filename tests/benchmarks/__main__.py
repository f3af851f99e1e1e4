"""All benchmarks, ours beside the peers', as one table: ``python -m tests.benchmarks``.

    python -m tests.benchmarks                    # all of it: half an hour
    python -m tests.benchmarks instructions scrape    # some parts
    python -m tests.benchmarks --quick            # small sizes: whether it works, not what it costs

What each part needs, and how to read it, is in README.md beside this file.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

if __package__ in (None, ""):  # pragma: no cover - python tests/benchmarks
    raise SystemExit("run it as: python -m tests.benchmarks")

# The tests' own servers and records, which find each other by their bare names.
sys.path.insert(0, str(Path(__file__).parent.parent))

from .report import Figure, table

PARTS = (
    "instructions",
    "servers",
    "enrichment",
    "scrape",
    "ingest",
    "reads",
    "memory",
    "imports",
)
"""Each a module of this package, whose ``measure(quick)`` returns its figures."""

PACKAGES = (
    "flask-usage-metrics",
    "flask",
    "werkzeug",
    "sqlalchemy",
    "prometheus-client",
    "prometheus-flask-exporter",
    "opentelemetry-sdk",
    "opentelemetry-instrumentation-flask",
    "gunicorn",
    "psycopg",
    "pymysql",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="small sizes")
    given = parser.parse_args()
    unknown = sorted(set(given.parts) - set(PARTS))
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")

    figures: list[Figure] = []
    for part in given.parts or PARTS:
        started = time.monotonic()
        measure: Callable[[bool], list[Figure]] = import_module(f".{part}", __package__).measure
        figures += measure(given.quick)
        took = time.monotonic() - started
        print(f"{part}: {took:,.0f} s", file=sys.stderr, flush=True)
    print(f"{' '.join(('python -m tests.benchmarks', *sys.argv[1:]))}\n")
    print(f"{datetime.now(timezone.utc):%Y-%m-%d}, {surroundings()}\n")
    print(table(figures))


def surroundings() -> str:
    """Return what the figures depend on: processor, Python, packages."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"{cpu}, Python {platform.python_version()}, {', '.join(versions)}"


main()
