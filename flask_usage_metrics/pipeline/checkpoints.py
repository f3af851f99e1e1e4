"""What of the journals may be given back: what is counted, and acked by every sink."""

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
    """Observations of one process: of this one, or of a dead one whose journal was recovered.

    Attributes:
        origin: Who captured them.
        file: Where they are kept until they are durable.
        commit: Number of the last commit that counted some of them.
        last: Sequence of the last one that was taken.
    """

    origin: Origin
    file: JournalFile | None
    commit: int = 0
    last: int = 0


class JournalEntry(msgspec.Struct, eq=False, gc=False):
    """An observation on its way.

    Attributes:
        reader: Where it comes from.
        sequence: Its number there.
        seen: The observation.
        is_counted: Whether the process that died had counted it.
    """

    reader: JournalReader
    sequence: int
    seen: Observation
    is_counted: bool


class Checkpoints:
    """Keeps what is in the journals until it needs no journal any more; for one caller at a time.

    Args:
        journal: Of this process.
        worker_group: Whom the journals of the dead are given back to.
        origin: Of this process.

        sinks: Who decides what becomes of records.

    Attributes:
        own: What this process captures.
    """

    def __init__(
        self, journal: Journal, worker_group: WorkerGroup, origin: Origin, sinks: Sequence[Sink]
    ) -> None:
        self.own = JournalReader(origin, None)
        self._sinks = sinks
        self._journal = journal
        self._worker_group = worker_group
        self._recovered: list[JournalReader] = []
        # When each sink has durable how many records, a reader is durable up to which sequence,
        # if its commit of which number is committed.
        self._open: deque[tuple[list[int], JournalReader, int, int]] = deque()

    def __bool__(self) -> bool:
        return bool(self._open)

    def recover(self, file: JournalFile, last_commit: int) -> Iterable[JournalEntry]:
        """Yield what a dead process captured and did not see durable.

        Args:
            file: Its journal.
            last_commit: Number of its last commit that was counted.
        """
        reader = JournalReader(file.origin, file, last_commit)
        self._recovered.append(reader)
        for sequence, commit, seen in file.entries():
            if commit > last_commit:  # else a later commit of that number would seem to be its own
                file.mark([sequence], 0)
            yield JournalEntry(reader, sequence, seen, 0 < commit <= last_commit)
        # Also a journal in which nothing is left has to be seen off.
        self._open.append((self._received(), reader, reader.last, last_commit))

    def note(
        self, reader: JournalReader, acked: Sequence[int], waiting: Sequence[JournalEntry]
    ) -> None:
        """Take note of what was put to the sinks, and what is behind it still.

        Args:
            reader: Where that came from.
            acked: The numbers it has there.
            waiting: What else was taken from journals, and is not put to the sinks yet.
        """
        if reader.file is not None and acked:
            reader.last = max(reader.last, *acked)
            # What waits for its country holds the room of those behind it as well.
            first = [entry.sequence for entry in waiting if entry.reader is reader]
            through = min(first) - 1 if first else reader.last
            self._open.append((self._received(), reader, through, reader.commit))

    def checkpoint(self, waiting: Sequence[JournalEntry]) -> None:
        """Give back the journals' room for what is counted, and acked by every sink.

        Args:
            waiting: What waits for its country.
        """
        durable = [sink.durable() for sink in self._sinks]
        while self._open and all(map(ge, durable, self._open[0][0])):
            _, reader, sequence, commit = self._open[0]
            if reader.file is None or reader.file.committed < commit:
                break
            self._open.popleft()
            if reader is self.own:
                self._journal.truncate(sequence)
            else:
                reader.file.truncate(sequence)
        for reader in list(self._recovered):
            waits = any(open[1] is reader for open in self._open)
            if not waits and not any(entry.reader is reader for entry in waiting):
                self._recovered.remove(reader)
                if reader.file is not None:
                    self._worker_group.forget(reader.file)

    def _received(self) -> list[int]:
        return [sink.received() for sink in self._sinks]

    def release(self) -> None:
        """Leave what is not durable to the next who recovers it; also right in a forked child."""
        for reader in self._recovered:
            if reader.file is not None:
                reader.file.close(remove=False)
        self._recovered.clear()
        self._open.clear()
        self.own.file = None
