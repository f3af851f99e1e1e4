"""A lock that keeps the process from forking while our threads hold locks a child cannot free."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from flask_usage_metrics.runtime.forks import FORKS

_PATIENCE_SECONDS = 0.5
"""How long a fork waits for the threads inside. A batch is inserted in some ms, but a summary of
everything may take any time: then the fork goes on, at the risk that the child hangs."""


class ForkGate:
    """A shared/exclusive lock: threads that use SQLite share it; `os.fork` takes it exclusively.

    So do threads that read a registry of client_python, which has a lock of its own.

    SQLite has locks for the whole process. A child forked while a thread of its parent holds one
    inherits it locked for ever, and hangs at whatever it does with SQLite next, the app's own
    databases included. It also takes what its parent had locked in a file to be locked by itself,
    so that the file may be damaged.

    A fork waits 0.5 s at most; threads that come while it waits let it go first.
    """

    def __init__(self) -> None:
        self.reset_after_fork()
        if hasattr(os, "register_at_fork"):  # not on Windows
            os.register_at_fork(before=self._close, after_in_parent=self._open)
        # Not by `after_in_child`: that of FORKS may come first, and a part may use SQLite there.
        FORKS.register(self)

    def reset_after_fork(self) -> None:
        """Open the gate in a forked child; no thread is inside there."""
        # Reentrant: a signal handler that forks may interrupt the holder.
        self._changed = threading.Condition(threading.RLock())
        self._inside: set[int] = set()
        self._forking = 0

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Hold the lock, shared; blocks while a fork is under way. Reentrant."""
        one = threading.get_ident()
        if one in self._inside:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._forking, _PATIENCE_SECONDS)
            self._inside.add(one)
        try:
            yield
        finally:
            with self._changed:
                self._inside.discard(one)  # not there in a child forked from in here
                self._changed.notify_all()

    def _close(self) -> None:
        with self._changed:
            self._forking += 1
            self._changed.wait_for(lambda: not self._inside, _PATIENCE_SECONDS)

    def _open(self) -> None:
        with self._changed:
            # Not below zero: an interrupt may have prevented the count in _close.
            self._forking = max(self._forking - 1, 0)
            self._changed.notify_all()


FORK_GATE = ForkGate()
"""One for the process, as SQLite's locks are."""
