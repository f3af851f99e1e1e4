"""The queue between the requests' threads and the worker, written ahead to a file of its own."""

from __future__ import annotations

import threading
from collections import deque
from itertools import islice

from flask_usage_metrics.pipeline.journal_file import JournalFile, encode, escape_surrogates
from flask_usage_metrics.records.observation import Observation
from flask_usage_metrics.runtime.forks import FORKS

NumberedObservation = tuple[int, Observation]
"""A sequence number, counted from 1 in each process, and the observation that has it."""


class Journal:
    """Takes observations from any thread, and hands them out in batches, in their order.

    Args:
        capacity: How many observations wait at most.

    Attributes:
        file: Where observations are kept as well until they are durable elsewhere; None: nowhere.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._start_anew()
        FORKS.register(self)

    def _start_anew(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[NumberedObservation] = deque()
        self._sequence = 0
        self.file: JournalFile | None = None

    def append(self, observation: Observation) -> bool:
        """Keep an observation; return False, and keep nothing, when there is no room.

        When this returns True the process may be killed: the observation is in the file, unless
        there is none or it is full. It does not block on the disk: the file is mapped.
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
            if len(self._waiting) >= self._capacity:
                return False
            self._sequence = sequence = self._sequence + 1
            if payload is not None and self.file is not None:
                self.file.append(sequence, payload)
            self._waiting.append((sequence, observation))
        finally:
            self._lock.release()
        return True

    def take(self, at_most: int) -> list[NumberedObservation]:
        """Return the oldest observations, which stay in the file only; for one caller at a time."""
        waiting = self._waiting
        return list(islice(iter(waiting.popleft, None), min(at_most, len(waiting))))

    def waiting(self) -> list[Observation]:
        """Return the observations that wait, oldest first; they stay. For any thread."""
        # Of a copy, which is made at once: the worker may take some meanwhile.
        return [observation for _, observation in self._waiting.copy()]

    def __len__(self) -> int:
        return len(self._waiting)

    def is_filling(self) -> bool:
        """Tell whether over a quarter of the room is taken: whoever takes from it must hurry."""
        return len(self._waiting) > self._capacity // 4

    def truncate(self, sequence: int) -> None:
        """Forget in the file what is durable elsewhere: everything up to this number."""
        if self.file is not None:
            with self._lock:
                self.file.truncate(sequence)

    def close(self) -> None:
        """Close the file; it is removed unless there is something in it that is not durable."""
        if self.file is not None:
            with self._lock:
                file, self.file = self.file, None
            file.close(remove=file.is_empty())

    def reset_after_fork(self) -> None:
        """Forget what the parent process captured: the parent still has it."""
        if self.file is not None:
            self.file.close(remove=False)
        self._start_anew()
