"""The buffer between the requests and the worker; on disk too, so that it outlives a kill -9."""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, TypeVar
from weakref import finalize
from zlib import crc32

import msgspec

from flask_usage_metrics.records.observation import Observation, Origin
from flask_usage_metrics.runtime.private_files import is_still, open_private, try_lock

FILE_BYTES = 4 * 1024 * 1024
"""Size of a journal file: some 8 000 requests of 500 bytes."""

_MAGIC = b"FUMJRNL2"
_HEADER_BYTES = 4096
_HEADER = struct.Struct("=8sQQQQI")  # magic, size, tail, head, committed, length of the origin
_TAIL, _HEAD, _COMMITTED = 2, 3, 4  # places of the header's words of 64 bits
_U32 = struct.Struct("=I")
_FRAME = struct.Struct("=IIQII")  # length, checksum, sequence, commit number, unused
_NEW_FRAME = struct.Struct("=IIQQ")
_NUMBER = 4  # place of a frame's commit number among its words of 32 bits
_SKIP = 0xFFFFFFFF

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Observation).decode

_S = TypeVar("_S", bound=msgspec.Struct)

Entry = tuple[int, Observation]
"""An observation, and its number in its journal: of all that its process captured."""


class Journal:
    """Takes observations from any thread, and hands them out in batches, in their order.

    Args:
        capacity: At most so many observations wait.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._start_anew()

    def _start_anew(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Entry] = deque()
        self._sequence = 0
        self.file: JournalFile | None = None

    def append(self, observation: Observation) -> bool:
        """Keep an observation; return False, and keep nothing, when there is no room.

        When this returns True the process may be killed: the observation is in the file, unless
        there is none or it is full.
        """
        file = self.file
        payload = None
        if file is not None:
            try:
                payload = _encode(observation)
            except UnicodeEncodeError:  # a lone surrogate
                payload = _encode(_washed(observation))
        # Not `with`, which costs 1 000 instructions more.
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

    def take(self, at_most: int) -> list[Entry]:
        """Return the oldest observations and forget them; for one caller at a time."""
        waiting = self._waiting
        return list(islice(iter(waiting.popleft, None), min(at_most, len(waiting))))

    def __len__(self) -> int:
        return len(self._waiting)

    def is_filling(self) -> bool:
        """Tell whether a quarter of the room is taken, so that whoever takes from it must hurry."""
        return len(self._waiting) > self._capacity // 4

    def release(self, sequence: int) -> None:
        """Forget on disk as well what is durable: everything up to this number."""
        if self.file is not None:
            with self._lock:
                self.file.release(sequence)

    def close(self) -> None:
        """Give the file back; it is removed if nothing in it is open."""
        if self.file is not None:
            with self._lock:
                file, self.file = self.file, None
            file.close(remove=file.is_empty())

    def reset_after_fork(self) -> None:
        """Forget what the parent process captured: the parent still has it."""
        if self.file is not None:
            self.file.close(remove=False)
        self._start_anew()


class JournalFile:
    """A file of frames, allocated at once and mapped: a ring whose tail follows what is durable.

    The kernel writes what is in the map to the file whatever becomes of the process. The file is
    locked (``flock``) as long as its process lives. Each frame has the number of the commit that
    counted it, and the file the number of the last commit: so whoever recovers the file after a
    kill knows what was counted, and counts the rest.

    Attributes:
        id: Unique name.
        origin: Who captured what is in it.
    """

    def __init__(self, path: Path, descriptor: int, origin: Origin, size: int) -> None:
        self.id = path.stem
        self.origin = origin
        self._path = path
        self._descriptor = descriptor
        self._size = size
        self._map = mmap.mmap(descriptor, _HEADER_BYTES + size)
        self._close = finalize(self, os.close, descriptor)
        self._close.atexit = False  # the pipeline ends later, by an exit handler of its own
        # Half as dear as pack_into.
        self._words = memoryview(self._map).cast("Q")
        self._numbers = memoryview(self._map).cast("I")
        self._tail: int = self._words[_TAIL]
        # Where in the map the next frame begins and has to end, and how much the head, which is
        # counted without end, is ahead of that.
        self._at = self._limit = self._ahead = 0
        self._move(self._words[_HEAD])
        # Where each frame is that is not released.
        self._frames: dict[int, int] = {}

    @classmethod
    def create(cls, folder: Path, origin: Origin, size: int = FILE_BYTES) -> JournalFile:
        """Make a file in a folder of ours.

        Raises:
            OSError: It cannot be made; the disk may be full.
        """
        path = folder / f"{os.urandom(8).hex()}.journal"
        descriptor = open_private(path, exclusive=True)
        try:
            if not try_lock(descriptor):
                raise BlockingIOError
            # Before it is mapped: a page that finds no room on the disk kills the process.
            os.posix_fallocate(descriptor, 0, _HEADER_BYTES + size)
            meta = msgspec.json.encode(origin)
            header = _HEADER.pack(_MAGIC, size, 0, 0, 0, len(meta)) + meta
            if len(header) > _HEADER_BYTES:
                raise OSError("too many country headers")
            os.pwrite(descriptor, header, 0)
            return cls(path, descriptor, origin, size)
        except BaseException:
            os.close(descriptor)
            path.unlink()
            raise

    @classmethod
    def recover(cls, path: Path, app: str) -> JournalFile | None:
        """Take over the file of a dead process; None if it is none, or not this app's."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        with suppress(OSError, ValueError, RecursionError, struct.error, msgspec.DecodeError):
            header = os.pread(descriptor, _HEADER_BYTES, 0)
            magic, size, _, _, _, length = _HEADER.unpack_from(header)
            meta = header[_HEADER.size : _HEADER.size + length]
            if magic == _MAGIC and os.fstat(descriptor).st_size == _HEADER_BYTES + size:
                origin = msgspec.json.decode(meta, type=Origin)
                if origin.app == app and try_lock(descriptor) and is_still(path, descriptor):
                    return cls(path, descriptor, origin, size)
        os.close(descriptor)
        return None

    @property
    def folder(self) -> Path:
        """Where the file is."""
        return self._path.parent

    @property
    def committed(self) -> int:
        """Number of the last commit that was committed."""
        return int(self._words[_COMMITTED])

    @committed.setter
    def committed(self, number: int) -> None:
        self._words[_COMMITTED] = number

    def append(self, sequence: int, payload: bytes) -> bool:
        """Write a frame; return False, and write nothing, when there is no room."""
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
        self._words[_HEAD] = end + self._ahead
        return True

    @property
    def _head(self) -> int:
        return self._at + self._ahead

    def _move(self, head: int, room: int = 0) -> None:
        """Have the next frame begin at the head, and find out how long it may be if need be."""
        self._at = _HEADER_BYTES + head % self._size
        self._ahead = head - self._at
        self._limit = self._at + room

    def _find_room(self, length: int) -> bool:
        """Find a place for a frame that follows at once; return False when there is no room."""
        start = self._head
        place = start % self._size
        if place + length > self._size:  # frames do not go round the end
            start += self._size - place
            if start + length - self._tail <= self._size:
                _U32.pack_into(self._map, _HEADER_BYTES + place, _SKIP)
            place = 0
        if start + length - self._tail > self._size:
            return False
        self._move(start, min(self._size - place, self._tail + self._size - start))
        return True

    def mark(self, sequences: Iterable[int], number: int) -> None:
        """Note that a commit is about to count these."""
        frames, numbers = self._frames, self._numbers
        for sequence in sequences:
            if sequence in frames:
                numbers[frames[sequence] // 4 + _NUMBER] = number

    def release(self, sequence: int) -> None:
        """Give room back up to this number; what was in it is wiped.

        It is what came with requests, before anything was taken away for privacy's sake.
        """
        frames = self._frames
        start = self._tail
        # Listed first: to begin at the front again would pass all the gaps there each time.
        for durable in list(takewhile(sequence.__ge__, frames)):
            del frames[durable]
        if frames:
            first = next(iter(frames.values())) - _HEADER_BYTES
            self._tail += (first - start) % self._size
        else:
            self._tail = self._head
        self._words[_TAIL] = self._tail
        self._wipe(start, self._tail)
        if not frames:
            # Where it began: so as many pages are touched as one batch needs, not the whole ring.
            self._tail = -(-self._head // self._size) * self._size
            # In this order: a process that is killed in between leaves an empty file, too.
            self._words[_TAIL] = self._tail
            self._words[_HEAD] = self._tail
            self._move(self._tail)
        else:
            self._move(self._head)

    def _wipe(self, start: int, end: int) -> None:
        """Zero what is between two places, counted without end; at most the whole ring."""
        start = max(start, end - self._size)
        while start < end:
            place = start % self._size
            length = min(end - start, self._size - place)
            at = _HEADER_BYTES + place
            self._map[at : at + length] = bytes(length)
            start += length

    def entries(self) -> Iterator[tuple[int, int, Observation]]:
        """Yield what was captured and not durable: sequence, commit number, observation.

        What is damaged ends it, as nothing tells where the next frame begins.
        """
        at_logical = self._tail
        while at_logical < self._head <= self._tail + self._size:
            place = at_logical % self._size
            at = _HEADER_BYTES + place
            room = self._size - place
            if room < _FRAME.size or _U32.unpack_from(self._map, at)[0] == _SKIP:
                at_logical += room
                continue
            length, checksum, sequence, number, _ = _FRAME.unpack_from(self._map, at)
            payload = self._map[at + _FRAME.size : at + _FRAME.size + length]
            if length > room or crc32(payload) != checksum:
                return
            at_logical += _FRAME.size + length + 7 & ~7
            self._frames[sequence] = at
            with suppress(msgspec.DecodeError, UnicodeDecodeError):
                yield sequence, number, _decode(payload)

    def is_empty(self) -> bool:
        """Tell whether everything is durable."""
        return not self._frames and self._tail >= self._head

    def is_there(self) -> bool:
        """Tell whether others could find it."""
        return is_still(self._path, self._descriptor)

    def close(self, *, remove: bool) -> None:
        """Unmap and unlock; also right in a forked child, unless it removes."""
        if remove:
            with suppress(OSError):
                self._path.unlink()
        self._words.release()
        self._numbers.release()
        self._map.close()
        self._close()


def _washed(observation: Observation) -> Observation:
    changes: dict[str, Any] = {"environ": tuple(map(_wash, observation.environ))}
    if observation.extras is not None:
        changes["extras"] = _washed_texts(observation.extras)
    return msgspec.structs.replace(_washed_texts(observation), **changes)


def _washed_texts(value: _S) -> _S:
    texts = {
        name: _wash(text)
        for name, text in msgspec.structs.asdict(value).items()
        if isinstance(text, str)
    }
    return msgspec.structs.replace(value, **texts)


def _wash(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
