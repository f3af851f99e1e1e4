"""The journal's file: a ring of frames that outlives a kill -9, for another process to recover."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from weakref import finalize
from zlib import crc32

import msgspec

from flask_usage_metrics.pipeline.payload import decode
from flask_usage_metrics.records.observation import Observation, Origin
from flask_usage_metrics.runtime.private_files import (
    is_still,
    open_existing,
    open_private,
    try_lock,
)

FILE_BYTES = 8 * 1024 * 1024
"""Size of the ring: some 16 000 requests of 500 bytes. It is touched as far as it is needed: twice
as much room costs nothing, and a worker that hardly gets the interpreter has twice the time."""

_FIRST_BYTES = 64 * 1024
"""How much of the ring is allocated at first: an app that answers some requests, as one of a test
does, needs no more."""

_MAGIC = b"FUMJRNL3"
_HEADER_BYTES = 4096
_HEADER = struct.Struct("=8sQQQQI")  # magic, size, tail, head, committed, length of the origin
_TAIL, _HEAD, _COMMITTED = 2, 3, 4  # positions among the header's words of 64 bits
_U32 = struct.Struct("=I")
_FRAME = struct.Struct("=IIQII")  # length, checksum, sequence, commit number, unused
_NEW_FRAME = struct.Struct("=IIQQ")  # the same before any commit
_COMMIT = 4  # position of the commit number among a frame's words of 32 bits
_SKIP = 0xFFFFFFFF  # in place of a length: the next frame begins at the start of the ring


class JournalFile:
    """A ring of frames in a file that is mapped; for one caller at a time.

    The disk is allocated from the start of the ring on, twice as much each time there is need of
    more. Nothing beyond is touched: a page that finds no room on the disk kills the process.

    The kernel writes what is in the map to the file whatever becomes of the process. The file is
    locked (``flock``) as long as its process lives. Each frame has the number of the commit that
    counted it (0: none yet), and the header the number of the last commit that is in the totals:
    so whoever recovers the file after a kill knows what was counted, and counts the rest.

    Attributes:
        id: Unique name.
        origin: The process that captured the observations in it.
        filling: Called by `append` when a frame is the first beyond half of the ring, or finds no
            room. It must not block.
    """

    def __init__(
        self, path: Path, descriptor: int, origin: Origin, size: int, allocated: int
    ) -> None:
        self.id = path.stem
        self.origin = origin
        self.filling: Callable[[], None] = _do_nothing
        self._path = path
        self._size = size
        self._allocated = allocated
        # Sequence number -> offset in the map, oldest first, of each frame that is not truncated.
        self._frames: dict[int, int] = {}
        self._use(mmap.mmap(descriptor, _HEADER_BYTES + size), descriptor)

    def _use(self, mapped: mmap.mmap, descriptor: int) -> None:
        """Take a mapped file, and go on where its header says."""
        self._map = mapped
        self._descriptor = descriptor
        self._close = finalize(self, os.close, descriptor)
        self._close.atexit = False  # the pipeline ends later, by an exit handler of its own
        # Hot path: see tests/benchmarks/README.md.
        self._header_words = memoryview(self._map).cast("Q")
        self._frame_words = memoryview(self._map).cast("I")
        self._tail: int = self._header_words[_TAIL]
        self._committed: int = self._header_words[_COMMITTED]
        # Offsets in the map: where the next frame begins, and what it must not reach beyond. Head
        # and tail never wrap: `_ahead` is how much more than the offset the head is.
        self._at = self._limit = self._ahead = 0
        self._move(self._header_words[_HEAD])

    @classmethod
    def create(cls, folder: Path, origin: Origin, size: int = FILE_BYTES) -> JournalFile:
        """Make, lock and map a new file; blocks while the disk allocates its start.

        Args:
            folder: Where to make it; of this user alone, which is not checked here.
            origin: This process.
            size: Bytes of the ring.

        Raises:
            OSError: It cannot be made; the disk may be full.
        """
        path = folder / f"{os.urandom(8).hex()}.journal"
        descriptor = open_private(path, exclusive=True)
        try:
            if not try_lock(descriptor):
                raise BlockingIOError
            allocated = min(_FIRST_BYTES, size)
            os.posix_fallocate(descriptor, 0, _HEADER_BYTES + allocated)
            os.ftruncate(descriptor, _HEADER_BYTES + size)
            os.pwrite(descriptor, _header(origin, size), 0)
            return cls(path, descriptor, origin, size, allocated)
        except BaseException:
            os.close(descriptor)
            path.unlink()
            raise

    @classmethod
    def recover(cls, path: Path, app: str) -> JournalFile | None:
        """Lock and map the file of a dead process.

        Returns:
            None if its process lives, another has recovered it, or it is no journal of this app.
        """
        try:
            descriptor = open_existing(path)
        except OSError:
            return None
        with suppress(OSError, ValueError, RecursionError, struct.error, msgspec.DecodeError):
            header = os.pread(descriptor, _HEADER_BYTES, 0)
            magic, size, _, _, _, length = _HEADER.unpack_from(header)
            meta = header[_HEADER.size : _HEADER.size + length]
            if magic == _MAGIC and os.fstat(descriptor).st_size == _HEADER_BYTES + size:
                origin = msgspec.json.decode(meta, type=Origin)
                if origin.app == app and try_lock(descriptor) and is_still(path, descriptor):
                    return cls(path, descriptor, origin, size, size)
        os.close(descriptor)
        return None

    @property
    def folder(self) -> Path:
        """The folder of the server run the file belongs to."""
        return self._path.parent

    @property
    def committed(self) -> int:
        """Number of the last commit that is in the totals, 0 before the first."""
        return self._committed

    @committed.setter
    def committed(self, number: int) -> None:
        self._committed = number
        if not self._is_cut():
            self._header_words[_COMMITTED] = number

    def append(self, sequence: int, payload: bytes) -> bool:
        """Write a frame; return False, and write nothing, when there is no room.

        Args:
            sequence: Its number; greater than all before.
            payload: As `encode` returns it.
        """
        frame = _NEW_FRAME.pack(len(payload), crc32(payload), sequence, 0) + payload
        at = self._at
        end = at + (len(frame) + 7 & ~7)
        if end > self._limit:
            length = end - at
            if not self._find_room(length):
                return False
            at = self._at
            end = at + length
        self._map[at : at + len(frame)] = frame
        self._frames[sequence] = at
        self._at = end
        # Last: a process that is killed before leaves nothing, instead of half a frame.
        self._header_words[_HEAD] = end + self._ahead
        return True

    @property
    def _head(self) -> int:
        return self._at + self._ahead

    def _move(self, head: int, room: int = 0) -> None:
        """Have the next frame begin at the head; if longer than `room` bytes, it asks for more."""
        self._at = _HEADER_BYTES + head % self._size
        self._ahead = head - self._at
        self._limit = self._at + room

    def _find_room(self, length: int) -> bool:
        """Make room for a frame that is written at once; return False when there is none."""
        # Asked for with the first frame after each `truncate`: so often a cut is looked for.
        if self._is_cut():
            self.filling()
            return False
        start = self._head
        offset = start % self._size
        gap = self._size - offset if offset + length > self._size else 0
        start += gap
        end = self._tail + self._size // 2
        if start + length > end:
            self.filling()
            end = self._tail + self._size
            if start + length > end:
                return False
        if not self._allocate(self._size if gap else offset + length):
            self.filling()
            return False
        if gap:  # frames do not wrap round the end
            _U32.pack_into(self._map, _HEADER_BYTES + offset, _SKIP)
            offset = 0
        self._move(start, min(self._allocated - offset, end - start))
        return True

    def _allocate(self, end: int) -> bool:
        """Have the ring on disk up to an offset; return False if there is no room there."""
        if end > self._allocated:
            wanted = min(max(end, 2 * self._allocated), self._size)
            at = _HEADER_BYTES + self._allocated
            try:
                os.posix_fallocate(self._descriptor, at, wanted - self._allocated)
            except OSError:
                return False
            self._allocated = wanted
        return True

    def mark(self, sequences: Iterable[int], commit: int) -> None:
        """Write into frames the number of the commit that is about to count them; 0: none is."""
        frames, words = self._frames, self._frame_words
        if self._is_cut():
            return
        for sequence in sequences:
            if sequence in frames:
                words[frames[sequence] // 4 + _COMMIT] = commit

    def truncate(self, sequence: int) -> None:
        """Forget, and overwrite with zeros, all frames up to this number.

        They hold what came with requests, before anything was taken away for privacy's sake.
        """
        if self._is_cut():
            return
        frames = self._frames
        start = self._tail
        # Listed first: a new iterator would pass all the gaps at the front of the dict each time.
        for old in list(takewhile(sequence.__ge__, frames)):
            del frames[old]
        if frames:
            first = next(iter(frames.values())) - _HEADER_BYTES
            self._tail += (first - start) % self._size
        else:
            self._tail = self._head
        self._header_words[_TAIL] = self._tail
        self._wipe(start, self._tail)
        if not frames:
            # Back to the start of the ring: so only as many pages are touched as one batch needs.
            self._tail = -(-self._head // self._size) * self._size
            # In this order: a process that is killed in between leaves an empty file, too.
            self._header_words[_TAIL] = self._tail
            self._header_words[_HEAD] = self._tail
            self._move(self._tail)
        else:
            self._move(self._head)

    def _wipe(self, start: int, end: int) -> None:
        """Zero what is between two positions that never wrap; at most the whole ring."""
        start = max(start, end - self._size)
        while start < end:
            offset = start % self._size
            length = min(end - start, self._size - offset)
            at = _HEADER_BYTES + offset
            self._map[at : at + length] = bytes(length)
            start += length

    def entries(self) -> Iterator[tuple[int, int, Observation]]:
        """Yield what is not truncated, oldest first: sequence, commit number, observation.

        A damaged frame ends it, as nothing tells where the next one begins; a frame that is whole
        and holds no observation is passed over.
        """
        position = self._tail
        while position < self._head <= self._tail + self._size:
            offset = position % self._size
            at = _HEADER_BYTES + offset
            room = self._size - offset
            if room < _FRAME.size or _U32.unpack_from(self._map, at)[0] == _SKIP:
                position += room
                continue
            length, checksum, sequence, commit, _ = _FRAME.unpack_from(self._map, at)
            payload = self._map[at + _FRAME.size : at + _FRAME.size + length]
            if length > room or crc32(payload) != checksum:
                return
            position += _FRAME.size + length + 7 & ~7
            self._frames[sequence] = at
            with suppress(msgspec.DecodeError, UnicodeDecodeError):
                yield sequence, commit, decode(payload)

    def fullness(self) -> float:
        """Return how much of the ring is taken, from 0 to 1."""
        return (self._head - self._tail) / self._size

    def is_empty(self) -> bool:
        """Tell whether everything is truncated."""
        return not self._frames and self._tail >= self._head

    def is_whole(self) -> bool:
        """Tell whether another process can recover it: the path still names it, and it is not cut.

        What is written behind the end of a file that was cut kills the process (SIGBUS).
        """
        return is_still(self._path, self._descriptor) and not self._is_cut()

    def _is_cut(self) -> bool:
        return os.fstat(self._descriptor).st_size < _HEADER_BYTES + self._size

    def restore(self) -> bool:
        """Make the file anew in its folder, which exists, and go on in that one.

        Returns:
            Whether all that was in it still is; False: it was cut.

        Raises:
            OSError: It cannot be made; the old one is used on.
        """
        is_cut = self._is_cut()
        old, size = self._map, _HEADER_BYTES + self._allocated
        # Not read from a file that was cut: the process would be killed.
        content = None if is_cut else old[:size]
        if is_still(self._path, self._descriptor):
            self._path.unlink()
        descriptor = open_private(self._path, exclusive=True)
        try:
            if not try_lock(descriptor):
                raise BlockingIOError
            os.posix_fallocate(descriptor, 0, size)
            os.ftruncate(descriptor, _HEADER_BYTES + self._size)
            # The header last: without it a process that is killed meanwhile has left no journal.
            if content is not None:
                os.pwrite(descriptor, content[_HEADER_BYTES:], _HEADER_BYTES)
                os.pwrite(descriptor, content[:_HEADER_BYTES], 0)
            else:
                os.pwrite(descriptor, _header(self.origin, self._size), 0)
            new = mmap.mmap(descriptor, _HEADER_BYTES + self._size)
        except BaseException:
            os.close(descriptor)
            self._path.unlink()
            raise
        if content is not None:
            # Wherever it is now, nobody is to recover the same from there as well.
            self._header_words[_TAIL] = self._header_words[_HEAD]
        committed = self._committed
        self._release()
        self._use(new, descriptor)
        if is_cut:
            self._frames.clear()
            self.committed = committed
        return not is_cut

    def close(self, *, remove: bool) -> None:
        """Unmap and unlock.

        Args:
            remove: Whether to remove the file first; never in a forked child.
        """
        if remove:
            with suppress(OSError):
                self._path.unlink()
        self._release()

    def _release(self) -> None:
        self._header_words.release()
        self._frame_words.release()
        self._map.close()
        self._close()


def _header(origin: Origin, size: int) -> bytes:
    """Return the header of a new file."""
    meta = msgspec.json.encode(origin)
    header = _HEADER.pack(_MAGIC, size, 0, 0, 0, len(meta)) + meta
    if len(header) > _HEADER_BYTES:
        raise OSError("too many country headers")
    return header


def _do_nothing() -> None:
    """Stand in for `JournalFile.filling` until somebody sets it."""
