"""Closes what an object had open once it is collected, and sees to it that it is collected soon."""

from __future__ import annotations

import _thread
import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakSet, finalize

_NEW_OWNERS = 16


def when_collected(
    owner: object, close: Callable[..., object], *arguments: Any
) -> finalize[..., Any]:
    """Have a function called once an object is collected, unless the process ends first.

    The garbage collector runs in any thread, in the middle of anything: a function called there
    must neither wait nor lock. This one may, for a bounded time.

    Args:
        owner: The object, which must not be reachable from the function and its arguments.
        close: Called once, in a new thread; or at once if there can be no more threads. What it
            raises is nobody's.
        *arguments: Its arguments.

    Returns:
        What calls it, so that it can be called off: ``detach()``.
    """
    finalizer = finalize(owner, _start, close, arguments)
    finalizer.atexit = False
    return finalizer


def _start(close: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    try:
        # Not threading's: to start one takes a lock that the interrupted code may hold.
        _thread.start_new_thread(_call, (close, arguments))
    except RuntimeError:
        _call(close, arguments)


def _call(close: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    with suppress(Exception):
        close(*arguments)


class Owners:
    """Objects that own threads and files, as apps do; garbage is collected after each 16 new ones.

    An app refers to itself, as any Flask app with a middleware does, so that only the garbage
    collector frees it; which by itself may come after some hundreds of them.
    """

    def __init__(self) -> None:
        self._owners: WeakSet[object] = WeakSet()
        self._kept = 0

    def add(self, owner: object) -> None:
        """Note a new one; may collect garbage, unless the process has disabled that."""
        if len(self._owners) >= self._kept + _NEW_OWNERS and gc.isenabled():
            gc.collect()
            self._kept = len(self._owners)
        self._owners.add(owner)


OWNERS = Owners()
"""One for the process, as the garbage collector is."""
