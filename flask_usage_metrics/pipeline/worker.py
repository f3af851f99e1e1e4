"""The worker's thread: started by the first request that wakes it, ended after idling for long."""

from __future__ import annotations

import threading
from typing import Protocol

from flask_usage_metrics.runtime.faults import Faults

_HEARTBEAT_SECONDS = 2.0
"""How often the worker looks after the server's other workers while no request comes."""

_HURRY_SECONDS = 0.05
"""How often it is called while it is short of room: as often as a storage may have written."""


class Work(Protocol):
    """The work of the thread, which calls these methods one at a time.

    Attributes:
        is_shared: Whether other processes of the server rely on this one: then the thread does not
            end.
    """

    is_shared: bool

    def process(self) -> object:
        """Do the work there is; it may raise, and is called again while `has_work`."""

    def has_work(self) -> bool:
        """Tell whether there is more to do at once, without being woken."""

    def is_short_of_room(self) -> bool:
        """Tell whether it should be called again before more gathers."""

    def due_in(self) -> float | None:
        """Return in how many seconds there is work without being woken, >= 0; None: never."""


class WorkerThread:
    """Calls `Work.process` in a daemon thread while there is work; for any thread.

    Args:
        flush_seconds: Seconds between two calls, in which observations gather.
        idle_seconds: Seconds without work after which the thread ends.
        faults: Where failures are reported.

    Attributes:
        is_awake: Whether the thread will look for work without being woken.
    """

    def __init__(self, *, flush_seconds: float, idle_seconds: float, faults: Faults) -> None:
        self._flush_seconds = flush_seconds
        self._idle_seconds = idle_seconds
        self._faults = faults
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Forget the parent's thread, which a forked child does not have."""
        self.is_awake = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def wake(self, work: Work, owner: object) -> None:
        """Have the thread look for work, started if need be; does not wait for it.

        Args:
            work: The same each time.
            owner: Kept alive by the thread while it runs, and no longer.
        """
        with self._lock:
            self.is_awake = True
            if self._thread is not None:
                self._wake.set()
                return
            thread = threading.Thread(
                target=self._run,
                args=(work, owner),
                name="flask_usage_metrics pipeline",
                daemon=True,
            )
            try:
                thread.start()
            except RuntimeError as error:  # no more threads, or the interpreter is ending
                self.is_awake = False
                self._faults.report("pipeline", error, "records wait for the next scrape")
            else:
                self._thread = thread

    def hurry(self) -> None:
        """Have the thread call at once, if it runs, instead of letting more gather."""
        self._wake.set()

    def _run(self, work: Work, owner: object) -> None:
        while True:
            pause = self._flush_seconds
            self._wake.wait(min(pause, _HURRY_SECONDS) if work.is_short_of_room() else pause)
            self._wake.clear()
            with self._faults.caught("pipeline", "records are processed later"):
                work.process()
            if work.has_work():
                continue
            # Order matters: a request first appends its observation, then reads this flag.
            self.is_awake = False
            if work.has_work():
                self.is_awake = True
            elif work.is_shared:
                # Another worker may die meanwhile, or somebody remove the files they share.
                if self._wake.wait(_HEARTBEAT_SECONDS):
                    self._wake.clear()
            elif not self._wake.wait(self._idle_for(work)):
                if work.due_in() is not None:
                    continue
                with self._lock:
                    if not self.is_awake:
                        self._thread = None
                        return
            else:
                # More observations will come with the one that woke us: they make one batch.
                self._wake.clear()

    def _idle_for(self, work: Work) -> float:
        """Return how many seconds to sleep unless a request comes."""
        due = work.due_in()
        return self._idle_seconds if due is None else max(due, 0.0) + 0.1
