"""The pipeline of an app: requests submit to it, scrapes drain it, the exit flushes and closes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from time import monotonic
from weakref import finalize

from flask_usage_metrics.metrics.sink_counters import SinkCounters
from flask_usage_metrics.pipeline.delivery.sink import Sink
from flask_usage_metrics.pipeline.journal import Journal
from flask_usage_metrics.pipeline.processing import METRICS_SINK, Processor
from flask_usage_metrics.pipeline.worker import WorkerThread
from flask_usage_metrics.records.observation import Observation
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.forks import FORKS
from flask_usage_metrics.runtime.servers import this_server

_START_SECONDS = 3.0
_GRACE_SECONDS = 0.05
_DRAIN_SECONDS = 1.0
_INLINE_SECONDS = 2.0
_COUNTRY_SECONDS = 0.1


class Pipeline:
    """Takes observations from requests, and sees to it that they are processed; for any thread.

    Also the source of the gauges that an app's metrics show (`GaugeSource`). It does not refer to
    the app, and lives on after it until all is written.

    Args:
        journal: Where observations wait for the worker.
        processor: What the worker has to do.
        sinks: Where records go.
        flush_seconds: Seconds an observation waits for others to be processed with.
        idle_seconds: Seconds without requests after which the worker's thread ends.
        inline: Whether `submit` waits until the record is written.
        in_progress: Returns how many requests are being answered.
        faults: Where failures are reported.

    Attributes:
        in_progress: See above.
    """

    def __init__(
        self,
        *,
        journal: Journal,
        processor: Processor,
        sinks: Sequence[Sink],
        flush_seconds: float,
        idle_seconds: float,
        inline: bool,
        in_progress: Callable[[], int],
        faults: Faults,
    ) -> None:
        self._journal = journal
        self._processor = processor
        self._sinks = sinks
        self._inline = inline
        self.in_progress = in_progress
        self._faults = faults
        self._worker = WorkerThread(
            flush_seconds=flush_seconds, idle_seconds=idle_seconds, faults=faults
        )
        journal.hurry = self._worker.hurry
        finalize(self, WorkerThread.ring, self._worker).atexit = False
        self._start_anew()
        FORKS.register(self)

    def _start_anew(self) -> None:
        self._lock = threading.Lock()
        self._multiprocess = self._ends = False
        self._has_worker = self._is_urgent = True

    def reset_after_fork(self) -> None:
        """Forget what the parent process will process and write."""
        self._worker.reset_after_fork()
        self._start_anew()

    # ------------------------------------------------------------------------ in the request

    def start(self, multiprocess: bool, ends: bool) -> Callable[[], None] | None:
        """Get ready for the first request of the process.

        Args:
            multiprocess: Whether the server has other processes for the same app (PEP 3333).
            ends: Whether the process ends after this request, without running exit handlers.

        Returns:
            A function to call at the start of each request; None: there is none to call.
        """
        # Whoever comes first opens it; the others do not wait for ever where a disk hangs.
        if self._lock.acquire(timeout=_START_SECONDS):
            try:
                if not self._processor.is_open:
                    self._open(multiprocess, ends)
            finally:
                self._lock.release()
        return self._wake_if_asleep if self._processor.is_shared and self._has_worker else None

    def _open(self, multiprocess: bool, ends: bool) -> None:
        self._ends = ends
        # Older uWSGI without --enable-threads runs threads only while a request runs: one that is
        # stopped in between may hold the lock of a file for minutes.
        has_threads = bool(getattr(sys.modules.get("uwsgi"), "has_threads", True))
        self._has_worker = has_threads and not ends
        self._is_urgent = self._inline or not self._has_worker
        self._multiprocess = multiprocess
        self._processor.open(this_server(multiprocess=multiprocess))

    def _wake_if_asleep(self) -> None:
        """Tell the other workers, within half a second, that a request is being answered."""
        if not self._worker.is_awake:
            self._wake()

    def submit(self, observation: Observation) -> None:
        """Take an observation; returns at once, unless delivery is inline."""
        if not self._processor.is_open:  # it was closed
            self.start(self._multiprocess, self._ends)
        if not self._journal.append(observation):
            self._processor.losses.drop(observation)
            self._faults.report("journal", "no room", "a request was not counted")
        # Order matters: the worker clears the flag first and looks into the journal after that.
        if not self._worker.is_awake and self._has_worker:
            self._wake()
        if self._is_urgent:
            if self._ends:
                self.close(_INLINE_SECONDS)
            else:
                self.flush(_INLINE_SECONDS)

    def lose(self) -> None:
        """Count a request that no observation could be made of."""
        self._processor.losses.fail(None)

    def _wake(self) -> None:
        for sink in self._sinks:
            sink.start()
        # While its thread is awake we live, also for the exit handler, which refers to us weakly.
        self._worker.wake(self._processor, self)

    # ------------------------------------------------------------------------ for others

    def drain(self) -> None:
        """Process what is buffered; never raises, and waits a second at most for another batch."""
        with self._faults.caught("pipeline", "records are processed later"):
            if all(sink.is_free(_DRAIN_SECONDS) for sink in self._sinks):
                self._processor.process(_GRACE_SECONDS, timeout=_DRAIN_SECONDS)

    def flush(self, timeout: float) -> bool:
        """Wait until all that was captured so far is processed and written.

        Args:
            timeout: Seconds to wait at most.

        Returns:
            Whether nothing is left that was captured before the call.
        """
        deadline = monotonic() + timeout
        if not all(sink.is_free(max(deadline - monotonic(), 0)) for sink in self._sinks):
            return False
        while True:
            unlocated = self._processor.process(timeout=max(deadline - monotonic(), 0))
            if unlocated is None:
                return False
            remaining = deadline - monotonic()
            if not unlocated or remaining <= 0:
                break
            self._processor.wait_for_countries(min(remaining, _COUNTRY_SECONDS))
        flushed = [sink.flush(deadline) for sink in self._sinks]
        self._processor.checkpoint(timeout=max(deadline - monotonic(), 0))
        return not unlocated and all(flushed)

    def close(self, timeout: float) -> None:
        """Flush, and close what can be closed; the next request opens it again.

        Args:
            timeout: Seconds to wait at most until all is written.
        """
        self.flush(timeout)
        buffered = self.pending()[METRICS_SINK]
        # What is in the journal or on disk is written by the next process.
        lost = max([sink.close() for sink in self._sinks], default=0)
        if self._journal.file is None and lost + buffered:
            left = f"{lost + buffered} record(s) were not written"
            self._faults.report("exit", left, "they are lost")
        self._processor.close()
        self._worker.end()

    def join(self, timeout: float) -> None:
        """Wait until the threads have ended, after `close`; one whose storage hangs does not.

        Args:
            timeout: Seconds to wait at most.
        """
        deadline = monotonic() + timeout
        self._worker.join(timeout)
        for sink in self._sinks:
            sink.join(max(deadline - monotonic(), 0))

    def counters(self) -> list[SinkCounters]:
        """Return the counters of all sinks, that of the metrics among them."""
        return [self._processor.counters, *(sink.counters for sink in self._sinks)]

    def pending(self) -> dict[str, int]:
        """Return, for each sink, how many captured requests are not written, dropped or failed."""
        return self._processor.pending()

    def up(self) -> dict[str, bool]:
        """Return whether each sink's last write went well."""
        return {METRICS_SINK: True, **{sink.name: sink.up for sink in self._sinks}}

    def is_journaled(self) -> bool:
        """Return whether what is captured survives a kill, as far as is known yet."""
        return self._processor.is_journaled()

    def visitors(self) -> int | None:
        """Return how many visitors all processes saw today; None: they are not told apart."""
        return self._processor.visitors()
