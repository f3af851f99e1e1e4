"""Parts that are made anew in a forked child: each registers itself once, none can be forgotten."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forkable(Protocol):
    """A part with locks, threads, open files or numbers that belong to one process."""

    def reset_after_fork(self) -> None:
        """Start anew in a forked child: close, write and send nothing of the parent's."""


class ForkRegistry:
    """Calls `reset_after_fork` of every living part in a forked child, oldest part first.

    So a part may rely on the parts it was given to its constructor. Parts are referenced weakly.
    """

    def __init__(self) -> None:
        self._parts: list[weakref.ref[Forkable]] = []
        if hasattr(os, "register_at_fork"):  # not on Windows
            os.register_at_fork(after_in_child=self._reset)

    def register(self, part: Forkable) -> None:
        """Have a part made anew in each child forked from now on, as long as it lives."""
        self._parts.append(weakref.ref(part, self._parts.remove))

    def _reset(self) -> None:
        for reference in list(self._parts):
            part = reference()
            if part is not None:
                part.reset_after_fork()


FORKS = ForkRegistry()
"""One for the process, as `os.register_at_fork` has no way to take a function back."""
