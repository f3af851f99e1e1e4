"""One file of a spool: a header, then records as frames; its lock tells that somebody has it."""

from __future__ import annotations

import errno
import os
import stat
import struct
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from flask_usage_metrics.records.record import UsageRecord

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

_MAGIC = b"fum-sp1\n"
_PROGRESS = struct.Struct("<QI")  # offset of the oldest record that waits, and its checksum
HEADER_BYTES = len(_MAGIC) + _PROGRESS.size
_FRAME = struct.Struct("<II")  # length and checksum of the JSON that follows
_CHUNK_BYTES = 256 * 1024

# JSON can hold any record there is, MessagePack only integers of 64 bits. And it has no control
# characters, so that no part of one, read as a length by mistake, is below 500 MB.
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(UsageRecord).decode


class Segment:
    """The file; for one caller at a time, and locked by one process.

    Attributes:
        path: The file.
        descriptor: Of the file, opened.
        recovered: Whether another process made it.
        size: Offset of the end of the last frame.
        count: How many records wait.
        ahead: The oldest of them, as far as they were read, each with the offset of its end.
    """

    def __init__(self, path: Path, descriptor: int, *, recovered: bool) -> None:
        self.path = path
        self.descriptor = descriptor
        self.recovered = recovered
        self.size = 0
        self.count = 0
        self.ahead: deque[tuple[int, UsageRecord]] = deque()
        self._read = HEADER_BYTES

    def close(self) -> None:
        """Close the file; it is unlocked when no forked child has it open either."""
        os.close(self.descriptor)

    def lock(self) -> bool:
        """Take the lock, which closing gives back; return False if another process has it."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return self._is_at_path()

    def _is_at_path(self) -> bool:
        """Tell whether the file is still what its path names, or another process removed it."""
        try:
            return os.path.samestat(self.path.lstat(), os.fstat(self.descriptor))
        except OSError:
            return False

    # ------------------------------------------------------------------------ writing

    def begin(self) -> None:
        """Write the header."""
        _write_all(self.descriptor, _MAGIC + _progress(HEADER_BYTES), 0)
        self.size = HEADER_BYTES

    def append(self, frames: Sequence[bytes]) -> None:
        """Write frames; may release a part of them behind the end, if it fails."""
        data = b"".join(frames)
        _write_all(self.descriptor, data, self.size)
        self.size += len(data)
        self.count += len(frames)

    def shorten(self, size: int, count: int) -> None:
        """Go back to an earlier end."""
        self.size, self.count = size, count
        # What cannot be cut off is written over by the next frame.
        with suppress(OSError):
            os.ftruncate(self.descriptor, size)

    def advance(self, count: int) -> None:
        """Pass records that are in `ahead`."""
        if not count:
            return
        passed = [self.ahead.popleft() for _ in range(count)]
        self.count -= count
        # If it cannot be noted, they come again after a crash.
        with suppress(OSError):
            _write_all(self.descriptor, _progress(passed[-1][0]), len(_MAGIC))

    # ------------------------------------------------------------------------ reading

    def read_ahead(self, at_most: int) -> int:
        """Have at least so many records in `ahead`, or all; return how many proved lost."""
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
        # Behind what cannot be read others may be appended.
        self._read = self.size
        return lost

    def is_ours(self) -> bool:
        """Tell whether a spool of this user made the file; one that has no header yet is not."""
        found = os.fstat(self.descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return False
        return _read(self.descriptor, len(_MAGIC), 0) == _MAGIC

    def survey(self) -> bool:
        """Find out what waits in a file of another process; return whether all can be read."""
        noted = _read(self.descriptor, _PROGRESS.size, len(_MAGIC))
        whole = HEADER_BYTES
        for end, data in _frames(self.descriptor, HEADER_BYTES, self.size):
            self.count += 1
            whole += _FRAME.size + len(data)
            # Believed only if it is where a record ends.
            if noted == _progress(end):
                self._read = end
                self.count = 0
        return whole == self.size


def open_new(path: Path) -> Segment:
    """Make a file, which is to be locked and begun.

    Raises:
        OSError: It cannot be made, or exists.
    """
    return Segment(path, _open(path, os.O_CREAT | os.O_EXCL), recovered=False)


def take_over(path: Path) -> Segment | None:
    """Open and lock a file that a dead process left; return None if it is not such a file."""
    try:
        segment = Segment(path, _open(path, 0), recovered=True)
    except OSError:
        return None
    if segment.is_ours() and segment.lock():
        # Only now does nobody write there.
        segment.size = os.fstat(segment.descriptor).st_size
        return segment
    segment.close()
    return None


def encode_frame(record: UsageRecord) -> bytes:
    """Return a record as it is written.

    Raises:
        Exception: JSON cannot hold it.
    """
    data = _encode(record)
    return _FRAME.pack(len(data), zlib.crc32(data)) + data


def _open(path: Path, flags: int) -> int:
    if fcntl is None:  # pragma: no cover - Windows
        raise OSError(errno.ENOTSUP, "this system has no flock")
    # Not blocking: it may be a pipe, which somebody put there.
    flags |= os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    return os.open(path, flags, 0o600)


def _progress(offset: int) -> bytes:
    return _PROGRESS.pack(offset, zlib.crc32(offset.to_bytes(8, "little")))


def _frames(descriptor: int, offset: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield where each undamaged frame ends, and what is in it.

    A frame whose content is damaged is skipped. Behind one whose length is damaged nothing can be
    found but by chance, against which there is the checksum.
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
