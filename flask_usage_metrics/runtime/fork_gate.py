"""Keeps a process from forking while a thread of ours is inside SQLite, or in a transaction."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_PATIENCE_SECONDS = 0.5
"""How long a fork waits; a batch is inserted in 5 ms, but a summary of everything may take any
time. Then it goes on, and takes the chance that the child hangs."""


class ForkGate:
    """What threads are inside of, one by one or together, and forks wait for.

    SQLite has locks of its own for a whole process. A child that is forked while a thread of its
    parent holds one inherits it locked for ever: it hangs at whatever it does with SQLite next,
    the app's own databases included. (Measured: 42 of 300 children of a process that writes
    without a break.) And what its parent had locked in a database it takes to be locked by itself,
    so that the file may be damaged.

    Threads that come while a fork waits let it go first: it comes soon.
    """

    def __init__(self) -> None:
        self._start()
        if hasattr(os, "register_at_fork"):  # not on Windows
            os.register_at_fork(
                before=self._close, after_in_parent=self._open, after_in_child=self._start
            )

    def _start(self) -> None:
        # Of a lock that its holder may take again: a signal may interrupt it with a fork.
        self._changed = threading.Condition(threading.RLock())
        self._inside: set[object] = set()
        self._forking = 0

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be inside, as soon as nobody forks; not for threads that are inside already."""
        one = object()
        with self._changed:
            self._changed.wait_for(lambda: not self._forking, _PATIENCE_SECONDS)
            self._inside.add(one)
        try:
            yield
        finally:
            with self._changed:
                self._inside.discard(one)  # which a child, forked from in here, knows nothing of
                self._changed.notify_all()

    def _close(self) -> None:
        with self._changed:
            self._forking += 1
            self._changed.wait_for(lambda: not self._inside, _PATIENCE_SECONDS)

    def _open(self) -> None:
        with self._changed:
            # Not below zero: an interrupt may have come before this fork was counted.
            self._forking = max(self._forking - 1, 0)
            self._changed.notify_all()


FORK_GATE = ForkGate()
"""One for the process, as SQLite's own locks are."""
