"""Folders and files that only this user may write: made, checked, opened, locked."""

from __future__ import annotations

import os
import stat
import time
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]


_LOCK_PAUSE_SECONDS = 0.005


class StateUnavailable(Exception):
    """No folder can be had that only this user may write; the message names no path."""


def require_locks() -> None:
    """Check that files can be locked.

    Raises:
        StateUnavailable: The system has no ``flock``.
    """
    if fcntl is None:  # pragma: no cover - Windows
        raise StateUnavailable("this system has no flock")


def make_private(folder: Path) -> Path:
    """Make a folder for this user only, unless it exists, and check it.

    Raises:
        StateUnavailable: It cannot be made, or `check_private` refuses it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StateUnavailable(os.strerror(error.errno or 0)) from None
    check_private(folder)
    return folder


def check_private(folder: Path) -> None:
    """Refuse a folder that another user could have planted or could change.

    Raises:
        StateUnavailable: It is no folder, a link, another user's, or writable by others.
    """
    try:
        found = folder.lstat()
    except OSError as error:
        raise StateUnavailable(os.strerror(error.errno or 0)) from None
    if not stat.S_ISDIR(found.st_mode):
        raise StateUnavailable("something that is no folder is in its place")
    if found.st_uid != os.geteuid():
        raise StateUnavailable("it belongs to another user")
    if found.st_mode & 0o022:
        raise StateUnavailable("other users may write there")


def open_private(path: Path, *, exclusive: bool = False) -> int:
    """Open a file of this user for reading and writing, made if need be, never through a link.

    Args:
        path: The file.
        exclusive: Fail if it exists.

    Raises:
        OSError: It cannot be opened, or is another user's or no regular file.
    """
    return _open(path, os.O_RDWR | os.O_CREAT | (os.O_EXCL if exclusive else 0))


def open_existing(path: Path, access: int = os.O_RDWR) -> int:
    """Open an existing file of this user, never through a link; a pipe in its place cannot block.

    Args:
        path: The file.
        access: ``os.O_RDWR``, ``os.O_RDONLY`` or ``os.O_WRONLY``.

    Raises:
        OSError: It cannot be opened, or is another user's or no regular file.
    """
    return _open(path, access | os.O_NONBLOCK)


def check_private_file(path: Path) -> os.stat_result:
    """Refuse what another user could have planted in a file's place.

    Returns:
        What the system says of the file.

    Raises:
        OSError: There is none, or it is another user's, a link or no regular file.
    """
    found = path.lstat()
    _check_file(found)
    return found


def make_private_file(path: Path) -> os.stat_result:
    """Make an empty file for this user only, unless it exists, and check it.

    An existing one is not opened: to close it would take away all locks (``fcntl``) that this
    process has on it, such as SQLite's (https://www.sqlite.org/howtocorrupt.html, 2.2).

    Returns:
        What the system says of the file.

    Raises:
        OSError: It cannot be made, or `check_private_file` refuses it.
    """
    try:
        return check_private_file(path)
    except FileNotFoundError:
        with suppress(FileExistsError):  # another process was quicker
            os.close(open_private(path, exclusive=True))
    return check_private_file(path)


def make_own_file(path: Path) -> None:
    """Make an empty file that only its owner may read, whatever the umask; at the end of a link.

    Raises:
        FileExistsError: There is one, which stays as it is.
        OSError: It cannot be made.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    os.close(os.open(os.path.realpath(path), flags, 0o600))


def owner_only(path: str, flags: int) -> int:
    """Open a file; one that is made is for its owner only. To be used as `open`'s ``opener``."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def try_lock(descriptor: int) -> bool:
    """Take the exclusive ``flock`` unless somebody holds one; closing the file gives it back."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def wait_for_lock(descriptor: int, deadline: float, *, shared: bool) -> bool:
    """Take a ``flock``; blocks while somebody holds one that excludes it.

    Args:
        descriptor: Of the open file.
        deadline: Moment of the monotonic clock to stop waiting at.
        shared: Whether others may hold a shared one meanwhile.

    Returns:
        Whether it was taken in time.

    Raises:
        OSError: The file cannot be locked at all.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        time.sleep(_LOCK_PAUSE_SECONDS)


def is_still(path: Path, descriptor: int) -> bool:
    """Tell whether a path still names this open file: not deleted, not replaced."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except OSError:
        return False


def _open(path: Path, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        _check_file(os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _check_file(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        raise PermissionError("not a file of this user")
