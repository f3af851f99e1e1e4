"""Counters of every record that is handed to a sink."""

from __future__ import annotations


class SinkCounters:
    """Counters of the records handed to one sink, by result; a record is in one of them at most.

    Attributes:
        sink: Value of the label ``sink``.
        written: Records that were written.
        dropped: Records there was no room for.
        failed: Records that can never be written.
    """

    __slots__ = ("dropped", "failed", "sink", "written")

    def __init__(self, sink: str) -> None:
        self.sink = sink
        self.reset()

    def reset(self) -> None:
        """Start anew, in a forked child."""
        self.written = self.dropped = self.failed = 0

    def add(self, *, written: int = 0, dropped: int = 0, failed: int = 0) -> None:
        """Count records; for one caller at a time."""
        self.written += written
        self.dropped += dropped
        self.failed += failed
