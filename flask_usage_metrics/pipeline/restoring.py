"""Files that somebody removed, moved or cut while they were in use: made anew, where they were."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic

from flask_usage_metrics.pipeline.delivery.sink import Sink
from flask_usage_metrics.pipeline.journal import Journal
from flask_usage_metrics.pipeline.worker_group import WorkerGroup
from flask_usage_metrics.runtime.private_files import StateUnavailable

_PAUSE_SECONDS = 1.0


class Restoring:
    """Has what waits on disk again after the state directory went; for one caller at a time.

    Args:
        journal: The journal of this process.
        worker_group: Made the folder of the journal.
        sinks: Each has a spool.
    """

    def __init__(self, journal: Journal, worker_group: WorkerGroup, sinks: Sequence[Sink]) -> None:
        self._journal = journal
        self._worker_group = worker_group
        self._sinks = sinks
        self._due = 0.0

    def look(self) -> None:
        """Restore the files if they are gone; blocks requests for some ms if they are."""
        file = self._journal.file
        if file is None or monotonic() < self._due:
            return
        if file.is_whole() and all(sink.is_on_disk() for sink in self._sinks):
            return
        self._due = monotonic() + _PAUSE_SECONDS
        try:
            # The journal last: only with it is everything on disk.
            for sink in self._sinks:
                sink.restore()
            if not file.is_whole():
                self._worker_group.rejoin()
                self._journal.restore()
        except (OSError, StateUnavailable) as error:
            self._worker_group.complain(error)
