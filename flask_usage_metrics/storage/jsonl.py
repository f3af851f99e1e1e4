"""The storage in a file of JSON lines: needs no database, and any tool can read it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from itertools import groupby, islice
from math import isfinite
from pathlib import Path
from time import monotonic
from typing import IO

import msgspec

from flask_usage_metrics.errors import ConfigError, StorageUnavailable
from flask_usage_metrics.records.query import Filter, Order, as_utc
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.runtime.private_files import owner_only, wait_for_lock
from flask_usage_metrics.storage.base import Storage

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND = timedelta(microseconds=1)
_OFFSET_BITS = 48
_LOCK_SECONDS = 5.0

_encode_lines = msgspec.json.Encoder().encode_lines
_decode = msgspec.json.Decoder(UsageRecord).decode


class JSONLinesStorage(Storage):
    """A file with a JSON object a line, whose keys are the fields of `UsageRecord`.

    Any number of threads and processes of one host may write, prune and read the same file: a
    batch is appended as a whole, under a lock (``flock``). Lines are in the order of writing.
    Readers skip a line that is no record, such as one cut off by a crash; `prune` and `erase` leave
    it. A record that is in the file twice is read once. `write` does not sync to the disk: a crash
    of the process loses nothing, one of the machine may.

    To read takes about 50 bytes of memory for each wanted record, for sorting; the records
    themselves are read one by one.

    Args:
        path: The file. The first write makes it and its folder. A relative path is taken from the
            directory the process is in now.
        hooks: See `Writer`.

    Raises:
        ConfigError: A hook is none, or the system has no ``flock`` (Windows).
    """

    name = "jsonl"

    def set_up(self, path: str | os.PathLike[str]) -> None:
        """Keep the path, made absolute."""
        if fcntl is None:  # pragma: no cover - Windows
            raise ConfigError("the jsonl storage needs flock, which this system does not have")
        self._path = Path(path).absolute()

    @property
    def identity(self) -> str:
        """The absolute path: ``"jsonl /var/lib/shop/usage.jsonl"``."""
        return f"jsonl {self._path}"

    def write(self, batch: Sequence[UsageRecord]) -> None:
        """Append a batch, as a whole or not at all; blocks while others hold the lock.

        Raises:
            StorageUnavailable: The file cannot be opened or written now, or the disk is full.
            Exception: A record cannot be kept as JSON; nothing was written.
        """
        self.is_of_app = True
        if not batch:
            return
        for record in batch:
            # These could be written, but not read again as they were: JSON has no infinity
            # (msgspec writes null), and a naive time compares with no other.
            optional = (record.queue_seconds or 0.0) + (record.first_byte_seconds or 0.0)
            if not isfinite(record.duration_seconds + optional):
                raise ValueError("a duration is not finite")
            if record.started_at.tzinfo is None:
                raise ValueError("started_at has no time zone")
        lines = _encode_lines(batch)
        with _unavailable_if_os_fails(), self._open_locked("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                # Another process died while it wrote: without a line end it would spoil our first.
                lines = b"\n" + lines
            try:
                _write_all(file, lines)
            except BaseException:
                # A full disk takes a part of the batch, which will be written again as a whole.
                with suppress(OSError):
                    file.truncate(end)
                raise

    def select(self, wanted: Filter, order: Order, limit: int | None) -> Iterator[UsageRecord]:
        """Yield the wanted records by (started_at, id); see the class for the memory it takes."""
        return islice(self._sorted(wanted, newest_first=order == "newest"), limit)

    def prune(self, before: datetime) -> int:
        """Delete the records with ``started_at < before``, as `delete` does, and return how many.

        Raises:
            StorageUnavailable: The file cannot be read, or the new one not be written, now.
        """
        limit = as_utc(before)
        # A filter without a limit would match all records.
        return 0 if limit is None else self.delete(Filter(until=limit))

    def delete(self, wanted: Filter) -> int:
        """Delete the wanted records, and return how many were deleted.

        The remaining lines are written to a new file beside the old one, which replaces it: that
        takes as much space on the disk. Writers wait meanwhile; readers go on with the old file.
        Memory grows by about 150 bytes a deleted record, to count each once. Lines that are no
        records remain, whatever they hold.

        Raises:
            StorageUnavailable: The file cannot be read, or the new one not be written, now.
        """
        gone: set[str] = set()
        with _unavailable_if_os_fails():
            try:
                file = self._open_locked("r+b")
            except FileNotFoundError:
                if self.is_of_app:
                    return 0
                raise
            # A link stays a link: the file it points at is replaced.
            path = Path(os.path.realpath(self._path))
            remaining = path.with_name(f".{path.name}.pruned")
            with file:
                try:
                    with open(remaining, "wb", opener=owner_only) as kept:
                        for line in file:
                            record = _parse(line)
                            if record is None or not wanted.matches(record):
                                kept.write(line)
                            else:
                                gone.add(record.id)
                        _copy_owner(file, kept)
                        kept.flush()
                        # Else, after a crash of the machine, the new name could be an empty file:
                        # the rename may reach the disk before the contents.
                        os.fsync(kept.fileno())
                    if gone:
                        remaining.replace(path)
                finally:
                    remaining.unlink(missing_ok=True)
        return len(gone)

    def _sorted(self, wanted: Filter, *, newest_first: bool) -> Iterator[UsageRecord]:
        with _unavailable_if_os_fails():
            try:
                file = self._open_locked("rb")
            except FileNotFoundError:
                if self.is_of_app:
                    return
                raise
            with file:
                # Up to here the file stays as it is: writers only append (and truncate what they
                # just appended, under the lock), and `delete` makes a new file.
                end = file.seek(0, os.SEEK_END)
                fcntl.flock(file, fcntl.LOCK_UN)
                for _, tied in groupby(
                    _index(file, end, wanted, newest_first=newest_first),
                    key=lambda entry: entry >> _OFFSET_BITS,
                ):
                    yield from _of_one_moment(file, tied, newest_first=newest_first)

    def _open_locked(self, mode: str) -> IO[bytes]:
        """Open the file and wait for its lock, which is released when the file is closed.

        Opened anew for each use: an open file would share its lock with a forked child.

        Args:
            mode: ``"a+b"`` makes the file and its folder, locks everybody else out, and does not
                buffer; ``"r+b"`` locks everybody else out; ``"rb"`` locks writers out.

        Raises:
            FileNotFoundError: There is no file, and the mode does not make one.
            StorageUnavailable: Others hold its lock for longer than 5 seconds.
        """
        appending = mode == "a+b"
        deadline = monotonic() + _LOCK_SECONDS
        while True:
            try:
                file = self._open(mode)
            except FileNotFoundError:
                if not appending:
                    raise
                self._path.parent.mkdir(parents=True, exist_ok=True)
                file = self._open(mode)
            try:
                if not wait_for_lock(file.fileno(), deadline, shared=mode == "rb"):
                    raise StorageUnavailable("jsonl: the file is locked")
                if _is_at(self._path, file):
                    return file
            except BaseException:
                file.close()
                raise
            # While we waited for the lock, the file was replaced by `delete`, or deleted.
            file.close()

    def _open(self, mode: str) -> IO[bytes]:
        buffering = 0 if mode == "a+b" else -1
        return open(self._path, mode, buffering, opener=owner_only)


def _index(file: IO[bytes], end: int, wanted: Filter, *, newest_first: bool) -> list[int]:
    """Return an int for each wanted record, sorted by time: microseconds, then the line's offset.

    An int takes 40 bytes, and 8 in the list; a tuple would take 120.
    """
    index: list[int] = []
    offset = file.seek(0)
    while offset < end:
        line = file.readline()
        record = _parse(line)
        if record is not None and wanted.matches(record):
            microseconds = (record.started_at - _EPOCH) // _MICROSECOND
            index.append(microseconds << _OFFSET_BITS | offset)
        offset += len(line)
    index.sort(reverse=newest_first)
    return index


def _of_one_moment(
    file: IO[bytes], entries: Iterator[int], *, newest_first: bool
) -> Iterator[UsageRecord]:
    """Yield the records of one microsecond, which are few, by id, each id once.

    Args:
        file: The file.
        entries: Those of `_index` with the same time.
        newest_first: Whether the greatest id comes first.
    """
    tied: dict[str, UsageRecord] = {}
    for entry in entries:
        file.seek(entry & ((1 << _OFFSET_BITS) - 1))
        record = _parse(file.readline())
        if record is not None:
            tied[record.id] = record
    for record_id in sorted(tied, reverse=newest_first):
        yield tied[record_id]


def _parse(line: bytes) -> UsageRecord | None:
    """Return the record of a line; None if it is none."""
    try:
        record = _decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return record if record.started_at.tzinfo is not None else None


def _write_all(file: IO[bytes], data: bytes) -> None:
    """Write to an unbuffered file, which may take a part at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _is_at(path: Path, file: IO[bytes]) -> bool:
    """Tell whether a path, which may be a link, still leads to an open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _copy_owner(old: IO[bytes], new: IO[bytes]) -> None:
    """Give a new file the permissions and, if root runs this, the owner of the old one."""
    status = os.fstat(old.fileno())
    os.fchmod(new.fileno(), status.st_mode & 0o7777)
    with suppress(OSError):
        os.fchown(new.fileno(), status.st_uid, status.st_gid)


@contextmanager
def _unavailable_if_os_fails() -> Iterator[None]:
    """Raise StorageUnavailable for an OSError, without its path."""
    try:
        yield
    except OSError as error:
        # Not the error's own text, which names the file.
        reason = os.strerror(error.errno) if error.errno else type(error).__name__
        raise StorageUnavailable(reason=f"jsonl: {reason}") from None
