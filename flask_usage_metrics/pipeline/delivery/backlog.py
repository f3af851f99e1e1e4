"""What waits for one storage, in order: the older part on disk, if there is any, then memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import count, islice
from time import monotonic

from flask_usage_metrics.metrics.sink_counts import Account
from flask_usage_metrics.pipeline.delivery.spool import Spool
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.runtime.faults import Faults

_SPOOL_PAUSE_SECONDS = 5.0
"""A disk that failed is not tried again before."""


class Backlog:
    """A queue of records, and the account of what became of them; for one caller at a time.

    As long as nothing is on disk, no disk is touched. What is moved there is all that waits in
    memory, and while something is there all that comes follows: so the order is kept.

    At any time ``taken + adopted = written + failed + dropped + pending``, but that the account
    has also what was refused, and dropped or failed before it came here.

    Args:
        account: Where it is counted what became of records.
        capacity: How many records may wait in memory.
        spool: Where they wait on disk; None: nowhere.
        faults: Where failures are reported.

    Attributes:
        received: Records that were ever put.
        taken: Of these, the ones that were not refused.
        adopted: Records of other processes that came by way of the spool.
        offered: Records, the oldest, that are being offered to the storage.
    """

    def __init__(
        self, account: Account, capacity: int, spool: Spool | None, faults: Faults
    ) -> None:
        self._account = account
        self._capacity = capacity
        self._spool = spool
        self._faults = faults
        self._start_anew()

    def _start_anew(self) -> None:
        self.taken = self.adopted = self.offered = 0
        self.received = 0
        self._decided = 0
        # Of what is offered, what the spool had to drop meanwhile; not decided yet.
        self._gone = 0
        self._left_on_disk = 0
        self._retry_at = 0.0
        self._memory: deque[tuple[int, UsageRecord]] = deque()

    def attach(self, spool: Spool | None) -> None:
        """Take the place where records may wait on disk; before any does."""
        self._spool = spool

    def reset_after_fork(self) -> None:
        """Forget what the parent process has."""
        self._start_anew()
        if self._spool is not None:
            self._spool.reset_after_fork()

    # ------------------------------------------------------------------------ how much there is

    def waits(self) -> bool:
        """Tell whether there is anything to offer."""
        return bool(self._memory or self._spool)

    def in_memory(self) -> int:
        """Return how many records would be lost with this process."""
        return len(self._memory)

    def pending(self) -> int:
        """Return how many records are not decided, those left on disk included."""
        return self.taken + self.adopted - self._decided + self._left_on_disk

    def decided(self) -> int:
        """Return how many of those that were put and not refused, the first ones, are decided.

        Too few for as long as records that were adopted, and are older, wait.
        """
        return self._decided - self.adopted

    def settled(self) -> int:
        """Return how many of all that were ever put, the first ones, are decided or on disk."""
        return self._memory[0][0] if self._memory else self.received

    # ------------------------------------------------------------------------ the new end

    def put(self, records: Sequence[UsageRecord]) -> None:
        """Take records; if there is no room these, or on disk the oldest, are dropped."""
        self._memory.extend(zip(count(self.received), records))
        self.received += len(records)
        self.taken += len(records)
        if self._spool or len(self._memory) > self._capacity:
            self.spill()
        refused = max(len(self._memory) - self._capacity, 0)
        if refused:
            for _ in range(refused):
                self._memory.pop()
            self.taken -= refused
            self._dropped(refused)

    def spill(self, *, again: bool = False) -> None:
        """Move all that waits in memory to the disk; if that fails it stays.

        Args:
            again: Also if it failed a moment ago.
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
        # What is being offered is the oldest: whether it is lost is known when that is over.
        gone = min(dropped, self.offered - self._gone)
        self._gone += gone
        if dropped > gone:
            self._decided += dropped - gone
            self._dropped(dropped - gone)

    def leave(self) -> None:
        """Leave what is on disk to whoever adopts it first, also this process; not in an offer."""
        if self._spool is not None:
            left = len(self._spool)
            self._spool.close()
            self._decided += left
            self._left_on_disk += left

    # ------------------------------------------------------------------------ the old end

    def adopt(self) -> None:
        """Take what dead processes left on disk, as the oldest; not in an offer."""
        if self._spool is None:
            return
        damaged = self._spool.damaged
        try:
            came = self._spool.adopt()
        except OSError as error:
            self._report(error, "what other processes left is not found")
            return
        if self._spool.damaged > damaged:
            self._report("a file is damaged", "some records of another process may be lost")
        returned = min(came, self._left_on_disk)
        self._left_on_disk -= returned
        self._decided -= returned
        self.adopted += came - returned

    def offer(self, at_most: int) -> list[UsageRecord]:
        """Return the oldest records, which are now to be decided or withdrawn."""
        batch: list[UsageRecord] = []
        if self._spool:
            batch = self._spool.peek(at_most)
            lost = self._spool.take_lost()
            if lost:
                self._decided += lost
                self._account.add(failed=lost)
                self._report("a file is damaged", "records are lost")
        if not batch:
            batch = [record for _, record in islice(self._memory, at_most)]
        self.offered = len(batch)
        return batch

    def decide(self, written: int, failed: int) -> None:
        """Forget the oldest of the records that are offered: this is what became of them."""
        number = written + failed
        # Those that are offered may have been moved to the disk since they were.
        if self._spool or self._gone:
            gone = min(number, self._gone)
            self._gone -= gone
            if self._spool is not None:
                self._spool.advance(number - gone)
        else:
            for _ in range(number):
                self._memory.popleft()
        self.offered -= number
        self._decided += number
        self._account.add(written=written, failed=failed)

    def withdraw(self) -> None:
        """End the offer: what was not decided waits on, unless there was no room meanwhile."""
        if self._gone:
            self._decided += self._gone
            self._dropped(self._gone)
        self.offered = self._gone = 0

    def _dropped(self, number: int) -> None:
        self._account.add(dropped=number)
        self._faults.report(f"sink {self._account.sink}", "no room", "records were dropped")

    def _report(self, error: BaseException | str, consequence: str) -> None:
        self._faults.report(f"spool {self._account.sink}", error, consequence)
