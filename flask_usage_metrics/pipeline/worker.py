"""The worker: takes observations from the journals, makes records, fans them out, keeps account."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import datetime
from itertools import chain, groupby, islice, repeat
from operator import attrgetter
from time import monotonic, perf_counter
from typing import TypeVar

from flask_usage_metrics.enrich.enricher import Enricher
from flask_usage_metrics.enrich.visitors.tally import VisitorTally
from flask_usage_metrics.metrics.totals import CountedJournal, Totals
from flask_usage_metrics.pipeline.checkpoints import Checkpoints, JournalEntry, JournalReader
from flask_usage_metrics.pipeline.delivery.sink import Accepts, Sink
from flask_usage_metrics.pipeline.journal import Journal
from flask_usage_metrics.pipeline.losses import Losses
from flask_usage_metrics.pipeline.worker_group import WorkerGroup
from flask_usage_metrics.records.observation import Observation
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.gil import release_gil

METRICS_SINK = "metrics"
"""Value of the label ``sink`` for the totals behind the metrics themselves."""

_CHUNK = 512

_STEP_SECONDS = 0.0001
"""How long the worker computes before it lets others have the interpreter; half as long gains
nothing, and makes the worker fall behind sooner."""

_STEP_ITEMS = 8
"""Items it handles before it looks at the clock, which costs 400 instructions."""

_STAMPED = 32
"""Records that get their ids together; of 8 one costs half as much again."""

_GRACE_SECONDS = 0.05
_HEARTBEAT_SECONDS = 2.0
_DRAIN_SECONDS = 1.0
_INLINE_SECONDS = 2.0


_T = TypeVar("_T")


class Pipeline:
    """Processes what one app's requests left in the journals, into the totals and the sinks.

    Args:
        journal: Where `submit` leaves observations.
        worker_group: Tells of the siblings, and what the dead among them left.
        enricher: Makes records of observations.
        tally: Where visitors are counted.
        totals: Where records are counted.
        sinks: Where records go.
        flush_seconds: Seconds an observation waits for others to be processed with.
        idle_seconds: How long the worker waits for requests before it ends.
        inline: Whether `submit` waits until the record is written.
        faults: Where failures are reported.
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
        flush_seconds: float,
        idle_seconds: float,
        inline: bool,
        faults: Faults,
    ) -> None:
        self._journal = journal
        self._worker_group = worker_group
        self._enricher = enricher
        self._tally = tally
        self._totals = totals
        self._counters = totals.sink_counters(METRICS_SINK)
        self._sinks = sinks
        self._flush_seconds = flush_seconds
        self._idle_seconds = idle_seconds
        self._inline = inline
        self._faults = faults
        names: dict[str, Accepts | None] = {sink.name: sink.accepts for sink in sinks}
        self._losses = Losses({METRICS_SINK: None, **names})
        self._start_anew()

    def _start_anew(self) -> None:
        self._lock = threading.Lock()
        self._unlocated: list[JournalEntry] = []
        self._processing: Sequence[JournalEntry] = ()
        self._has_begun = False
        self._is_shared = self._ends = False
        self._has_worker = self._is_urgent = True
        self._awake = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._short = threading.Lock()
        self._checkpoints = Checkpoints(
            self._journal, self._worker_group, self._enricher.origin, self._sinks
        )

    def reset_after_fork(self) -> None:
        """Forget what the parent process will process."""
        self._journal.reset_after_fork()
        self._checkpoints.release()
        self._worker_group.reset_after_fork()
        self._enricher.reset_after_fork()
        if self._tally is not None:
            self._tally.reset_after_fork()
        self._losses.reset_after_fork()
        self._start_anew()
        for sink in self._sinks:
            sink.reset_after_fork()

    # ------------------------------------------------------------------------ in the request

    def begin(self, multiprocess: bool, ends: bool) -> Callable[[], None] | None:
        """Get ready for the first request of the process.

        Args:
            multiprocess: Whether the server has other processes for the same app.
            ends: Whether the process ends after this request, without running exit handlers.

        Returns:
            What is to be called at the beginning of each request, if anything.
        """
        with self._short:
            if not self._has_begun:
                self._has_begun = True
                self._is_shared, self._ends = multiprocess, ends
                # Older uWSGI without --enable-threads runs threads only while a request runs: one
                # that is stopped in between may hold the lock of a file for minutes.
                has_threads = bool(getattr(sys.modules.get("uwsgi"), "has_threads", True))
                self._has_worker = has_threads and not ends
                self._is_urgent = self._inline or not self._has_worker
                file = self._worker_group.begin(self._enricher.origin, multiprocess=multiprocess)
                self._checkpoints.own.file = self._journal.file = file
                for sink in self._sinks:
                    sink.attach(self._worker_group.spool(sink.name))
        return self._notice if multiprocess and self._has_worker else None

    def _notice(self) -> None:
        """Let the siblings know, within half a second, that a request is being answered."""
        if not self._awake:
            self._rouse()

    def submit(self, observation: Observation) -> None:
        """Take an observation; returns at once, unless delivery is inline."""
        if not self._has_begun:  # it was closed
            self.begin(self._is_shared, self._ends)
        if not self._journal.append(observation):
            self._losses.drop(observation)
            self._faults.report("journal", "no room", "a request was not counted")
        # Order matters: the worker clears the flag first and looks into the journal after that.
        if not self._awake and self._has_worker:
            self._rouse()
        if self._is_urgent:
            if self._ends:
                self.close(_INLINE_SECONDS)
            else:
                self.flush(_INLINE_SECONDS)

    def lose(self) -> None:
        """Count a request that no observation could be made of."""
        self._losses.fail(None)

    def _rouse(self) -> None:
        with self._short:
            self._awake = True
            for sink in self._sinks:
                sink.start()
            if self._thread is not None:
                self._wake.set()
                return
            thread = threading.Thread(
                target=self._run, name="flask_usage_metrics pipeline", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:  # no more threads, or the interpreter is ending
                self._awake = False
                self._faults.report("pipeline", error, "records wait for the next scrape")
            else:
                self._thread = thread

    # ------------------------------------------------------------------------ the worker

    def _run(self) -> None:
        while True:
            self._wake.wait(self._flush_seconds)
            self._wake.clear()
            try:
                self.process()
            except Exception as error:  # noqa: BLE001 - the worker goes on whatever happens
                self._faults.report("pipeline", error, "records are processed later")
            if self._has_work():
                continue
            self._awake = False
            if self._has_work():
                self._awake = True
            elif self._is_shared:
                # A sibling may die meanwhile, or somebody remove what the siblings share.
                if self._wake.wait(_HEARTBEAT_SECONDS):
                    self._wake.clear()
            elif not self._wake.wait(self._idle_for()):
                if self._enricher.due_in() is not None:
                    continue  # there is still a key to be destroyed
                with self._short:
                    if not self._awake:
                        self._thread = None
                        return
            else:
                # Others will come with the one that woke us.
                self._wake.clear()

    def _idle_for(self) -> float:
        """Return how many seconds there is nothing to do, unless a request comes."""
        due = self._enricher.due_in()
        return self._idle_seconds if due is None else max(due, 0.0) + 0.1

    def _has_work(self) -> bool:
        if self._journal or self._unlocated or self._checkpoints:
            return True
        # The siblings show how many requests are being answered here.
        return self._is_shared and self._totals.in_progress() > 0

    def process(self, grace: float = 0.0) -> None:
        """Turn the observations taken so far into records, count them, hand them to the sinks.

        Args:
            grace: Seconds to wait for the app's own country function; nothing remote is waited
                for, what it is asked for is processed later.
        """
        with self._lock:
            self._process(grace)

    def _process(self, grace: float) -> None:
        self._enricher.maintain()
        recovered = list(self._recover())
        waiting, self._unlocated = self._unlocated, []
        self._process_entries([*waiting, *recovered])
        own = self._checkpoints.own
        for _ in range(len(self._journal) // _CHUNK + 1):
            if taken := self._journal.take(_CHUNK):
                entries = [
                    *map(JournalEntry, repeat(own), *zip(*taken, strict=True), repeat(False))
                ]
                self._process_chunk(entries, ())
        if grace and self._unlocated:
            self._enricher.wait_local(grace)
            waiting, self._unlocated = self._unlocated, []
            self._process_entries(waiting)
        self._totals.sync()
        self._checkpoints.checkpoint(self._unlocated)

    def _recover(self) -> Iterable[JournalEntry]:
        """Yield what dead siblings captured and did not see durable."""
        for file in self._worker_group.leftovers():
            last_commit = self._totals.last_commit(file)
            if last_commit is None:
                file.close(remove=False)
                continue
            yield from self._checkpoints.recover(file, last_commit)

    def _process_entries(self, entries: Sequence[JournalEntry]) -> None:
        end = 0
        for _, same in groupby(entries, attrgetter("reader", "is_counted")):
            for chunk in _groups(list(same), _CHUNK):
                end += len(chunk)
                self._process_chunk(chunk, entries[end:])

    def _process_chunk(self, entries: Sequence[JournalEntry], rest: Sequence[JournalEntry]) -> None:
        """Process entries of one reader, all of them counted before or none."""
        self._processing = entries
        reader, is_counted = entries[0].reader, entries[0].is_counted
        records: list[UsageRecord] = []
        sampled: set[str] = set()
        unlocated: list[JournalEntry] = []
        failed: list[JournalEntry] = []
        stamped = chain.from_iterable(map(self._stamped, _groups(entries, _STAMPED)))
        for entry, seen, (record_id, started_at) in self._yielding(stamped):
            try:
                record = self._enricher.enrich(seen, reader.origin, record_id, started_at)
            except Exception as error:  # noqa: BLE001 - one poisonous request among others
                self._faults.report("enrichment", error, "a request was not counted")
                failed.append(entry)
            else:
                if record is None:
                    unlocated.append(entry)
                    continue
                records.append(record)
                if seen.extras is not None:
                    trace = seen.extras.trace
                    if trace is not None and trace.is_sampled:
                        sampled.add(record_id)
        self._unlocated += unlocated
        located = _without(entries, unlocated)
        recorded = _without(located, failed)
        sequences = [entry.sequence for entry in located]
        for entry in failed:
            self._losses.fail(entry.seen)
        if not is_counted:
            self._count(reader, sequences, records, sampled)
        if self._tally is not None:
            self._tally.add(
                (record.started_at.timestamp(), record.visitor)
                for record in records
                if record.visitor is not None
            )
        written = 0 if is_counted else len(records)
        lost = self._losses.take()
        uncounted = lost[METRICS_SINK]
        self._counters.add(written=written, dropped=uncounted.dropped, failed=uncounted.failed)
        for sink in self._sinks:
            accepts, unrecorded = sink.accepts, lost[sink.name]
            accepted = records
            if accepts is not None:
                pairs = zip(recorded, records, strict=True)
                accepted = [record for entry, record in pairs if accepts(entry.seen)]
            sink.put(accepted, dropped=unrecorded.dropped, failed=unrecorded.failed)
        self._checkpoints.note(reader, sequences, (*self._unlocated, *rest))
        self._processing = ()

    def _count(
        self,
        reader: JournalReader,
        sequences: Sequence[int],
        records: Sequence[UsageRecord],
        sampled: Collection[str],
    ) -> None:
        """Add records to the totals; their journal is told before which ones it is about."""
        commits: dict[CountedJournal, int] = {}
        if reader.file is not None and sequences:
            reader.commit += 1
            reader.file.mark(sequences, reader.commit)
            commits[reader.file] = reader.commit
        self._totals.add(self._yielding(records), commits, sampled)

    def _stamped(
        self, entries: Sequence[JournalEntry]
    ) -> Iterator[tuple[JournalEntry, Observation, tuple[str, datetime]]]:
        """Yield entries of one reader, their observations, and the stamps of their records."""
        seen = [entry.seen for entry in entries]
        nonce = entries[0].reader.origin.nonce
        numbers = [nonce + entry.sequence for entry in entries]
        return zip(entries, seen, self._enricher.stamps(seen, numbers), strict=True)

    def _yielding(self, entries: Iterable[_T]) -> Iterator[_T]:
        """Yield entries, and let others have the interpreter in between, unless too much waits."""
        return chain.from_iterable(self._steps(iter(entries)))

    def _steps(self, entries: Iterator[_T]) -> Iterator[Sequence[_T]]:
        until = perf_counter() + _STEP_SECONDS
        while step := [*islice(entries, _STEP_ITEMS)]:
            yield step
            if perf_counter() >= until:
                if not self._journal.is_filling():
                    release_gil()
                until = perf_counter() + _STEP_SECONDS

    # ------------------------------------------------------------------------ for others

    def drain(self) -> None:
        """Process what is buffered; never raises, and waits a second at most for another batch."""
        if self._lock.acquire(timeout=_DRAIN_SECONDS):
            try:
                self._process(_GRACE_SECONDS)
            except Exception as error:  # noqa: BLE001 - a scrape shows what is known by now
                self._faults.report("pipeline", error, "records are processed later")
            finally:
                self._lock.release()

    def flush(self, timeout: float) -> bool:
        """Wait until all that was captured so far is processed and written.

        Args:
            timeout: Seconds to wait at most.

        Returns:
            Whether nothing is left that was captured before the call.
        """
        deadline = monotonic() + timeout
        while True:
            if not self._lock.acquire(timeout=max(deadline - monotonic(), 0)):
                return False
            try:
                self._process(0.0)
                located = not self._unlocated
            finally:
                self._lock.release()
            remaining = deadline - monotonic()
            if located or remaining <= 0:
                break
            self._enricher.wait(min(remaining, 0.1))
        flushed = [sink.flush(deadline) for sink in self._sinks]
        with self._lock:
            self._totals.sync()
            self._checkpoints.checkpoint(self._unlocated)
        return located and all(flushed)

    def close(self, timeout: float) -> None:
        """Flush, and close what can be closed; the next request opens it again."""
        self.flush(timeout)
        buffered = self.pending()[METRICS_SINK]
        # What is in the journal or on disk is written by the next process.
        lost = max([sink.close() for sink in self._sinks], default=0)
        if self._journal.file is None and lost + buffered:
            left = f"{lost + buffered} record(s) were not written"
            self._faults.report("exit", left, "they are lost")
        with self._lock:
            self._totals.sync()
            self._checkpoints.checkpoint(self._unlocated)
            self._has_begun = False
            if self._journal.file is not None:
                if self._journal.file.is_empty():
                    self._totals.forget(self._journal.file)
                self._journal.close()
            self._checkpoints.release()
            self._totals.close()
            self._worker_group.end()
        self._enricher.close()
        if self._tally is not None:
            self._tally.close()

    def pending(self) -> dict[str, int]:
        """Return, for each sink, how many captured requests are not acked."""
        losses = self._losses
        buffered = len(self._journal) + len(self._unlocated) + len(self._processing)
        pending = {METRICS_SINK: buffered + losses.pending(METRICS_SINK)}
        for sink in self._sinks:
            accepts = sink.accepts
            accepted = buffered
            if accepts is not None and buffered:
                accepted = sum(map(accepts, self._buffered()))
            pending[sink.name] = accepted + losses.pending(sink.name) + sink.pending()
        return pending

    def _buffered(self) -> list[Observation]:
        entries = (*self._unlocated, *self._processing)
        return [*self._journal.waiting(), *(entry.seen for entry in entries)]

    def up(self) -> dict[str, bool]:
        """Return whether each sink's last write went well."""
        return {METRICS_SINK: True, **{sink.name: sink.up for sink in self._sinks}}

    def is_journaled(self) -> bool:
        """Return whether what is captured survives a kill, as far as is known yet."""
        file = self._journal.file
        return not self._has_begun or (file is not None and file.is_there())


def _without(
    entries: Sequence[JournalEntry], others: Sequence[JournalEntry]
) -> Sequence[JournalEntry]:
    if not others:
        return entries
    left_out = set(others)
    return [entry for entry in entries if entry not in left_out]


def _groups(entries: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    return (entries[start : start + size] for start in range(0, len(entries), size))
