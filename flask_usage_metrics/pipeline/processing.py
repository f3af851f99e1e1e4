"""A batch of observations -> records, which are counted in the totals and handed to each sink."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import datetime
from itertools import chain, groupby, repeat
from operator import attrgetter
from typing import Any, TypeVar
from weakref import finalize

from flask_usage_metrics.enrich.enricher import Enricher
from flask_usage_metrics.enrich.visitors.tally import VisitorTally
from flask_usage_metrics.metrics.totals import CountedJournal, Totals
from flask_usage_metrics.pipeline.checkpoints import (
    Checkpoints,
    JournalEntry,
    JournalReader,
    without,
)
from flask_usage_metrics.pipeline.delivery.sink import Accepts, Sink
from flask_usage_metrics.pipeline.journal import Journal
from flask_usage_metrics.pipeline.kept_files import KeptFiles, close_journal
from flask_usage_metrics.pipeline.losses import Losses
from flask_usage_metrics.pipeline.worker_group import WorkerGroup
from flask_usage_metrics.pipeline.yielding import yielding
from flask_usage_metrics.records.observation import Observation
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.runtime.collected import when_collected
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.forks import FORKS
from flask_usage_metrics.runtime.passing import is_passing
from flask_usage_metrics.runtime.servers import Server

METRICS_SINK = "metrics"
"""Value of the label ``sink`` for the totals behind the metrics themselves."""

_BATCH_ENTRIES = 512
"""Entries of one batch: of one commit to the totals, and one `Sink.put`."""

_HURRY_FULLNESS = 0.5
"""How much of the journal's file may be taken before the worker is called without a pause."""

_SPILL_FULLNESS = 0.75
"""How much of it may be taken before records that wait for a storage are moved to the disk."""

_WAITING_ENTRIES = 10_000
"""Entries that wait at most for a passing fault of the machine to pass."""

_STAMPED_ENTRIES = 32
"""Entries that get their ids together, which is cheaper than one by one."""

_T = TypeVar("_T")


class Processor:
    """Processes the journal of this process and those of dead ones; for any thread, one at a time.

    Args:
        journal: The journal of this process.
        worker_group: Recovers the journals of dead processes.
        enricher: Makes records of observations.
        tally: Where visitors are counted; None: nowhere.
        totals: Where records are counted.
        sinks: Where records go.
        faults: Where failures are reported.

    Attributes:
        counters: Of the records that are counted in the totals.
        losses: Requests that never become records, until the next batch tells the sinks of them.
        is_open: Whether this process is in its worker group: from `open` until `close` or a fork.
        is_shared: Whether the server may have other processes for the same app.
    """

    def __init__(
        self,
        *,
        journal: Journal,
        worker_group: WorkerGroup,
        enricher: Enricher,
        tally: VisitorTally | None,
        totals: Totals,
        sinks: Sequence[Sink],
        faults: Faults,
    ) -> None:
        self._journal = journal
        self._worker_group = worker_group
        self._enricher = enricher
        self._tally = tally
        self._totals = totals
        self.counters = totals.sink_counters(METRICS_SINK)
        self._sinks = sinks
        self._faults = faults
        accepts: dict[str, Accepts | None] = {sink.name: sink.accepts for sink in sinks}
        self.losses = Losses({METRICS_SINK: None, **accepts})
        self._start_anew()
        FORKS.register(self)

    def _start_anew(self) -> None:
        self.is_open = self.is_shared = False
        self._closing: finalize[..., Any] | None = None
        self._lock = threading.Lock()
        # Entries whose country is asked for, or that met a passing fault; those of the batch.
        self._unlocated: list[JournalEntry] = []
        self._processing: Sequence[JournalEntry] = ()
        self._checkpoints = Checkpoints(
            self._journal, self._worker_group, self._enricher.origin, self._sinks
        )
        self._files = KeptFiles(
            self._journal, self._worker_group, self._totals, self._sinks, self._checkpoints
        )

    def reset_after_fork(self) -> None:
        """Forget what the parent process will process."""
        self._call_off()
        self._checkpoints.release()
        self.losses.reset_after_fork()
        self._start_anew()

    def open(self, server: Server) -> None:
        """Join the worker group, and open the journal file and the spools.

        Args:
            server: Of this process.
        """
        self.is_open, self.is_shared = True, server.is_shared
        self._files.open(server)
        # An app that is dropped when all is processed leaves no journal and no server run.
        self._call_off()
        self._closing = when_collected(
            self, _let_go, self._journal, self._worker_group, self._totals
        )

    def _call_off(self) -> None:
        if self._closing is not None:
            self._closing.detach()
        self._closing = None

    def close(self) -> None:
        """Release what is not durable, for the next process to recover; end threads, close files.

        It is opened again before the next observation is appended to the journal.
        """
        with self._lock:
            self._checkpoint()
            self.is_open = False
            self._call_off()
            self._files.close()
            self._totals.close()
            self._worker_group.end()
        self._enricher.close()
        if self._tally is not None:
            self._tally.close()

    # ------------------------------------------------------------------------ one at a time

    def process(self, grace: float = 0.0, *, timeout: float = -1.0) -> int | None:
        """Process all observations captured so far, and those that dead processes left.

        Args:
            grace: Seconds to wait at most for the app's own country function. An observation whose
                country an HTTP service is still asked for is left to a later call.
            timeout: Seconds to wait at most while another thread processes; -1: as long as it does.

        Returns:
            How many observations wait for their country now; None after the timeout, when
            nothing was done.
        """
        if not self._lock.acquire(timeout=timeout):
            return None
        try:
            self._process(grace)
            return len(self._unlocated)
        finally:
            self._lock.release()

    def checkpoint(self, *, timeout: float) -> None:
        """Sync the totals, and truncate the journals as far as these and all sinks allow.

        Args:
            timeout: Seconds to wait at most while another thread processes, which does it as well.
        """
        if self._lock.acquire(timeout=timeout):
            try:
                self._checkpoint()
            finally:
                self._lock.release()

    def _checkpoint(self) -> None:
        for sink in self._sinks:
            sink.notice_silence()
        self._checkpoints.checkpoint(self._unlocated)
        if self._journal.fullness() > _SPILL_FULLNESS:
            for sink in self._sinks:
                sink.spill()
            self._checkpoints.checkpoint(self._unlocated)

    def _process(self, grace: float) -> None:
        self._enricher.maintain()
        self._files.look(self._unlocated)
        recovered = list(self._recover())
        waiting, self._unlocated = self._unlocated, []
        self._process_entries([*waiting, *recovered])
        own = self._checkpoints.own
        for _ in range(len(self._journal) // _BATCH_ENTRIES + 1):
            if taken := self._journal.take(_BATCH_ENTRIES):
                entries = [
                    *map(JournalEntry, repeat(own), *zip(*taken, strict=True), repeat(False))
                ]
                self._process_batch(entries, ())
                if self.is_short_of_room():
                    self._checkpoint()
        if grace and self._unlocated:
            self._enricher.wait_local(grace)
            waiting, self._unlocated = self._unlocated, []
            self._process_entries(waiting)
        self._checkpoint()

    def _recover(self) -> Iterable[JournalEntry]:
        """Yield the entries of the journals that dead processes left."""
        for file in self._worker_group.leftovers():
            last_commit = self._totals.last_commit(file)
            if last_commit is None:
                file.close(remove=False)
                continue
            yield from self._checkpoints.recover(file, last_commit)

    def _process_entries(self, entries: Sequence[JournalEntry]) -> None:
        end = 0
        for _, same in groupby(entries, attrgetter("reader", "is_counted")):
            for batch in _slices(list(same), _BATCH_ENTRIES):
                end += len(batch)
                self._process_batch(batch, entries[end:])

    def _process_batch(self, entries: Sequence[JournalEntry], rest: Sequence[JournalEntry]) -> None:
        """Process entries of one reader: either all are in the totals already, or none is.

        Args:
            entries: At least one.
            rest: All entries that were taken from journals and have yet to be processed.
        """
        self._processing = entries
        reader, is_counted = entries[0].reader, entries[0].is_counted
        records: list[UsageRecord] = []
        sampled: set[str] = set()
        unlocated: list[JournalEntry] = []
        failed: list[JournalEntry] = []
        stamped = chain.from_iterable(map(self._stamped, _slices(entries, _STAMPED_ENTRIES)))
        for entry, observation, (record_id, started_at) in self._yielding(stamped):
            try:
                record = self._enricher.enrich(observation, reader.origin, record_id, started_at)
            except Exception as error:  # noqa: BLE001 - one poisonous request among others
                if is_passing(error) and len(self._unlocated) + len(unlocated) < _WAITING_ENTRIES:
                    self._faults.report("enrichment", error, "a request is counted later")
                    unlocated.append(entry)
                    continue
                self._faults.report("enrichment", error, "a request was not counted")
                failed.append(entry)
            else:
                if record is None:
                    unlocated.append(entry)
                    continue
                records.append(record)
                if observation.extras is not None:
                    trace = observation.extras.trace
                    if trace is not None and trace.is_sampled:
                        sampled.add(record_id)
        located = self._processing = without(entries, unlocated)
        self._unlocated += unlocated
        sequences = [entry.sequence for entry in located]
        if not is_counted:
            self._count(reader, sequences, records, sampled)
        if self._tally is not None:
            self._tally.add(
                (record.started_at.timestamp(), record.visitor)
                for record in records
                if record.visitor is not None
            )
        for entry in failed:
            self.losses.fail(entry.observation)
        self._hand_over(without(located, failed), records, is_counted)
        self._checkpoints.add_batch(reader, sequences, (*self._unlocated, *rest))
        self._processing = ()

    def _count(
        self,
        reader: JournalReader,
        sequences: Sequence[int],
        records: Sequence[UsageRecord],
        sampled: Collection[str],
    ) -> None:
        """Mark entries in their journal with a new commit, then add the records to the totals.

        The other way round, a kill in between would leave records in the totals that the journal
        says are not counted: they would be counted twice.
        """
        commits: dict[CountedJournal, int] = {}
        if reader.file is not None and sequences:
            reader.commit += 1
            reader.file.mark(sequences, reader.commit)
            commits[reader.file] = reader.commit
        self._totals.add(self._yielding(records), commits, sampled)

    def _hand_over(
        self, entries: Sequence[JournalEntry], records: Sequence[UsageRecord], is_counted: bool
    ) -> None:
        """Put records, and the losses up to now, to each sink.

        Args:
            entries: For each record the one it was made of.
            records: In the order of their requests' ends.
            is_counted: Whether a process that died since had added them to the totals.
        """
        losses = self.losses.take()
        lost = losses[METRICS_SINK]
        written = 0 if is_counted else len(records)
        self.counters.add(written=written, dropped=lost.dropped, failed=lost.failed)
        for sink in self._sinks:
            accepts, lost = sink.accepts, losses[sink.name]
            accepted = records
            if accepts is not None:
                pairs = zip(entries, records, strict=True)
                accepted = [record for entry, record in pairs if accepts(entry.observation)]
            sink.put(accepted, dropped=lost.dropped, failed=lost.failed)

    def _stamped(
        self, entries: Sequence[JournalEntry]
    ) -> Iterator[tuple[JournalEntry, Observation, tuple[str, datetime]]]:
        """Yield entries of one reader, their observations, and the stamps of their records."""
        observations = [entry.observation for entry in entries]
        nonce = entries[0].reader.origin.nonce
        numbers = [nonce + entry.sequence for entry in entries]
        return zip(entries, observations, self._enricher.stamps(observations, numbers), strict=True)

    def _yielding(self, items: Iterable[_T]) -> Iterator[_T]:
        return yielding(items, self._journal.is_filling)

    # ------------------------------------------------------------------------ for any thread

    def is_short_of_room(self) -> bool:
        """Tell whether more than half of the journal's file is taken."""
        return self._journal.fullness() > _HURRY_FULLNESS

    def has_work(self) -> bool:
        """Tell whether there is something to process, or a checkpoint to be reached."""
        if self._journal or self._unlocated or self._checkpoints:
            return True
        # The other workers show how many requests are being answered here.
        return self.is_shared and self._totals.in_progress() > 0

    def due_in(self) -> float | None:
        """Return in how many seconds `process` has work even if no request comes.

        Returns:
            Seconds, >= 0; None: it has none until a request comes.
        """
        return self._enricher.due_in()

    def wait_for_countries(self, timeout: float) -> None:
        """Block until the country of some observation may be known, or for `timeout` seconds."""
        self._enricher.wait(timeout)

    def pending(self) -> dict[str, int]:
        """Return, for each sink, how many captured requests are not written, dropped or failed."""
        buffered = len(self._journal) + len(self._unlocated) + len(self._processing)
        pending = {METRICS_SINK: buffered + self.losses.pending(METRICS_SINK)}
        for sink in self._sinks:
            accepts, accepted = sink.accepts, buffered
            if accepts is not None and buffered:
                accepted = sum(map(accepts, self._buffered()))
            pending[sink.name] = accepted + self.losses.pending(sink.name) + sink.pending()
        return pending

    def _buffered(self) -> list[Observation]:
        entries = (*self._unlocated, *self._processing)
        return [*self._journal.waiting(), *(entry.observation for entry in entries)]

    def visitors(self) -> int | None:
        """Return how many visitors all processes saw today; None: they are not told apart."""
        return None if self._tally is None else self._tally.today()

    def is_journaled(self) -> bool:
        """Tell whether all that was captured survives a kill; True until `open`."""
        return not self.is_open or self._journal.is_durable()


def _let_go(journal: Journal, worker_group: WorkerGroup, totals: Totals) -> None:
    close_journal(journal, totals)
    worker_group.end()


def _slices(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
