"""From the pipeline into one storage: batches, retries, and an counters of every record."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from math import inf
from time import monotonic

from flask_usage_metrics.errors import RecordsRejected, StorageUnavailable
from flask_usage_metrics.metrics.sink_counters import SinkCounters
from flask_usage_metrics.pipeline.delivery.queue import SinkQueue
from flask_usage_metrics.pipeline.delivery.spool import Spool
from flask_usage_metrics.records.observation import Observation
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.storage import Writer

BATCH_RECORDS = 512
"""Records of one write: what SQLite takes in one statement; more are hardly faster."""

ATTEMPTS = 5
"""Attempts before a batch that keeps failing with an unknown exception is split to isolate the bad
record."""

RECOVER_SECONDS = 5.0
"""How often it is looked for what dead processes left on disk, while the thread lives."""

MAINTAIN_SECONDS = 5.0
"""How long the thread has lived when the storage is tended for the first time: a process that is
over soon leaves it to others."""

_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 30.0
_CLOSE_SECONDS = 1.0

Accepts = Callable[[Observation], bool]
"""Tells whether a sink takes the record of a request; for any thread. It neither raises nor blocks,
and says the same each time it is asked of an observation, also in another process."""


class Sink:
    """Takes records, and writes them to a storage from a thread of its own.

    So a storage that blocks or fails delays neither a request nor another storage. A record stays
    in the queue until it is acked.

    Args:
        storage: Where records go.
        counters: Where it is counted what became of them.
        capacity: How many records may wait in memory.
        idle_seconds: How long the thread waits for records before it ends.
        faults: Where failures are reported.
        spool: Where records wait while the storage is down; None: in memory only.
        keep: How long the storage keeps records; None: for ever.
        accepts: Which records the sink is given, and has to account for: one request is captured,
            written, dropped, failed or pending here only if this is true of it. None: all.

    Attributes:
        up: Whether the last write went well.
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
        self._counters = counters
        self._faults = faults
        self._queue = SinkQueue(counters, capacity, spool, faults)
        self._start_anew()

    def _start_anew(self) -> None:
        self.up = True
        self._changed = threading.Condition()
        self._hurry = threading.Event()
        self._writing = threading.Lock()
        self._thread: threading.Thread | None = None
        self._recover_at = 0.0
        self._maintain_at = inf
        self._is_closed = False
        # Not the module's own generator: an app that seeded it must not see it move.
        self._random = random.Random()

    @property
    def name(self) -> str:
        """Value of the label ``sink``."""
        return self._counters.sink

    @property
    def recovered(self) -> int:
        """How many records of dead processes came to be pending here, and then what they were."""
        return self._queue.recovered

    def attach(self, spool: Spool | None) -> None:
        """Take the place where records may wait on disk, at the first request of the process."""
        with self._changed:
            self._queue.attach(spool)

    def pending(self) -> int:
        """Return how many records are not acked."""
        return self._queue.pending()

    def received(self) -> int:
        """Return how many records were ever `put`."""
        return self._queue.received

    def durable(self) -> int:
        """Return how many of all records ever `put`, the first ones, need nobody to keep them.

        Each of these is acked, or is on disk.
        """
        with self._changed:
            return self._queue.durable()

    def put(self, records: Sequence[UsageRecord], *, dropped: int, failed: int) -> None:
        """Take records; those there is no room for are dropped and counted.

        Args:
            records: In the order to write them in.
            dropped: Requests there was no room for before they came here.
            failed: Requests that no record could be made of.
        """
        with self._changed:
            self._is_closed = False
            self._counters.add(dropped=dropped, failed=failed)
            self._queue.put(records)
            if self._recover_at == inf:
                self._recover_at = 0.0
            self._changed.notify_all()
        if records:
            self.start()

    def flush(self, deadline: float) -> bool:
        """Wait until what was taken so far is acked, and the storage holds nothing back.

        Args:
            deadline: Moment of the monotonic clock to stop waiting at.

        Returns:
            Whether all was acked in time.
        """
        self._hurry.set()
        if self._queue.waits() and not self.start():
            self._write_here(deadline)
        with self._changed:
            target = self._queue.taken
            if not self._changed.wait_for(
                lambda: self._queue.acked() >= target, max(deadline - monotonic(), 0)
            ):
                return False
        if not self._writing.acquire(timeout=max(deadline - monotonic(), 0)):
            return False
        try:
            self.storage.flush()
        except Exception as error:  # noqa: BLE001 - it is the storage's, and may be anybody's
            self._report(error, "what it holds back may be late")
            return False
        finally:
            self._writing.release()
        return True

    def close(self) -> int:
        """Leave what waits on disk, if there is a spool, and close the storage if nobody writes.

        What is left there is taken up by any process of the app, also by this one if it goes on.

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
                self.storage.close()
            except Exception as error:  # noqa: BLE001 - it is the storage's, and may be anybody's
                self._report(error, "it was not closed")
            finally:
                with self._changed:
                    self._queue.release()
                    self._recover_at = inf
                self._writing.release()
        return self._queue.in_memory()

    def reset_after_fork(self) -> None:
        """Forget what the parent process will write."""
        self._start_anew()
        self._queue.reset_after_fork()
        self.storage.reset_after_fork()

    # ------------------------------------------------------------------------ the thread

    def start(self) -> bool:
        """Start the thread, unless it runs; return whether one does.

        Done with the first request rather than with the first record: since Python 3.12 none can
        be started at exit any more, and a storage that hangs must not hang the main thread.
        """
        # Without the lock, which is held while records are moved to the disk: a request is here.
        # A thread that ends meanwhile has seen all records that were put before.
        if self._thread is not None:
            return True
        with self._changed:
            if self._thread is not None:
                return True
            thread = threading.Thread(
                target=self._run, name=f"flask_usage_metrics {self.name}", daemon=True
            )
            self._thread = thread
            try:
                thread.start()
            except RuntimeError as error:  # no more threads, or the interpreter is ending
                self._thread = None
                self._report(error, "its records wait for the next flush")
                return False
        return True

    def _run(self) -> None:
        pause = 0.0
        attempt = 0
        self._maintain_at = monotonic() + MAINTAIN_SECONDS
        while self._wait():
            if self._write_batch(last_attempt=attempt >= ATTEMPTS - 1):
                pause, attempt = 0.0, 0
                continue
            attempt += 1
            pause = min(max(2 * pause, _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
            self._hurry.wait(pause * self._random.uniform(0.8, 1.2))
            self._hurry.clear()

    def _wait(self) -> bool:
        """Wait for records, of this process or a dead one; return False to end the thread."""
        until = monotonic() + self._idle_seconds
        while True:
            self.recover()
            self._maintain()
            with self._changed:
                due = until if self._is_closed else min(until, self._maintain_at)
                seconds = min(max(due - monotonic(), 0), RECOVER_SECONDS)
                if self._changed.wait_for(self._queue.waits, seconds):
                    return True
                if monotonic() >= until:
                    self._thread = None
                    return False

    def recover(self) -> None:
        """Take over what dead processes left, unless that was tried a moment ago."""
        if monotonic() < self._recover_at:
            return
        with self._writing, self._changed:
            if monotonic() >= self._recover_at:
                self._recover_at = monotonic() + RECOVER_SECONDS
                self._queue.recover()

    def _maintain(self) -> None:
        """Have the storage do a small piece of its upkeep, if it is time for some.

        A storage that was closed is left alone until there are records again.
        """
        if self._is_closed or monotonic() < self._maintain_at:
            return
        seconds = _LONGEST_PAUSE_SECONDS
        with self._writing:
            try:
                seconds = self.storage.maintain(self._keep, datetime.now(timezone.utc))
            except StorageUnavailable:
                pass  # as whoever writes will notice, and say
            except Exception as error:  # noqa: BLE001 - it is the storage's, and may be anybody's
                self._report(error, "its upkeep waits")
        self._maintain_at = monotonic() + seconds

    def _write_here(self, deadline: float) -> None:
        for attempt in range(ATTEMPTS):
            while self._queue.waits() and monotonic() < deadline:
                if not self._write_batch(last_attempt=attempt == ATTEMPTS - 1):
                    break

    # ------------------------------------------------------------------------ writing

    def _write_batch(self, *, last_attempt: bool) -> bool:
        """Offer the oldest records to the storage; return whether anything was acked."""
        with self._writing:
            with self._changed:
                batch = self._queue.peek(BATCH_RECORDS)
            try:
                return self._offer_all(batch, last_attempt=last_attempt) if batch else True
            finally:
                if self._queue.in_flight:
                    with self._changed:
                        self._queue.nack()
                        self._changed.notify_all()

    def _offer_all(self, batch: Sequence[UsageRecord], *, last_attempt: bool) -> bool:
        try:
            self._offer(batch)
        except (StorageUnavailable, OSError) as error:
            self._outage(error)
            return False
        except BaseException as error:  # noqa: BLE001 - a storage must not end its thread
            self._failed(error, "the batch is tried again")
            return self._take_apart(batch) if last_attempt else False
        return True

    def _offer(self, batch: Sequence[UsageRecord]) -> None:
        """Write the oldest records; they are acked unless this raises."""
        try:
            self.storage.write(batch)
        except RecordsRejected as error:
            refused = set(error.positions)
            kept = [record for position, record in enumerate(batch) if position not in refused]
            self._report(error, "records were not written", kind=error.reason)
            self.storage.call_hooks(kept, self._hook_failed)
            self._ack(written=len(kept), failed=len(batch) - len(kept))
            self.up = bool(kept)
        else:
            # Before it is acked: a kill meanwhile has the batch written, and these called, again.
            self.storage.call_hooks(batch, self._hook_failed)
            self._ack(written=len(batch), failed=0)
            self.up = True

    def _take_apart(self, batch: Sequence[UsageRecord]) -> bool:
        """Write each record that can be written, the oldest first; return False on an outage."""
        middle = (len(batch) + 1) // 2
        for half in (batch[:middle], batch[middle:]):
            if not half:
                continue
            try:
                self._offer(half)
            except (StorageUnavailable, OSError) as error:
                self._outage(error)
                return False
            except BaseException as error:  # noqa: BLE001 - a storage must not end its thread
                if len(half) == 1:
                    self._failed(error, "a record was not written")
                    self._ack(written=0, failed=1)
                elif not self._take_apart(half):
                    return False
        return True

    def _ack(self, written: int, failed: int) -> None:
        with self._changed:
            self._queue.ack(written, failed)
            self._changed.notify_all()

    def _outage(self, error: BaseException) -> None:
        # Not the records' fault: they wait until it is over, or there is no more room.
        self._failed(error, "its records wait")
        with self._changed:
            self._queue.spill()

    def _failed(self, error: BaseException, consequence: str) -> None:
        self.up = False
        self._report(error, consequence)

    def _hook_failed(self, name: str, error: BaseException) -> None:
        self._faults.report(f"hook {name}", error, "the record is kept all the same")

    def _report(self, error: BaseException, consequence: str, kind: str | None = None) -> None:
        self._faults.report(f"sink {self.name}", kind or error, consequence)
