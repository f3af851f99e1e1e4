"""The spool: records on disk, in order and bounded, while a storage is down; outlives a kill."""

from __future__ import annotations

import errno
import os
import re
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from flask_usage_metrics.pipeline.delivery.segment import HEADER_BYTES, Segment, encode_frame
from flask_usage_metrics.records.record import UsageRecord

_SEGMENTS = 16
_SEGMENT_BYTES = 64 * 1024 * 1024
_HELD_SEGMENTS = 64
"""No file is recovered while this many are open: each is a descriptor."""

_NAME = re.compile(r"[0-9]{20}-[0-9a-f]{8}\.spool")


class Spool:
    """A queue of records in files of one folder; for one caller at a time.

    Each process appends to files of its own, and holds an exclusive ``flock`` on each. However a
    process ends, the kernel gives its locks back, which tells the others what they may recover.

    Nothing is synced to the disk: a crash of the process loses nothing, one of the machine may.
    Acks are written to the file; after a crash at worst a few records come twice.

    Args:
        folder: Where the files are; no other queue has files there, and only this user may write
            there, which is not checked here. The first `append` makes it; before that and the first
            `recover` the disk is not touched.
        max_bytes: Most bytes of all files that this process made or recovered. During an `append`
            its records come on top.

    Attributes:
        damaged: How many files were found so far that cannot be read in full.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        # Records are dropped a whole file at a time.
        self._segment_bytes = min(max_bytes // _SEGMENTS, _SEGMENT_BYTES)
        self._forget()

    def _forget(self) -> None:
        self.damaged = 0
        self._lost = 0
        self._named = 0
        self._segments: list[Segment] = []
        self._stuck: list[Segment] = []

    def __len__(self) -> int:
        return sum([segment.count for segment in self._segments])

    def close(self) -> None:
        """Close the files; the process that recovers them next has what waits in them."""
        for segment in (*self._segments, *self._stuck):
            segment.close()
        self._segments, self._stuck = [], []

    def reset_after_fork(self) -> None:
        """Forget the parent's files in a forked child; they stay the parent's.

        Closing them is right: a lock is that of the open file, which parent and child share, and
        goes when the last of the two has closed it (flock(2)); unlocking would take it away.
        """
        self.close()
        self._forget()

    def is_there(self) -> bool:
        """Tell whether the files are in the folder, for any thread."""
        return all(segment.is_there() for segment in list(self._segments))

    def restore(self) -> None:
        """Copy the files that somebody removed or moved back to the folder.

        Raises:
            OSError: One cannot be written; it is used on where it is.
        """
        for segment in self._segments:
            if not segment.is_there():
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                segment.restore()

    # ------------------------------------------------------------------------ the new end

    def append(self, records: Sequence[UsageRecord]) -> int:
        """Add the newest records; beyond the bound the oldest are dropped, a whole file at once.

        Returns:
            How many records were dropped, older ones and given ones together. A given record is
            dropped if it cannot be encoded as JSON or is larger than the bound.

        Raises:
            OSError: None of the given records was kept, and no older one was dropped.
        """
        # No two neighbouring files are both less than half full: there are twice as many at most.
        room = self._max_bytes - 2 * _SEGMENTS * HEADER_BYTES
        frames: list[bytes] = []
        for record in records:
            with suppress(Exception):
                frame = encode_frame(record)
                if len(frame) <= room:
                    frames.append(frame)
        # Records that would be dropped at once are not written; then all older ones go, too.
        kept = 0
        for frame in reversed(frames):
            room -= len(frame)
            if room < 0:
                break
            kept += 1
        outdated = self._segments[:] if kept < len(frames) else []
        self._write(frames[len(frames) - kept :])
        dropped = len(records) - kept
        while outdated or sum([segment.size for segment in self._segments]) > self._max_bytes:
            segment = outdated.pop() if outdated else self._segments[0]
            dropped += segment.count
            self._remove(segment)
        return dropped

    def _write(self, frames: Sequence[bytes]) -> None:
        """Write all, or none if this raises."""
        made = len(self._segments)
        tail = self._own_tail()
        size, count = (tail.size, tail.count) if tail else (0, 0)
        try:
            start = 0
            while start < len(frames):
                segment = self._segment_for(frames[start])
                room = self._segment_bytes - segment.size
                end = start
                while end == start or (end < len(frames) and len(frames[end]) <= room):
                    room -= len(frames[end])
                    end += 1
                segment.append(frames[start:end])
                start = end
        except BaseException:
            for segment in self._segments[made:]:
                self._remove(segment)
            if tail:
                tail.rollback(size, count)
            raise

    def _own_tail(self) -> Segment | None:
        tail = self._segments[-1] if self._segments else None
        return None if tail is None or tail.recovered else tail

    def _segment_for(self, frame: bytes) -> Segment:
        tail = self._own_tail()
        if tail is None or tail.size + len(frame) > self._segment_bytes:
            tail = self._make_segment()
        return tail

    def _make_segment(self) -> Segment:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Names are in the order of writing, even if the clock is set back.
        self._named = max(time.time_ns(), self._named + 1)
        path = self._folder / f"{self._named:020d}-{secrets.token_hex(4)}.spool"
        segment = Segment.create(path)
        self._segments.append(segment)
        try:
            if not segment.lock():
                raise BlockingIOError(errno.EAGAIN, "another process looks at the file")
            segment.write_header()
        except BaseException:
            self._remove(segment)
            raise
        return segment

    # ------------------------------------------------------------------------ the old end

    def peek(self, at_most: int) -> list[UsageRecord]:
        """Return the oldest records, which stay; empty only if there are none.

        Records that cannot be read any more are removed, see `take_lost`.
        """
        records: list[UsageRecord] = []
        for segment in list(self._segments):
            wanted = at_most - len(records)
            if not wanted:
                break
            self._read_ahead(segment, wanted)
            records += [record for _, record in islice(segment.ahead, wanted)]
            if not segment.count:
                self._remove(segment)
        return records

    def ack(self, count: int) -> None:
        """Remove the oldest records; there must be at least `count`."""
        while count:
            segment = self._segments[0]
            # They are read already, unless they were in memory when they were peeked at.
            lost = self._read_ahead(segment, count)
            acked = min(count, segment.count)
            segment.ack(acked)
            count -= acked
            # An acked record need not be read again, so it does not count as lost.
            unneeded = min(count, lost)
            self._lost -= unneeded
            count -= unneeded
            if not segment.count:
                self._remove(segment)

    def _read_ahead(self, segment: Segment, at_most: int) -> int:
        lost = segment.read_ahead(at_most)
        if lost:
            self._lost += lost
            self.damaged += 1
        return lost

    def take_lost(self) -> int:
        """Return how many records turned out unreadable since the last call; `len` counted them."""
        lost, self._lost = self._lost, 0
        return lost

    def _remove(self, segment: Segment) -> None:
        self._segments.remove(segment)
        try:
            segment.path.unlink(missing_ok=True)
        except OSError:
            # Kept open, and so locked: it would be recovered, and written, over and over again.
            self._stuck.append(segment)
        else:
            segment.close()

    # ------------------------------------------------------------------------ what others left

    def recover(self) -> int:
        """Take the files that other processes left, as older than all own records.

        It takes as many files as the bound has room for, but at least one if there are no records.
        Files that are no segments, or another user's, are not touched.

        Returns:
            How many records came.

        Raises:
            OSError: The folder cannot be read.
        """
        try:
            names = sorted(os.listdir(self._folder))  # noqa: PTH208 - names are all that is needed
        except FileNotFoundError:
            return 0
        held = {segment.path.name for segment in (*self._segments, *self._stuck)}
        size = sum([segment.size for segment in self._segments])
        came: list[Segment] = []
        for name in names:
            if name in held or not _NAME.fullmatch(name):
                continue
            if len(self._segments) + len(came) >= _HELD_SEGMENTS:
                break
            segment = Segment.recover(self._folder / name)
            if segment is None:
                continue
            if size and size + segment.size > self._max_bytes:
                segment.close()
                break
            self.damaged += not segment.scan()
            came.append(segment)
            size += segment.size
        recovered = [segment for segment in self._segments if segment.recovered]
        own = self._segments[len(recovered) :]
        self._segments = sorted([*recovered, *came], key=lambda segment: segment.path.name) + own
        for segment in came:
            if not segment.count:
                self._remove(segment)
        return sum([segment.count for segment in came])
