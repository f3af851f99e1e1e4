"""Checkpoints: journals are truncated up to entries that are counted and durable in every sink."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from operator import ge

import msgspec

from flask_usage_metrics.pipeline.delivery.sink import Sink
from flask_usage_metrics.pipeline.journal import Journal
from flask_usage_metrics.pipeline.journal_file import JournalFile
from flask_usage_metrics.pipeline.worker_group import WorkerGroup
from flask_usage_metrics.records.observation import Observation, Origin


class JournalReader(msgspec.Struct, eq=False):
    """The worker's position in one journal: of this process, or recovered from a dead one.

    Attributes:
        origin: The process that captured what is in it.
        file: Where the entries are kept until they are durable; None: nowhere.
        commit: Number of the last commit to the totals that counted some of them.
        last: Sequence number of the last entry that was handed to the sinks.
    """

    origin: Origin
    file: JournalFile | None
    commit: int = 0
    last: int = 0


class JournalEntry(msgspec.Struct, eq=False, gc=False):
    """An observation that was taken from a journal.

    Attributes:
        reader: Of the journal.
        sequence: Its sequence number there.
        observation: The observation.
        is_counted: Whether it is in the totals already, by a process that died since.
    """

    reader: JournalReader
    sequence: int
    observation: Observation
    is_counted: bool


def without(
    entries: Sequence[JournalEntry], others: Sequence[JournalEntry]
) -> Sequence[JournalEntry]:
    """Return entries without some of them, in the same order."""
    if not others:
        return entries
    left_out = set(others)
    return [entry for entry in entries if entry not in left_out]


class _Checkpoint(msgspec.Struct, eq=False):
    """A journal may be truncated up to a sequence number, as soon as two conditions hold.

    Attributes:
        reader: Of the journal.
        through: The sequence number.
        commit: Number of the commit that must be in the totals by then.
        received: For each sink, how many of all records it ever received must be durable.
    """

    reader: JournalReader
    through: int
    commit: int
    received: list[int]


class Checkpoints:
    """Truncates journals as far as their entries are durable elsewhere; for one caller at a time.

    Args:
        journal: The journal of this process.
        worker_group: Removes the journal of a dead process once it is empty.
        origin: This process.
        sinks: An entry is truncated only once its record is durable in each (`Sink.durable`).

    Attributes:
        own: Reader of the journal of this process.
    """

    def __init__(
        self, journal: Journal, worker_group: WorkerGroup, origin: Origin, sinks: Sequence[Sink]
    ) -> None:
        self.own = JournalReader(origin, None)
        self._sinks = sinks
        self._journal = journal
        self._worker_group = worker_group
        self._recovered: list[JournalReader] = []
        self._ahead: deque[_Checkpoint] = deque()
        self._durable = [0] * len(sinks)

    def __bool__(self) -> bool:
        """Tell whether there is a checkpoint that is not reached yet."""
        return bool(self._ahead)

    def recover(self, file: JournalFile, last_commit: int) -> Iterable[JournalEntry]:
        """Yield the entries of a dead process's journal; they were not durable when it died.

        Args:
            file: Its journal.
            last_commit: Number of its last commit that is in the totals.
        """
        reader = JournalReader(file.origin, file, last_commit)
        self._recovered.append(reader)
        for sequence, commit, observation in file.entries():
            # Else the entry would seem counted once a later commit has that number.
            if commit > last_commit:
                file.mark([sequence], 0)
            yield JournalEntry(reader, sequence, observation, 0 < commit <= last_commit)
        # A journal in which nothing is left has to be removed as well.
        self._ahead.append(_Checkpoint(reader, reader.last, last_commit, self._received()))

    def add_batch(
        self, reader: JournalReader, sequences: Sequence[int], waiting: Iterable[JournalEntry]
    ) -> None:
        """Set a checkpoint after entries that were counted and handed to the sinks.

        Args:
            reader: Of their journal.
            sequences: Their sequence numbers there.
            waiting: All entries that were taken from journals and not handed to the sinks yet.
        """
        if sequences:
            reader.last = max(reader.last, *sequences)
            if reader.file is not None:
                self._add(reader, waiting)

    def open(self, file: JournalFile | None, waiting: Iterable[JournalEntry] = ()) -> None:
        """Set the file of the journal of this process.

        Args:
            file: None: there is none.
            waiting: All entries that were taken from it before and not handed to the sinks yet.
        """
        self.own.file = file
        if file is not None and self.own.last:
            self._add(self.own, waiting)

    def _add(self, reader: JournalReader, waiting: Iterable[JournalEntry]) -> None:
        # Only the old end of a journal is truncated: an entry that waits holds up later ones.
        first = [entry.sequence for entry in waiting if entry.reader is reader]
        through = min(first) - 1 if first else reader.last
        self._ahead.append(_Checkpoint(reader, through, reader.commit, self._received()))

    def checkpoint(self, waiting: Sequence[JournalEntry]) -> None:
        """Sync the totals, then truncate the journals up to each checkpoint that is reached.

        Args:
            waiting: The entries that wait for their country.
        """
        # In this order: what became of the records that are let go of is in the totals by then.
        durable = [sink.durable() for sink in self._sinks]
        if self._worker_group.sync():
            self._durable = durable
        while self._ahead and all(map(ge, self._durable, self._ahead[0].received)):
            reader, through = self._ahead[0].reader, self._ahead[0].through
            if reader.file is None or reader.file.committed < self._ahead[0].commit:
                break
            self._ahead.popleft()
            if reader is self.own:
                self._journal.truncate(through)
            else:
                reader.file.truncate(through)
        for reader in list(self._recovered):
            is_ahead = any(checkpoint.reader is reader for checkpoint in self._ahead)
            if not is_ahead and not any(entry.reader is reader for entry in waiting):
                self._recovered.remove(reader)
                if reader.file is not None:
                    self._worker_group.forget(reader.file)

    def _received(self) -> list[int]:
        return [sink.received() for sink in self._sinks]

    def release(self) -> None:
        """Close recovered journals, so that others can recover them; also in a forked child."""
        for reader in self._recovered:
            if reader.file is not None:
                reader.file.close(remove=False)
        self._recovered.clear()
        self._ahead.clear()
        self.own.file = None
