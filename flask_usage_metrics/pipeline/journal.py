"""The queue between the requests' threads and the worker, written ahead to a journal file."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from itertools import islice

from flask_usage_metrics.pipeline.journal_file import JournalFile
from flask_usage_metrics.pipeline.payload import encode, escape_surrogates
from flask_usage_metrics.records.observation import Observation
from flask_usage_metrics.runtime.forks import FORKS

NumberedObservation = tuple[int, Observation]
"""Sequence number of an observation, from 1 in each process, and the observation."""


class Journal:
    """Takes observations from any thread, and hands them out in batches in the same order.

    Args:
        capacity: How many observations wait at most.

    Attributes:
        file: Where observations are kept until they are durable elsewhere; None: in memory only.
        hurry: Called by `append` when much waits: the worker should not let more gather. It must
            not block.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self.hurry: Callable[[], None] = _do_nothing
        self._start_anew()
        FORKS.register(self)

    def _start_anew(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[NumberedObservation] = deque()
        self._sequence = 0
        # Numbers of the last observation that found no room in the file, and of the last that is
        # durable elsewhere.
        self._last_unwritten = self._last_durable = 0
        # How many may wait before `_has_room` is asked.
        self._mark = self._capacity // 4
        self.file: JournalFile | None = None

    def open(self, file: JournalFile | None) -> None:
        """Set the file; what was appended before is in memory only."""
        if file is not None:
            file.filling = self._filling
        with self._lock:
            self.file = file
            self._last_unwritten = self._sequence

    def _filling(self) -> None:
        self.hurry()

    def append(self, observation: Observation) -> bool:
        """Append an observation; return False, and append nothing, when there is no room.

        Once this returns True the observation survives a kill of the process: it is in the file,
        unless `is_durable` says otherwise. It does not block on the disk: the file is mapped.
        """
        file = self.file
        payload = None
        if file is not None:
            try:
                payload = encode(observation)
            except UnicodeEncodeError:  # a lone surrogate
                payload = encode(escape_surrogates(observation))
        # Hot path: `with` costs more, see tests/benchmarks/README.md.
        self._lock.acquire()
        try:
            if len(self._waiting) >= self._mark and not self._has_room():
                return False
            self._sequence = sequence = self._sequence + 1
            file = self.file
            # Without a payload the file came after it would have been made.
            if file is not None and (payload is None or not file.append(sequence, payload)):
                self._last_unwritten = sequence
            self._waiting.append((sequence, observation))
        finally:
            self._lock.release()
        return True

    def _has_room(self) -> bool:
        """Tell whether one more may wait; a quarter of the capacity does already."""
        if self._mark < self._capacity:
            self._mark = self._capacity
            self.hurry()
        return len(self._waiting) < self._capacity

    def take(self, at_most: int) -> list[NumberedObservation]:
        """Remove and return the oldest observations, which stay in the file; for one caller."""
        waiting = self._waiting
        self._mark = self._capacity // 4
        return list(islice(iter(waiting.popleft, None), min(at_most, len(waiting))))

    def waiting(self) -> list[Observation]:
        """Return the observations that wait to be taken, oldest first; for any thread."""
        # From a copy, made in one step: the worker may take some meanwhile.
        return [observation for _, observation in self._waiting.copy()]

    def __len__(self) -> int:
        return len(self._waiting)

    def is_filling(self) -> bool:
        """Tell whether over a quarter of the capacity waits: the worker must hurry."""
        return len(self._waiting) > self._capacity // 4

    def fullness(self) -> float:
        """Return how much of the file is taken, from 0 to 1; 0 if there is none."""
        file = self.file
        if file is None:
            return 0.0
        return 1.0 if self._last_unwritten > self._last_durable else file.fullness()

    def is_durable(self) -> bool:
        """Tell whether all that was appended survives a kill, here or elsewhere."""
        file = self.file
        return file is not None and file.is_whole() and self._last_unwritten <= self._last_durable

    def restore(self) -> None:
        """Have the file on disk again, where it was, after somebody removed, moved or cut it.

        Raises:
            OSError: It cannot be made.
        """
        if self.file is not None:
            with self._lock:
                if not self.file.restore():
                    # What was in it is in memory only.
                    self._last_unwritten = self._sequence

    def truncate(self, sequence: int) -> None:
        """Remove from the file all observations up to this number: they are durable elsewhere."""
        if self.file is not None:
            with self._lock:
                self.file.truncate(sequence)
                self._last_durable = sequence

    def close(self) -> None:
        """Close the file; it is removed if it is empty, otherwise left to be recovered."""
        if self.file is not None:
            with self._lock:
                file, self.file = self.file, None
            file.close(remove=file.is_empty())

    def reset_after_fork(self) -> None:
        """Forget what the parent process captured: the parent still has it."""
        if self.file is not None:
            self.file.close(remove=False)
        self._start_anew()


def _do_nothing() -> None:
    """Stand in for `Journal.hurry` until somebody sets it."""
