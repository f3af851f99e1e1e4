"""The worker's thread: started by the first request that wakes it, ended after idling for long."""

from __future__ import annotations

import threading
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Protocol
from weakref import ref

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

    While the thread sleeps it refers to the work weakly: an app may be dropped meanwhile.

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
        # A queue, as a finalizer may put to it whatever lock the thread holds that it interrupts.
        # It keeps alive who rang until the thread has found it.
        self._bell: SimpleQueue[object] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_to_end = False
        self._lock = threading.Lock()

    def wake(self, work: Work, owner: object) -> None:
        """Have the thread look for work, started if need be; does not wait for it.

        Args:
            work: The same each time.
            owner: Kept alive by the thread while it is awake, and no longer; it has the work.
        """
        with self._lock:
            self.is_awake = True
            self._is_to_end = False
            self._bell.put((work, owner))
            if self._thread is not None:
                return
            thread = threading.Thread(
                target=self._run,
                args=(ref(work), ref(owner)),
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

    def ring(self) -> None:
        """Interrupt the thread's sleep; never waits, so that a finalizer may call it."""
        self._bell.put(None)

    def hurry(self) -> None:
        """Have the thread call at once, if it runs, instead of letting more gather."""
        if self._bell.empty():
            self.ring()

    def end(self) -> None:
        """Have the thread end once there is no work; does not wait for it, see `join`."""
        with self._lock:
            self._is_to_end = True
            self.ring()

    def join(self, timeout: float) -> None:
        """Wait until the thread has ended, for `timeout` seconds at most."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _run(self, find_work: ref[Work], find_owner: ref[object]) -> None:
        rung = self._sleep(0.0)
        while (work := find_work()) is not None and (owner := find_owner()) is not None:
            rung.clear()
            seconds = self._work(work)
            del work, owner
            rung = self._sleep(seconds)
            if rung and not self._is_to_end:
                continue
            if (work := find_work()) is None:
                return
            is_needed = work.is_shared or work.due_in() is not None
            del work
            if not is_needed or self._is_to_end:
                with self._lock:
                    if not self.is_awake:
                        self._thread = None
                        return

    def _work(self, work: Work) -> float:
        """Process while there is work; return how many seconds to sleep unless a request comes."""
        self.is_awake = True
        while self.is_awake:
            # More observations will come with the one that woke us: they make one batch.
            pause = self._flush_seconds
            self._sleep(min(pause, _HURRY_SECONDS) if work.is_short_of_room() else pause)
            with self._faults.caught("pipeline", "records are processed later"):
                work.process()
            if not work.has_work():
                # Order matters: a request first appends its observation, then reads this flag.
                self.is_awake = False
                if work.has_work():
                    self.is_awake = True
        if self._is_to_end:
            return 0.0
        if work.is_shared:
            # Another worker may die meanwhile, or somebody remove the files they share.
            return _HEARTBEAT_SECONDS
        due = work.due_in()
        return self._idle_seconds if due is None else max(due, 0.0) + 0.1

    def _sleep(self, seconds: float) -> list[object]:
        """Wait until somebody rings; return who did, empty if nobody in time."""
        rung: list[object] = []
        try:
            rung.append(self._bell.get(timeout=seconds))
        except Empty:
            return rung
        with suppress(Empty):  # it may have been rung more than once
            while True:
                rung.append(self._bell.get_nowait())
        return rung
