"""Machine instructions a request, by variant: steadier than any clock.

Each variant runs in two fresh processes that differ in the number of requests only. The slope
between the two is free of start-up, warm-up and exit. It holds the work of all threads. What is
buffered is folded after each `BATCH` requests: half a second at 1 000 requests a second.

Counts of the same code differ by up to 1 %, since what shares a slot of the interpreter's caches
depends on where in memory it lies. So each is the median of several layouts of the memory.

    python -m tests.benchmarks.instructions capture all-in    # these variants only
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median

from .report import Figure, table
from .variants import VARIANTS

BATCH = 500

WHAT = "instructions a request"
BARE = "bare"
PEER = "prometheus-flask-exporter"

AIMS = {"capture": 30_000, "capture-journaled": 45_000, "all-in": 90_000}
"""Over bare Flask, at most."""


QUICK = (BARE, "capture-journaled")


def measure(quick: bool, variants: Sequence[str] = ()) -> list[Figure]:
    """Return what each variant costs, and what it costs over bare Flask."""
    if shutil.which("valgrind") is None:
        raise SystemExit("instructions: valgrind is missing (apt install valgrind)")
    few, many, layouts = (20, 40, 1) if quick else (500, 1000, 3)
    variants = variants or (QUICK if quick else tuple(VARIANTS))
    for variant in variants:
        # Tells at once what does not work, and leaves .pyc files, so that no run compiles any.
        run(variant, 10, 0)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counts = {
            (variant, layout, requests): pool.submit(instructions, variant, requests, layout)
            for layout in range(layouts)
            for variant in variants
            for requests in (few, many)
        }

    def slope(variant: str, layout: int) -> float:
        more, less = (counts[variant, layout, requests].result() for requests in (many, few))
        return (more - less) / (many - few)

    costs = {
        variant: median(slope(variant, layout) for layout in range(layouts)) for variant in variants
    }
    if BARE not in costs:
        return [Figure(WHAT, variant, cost, "") for variant, cost in costs.items()]
    base = costs[BARE]
    whole = [Figure(WHAT, variant, cost, "", against=BARE) for variant, cost in costs.items()]
    over = [
        Figure(
            f"{WHAT} over {BARE}",
            variant,
            cost - base,
            "",
            against=PEER if PEER in costs else None,
            aim=f"<= {AIMS[variant]:,}" if variant in AIMS else "",
        )
        for variant, cost in costs.items()
        if variant != BARE
    ]
    return whole + over


def run(variant: str, requests: int, layout: int, *under: str) -> str:
    """Answer some requests in a process of its own and return what it wrote to stderr."""
    module = [sys.executable, "-m", "tests.benchmarks.variants"]
    command = [*under, *module, variant, str(requests), f"--batch={BATCH}", f"--layout={layout}"]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{variant}: exit status {done.returncode}\n{done.stderr}")
    return done.stderr


def instructions(variant: str, requests: int, layout: int) -> int:
    """Return the instructions of a whole process."""
    told = run(
        variant, requests, layout, "valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"
    )
    collected = re.search(r"Collected : (\d+)", told)
    if collected is None:
        raise SystemExit(f"{variant}: valgrind told no count\n{told}")
    return int(collected[1])


if __name__ == "__main__":
    print(table(measure(quick=False, variants=sys.argv[1:])))
