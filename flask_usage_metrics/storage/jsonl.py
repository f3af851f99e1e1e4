"""Records as JSON lines in one file: no database, readable with any tool."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from itertools import groupby, islice
from math import isfinite
from pathlib import Path
from typing import IO

import msgspec

from flask_usage_metrics.errors import ConfigError, StorageUnavailable
from flask_usage_metrics.records.query import Filter, Order, as_utc
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.storage.base import Storage

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND = timedelta(microseconds=1)
_OFFSET_BITS = 48

_encode_lines = msgspec.json.Encoder().encode_lines
_decode = msgspec.json.Decoder(UsageRecord).decode


class JSONLinesStorage(Storage):
    """A file of one JSON object a line, with the fields of `UsageRecord` as keys.

    Any number of threads and processes of one host may append to and prune the same file: each
    batch is appended whole, under a lock (``flock``). Lines are in the order of writing. A line
    that is not a record, such as one cut short by a crash, is skipped by readers and kept by
    `prune` and `erase`; a record that is in the file twice is read once. Nothing is synced to the
    disk by `write`: a crash of the process loses nothing, one of the machine may.

    Memory for reading grows by about 50 bytes for each wanted record (not for each one in the
    file), because these have to be sorted; the records themselves are read one by one.

    Args:
        path: The file. It and its folder are made by the first write. A relative path is taken
            from the directory the process is in now.
        hooks: As for every storage.

    Raises:
        ConfigError: A hook is none, or the system has no ``flock`` (Windows).
    """

    name = "jsonl"

    def set_up(self, path: str | os.PathLike[str]) -> None:
        """Keep the path."""
        if fcntl is None:  # pragma: no cover - Windows
            raise ConfigError("the jsonl storage needs flock, which this system does not have")
        self._path = Path(path).absolute()

    @property
    def identity(self) -> str:
        """Kind and place of the file."""
        return f"jsonl {self._path}"

    def write(self, batch: Sequence[UsageRecord]) -> None:
        """Append a batch, whole or not at all.

        Raises:
            StorageUnavailable: The file cannot be opened or written now, or the disk is full.
            Exception: A record cannot be kept as JSON; nothing was written.
        """
        if not batch:
            return
        for record in batch:
            # These would be written, but not be read again as what they were: JSON has no
            # infinity (msgspec writes null), and naive times compare with no others.
            if not (isfinite(record.duration_seconds) and isfinite(record.queue_seconds or 0.0)):
                raise ValueError("a duration is not finite")
            if record.started_at.tzinfo is None:
                raise ValueError("started_at has no time zone")
        lines = _encode_lines(batch)
        with _unavailable_if_os_fails(), self._open_locked("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                # Somebody died while writing: end their line, or it would spoil our first.
                lines = b"\n" + lines
            try:
                _write_all(file, lines)
            except BaseException:
                # A disk that fills up takes a part, but the whole batch will be offered again.
                with suppress(OSError):
                    file.truncate(end)
                raise

    def select(self, wanted: Filter, order: Order, limit: int | None) -> Iterator[UsageRecord]:
        """Yield the wanted records by (started_at, id); see the class for the memory it takes."""
        return islice(self._sorted(wanted, newest_first=order == "newest"), limit)

    def prune(self, before: datetime) -> int:
        """Delete the records with ``started_at < before`` and return how many these were.

        As `delete` does it.

        Raises:
            StorageUnavailable: The file cannot be read, or the new one not be written, now.
        """
        limit = as_utc(before)
        # Without a limit, a filter would be for all records.
        return 0 if limit is None else self.delete(Filter(until=limit))

    def delete(self, wanted: Filter) -> int:
        """Delete the wanted records and return how many these were.

        What remains is written to a new file beside the old one, which it then replaces: it
        needs that much space on the disk. Writers wait meanwhile; readers keep the old file.
        Memory grows by about 150 bytes a deleted record, to count none of them twice. Lines that
        are no records remain, whatever they hold.

        Raises:
            StorageUnavailable: The file cannot be read, or the new one not be written, now.
        """
        gone: set[str] = set()
        with _unavailable_if_os_fails():
            try:
                file = self._open_locked("r+b")
            except FileNotFoundError:
                return 0
            # A link stays a link: what it points at is replaced.
            path = Path(os.path.realpath(self._path))
            remaining = path.with_name(f".{path.name}.pruned")
            with file:
                try:
                    with remaining.open("wb") as kept:
                        for line in file:
                            record = _parse(line)
                            if record is None or not wanted.matches(record):
                                kept.write(line)
                            else:
                                gone.add(record.id)
                        _copy_owner(file, kept)
                        kept.flush()
                        # Renamed before its contents reached the disk, a crash of the machine
                        # could leave an empty file in the place of all records.
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
                return
            with file:
                # What lies before this end stays as it is: writers only append, or take back,
                # under the lock, what they appended; a pruner makes a new file.
                end = file.seek(0, os.SEEK_END)
                fcntl.flock(file, fcntl.LOCK_UN)
                for _, places in groupby(
                    _index(file, end, wanted, newest_first=newest_first),
                    key=lambda place: place >> _OFFSET_BITS,
                ):
                    yield from _of_one_moment(file, places, newest_first=newest_first)

    def _open_locked(self, mode: str) -> IO[bytes]:
        """Open the file and wait for its lock, which closing it gives back.

        Opened for each use: a file kept open would share its lock with a forked child.

        Args:
            mode: ``"a+b"`` makes the file and its folder and is not buffered; ``"r+b"`` locks
                everybody else out, too; ``"rb"`` writers only.

        Raises:
            FileNotFoundError: There is no file, and it was not to be made.
        """
        appending = mode == "a+b"
        while True:
            try:
                file: IO[bytes] = self._path.open(mode, buffering=0 if appending else -1)
            except FileNotFoundError:
                if not appending:
                    raise
                self._path.parent.mkdir(parents=True, exist_ok=True)
                file = self._path.open(mode, buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_SH if mode == "rb" else fcntl.LOCK_EX)
                if _is_at(self._path, file):
                    return file
            except BaseException:
                file.close()
                raise
            # While we waited for the lock, a pruner replaced the file, or somebody deleted it.
            file.close()


def _index(file: IO[bytes], end: int, wanted: Filter, *, newest_first: bool) -> list[int]:
    """Return time and place of the wanted records as one int each, sorted by time.

    40 bytes an int and 8 in the list, where a tuple would take 120.
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
    file: IO[bytes], places: Iterator[int], *, newest_first: bool
) -> Iterator[UsageRecord]:
    """Read the records of one microsecond, which are few; each id once."""
    tied: dict[str, UsageRecord] = {}
    for place in places:
        file.seek(place & ((1 << _OFFSET_BITS) - 1))
        record = _parse(file.readline())
        if record is not None:
            tied[record.id] = record
    for record_id in sorted(tied, reverse=newest_first):
        yield tied[record_id]


def _parse(line: bytes) -> UsageRecord | None:
    try:
        record = _decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return record if record.started_at.tzinfo is not None else None


def _write_all(file: IO[bytes], data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _is_at(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _copy_owner(old: IO[bytes], new: IO[bytes]) -> None:
    """Leave the file to whom it belonged, even if root prunes it."""
    status = os.fstat(old.fileno())
    os.fchmod(new.fileno(), status.st_mode & 0o7777)
    with suppress(OSError):
        os.fchown(new.fileno(), status.st_uid, status.st_gid)


@contextmanager
def _unavailable_if_os_fails() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # Not the error's own text, which names the file.
        reason = os.strerror(error.errno) if error.errno else type(error).__name__
        raise StorageUnavailable(f"jsonl: {reason}") from None
