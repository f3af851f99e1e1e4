"""Gives the interpreter away while a thread of ours computes, so that requests need not wait.

Else a request that is answered meanwhile would have to wait for it 5 ms, and that again after each
of its system calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter, sleep
from typing import TypeVar

_PAUSE_SECONDS = 0.00005
"""Not 0: that may give the interpreter back to this thread at once."""

_LONG_SECONDS = 0.002

_T = TypeVar("_T")


def pause() -> None:
    """Let another thread that wants the interpreter have it."""
    sleep(_PAUSE_SECONDS)


class GilYielder:
    """Pauses now and then in one piece of work, until a pause has lasted for long.

    Then some other thread computes without a break, and each pause is 5 ms long: this thread would
    fall behind, and no request be answered any sooner.
    """

    def __init__(self) -> None:
        self._pauses = True

    def steps(self, items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
        """Yield so many items at a time, and pause in between."""
        for start in range(0, len(items), size):
            if start and self._pauses:
                began = perf_counter()
                pause()
                self._pauses = perf_counter() - began < _LONG_SECONDS
            yield items[start : start + size]
