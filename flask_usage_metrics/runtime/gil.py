"""Yielding the interpreter lock (GIL) from a thread that computes, so that requests need not wait.

Without it a request that is answered meanwhile waits 5 ms (`sys.getswitchinterval`) for the lock,
and again after each of its system calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter, sleep
from typing import TypeVar

_PAUSE_SECONDS = 0.00005
"""Not 0, which may give the lock back to this thread at once."""

_LONG_SECONDS = 0.002

_T = TypeVar("_T")


def release_gil() -> None:
    """Let another thread that waits for the interpreter lock have it; blocks for some 50 µs."""
    sleep(_PAUSE_SECONDS)


class GilYielder:
    """Yields the interpreter lock between the steps of one piece of work, as long as that is cheap.

    A pause of 2 ms or more means that another thread computes without a break. Each further pause
    would last 5 ms, this thread would fall behind, and no request would be answered sooner: so
    there are no more.
    """

    def __init__(self) -> None:
        self._pauses = True

    def steps(self, items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
        """Yield slices of `size` items, in order, with a pause between them."""
        for start in range(0, len(items), size):
            if start and self._pauses:
                paused_at = perf_counter()
                release_gil()
                self._pauses = perf_counter() - paused_at < _LONG_SECONDS
            yield items[start : start + size]
