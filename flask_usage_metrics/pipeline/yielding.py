"""Yields the interpreter lock (GIL) while the worker computes, so that requests need not wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from time import perf_counter
from typing import TypeVar

from flask_usage_metrics.runtime.gil import release_gil

_STEP_SECONDS = 0.0001
"""How long the worker computes before it lets others have the interpreter; shorter steps gain
nothing, and make the worker fall behind sooner."""

_STEP_ITEMS = 8
"""Items it handles before it looks at the clock, which is not free."""

_T = TypeVar("_T")


def yielding(items: Iterable[_T], is_behind: Callable[[], bool]) -> Iterator[_T]:
    """Yield items, with a pause after each 0.1 ms in which other threads may run.

    Args:
        items: Anything; each is handled by the caller before the next one is asked for.
        is_behind: Asked before each pause: while it returns True there is none.
    """
    # Hot path: an item passes no code of ours, only each step does.
    return chain.from_iterable(_steps(iter(items), is_behind))


def _steps(items: Iterator[_T], is_behind: Callable[[], bool]) -> Iterator[Sequence[_T]]:
    until = perf_counter() + _STEP_SECONDS
    while step := [*islice(items, _STEP_ITEMS)]:
        yield step
        if perf_counter() >= until:
            if not is_behind():
                release_gil()
            until = perf_counter() + _STEP_SECONDS
