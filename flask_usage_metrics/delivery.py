"""From the pipeline into one storage: batches, retries, and an account of every record."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Sequence
from itertools import islice
from time import monotonic

from flask_usage_metrics.errors import RecordsRejected, StorageUnavailable
from flask_usage_metrics.faults import Faults
from flask_usage_metrics.record import UsageRecord
from flask_usage_metrics.storage import Writer
from flask_usage_metrics.totals import Account

BATCH_RECORDS = 512
"""Records of one write: what SQLite takes in one statement; more are hardly faster."""

ATTEMPTS = 5
"""How often a batch is offered whose failure says nothing of its kind, before it is taken apart."""

_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 30.0


class Sink:
    """Takes records, and writes them to a storage from a thread of its own.

    So a storage that blocks or fails delays neither a request nor another storage. A record stays
    in the queue until it is decided what became of it.

    Args:
        storage: Where records go.
        account: Where it is counted what became of them.
        capacity: How many records may wait.
        idle_seconds: How long the thread waits for records before it ends.
        faults: Where failures are reported.

    Attributes:
        up: Whether the last write went well.
    """

    def __init__(
        self,
        storage: Writer,
        account: Account,
        *,
        capacity: int,
        idle_seconds: float,
        faults: Faults,
    ) -> None:
        self.storage = storage
        self._idle_seconds = idle_seconds
        self._account = account
        self._capacity = capacity
        self._faults = faults
        self._start_anew()

    def _start_anew(self) -> None:
        self.up = True
        self._queue: deque[UsageRecord] = deque()
        self._accepted = self._decided = 0
        self._changed = threading.Condition()
        self._hurry = threading.Event()
        self._writing = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        """Value of the label ``sink``."""
        return self._account.sink

    def pending(self) -> int:
        """Return how many records are not decided."""
        return len(self._queue)

    def put(self, records: Sequence[UsageRecord], *, dropped: int, failed: int) -> None:
        """Take records; those there is no room for are dropped and counted.

        Args:
            records: In the order to write them in.
            dropped: Requests there was no room for before they came here.
            failed: Requests that no record could be made of.
        """
        with self._changed:
            taken = records[: max(self._capacity - len(self._queue), 0)]
            refused = len(records) - len(taken)
            self._queue.extend(taken)
            self._accepted += len(taken)
            self._account.add(dropped=dropped + refused, failed=failed)
            self._changed.notify_all()
        if refused:
            self._faults.report(f"sink {self.name}", "no room", "records were dropped")
        if taken:
            self.start()

    def flush(self, deadline: float) -> bool:
        """Wait until what was taken so far is decided, and the storage holds nothing back.

        Args:
            deadline: Moment of the monotonic clock to stop waiting at.

        Returns:
            Whether all was decided in time.
        """
        self._hurry.set()
        if self._queue and not self.start():
            self._write_here(deadline)
        with self._changed:
            target = self._accepted
            if not self._changed.wait_for(
                lambda: self._decided >= target, max(deadline - monotonic(), 0)
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

    def close(self) -> None:
        """Close the storage, unless it is being written to."""
        if self._writing.acquire(blocking=False):
            try:
                self.storage.close()
            except Exception as error:  # noqa: BLE001 - it is the storage's, and may be anybody's
                self._report(error, "it was not closed")
            finally:
                self._writing.release()

    def reset_after_fork(self) -> None:
        """Forget what the parent process will write."""
        self._start_anew()
        self.storage.reset_after_fork()

    # ------------------------------------------------------------------------ the thread

    def start(self) -> bool:
        """Start the thread, unless it runs; return whether one does.

        Done with the first request rather than with the first record: since Python 3.12 none can
        be started at exit any more, and a storage that hangs must not hang the main thread.
        """
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
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue, self._idle_seconds)
                if not self._queue:
                    self._thread = None
                    return
            if self._write_batch(last_attempt=attempt >= ATTEMPTS - 1):
                pause, attempt = 0.0, 0
                continue
            attempt += 1
            pause = min(max(2 * pause, _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
            self._hurry.wait(pause * random.uniform(0.8, 1.2))
            self._hurry.clear()

    def _write_here(self, deadline: float) -> None:
        for attempt in range(ATTEMPTS):
            while self._queue and monotonic() < deadline:
                if not self._write_batch(last_attempt=attempt == ATTEMPTS - 1):
                    break

    # ------------------------------------------------------------------------ writing

    def _write_batch(self, *, last_attempt: bool) -> bool:
        """Offer the oldest records to the storage; return whether anything was decided."""
        with self._writing:
            with self._changed:
                batch = list(islice(self._queue, BATCH_RECORDS))
            if not batch:
                return True
            try:
                self._offer(batch)
            except (StorageUnavailable, OSError) as error:
                # Not the records' fault: they wait until it is over, or there is no more room.
                self._failed(error, "its records wait")
                return False
            except BaseException as error:  # noqa: BLE001 - a storage must not end its thread
                self._failed(error, "the batch is offered again")
                if not last_attempt:
                    return False
                return self._take_apart(batch)
            return True

    def _offer(self, batch: Sequence[UsageRecord]) -> None:
        """Write the oldest records; they are decided unless this raises."""
        try:
            self.storage.write(batch)
        except RecordsRejected as error:
            rejected = len(set(error.positions) & set(range(len(batch))))
            self._report(error, "records were not written", kind=error.reason)
            self._decide(written=len(batch) - rejected, failed=rejected)
            self.up = rejected < len(batch)
        else:
            self._decide(written=len(batch), failed=0)
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
                self._failed(error, "its records wait")
                return False
            except BaseException as error:  # noqa: BLE001 - a storage must not end its thread
                if len(half) == 1:
                    self._failed(error, "a record was not written")
                    self._decide(written=0, failed=1)
                elif not self._take_apart(half):
                    return False
        return True

    def _decide(self, written: int, failed: int) -> None:
        with self._changed:
            for _ in range(written + failed):
                self._queue.popleft()
            self._account.add(written=written, failed=failed)
            self._decided += written + failed
            self._changed.notify_all()

    def _failed(self, error: BaseException, consequence: str) -> None:
        self.up = False
        self._report(error, consequence)

    def _report(self, error: BaseException, consequence: str, kind: str | None = None) -> None:
        self._faults.report(f"sink {self.name}", kind or error, consequence)
