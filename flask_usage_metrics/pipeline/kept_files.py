"""What this process keeps on disk: made at its first request, and again whenever it is gone."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic

from flask_usage_metrics.metrics.totals import Totals
from flask_usage_metrics.pipeline.checkpoints import Checkpoints, JournalEntry
from flask_usage_metrics.pipeline.delivery.sink import Sink
from flask_usage_metrics.pipeline.journal import Journal
from flask_usage_metrics.pipeline.worker_group import WorkerGroup
from flask_usage_metrics.runtime.private_files import StateUnavailable
from flask_usage_metrics.runtime.servers import Server

_PAUSE_SECONDS = 1.0
"""Seconds after a try to make files before the next."""


class KeptFiles:
    """The journal and the spools of this process, in the server run that it is a member of.

    There may be no place for them at the first request, or somebody may remove, move or cut them
    later: they are made as soon as there is one. For one caller at a time.

    Args:
        journal: The journal of this process.
        worker_group: Joins the server run.
        totals: Where records are counted.
        sinks: Each has a spool.
        checkpoints: Of the journal.
    """

    def __init__(
        self,
        journal: Journal,
        worker_group: WorkerGroup,
        totals: Totals,
        sinks: Sequence[Sink],
        checkpoints: Checkpoints,
    ) -> None:
        self._journal = journal
        self._worker_group = worker_group
        self._totals = totals
        self._sinks = sinks
        self._checkpoints = checkpoints
        self._server: Server | None = None
        self._due = 0.0

    def open(self, server: Server) -> None:
        """Join the server run, and make the files; blocks some seconds at most.

        Args:
            server: Of this process.
        """
        self._server = server
        self._make(server, ())

    def look(self, waiting: Sequence[JournalEntry]) -> None:
        """Make the files if there are none, or they are gone; blocks some seconds at most.

        Requests are blocked for some ms if they are gone.

        Args:
            waiting: The entries that were taken from the journal, and not handed to the sinks yet.
        """
        if self._server is None or monotonic() < self._due:
            return
        if self._journal.file is None:
            self._make(self._server, waiting)
        else:
            self._restore()

    def close(self) -> None:
        """Close the journal, which is removed if it is empty, otherwise left to be recovered."""
        self._server = None
        close_journal(self._journal, self._totals)
        self._checkpoints.release()

    def _make(self, server: Server, waiting: Sequence[JournalEntry]) -> None:
        was_member, own = self._worker_group.is_member, self._checkpoints.own
        file = self._worker_group.join(own.origin, server)
        if not was_member:
            for sink in self._sinks:
                sink.attach(self._worker_group.spool(sink.name))
        self._due = monotonic() + _PAUSE_SECONDS
        if file is None:
            return
        self._journal.open(file)
        if own.last:
            # What was counted while there was no file has to be in the totals as well.
            own.commit += 1
            self._totals.add((), {file: own.commit})
        self._checkpoints.open(file, waiting)

    def _restore(self) -> None:
        file = self._journal.file
        if file is None or (file.is_whole() and all(sink.is_on_disk() for sink in self._sinks)):
            return
        self._due = monotonic() + _PAUSE_SECONDS
        try:
            # The journal last: only with it is everything on disk.
            for sink in self._sinks:
                sink.restore()
            if not file.is_whole():
                self._worker_group.rejoin()
                self._journal.restore()
            self._worker_group.take_back()
        except (OSError, StateUnavailable) as error:
            self._worker_group.complain(error)


def close_journal(journal: Journal, totals: Totals) -> None:
    """Close a journal; it is removed if it is empty, otherwise left to be recovered."""
    file = journal.file
    if file is not None:
        if file.is_empty():
            totals.forget(file)
        journal.close()
