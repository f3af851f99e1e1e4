"""The file of a SQLite database: whether it is still the one that was written to."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

from flask_usage_metrics.errors import StorageUnavailable
from flask_usage_metrics.runtime.private_files import try_lock

_LOCK_SECONDS = 1.0
_EMPTY_SECONDS = 2.0
"""How long an empty file is left alone: somebody may be copying another one into it."""

Change = Literal["none", "gone", "replaced", "emptied", "cut"]
"""What happened to a file: gone means that there is none, replaced that another one has its name,
cut that it is shorter, as after a VACUUM or a truncation."""

_Identity = tuple[int, int]


class DatabaseFile:
    """Tells what others did to a file, by its name, device, inode and size.

    SQLite notices none of it: it goes on writing to a file that nobody finds any more, or to the
    log of one that is empty, which the next process throws away.

    Args:
        path: The file.

    Attributes:
        path: The file.
        records: How many records this process wrote to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.forget()

    def forget(self) -> None:
        """Take whatever has the name next for the file."""
        self.records = 0
        self._identity: _Identity | None = None
        self._size = 0
        self._beside: dict[str, _Identity | None] = {}
        self._empty_since: float | None = None

    def note(self) -> None:
        """Remember the file, its log and its index as they are."""
        found = _stat(self.path)
        self._identity = _identity(found)
        self._size = found.st_size if found else 0
        self._empty_since = None
        for suffix in ("-wal", "-shm"):
            self._beside[suffix] = _identity(_stat(self._named(suffix)))

    def exists(self) -> bool:
        """Tell whether there is a file of that name."""
        return self.path.exists()

    def is_known(self) -> bool:
        """Tell whether the file was noted since it was last forgotten."""
        return self._identity is not None

    def change(self) -> Change:
        """Tell what happened to the file since it was noted."""
        if self._identity is None:
            return "none"
        found = _stat(self.path)
        if found is None:
            return "gone"
        if _identity(found) != self._identity:
            return "replaced"
        if found.st_size >= self._size:
            return "none"
        return "cut" if found.st_size else "emptied"

    def wait_until_sure(self) -> None:
        """See to it that an empty file stays so.

        Raises:
            StorageUnavailable: It has not been empty for long; the message says what is lost.
        """
        now = time.monotonic()
        if self._empty_since is None:
            self._empty_since = now
        if now - self._empty_since < _EMPTY_SECONDS:
            raise StorageUnavailable(
                reason=f"the file was emptied: {self.records} records that this process wrote are "
                "lost"
            )

    def remove_remains(self) -> None:
        """Remove the file if it is empty, and the noted log and index, which fit no other file.

        Whoever has them open goes on with what nobody else finds; and notices, as this process did.

        Raises:
            StorageUnavailable: Another process is about to do the same.
        """
        try:
            folder = os.open(self.path.parent, os.O_RDONLY)
        except OSError:  # gone with all that was in it; or Windows, which keeps open files anyway
            return
        try:
            # Else one could remove the log that another has just made for the next file.
            deadline = time.monotonic() + _LOCK_SECONDS
            while not try_lock(folder):
                if time.monotonic() > deadline:
                    raise StorageUnavailable(reason="another process replaces the file")
                time.sleep(0.01)
            with suppress(OSError):
                found = _stat(self.path)
                if found and _identity(found) == self._identity and not found.st_size:
                    self.path.unlink()
                for suffix, noted in self._beside.items():
                    beside = self._named(suffix)
                    if noted is not None and _identity(_stat(beside)) == noted:
                        beside.unlink()
        finally:
            os.close(folder)

    def log_bytes(self) -> int:
        """Return the size of the write-ahead log; 0 if there is none."""
        found = _stat(self._named("-wal"))
        return found.st_size if found else 0

    def _named(self, suffix: str) -> Path:
        return self.path.with_name(f"{self.path.name}{suffix}")


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _identity(found: os.stat_result | None) -> _Identity | None:
    return None if found is None else (found.st_dev, found.st_ino)
