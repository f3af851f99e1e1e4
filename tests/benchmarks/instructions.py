r"""How many machine instructions a request costs, by variant: steadier than any clock.

    pip install -e '.[country]' prometheus-flask-exporter \
        opentelemetry-instrumentation-flask opentelemetry-sdk
    python tests/benchmarks/instructions.py                     # needs valgrind, too; 3 minutes
    python tests/benchmarks/instructions.py --variants bare capture --requests 500 1500

Each variant runs in two fresh processes that differ in the number of requests only. The slope
between the two is free of start-up, warm-up and exit. It holds the work of all threads. What is
buffered is folded after each ``--batch`` requests: 500 is half a second at 1 000 requests a second.

Counts of the same code differ by up to 1 %, since what shares a slot of the interpreter's caches
depends on where in memory it lies. So a saving below 4 000 is better measured on its own.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from variants import VARIANTS

LOOP = str(Path(__file__).with_name("variants.py"))


def run(variant: str, requests: int, batch: int, *under: str) -> str:
    """Answer some requests in a process of its own and return what it wrote to stderr."""
    command = [*under, sys.executable, LOOP, variant, str(requests), "--batch", str(batch)]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{variant}: exit status {done.returncode}\n{done.stderr}")
    return done.stderr


def instructions(variant: str, requests: int, batch: int) -> int:
    """Return the instructions of a whole process."""
    told = run(
        variant, requests, batch, "valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"
    )
    collected = re.search(r"Collected : (\d+)", told)
    if collected is None:
        raise SystemExit(f"{variant}: valgrind told no count\n{told}")
    return int(collected[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, nargs=2, default=(1000, 2000), metavar="N")
    parser.add_argument("--batch", type=int, default=500, help="requests between two folds")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    given = parser.parse_args()
    few, many = sorted(given.requests)
    if few == many:
        parser.error("a slope takes two different numbers of requests")

    for variant in given.variants:
        # Tells at once what does not work, and leaves .pyc files, so that no run compiles any.
        run(variant, 10, given.batch)
    with ThreadPoolExecutor(given.jobs) as pool:
        counts = {
            (variant, requests): pool.submit(instructions, variant, requests, given.batch)
            for variant in given.variants
            for requests in (few, many)
        }
    costs = {
        variant: (counts[variant, many].result() - counts[variant, few].result()) / (many - few)
        for variant in given.variants
    }

    base = costs.get("bare")
    print("| variant | instructions a request | over bare | times bare |")
    print("|---|--:|--:|--:|")
    for variant, cost in costs.items():
        over, ratio = (f"{cost - base:+,.0f}", f"{cost / base:.2f}") if base else ("", "")
        print(f"| {variant} | {cost:,.0f} | {over} | {ratio} |")


if __name__ == "__main__":
    main()
