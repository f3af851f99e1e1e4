"""The queue of one sink: in memory; in the spool while the storage is down or memory is full."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import count, islice
from time import monotonic

from flask_usage_metrics.metrics.sink_counters import SinkCounters
from flask_usage_metrics.pipeline.delivery.spool import Spool
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.runtime.faults import Faults

_SPOOL_PAUSE_SECONDS = 5.0
"""Seconds before a disk that failed is tried again."""


class SinkQueue:
    """A queue of records that counts what becomes of each; for one caller at a time.

    The records on disk are the oldest. While there are any, new ones are appended to them there,
    which keeps the order; while there are none, no disk is touched.

    At any time ``queued + recovered = written + failed + dropped + pending``; the counters also
    have the records that were refused, and those dropped or failed before they came here.

    Args:
        counters: Where it is counted what became of records.
        capacity: How many records may wait in memory.
        spool: Where they wait on disk; None: nowhere.
        faults: Where failures are reported.

    Attributes:
        received: How many records were put in this process.
        queued: How many of these were not refused.
        recovered: How many records of dead processes came by way of the spool.
        in_flight: How many of the oldest records were returned by `peek`, not yet acked or nacked.
    """

    def __init__(
        self, counters: SinkCounters, capacity: int, spool: Spool | None, faults: Faults
    ) -> None:
        self._counters = counters
        self._capacity = capacity
        self._spool = spool
        self._faults = faults
        self._start_anew()

    def _start_anew(self) -> None:
        self.queued = self.recovered = self.in_flight = 0
        self.received = 0
        self._acked = 0
        # How many of those in flight the spool dropped meanwhile: `ack` or `nack` counts them.
        self._gone = 0
        self._left_on_disk = 0
        self._retry_at = 0.0
        # Each record with how many were received before it.
        self._memory: deque[tuple[int, UsageRecord]] = deque()

    def attach(self, spool: Spool | None) -> None:
        """Set the spool; called before any record is put."""
        self._spool = spool

    def reset_after_fork(self) -> None:
        """Forget the parent's records: they stay the parent's."""
        self._start_anew()
        if self._spool is not None:
            self._spool.reset_after_fork()

    # ------------------------------------------------------------------------ how much there is

    def has_records(self) -> bool:
        """Tell whether there is anything to peek at."""
        return bool(self._memory or self._spool)

    def in_memory(self) -> int:
        """Return how many records would be lost with this process."""
        return len(self._memory)

    def pending(self) -> int:
        """Return how many records are not acked, those left on disk included."""
        return self.queued + self.recovered - self._acked + self._left_on_disk

    def acked(self) -> int:
        """Return how many of the queued records are acked, counted from the first.

        Too low while recovered records wait: they are older, and acked before.
        """
        return self._acked - self.recovered

    def durable(self) -> int:
        """Return how many of the records put, counted from the first, are acked or on disk."""
        return self._memory[0][0] if self._memory else self.received

    # ------------------------------------------------------------------------ the new end

    def put(self, records: Sequence[UsageRecord]) -> None:
        """Append records. If memory is full the newest are dropped; if the spool is, the oldest."""
        self._memory.extend(zip(count(self.received), records))
        self.received += len(records)
        self.queued += len(records)
        if self._spool or len(self._memory) > self._capacity:
            self.spill()
        refused = max(len(self._memory) - self._capacity, 0)
        if refused:
            for _ in range(refused):
                self._memory.pop()
            self.queued -= refused
            self._count_dropped(refused)

    def spill(self, *, again: bool = False) -> None:
        """Move all records in memory to the disk; if that fails they stay.

        Args:
            again: Try it even if it failed less than 5 s ago.
        """
        if self._spool is None or not self._memory:
            return
        if monotonic() < self._retry_at and not again:
            return
        try:
            dropped = self._spool.append([record for _, record in self._memory])
        except OSError as error:
            self._retry_at = monotonic() + _SPOOL_PAUSE_SECONDS
            self._report(error, "records wait in memory, or are dropped")
            return
        self._memory.clear()
        # Records in flight are the oldest; whether those are lost is known when they are acked.
        gone = min(dropped, self.in_flight - self._gone)
        self._gone += gone
        if dropped > gone:
            self._acked += dropped - gone
            self._count_dropped(dropped - gone)

    def is_on_disk(self) -> bool:
        """Tell whether the files of the spool are where another process would look for them."""
        return self._spool is None or self._spool.is_there()

    def restore(self) -> None:
        """Have the files of the spool on disk again; raises OSError if they cannot be made."""
        if self._spool is not None:
            self._spool.restore()

    def release(self) -> None:
        """Close the spool, for any process to recover, also this one; none must be in flight."""
        if self._spool is not None:
            left = len(self._spool)
            self._spool.close()
            self._acked += left
            self._left_on_disk += left

    # ------------------------------------------------------------------------ the old end

    def recover(self) -> None:
        """Take what other processes left on disk, as the oldest records; none must be in flight."""
        if self._spool is None:
            return
        damaged = self._spool.damaged
        try:
            came = self._spool.recover()
        except OSError as error:
            self._report(error, "what other processes left is not found")
            return
        if self._spool.damaged > damaged:
            self._report("a file is damaged", "some records of another process may be lost")
        returned = min(came, self._left_on_disk)
        self._left_on_disk -= returned
        self._acked -= returned
        self.recovered += came - returned

    def peek(self, at_most: int) -> list[UsageRecord]:
        """Return the oldest records; from now on they are in flight, until `ack` or `nack`.

        Returns:
            Between 1 and `at_most` records, perhaps fewer than wait; none if none waits.
        """
        batch: list[UsageRecord] = []
        if self._spool:
            batch = self._spool.peek(at_most)
            lost = self._spool.take_lost()
            if lost:
                self._acked += lost
                self._counters.add(failed=lost)
                self._report("a file is damaged", "records are lost")
        if not batch:
            batch = [record for _, record in islice(self._memory, at_most)]
        self.in_flight = len(batch)
        return batch

    def ack(self, written: int, failed: int) -> None:
        """Remove the oldest of the records in flight.

        Args:
            written: How many of them were written.
            failed: How many can never be written.
        """
        number = written + failed
        # They may have been moved to the disk meanwhile.
        if self._spool or self._gone:
            gone = min(number, self._gone)
            self._gone -= gone
            if self._spool is not None:
                self._spool.ack(number - gone)
        else:
            for _ in range(number):
                self._memory.popleft()
        self.in_flight -= number
        self._acked += number
        self._counters.add(written=written, failed=failed)

    def nack(self) -> None:
        """Have the records in flight wait again, except those the spool has dropped meanwhile."""
        if self._gone:
            self._acked += self._gone
            self._count_dropped(self._gone)
        self.in_flight = self._gone = 0

    def _count_dropped(self, number: int) -> None:
        self._counters.add(dropped=number)
        self._faults.report(f"sink {self._counters.sink}", "no room", "records were dropped")

    def _report(self, error: BaseException | str, consequence: str) -> None:
        self._faults.report(f"spool {self._counters.sink}", error, consequence)
