"""What of the journals may be given back: what is counted, and decided by every sink."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from operator import ge

import msgspec

from flask_usage_metrics.pipeline.delivery.sink import Sink
from flask_usage_metrics.pipeline.journal import Journal, JournalFile
from flask_usage_metrics.pipeline.membership import Membership
from flask_usage_metrics.records.observation import Observation, Origin


class Stream(msgspec.Struct, eq=False):
    """Observations of one process: of this one, or of a dead one whose journal was adopted.

    Attributes:
        origin: Who captured them.
        file: Where they are kept until they are settled.
        fold: Number of the last fold that counted some of them.
        last: Sequence of the last one that was taken.
    """

    origin: Origin
    file: JournalFile | None
    fold: int = 0
    last: int = 0


class Item(msgspec.Struct, eq=False, gc=False):
    """An observation on its way.

    Attributes:
        stream: Where it comes from.
        sequence: Its number there.
        seen: The observation.
        is_counted: Whether the process that died had counted it.
    """

    stream: Stream
    sequence: int
    seen: Observation
    is_counted: bool


class Settlement:
    """Keeps what is in the journals until it needs no journal any more; for one caller at a time.

    Args:
        journal: Of this process.
        membership: Whom the journals of the dead are given back to.
        origin: Of this process.

        sinks: Who decides what becomes of records.

    Attributes:
        own: What this process captures.
    """

    def __init__(
        self, journal: Journal, membership: Membership, origin: Origin, sinks: Sequence[Sink]
    ) -> None:
        self.own = Stream(origin, None)
        self._sinks = sinks
        self._journal = journal
        self._membership = membership
        self._adopted: list[Stream] = []
        # When each sink has settled how many records, a stream is settled up to which sequence,
        # if its fold of which number is committed.
        self._unsettled: deque[tuple[list[int], Stream, int, int]] = deque()

    def __bool__(self) -> bool:
        return bool(self._unsettled)

    def adopt(self, file: JournalFile, folded: int) -> Iterable[Item]:
        """Yield what a dead process captured and did not see settled.

        Args:
            file: Its journal.
            folded: Number of its last fold that was counted.
        """
        stream = Stream(file.origin, file, folded)
        self._adopted.append(stream)
        for sequence, fold, seen in file.entries():
            if fold > folded:  # else a later fold of that number would seem to be its own
                file.mark([sequence], 0)
            yield Item(stream, sequence, seen, 0 < fold <= folded)
        # Also a journal in which nothing is left has to be seen off.
        self._unsettled.append((self._received(), stream, stream.last, folded))

    def note(self, stream: Stream, decided: Sequence[int], waiting: Sequence[Item]) -> None:
        """Take note of what was put to the sinks, and what is behind it still.

        Args:
            stream: Where that came from.
            decided: The numbers it has there.
            waiting: What else was taken from journals, and is not put to the sinks yet.
        """
        if stream.file is not None and decided:
            stream.last = max(stream.last, *decided)
            # What waits for its country holds the room of those behind it as well.
            first = [item.sequence for item in waiting if item.stream is stream]
            through = min(first) - 1 if first else stream.last
            self._unsettled.append((self._received(), stream, through, stream.fold))

    def settle(self, waiting: Sequence[Item]) -> None:
        """Give back the journals' room for what is counted, and decided by every sink.

        Args:
            waiting: What waits for its country.
        """
        settled = [sink.settled() for sink in self._sinks]
        while self._unsettled and all(map(ge, settled, self._unsettled[0][0])):
            _, stream, sequence, fold = self._unsettled[0]
            if stream.file is None or stream.file.committed < fold:
                break
            self._unsettled.popleft()
            if stream is self.own:
                self._journal.release(sequence)
            else:
                stream.file.release(sequence)
        for stream in list(self._adopted):
            waits = any(unsettled[1] is stream for unsettled in self._unsettled)
            if not waits and not any(item.stream is stream for item in waiting):
                self._adopted.remove(stream)
                if stream.file is not None:
                    self._membership.forget(stream.file)

    def _received(self) -> list[int]:
        return [sink.received() for sink in self._sinks]

    def leave(self) -> None:
        """Leave what is not settled to the next who adopts it; also right in a forked child."""
        for stream in self._adopted:
            if stream.file is not None:
                stream.file.close(remove=False)
        self._adopted.clear()
        self._unsettled.clear()
        self.own.file = None
