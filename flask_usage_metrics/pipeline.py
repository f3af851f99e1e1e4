"""The worker: takes observations from the journal, makes records, fans them out, keeps account."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from time import monotonic

from flask_usage_metrics.country import Locator
from flask_usage_metrics.delivery import Sink
from flask_usage_metrics.enrichment import Enricher
from flask_usage_metrics.faults import Faults
from flask_usage_metrics.journal import Journal
from flask_usage_metrics.observation import Observation
from flask_usage_metrics.record import UsageRecord
from flask_usage_metrics.totals import Totals

METRICS_SINK = "metrics"
"""Value of the label ``sink`` for the totals behind the metrics themselves."""

_CHUNK = 500
_GRACE_SECONDS = 0.05
_DRAIN_SECONDS = 1.0
_INLINE_SECONDS = 2.0


class Pipeline:
    """Folds what one app's requests left in the journal, into the totals and the sinks.

    Args:
        journal: Where `submit` leaves observations.
        enricher: Makes records of them.
        locator: Where the enricher looks up countries.
        totals: Where records are counted.
        sinks: Where records go.
        flush_seconds: Seconds an observation waits for others to be folded with.
        idle_seconds: How long the worker waits for requests before it ends.
        inline: Whether `submit` waits until the record is written.
        faults: Where failures are reported.
    """

    def __init__(
        self,
        *,
        journal: Journal,
        enricher: Enricher,
        locator: Locator,
        totals: Totals,
        sinks: Sequence[Sink],
        flush_seconds: float,
        idle_seconds: float,
        inline: bool,
        faults: Faults,
    ) -> None:
        self._journal = journal
        self._enricher = enricher
        self._locator = locator
        self._totals = totals
        self._account = totals.account(METRICS_SINK)
        self._sinks = sinks
        self._flush_seconds = flush_seconds
        self._idle_seconds = idle_seconds
        self._inline = inline
        self._faults = faults
        self._start_anew()

    def _start_anew(self) -> None:
        self._lock = threading.Lock()
        self._unlocated: list[Observation] = []
        self._folding = 0
        self._dropped = self._lost = 0
        self._awake = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._short = threading.Lock()

    def reset_after_fork(self) -> None:
        """Forget what the parent process will fold."""
        self._start_anew()
        self._journal.reset_after_fork()
        self._enricher.reset_after_fork()
        self._locator.reset_after_fork()
        for sink in self._sinks:
            sink.reset_after_fork()

    # ------------------------------------------------------------------------ in the request

    def submit(self, observation: Observation) -> None:
        """Take an observation; returns at once, unless delivery is inline."""
        if not self._journal.append(observation):
            self._drop()
        # Order matters: the worker clears the flag first and looks into the journal after that.
        if not self._awake:
            self._rouse()
        if self._inline:
            self.flush(_INLINE_SECONDS)

    def lose(self) -> None:
        """Count a request that no observation could be made of."""
        with self._short:
            self._lost += 1

    def _drop(self) -> None:
        with self._short:
            self._dropped += 1
        self._faults.report("journal", "no room", "a request was not counted")

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
                self.fold()
            except Exception as error:  # noqa: BLE001 - the worker goes on whatever happens
                self._faults.report("pipeline", error, "records are folded later")
            if self._journal or self._unlocated:
                continue
            self._awake = False
            if self._journal:
                self._awake = True
            elif not self._wake.wait(self._idle_seconds):
                with self._short:
                    if not self._awake:
                        self._thread = None
                        return
            else:
                # Others will come with the one that woke us.
                self._wake.clear()

    def fold(self, grace: float = 0.0) -> None:
        """Turn the observations taken so far into records, count them, hand them to the sinks.

        Args:
            grace: Seconds to wait for the app's own country function; nothing remote is waited
                for, what it is asked for is folded later.
        """
        with self._lock:
            self._fold(grace)

    def _fold(self, grace: float) -> None:
        waiting, self._unlocated = self._unlocated, []
        self._fold_some(waiting)
        for _ in range(len(self._journal) // _CHUNK + 1):
            self._fold_some(self._journal.take(_CHUNK))
        if grace and self._unlocated:
            self._locator.wait_local(grace)
            waiting, self._unlocated = self._unlocated, []
            self._fold_some(waiting)

    def _fold_some(self, observations: Sequence[Observation]) -> None:
        self._folding = len(observations)
        records: list[UsageRecord] = []
        failed = 0
        for observation in observations:
            try:
                record = self._enricher.enrich(observation)
            except Exception as error:  # noqa: BLE001 - one poisonous request among others
                self._faults.report("enrichment", error, "a request was not counted")
                failed += 1
                continue
            if record is None:
                self._unlocated.append(observation)
            else:
                records.append(record)
        with self._short:
            dropped, self._dropped = self._dropped, 0
            failed, self._lost = failed + self._lost, 0
        if records:
            self._totals.add(records)
        self._account.add(written=len(records), dropped=dropped, failed=failed)
        for sink in self._sinks:
            sink.put(records, dropped=dropped, failed=failed)
        self._folding = 0

    # ------------------------------------------------------------------------ for others

    def drain(self) -> None:
        """Fold what is buffered; never raises, and waits a second at most for another fold."""
        if self._lock.acquire(timeout=_DRAIN_SECONDS):
            try:
                self._fold(_GRACE_SECONDS)
            except Exception as error:  # noqa: BLE001 - a scrape shows what is known by now
                self._faults.report("pipeline", error, "records are folded later")
            finally:
                self._lock.release()

    def flush(self, timeout: float) -> bool:
        """Wait until all that was captured so far is folded and written.

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
                self._fold(0.0)
                located = not self._unlocated
            finally:
                self._lock.release()
            remaining = deadline - monotonic()
            if located or remaining <= 0:
                break
            self._locator.wait(min(remaining, 0.1))
        flushed = [sink.flush(deadline) for sink in self._sinks]
        return located and all(flushed)

    def close(self, timeout: float) -> None:
        """Flush, and close what can be closed; the next request opens it again."""
        if not self.flush(timeout):
            left = max(self.pending().values(), default=0)
            self._faults.report("exit", f"{left} record(s) were not written", "they are lost")
        for sink in self._sinks:
            sink.close()
        self._locator.close()

    def pending(self) -> dict[str, int]:
        """Return, for each sink, how many captured requests are not decided."""
        buffered = len(self._journal) + len(self._unlocated) + self._folding
        buffered += self._dropped + self._lost
        pending = {METRICS_SINK: buffered}
        for sink in self._sinks:
            pending[sink.name] = buffered + sink.pending()
        return pending

    def up(self) -> dict[str, bool]:
        """Return whether each sink's last write went well."""
        return {METRICS_SINK: True, **{sink.name: sink.up for sink in self._sinks}}
