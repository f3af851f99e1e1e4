"""Delivery of batches: retried with growing pauses, and split if they keep failing."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence

from flask_usage_metrics.errors import RecordsRejected, StorageUnavailable
from flask_usage_metrics.pipeline.delivery.queue import SinkQueue
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.storage import Writer

BATCH_RECORDS = 512
"""Records of one write: what SQLite takes in one statement; more are hardly faster."""

ATTEMPTS = 5
"""Attempts before a batch that keeps failing with an unknown exception is split to isolate the bad
record."""


_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 30.0


class Backoff:
    """The attempts at one batch, and the pauses between them: each twice the last, with jitter."""

    def __init__(self) -> None:
        # Not the module's own generator: an app that seeded it must not see it move.
        self._random = random.Random()
        self.reset()

    def reset(self) -> None:
        """Begin again: the batch is decided."""
        self._failures = 0
        self._pause = 0.0

    def is_last_attempt(self) -> bool:
        """Tell whether the batch is to be split if the next attempt fails as well."""
        return self._failures >= ATTEMPTS - 1

    def next_pause(self) -> float:
        """Count a failed attempt; return the seconds to wait until the next, 36 at most."""
        self._failures += 1
        self._pause = min(max(2 * self._pause, _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
        return self._pause * self._random.uniform(0.8, 1.2)


class RetryingDelivery:
    """Delivers the oldest records of a queue to its storage; for one caller at a time.

    Args:
        storage: Where records go.
        queue: Where they wait.
        changed: Lock of the queue; notified when records are acked or nacked.
        name: Value of the label ``sink``.
        faults: Where failures are reported.

    Attributes:
        up: Whether the last write went well.
    """

    def __init__(
        self,
        storage: Writer,
        queue: SinkQueue,
        changed: threading.Condition,
        name: str,
        faults: Faults,
    ) -> None:
        self.up = True
        self._storage = storage
        self._queue = queue
        self._changed = changed
        self._part = f"sink {name}"
        self._faults = faults

    def deliver(self, *, last_attempt: bool) -> bool:
        """Deliver one batch; blocks as long as the storage does.

        Args:
            last_attempt: Whether to split the batch if the storage raises an unknown exception.

        Returns:
            Whether there was nothing to deliver, or some of it is acked; otherwise the records
            wait for another attempt.
        """
        with self._changed:
            batch = self._queue.peek(BATCH_RECORDS)
        try:
            return self._attempt(batch, last_attempt=last_attempt) if batch else True
        finally:
            if self._queue.in_flight:
                with self._changed:
                    self._queue.nack()
                    self._changed.notify_all()

    def _attempt(self, batch: Sequence[UsageRecord], *, last_attempt: bool) -> bool:
        try:
            self._write(batch)
        except (StorageUnavailable, OSError) as error:
            self._spill(error)
            return False
        except BaseException as error:  # noqa: BLE001 - a storage must not end its thread
            self._failed(error, "the batch is tried again")
            return self._split(batch) if last_attempt else False
        return True

    def _write(self, batch: Sequence[UsageRecord]) -> None:
        """Write the oldest records; they are acked unless this raises."""
        try:
            self._storage.write(batch)
        except RecordsRejected as error:
            rejected = set(error.positions)
            kept = [record for position, record in enumerate(batch) if position not in rejected]
            self._faults.report(self._part, error.reason or error, "records were not written")
            self._storage.call_hooks(kept, self._hook_failed)
            self._ack(written=len(kept), failed=len(batch) - len(kept))
            self.up = bool(kept)
        else:
            # Before it is acked: a kill meanwhile has the batch written, and these called, again.
            self._storage.call_hooks(batch, self._hook_failed)
            self._ack(written=len(batch), failed=0)
            self.up = True

    def _split(self, batch: Sequence[UsageRecord]) -> bool:
        """Write each record that can be written, the oldest first.

        Returns:
            False if the storage became unavailable: what is left waits for another attempt.
        """
        middle = (len(batch) + 1) // 2
        for half in (batch[:middle], batch[middle:]):
            if not half:
                continue
            try:
                self._write(half)
            except (StorageUnavailable, OSError) as error:
                self._spill(error)
                return False
            except BaseException as error:  # noqa: BLE001 - a storage must not end its thread
                if len(half) == 1:
                    self._failed(error, "a record was not written")
                    self._ack(written=0, failed=1)
                elif not self._split(half):
                    return False
        return True

    def _ack(self, written: int, failed: int) -> None:
        with self._changed:
            self._queue.ack(written, failed)
            self._changed.notify_all()

    def _spill(self, error: BaseException) -> None:
        """Have all records wait on disk: it is no fault of theirs that the storage is down."""
        self._failed(error, "its records wait")
        with self._changed:
            self._queue.spill()

    def _failed(self, error: BaseException, consequence: str) -> None:
        self.up = False
        self._faults.report(self._part, error, consequence)

    def _hook_failed(self, name: str, error: BaseException) -> None:
        self._faults.report(f"hook {name}", error, "the record is kept all the same")
