"""The buffer between the requests and the worker: bounded, one a process."""

from __future__ import annotations

from collections import deque

from flask_usage_metrics.observation import Observation


class Journal:
    """Takes observations from any thread, without a lock, and hands them out in batches.

    Args:
        capacity: At most so many observations wait. Threads that append at the very same moment
            may exceed it by one each.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._waiting: deque[Observation] = deque()

    def append(self, observation: Observation) -> bool:
        """Keep an observation; return False, and keep nothing, when there is no room."""
        if len(self._waiting) >= self._capacity:
            return False
        self._waiting.append(observation)
        return True

    def take(self, at_most: int) -> list[Observation]:
        """Return the oldest observations and forget them; for one caller at a time."""
        waiting = self._waiting
        return [waiting.popleft() for _ in range(min(at_most, len(waiting)))]

    def __len__(self) -> int:
        return len(self._waiting)

    def reset_after_fork(self) -> None:
        """Forget what the parent process captured: the parent still has it."""
        self._waiting = deque()
