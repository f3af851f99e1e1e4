"""How many examples tests of made-up data try: fewer where another run tries them all.

    @settings(max_examples=examples(150))

With `FEW_EXAMPLES` in the environment each test tries a few, which shows whether it works on this
Python at all; `.ci/run` says so for all but the first.
"""

from __future__ import annotations

import os

MOST = 12 if os.environ.get("FEW_EXAMPLES") else 10_000


def examples(wanted: int) -> int:
    """Return how many examples a test tries that wants so many."""
    return min(wanted, MOST)
