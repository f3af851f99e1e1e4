"""One file of a spool: a header, then records as frames; locked by the process that has it."""

from __future__ import annotations

import os
import struct
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.runtime.private_files import (
    is_still,
    open_existing,
    open_private,
    try_lock,
)

_MAGIC = b"fum-sp1\n"
_PROGRESS = struct.Struct("<QI")  # offset of the oldest record not acked, and its checksum
HEADER_BYTES = len(_MAGIC) + _PROGRESS.size
_FRAME = struct.Struct("<II")  # length and checksum of the JSON that follows
_CHUNK_BYTES = 256 * 1024

# JSON can hold any record there is, MessagePack only integers of 64 bits. And it has no control
# characters, so that no part of one, read as a length by mistake, is below 500 MB.
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(UsageRecord).decode


class Segment:
    """An open file of records, the oldest first; for one caller at a time.

    Args:
        path: The file.
        descriptor: Of the file, opened.
        recovered: Whether another process made it.

    Attributes:
        path: The file.
        descriptor: Of the file, opened.
        recovered: Whether another process made it.
        size: Offset of the end of the last frame, in bytes.
        count: How many records are not acked.
        ahead: The oldest of these, as far as they were read, each with the offset of its end.
    """

    def __init__(self, path: Path, descriptor: int, *, recovered: bool) -> None:
        self.path = path
        self.descriptor = descriptor
        self.recovered = recovered
        self.size = 0
        self.count = 0
        self.ahead: deque[tuple[int, UsageRecord]] = deque()
        self._read = HEADER_BYTES

    @classmethod
    def create(cls, path: Path) -> Segment:
        """Make an empty file; call `lock` and `write_header` next.

        Raises:
            OSError: It cannot be made, or exists.
        """
        return cls(path, open_private(path, exclusive=True), recovered=False)

    @classmethod
    def recover(cls, path: Path) -> Segment | None:
        """Open and lock the file of a dead process; call `scan` next.

        Returns:
            None if its process lives, another has recovered it, or it is no segment of this user.
        """
        try:
            segment = cls(path, open_existing(path), recovered=True)
        except OSError:
            return None
        if segment.has_header() and segment.lock():
            # Only now does nobody write there.
            segment.size = os.fstat(segment.descriptor).st_size
            return segment
        segment.close()
        return None

    def close(self) -> None:
        """Close the file; it is unlocked when no forked child has it open either."""
        os.close(self.descriptor)

    def lock(self) -> bool:
        """Take the lock, which closing gives back.

        Returns:
            False if another process has it, or has removed the file.
        """
        return try_lock(self.descriptor) and is_still(self.path, self.descriptor)

    def is_there(self) -> bool:
        """Tell whether the path still names this file."""
        return is_still(self.path, self.descriptor)

    def restore(self) -> None:
        """Copy the file to its path, where it is no more, and go on in the copy.

        Raises:
            OSError: It cannot be written, or there is something else.
        """
        copy = open_private(self.path, exclusive=True)
        try:
            if not try_lock(copy):
                raise BlockingIOError
            offset = self.size
            # The header last: without it nobody takes it for a segment.
            while offset > 0:
                start = max(offset - _CHUNK_BYTES, 0)
                _write_all(copy, _read(self.descriptor, offset - start, start), start)
                offset = start
        except BaseException:
            os.close(copy)
            self.path.unlink()
            raise
        with suppress(OSError):  # wherever it is now, nobody is to recover the same from there
            os.ftruncate(self.descriptor, 0)
        os.close(self.descriptor)
        self.descriptor = copy

    # ------------------------------------------------------------------------ writing

    def write_header(self) -> None:
        """Write the header: only now others can tell that it is a segment."""
        _write_all(self.descriptor, _MAGIC + _progress(HEADER_BYTES), 0)
        self.size = HEADER_BYTES

    def append(self, frames: Sequence[bytes]) -> None:
        """Write frames behind the last one.

        Args:
            frames: As `encode_frame` returns them.

        Raises:
            OSError: A part of them may be behind the end of the last frame, which stands.
        """
        data = b"".join(frames)
        _write_all(self.descriptor, data, self.size)
        self.size += len(data)
        self.count += len(frames)

    def rollback(self, size: int, count: int) -> None:
        """Remove the frames appended since the segment had this size and count."""
        self.size, self.count = size, count
        # What cannot be cut off is written over by the next frame.
        with suppress(OSError):
            os.ftruncate(self.descriptor, size)

    def ack(self, count: int) -> None:
        """Remove the oldest records, which must be in `ahead`; the file has it written down."""
        if not count:
            return
        acked = [self.ahead.popleft() for _ in range(count)]
        self.count -= count
        # If the disk fails, they come again after a crash.
        with suppress(OSError):
            _write_all(self.descriptor, _progress(acked[-1][0]), len(_MAGIC))

    # ------------------------------------------------------------------------ reading

    def read_ahead(self, at_most: int) -> int:
        """Read so that `ahead` has at least as many records, or all there are.

        Returns:
            How many records cannot be read; they are not counted any more.
        """
        wanted = min(at_most, self.count)
        if len(self.ahead) >= wanted:
            return 0
        for end, data in _frames(self.descriptor, self._read, self.size):
            self._read = end
            with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                self.ahead.append((end, _decode(data)))
                if len(self.ahead) >= wanted:
                    return 0
        lost = self.count - len(self.ahead)
        self.count = len(self.ahead)
        # Records that are appended behind the damage can be read.
        self._read = self.size
        return lost

    def has_header(self) -> bool:
        """Tell whether a spool made the file: it begins with a header."""
        return _read(self.descriptor, len(_MAGIC), 0) == _MAGIC

    def scan(self) -> bool:
        """Count the records not acked in a recovered file; return whether all of it can be read."""
        progress = _read(self.descriptor, _PROGRESS.size, len(_MAGIC))
        whole = HEADER_BYTES
        for end, data in _frames(self.descriptor, HEADER_BYTES, self.size):
            self.count += 1
            whole += _FRAME.size + len(data)
            # Believed only if it is where a record ends.
            if progress == _progress(end):
                self._read = end
                self.count = 0
        return whole == self.size


def encode_frame(record: UsageRecord) -> bytes:
    """Return a record as a frame: length, checksum, JSON.

    Raises:
        Exception: JSON cannot hold it.
    """
    data = _encode(record)
    return _FRAME.pack(len(data), zlib.crc32(data)) + data


def _progress(offset: int) -> bytes:
    return _PROGRESS.pack(offset, zlib.crc32(offset.to_bytes(8, "little")))


def _frames(descriptor: int, offset: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield the end offset and the content of each undamaged frame.

    A frame whose content is damaged is skipped. After one whose length is damaged the next frame is
    not found; bytes that look like one by chance fail the checksum.
    """
    chunk = b""
    start = offset
    while offset + _FRAME.size <= end:
        if offset + _FRAME.size > start + len(chunk):
            chunk, start = _read(descriptor, _CHUNK_BYTES, offset), offset
            if len(chunk) < _FRAME.size:
                return
        length, checksum = _FRAME.unpack_from(chunk, offset - start)
        after = offset + _FRAME.size + length
        if after > end:
            return
        if after > start + len(chunk):
            chunk, start = _read(descriptor, max(_CHUNK_BYTES, after - offset), offset), offset
            if after > start + len(chunk):
                return
        data = chunk[offset - start + _FRAME.size : after - start]
        if length and zlib.crc32(data) == checksum:
            yield after, data
        offset = after


def _read(descriptor: int, size: int, offset: int) -> bytes:
    """Read; less, or nothing, at the end of the file or if the disk fails."""
    try:
        return os.pread(descriptor, size, offset)
    except OSError:
        return b""


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written
