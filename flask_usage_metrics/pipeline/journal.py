"""The queue between the requests' threads and the worker, written ahead to a journal file."""

from __future__ import annotations

import threading
from collections import deque
from itertools import islice

from flask_usage_metrics.pipeline.journal_file import JournalFile, encode, escape_surrogates
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
        """Append an observation; return False, and append nothing, when there is no room.

        Once this returns True the observation survives a kill of the process: it is in the file,
        unless there is no file or it is full. It does not block on the disk: the file is mapped.
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
        """Remove and return the oldest observations, which stay in the file; for one caller."""
        waiting = self._waiting
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

    def truncate(self, sequence: int) -> None:
        """Remove from the file all observations up to this number: they are durable elsewhere."""
        if self.file is not None:
            with self._lock:
                self.file.truncate(sequence)

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
