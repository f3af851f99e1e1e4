"""A sink: a storage, the queue in front of it, and the thread that delivers from it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from math import inf
from queue import Empty, SimpleQueue
from time import monotonic
from weakref import finalize, ref

from flask_usage_metrics.errors import StorageUnavailable
from flask_usage_metrics.metrics.sink_counters import SinkCounters
from flask_usage_metrics.pipeline.delivery.queue import SinkQueue
from flask_usage_metrics.pipeline.delivery.retries import ATTEMPTS, Backoff, RetryingDelivery
from flask_usage_metrics.pipeline.delivery.spool import Spool
from flask_usage_metrics.records.observation import Observation
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.forks import FORKS
from flask_usage_metrics.storage import Writer

RECOVER_SECONDS = 5.0
"""Seconds between two looks for records that other processes left on disk."""

MAINTAIN_SECONDS = 5.0
"""Age of the thread when it first maintains the storage: a process that is over soon leaves that to
others."""

_UNAVAILABLE_SECONDS = 30.0
"""How long maintenance waits after a storage was unavailable, or raised."""

_CLOSE_SECONDS = 1.0

_START_SECONDS = 0.1
"""How long a request waits to start the thread, for who moves records to a disk that hangs."""

ANSWER_SECONDS = 3.0
"""Seconds in which a storage answers a call; one that takes longer is not up."""

Accepts = Callable[[Observation], bool]
"""Tells whether a sink takes the record of a request; for any thread. It neither raises nor blocks,
and says the same each time it is asked of an observation, also in another process."""


_RINGS = 4
"""Rings that a busy thread may find, at most."""


class Sink:
    """Takes records, and delivers them to a storage from a thread of its own; for any thread.

    So a storage that blocks or fails delays neither a request nor another storage. A record stays
    in the queue until it is acked: written, dropped or failed. While there is none, the thread
    refers to the sink weakly: an app may be dropped meanwhile.

    Args:
        storage: Where records go.
        counters: Where it is counted what became of them.
        capacity: How many records may wait in memory.
        idle_seconds: Seconds without records after which the thread ends.
        faults: Where failures are reported.
        spool: Where records wait while the storage is down; None: in memory only.
        keep: How long the storage keeps records; None: for ever.
        accepts: Which records the sink is given, and has to account for: one request is captured,
            written, dropped, failed or pending here only if this is true of it. None: all.

    Attributes:
        counters: See above.
    """

    def __init__(
        self,
        storage: Writer,
        counters: SinkCounters,
        *,
        capacity: int,
        idle_seconds: float,
        faults: Faults,
        spool: Spool | None = None,
        keep: timedelta | None = None,
        accepts: Accepts | None = None,
    ) -> None:
        self.storage = storage
        self.accepts = accepts
        self._keep = keep
        self._idle_seconds = idle_seconds
        self.counters = counters
        self._faults = faults
        self._queue = SinkQueue(counters, capacity, spool, faults)
        self._start_anew()
        FORKS.register(self)

    def _start_anew(self) -> None:
        # Held while the queue is touched, which may write to the disk.
        self._changed = threading.Condition()
        # Held while the storage is touched, which may block for any time.
        self._writing = threading.Lock()
        self._delivery = RetryingDelivery(
            self.storage, self._queue, self._changed, self.name, self._faults
        )
        self._hurry = threading.Event()
        # When the storage was called, while it has not answered; and of the last call that was
        # reported for taking too long.
        self._called_at = self._silence_told = inf
        self._thread: threading.Thread | None = None
        # It keeps alive who rang until the thread has found it.
        self._bell: SimpleQueue[object] = SimpleQueue()
        finalize(self, self._bell.put, None).atexit = False
        self._backoff = Backoff()
        self._idle_at = self._recover_at = 0.0
        self._maintain_at = inf
        self._is_closed = False

    def reset_after_fork(self) -> None:
        """Forget what the parent process will write."""
        self._start_anew()
        self._queue.reset_after_fork()
        self.storage.reset_after_fork()

    # ------------------------------------------------------------------------ how it stands

    @property
    def name(self) -> str:
        """Value of the label ``sink``."""
        return self.counters.sink

    @property
    def up(self) -> bool:
        """Whether the last write went well and there is none that lasts; True before the first."""
        return self._delivery.up and not self._is_silent()

    def _is_silent(self) -> bool:
        """Tell whether records wait, and the storage has not answered for some seconds."""
        return monotonic() - self._called_at > ANSWER_SECONDS and self._queue.has_records()

    @property
    def recovered(self) -> int:
        """How many records that other processes left were recovered here."""
        return self._queue.recovered

    def pending(self) -> int:
        """Return how many records are not acked."""
        return self._queue.pending()

    def received(self) -> int:
        """Return how many records were ever `put`."""
        return self._queue.received

    def durable(self) -> int:
        """Return how many of all records ever `put`, the oldest ones, are acked or on disk."""
        with self._changed:
            return self._queue.durable()

    # ------------------------------------------------------------------------ for the worker

    def attach(self, spool: Spool | None) -> None:
        """Set where records may wait on disk; at the first request of the process.

        Not while a disk hangs: then they wait in memory, or where they did before.
        """
        if self._changed.acquire(timeout=_CLOSE_SECONDS):
            try:
                self._is_closed = False
                self._queue.attach(spool)
            finally:
                self._changed.release()

    def put(self, records: Sequence[UsageRecord], *, dropped: int, failed: int) -> None:
        """Append records to the queue; those without room are dropped and counted.

        Args:
            records: In the order to write them in.
            dropped: Requests that the journal had no room for.
            failed: Requests that no record could be made of.
        """
        with self._changed:
            self._is_closed = False
            self.counters.add(dropped=dropped, failed=failed)
            self._queue.put(records)
            if self._recover_at == inf:
                self._recover_at = 0.0
        if records:
            if self._bell.qsize() < _RINGS:
                self._bell.put(self)
            self.start()

    def is_free(self, timeout: float) -> bool:
        """Tell whether the queue can be had, for `timeout` seconds at most; not where a disk hangs.

        For whoever must not wait for ever, before `put`.
        """
        if not self._changed.acquire(timeout=timeout):
            return False
        self._changed.release()
        return True

    def spill(self) -> None:
        """Move the records that wait to the disk, if there is one to wait on."""
        with self._changed:
            self._queue.spill()

    def is_on_disk(self) -> bool:
        """Tell whether the files of the spool are where another process would look for them."""
        return self._queue.is_on_disk()

    def restore(self) -> None:
        """Have the files of the spool on disk again, after somebody removed or moved them.

        Raises:
            OSError: They cannot be made.
        """
        with self._changed:
            self._queue.restore()

    def notice_silence(self) -> None:
        """Report a storage that has not answered for some seconds, and have its records spill."""
        called_at = self._called_at
        if not self._is_silent():
            return
        if called_at != self._silence_told:
            self._silence_told = called_at
            silence = f"no answer for {ANSWER_SECONDS:.0f} seconds"
            self._faults.report(f"sink {self.name}", silence, "its records wait")
        self.spill()

    def start(self) -> bool:
        """Start the thread, unless it runs; return whether one does.

        Done with the first request rather than with the first record: since Python 3.12 none can
        be started at exit any more, and a storage that hangs must not hang the main thread.
        """
        # Without the lock, which is held while records are moved to the disk: a request is here.
        # A thread that ends meanwhile has seen all records that were put before.
        if self._thread is not None:
            return True
        if not self._changed.acquire(timeout=_START_SECONDS):
            return False  # the disk hangs; whoever puts records next tries again
        try:
            if self._thread is not None:
                return True
            thread = threading.Thread(
                target=_run,
                args=(ref(self), self._bell),
                name=f"flask_usage_metrics {self.name}",
                daemon=True,
            )
            self._thread = thread
            self._backoff.reset()
            self._idle_at = monotonic() + self._idle_seconds
            self._maintain_at = monotonic() + MAINTAIN_SECONDS
            try:
                thread.start()
            except RuntimeError as error:  # no more threads, or the interpreter is ending
                self._thread = None
                self._report(error, "its records wait for the next flush")
                return False
        finally:
            self._changed.release()
        return True

    def flush(self, deadline: float) -> bool:
        """Wait until all records put so far are acked and the storage has flushed its own buffers.

        Args:
            deadline: Moment of the monotonic clock to stop waiting at.

        Returns:
            Whether all was acked in time.
        """
        self._hurry.set()
        if self._queue.has_records() and not self.start():
            self._deliver_here(deadline)
        if not self._changed.acquire(timeout=max(deadline - monotonic(), 0)):
            return False
        try:
            target = self._queue.queued
            if not self._changed.wait_for(
                lambda: self._queue.acked() >= target, max(deadline - monotonic(), 0)
            ):
                return False
        finally:
            self._changed.release()
        if not self._writing.acquire(timeout=max(deadline - monotonic(), 0)):
            return False
        self._called_at = monotonic()
        try:
            self.storage.flush()
        except Exception as error:  # noqa: BLE001 - it is the storage's, and may be anybody's
            self._report(error, "what it holds back may be late")
            return False
        finally:
            self._called_at = inf
            self._writing.release()
        return True

    def close(self) -> int:
        """Leave waiting records in the spool, if any, and close the storage unless it is writing.

        Any process of the app recovers what is left there, also this one if it goes on. The thread
        ends, which `join` waits for.

        Returns:
            How many records are not written, and lost if the process ends now.
        """
        self._is_closed = True
        # In time for an end even if the disk hangs.
        if self._changed.acquire(timeout=_CLOSE_SECONDS):
            try:
                self._queue.spill(again=True)
            finally:
                self._changed.release()
        if self._writing.acquire(blocking=False):
            try:
                with self._faults.caught(f"sink {self.name}", "it was not closed"):
                    self.storage.close()
            finally:
                with self._changed:
                    self._queue.release()
                    self._recover_at = inf
                self._writing.release()
        self._hurry.set()
        self._bell.put(None)
        return self._queue.in_memory()

    def join(self, timeout: float) -> None:
        """Wait until the thread has ended, for `timeout` seconds at most; see `close`."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    # ------------------------------------------------------------------------ the thread

    def serve(self) -> float | None:
        """Deliver while there are records.

        Returns:
            Seconds until there may be something else to do unless records come; None: the thread
            is to end.
        """
        self._recover()
        self._maintain()
        while self._queue.has_records():
            if self._deliver(last_attempt=self._backoff.is_last_attempt()):
                self._backoff.reset()
            else:
                self._hurry.wait(self._backoff.next_pause())
                self._hurry.clear()
            self._idle_at = monotonic() + self._idle_seconds
            self._recover()
            self._maintain()
        with self._changed:
            if self._queue.has_records():
                return 0.0
            if self._is_closed or monotonic() >= self._idle_at:
                self._thread = None
                return None
        due = min(self._idle_at, self._maintain_at)
        return min(max(due - monotonic(), 0), RECOVER_SECONDS)

    def _recover(self) -> None:
        """Recover records that other processes left, once every `RECOVER_SECONDS`."""
        if monotonic() < self._recover_at:
            return
        with self._writing, self._changed:
            if monotonic() >= self._recover_at:
                self._recover_at = monotonic() + RECOVER_SECONDS
                self._queue.recover()

    def _maintain(self) -> None:
        """Have the storage do a small piece of maintenance, if it is time for it.

        A storage that was closed is left alone until there are records again.
        """
        if self._is_closed or monotonic() < self._maintain_at:
            return
        seconds = _UNAVAILABLE_SECONDS
        with self._calling():
            try:
                seconds = self.storage.maintain(self._keep, datetime.now(timezone.utc))
            except StorageUnavailable:
                pass  # the next write notices and reports it
            except Exception as error:  # noqa: BLE001 - it is the storage's, and may be anybody's
                self._report(error, "its upkeep waits")
        self._maintain_at = monotonic() + seconds

    def _deliver(self, *, last_attempt: bool) -> bool:
        with self._calling():
            return self._delivery.deliver(last_attempt=last_attempt)

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """Hold the storage for a call, and know since when."""
        with self._writing:
            self._called_at = monotonic()
            try:
                yield
            finally:
                self._called_at = inf

    def _deliver_here(self, deadline: float) -> None:
        """Deliver from the caller's thread, as there is none for it."""
        for attempt in range(ATTEMPTS):
            while self._queue.has_records() and monotonic() < deadline:
                if not self._deliver(last_attempt=attempt == ATTEMPTS - 1):
                    break

    def _report(self, error: BaseException, consequence: str) -> None:
        self._faults.report(f"sink {self.name}", error, consequence)


def _run(find: ref[Sink], bell: SimpleQueue[object]) -> None:
    """Have a sink served until it needs no thread any more, or is gone."""
    rung: list[object] = []
    while (sink := find()) is not None:
        rung.clear()
        seconds = sink.serve()
        if seconds is None:
            return
        del sink
        with suppress(Empty):
            rung.append(bell.get(timeout=seconds))
            while True:  # it may have been rung more than once
                rung.append(bell.get_nowait())
