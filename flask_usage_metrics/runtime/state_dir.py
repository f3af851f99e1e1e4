"""The state directory: what processes of one app release on disk for each other, no stranger."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import finalize

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"

_STALE_SECONDS = 30 * 86_400.0
"""What nobody adopted for so long belongs to an app that is gone, or has another storage now."""

_RUN = re.compile(r"g-[0-9a-f]{16}")
_OWN_FILE = re.compile(r"lock|totals\.sqlite3(-wal|-shm|-journal)?|[0-9a-f]{16}\.journal")


class StateUnavailable(Exception):
    """There is no place that is ours alone; the message names no path."""


class State:
    """The folder of one app, below the first place that can be had.

    Args:
        places: Folders to use, in this order of preference.
        app: What tells this app from others in the same place.
    """

    def __init__(self, places: Sequence[Path], app: str) -> None:
        self.places = tuple(places)
        slug = re.sub(r"[^A-Za-z0-9]+", "-", app)[:24].strip("-") or "app"
        self._name = f"{slug}-{digest(app)}"

    def home(self) -> Path:
        """Return the app's folder, made if need be, for its owner only.

        Raises:
            StateUnavailable: It cannot be made, or is not ours alone.
        """
        if fcntl is None:  # pragma: no cover - Windows
            raise StateUnavailable("this system has no flock")
        reason = "no place is configured"
        for place in self.places:
            try:
                make_private(place)
                return make_private(place / self._name)
            except StateUnavailable as error:
                reason = str(error)
        raise StateUnavailable(reason)

    def homes(self) -> Iterator[Path]:
        """Yield the app's folders that exist in any of the places and are ours."""
        for place in self.places:
            home = place / self._name
            with suppress(StateUnavailable):
                check_private(place)
                check_private(home)
                yield home


class ServerRun:
    """One server's folder in a home: its workers are members.

    WorkerGroup is a shared ``flock``, which the kernel gives back however a process ends. A
    server run is dead when it has no members and nobody is left who would start more.

    Args:
        home: The app's folder.
        key: What the members have in common.
        starter: Process id of who starts members: their parent, or the only member itself.
    """

    def __init__(self, home: Path, key: str, starter: int) -> None:
        self.folder = home / f"g-{digest(key)}"
        self._starter = starter
        self._close: finalize[..., Any] | None = None

    def join(self) -> None:
        """Become a member.

        Raises:
            OSError: The folder cannot be used.
            StateUnavailable: The folder is not ours alone.
        """
        while self._close is None:
            make_private(self.folder)
            try:
                descriptor = open_private(self.folder / LOCK)
            except FileNotFoundError:  # somebody took the server run for dead and removed it
                continue
            close = finalize(self, os.close, descriptor)
            close.atexit = False  # the pipeline ends later, by an exit handler of its own
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if is_still(self.folder / LOCK, descriptor):
                os.pwrite(descriptor, f"{self._starter} {started(self._starter)}\n".encode(), 0)
                self._close = close
            else:
                close()

    def release(self) -> None:
        """Be no member any more; also right in a forked child, whose parent remains one."""
        if self._close is not None:
            self._close()
            self._close = None

    def end(self) -> None:
        """Be no member any more, and remove what nobody else needs."""
        self.release()
        if self._starter == os.getpid():
            remove_run(self.folder, starter_ends=True)


def dead_runs(homes: Iterable[Path], own: Path) -> Iterator[Path]:
    """Yield the folders of an app's server runs that are dead.

    Args:
        homes: See `State.homes`.
        own: Folder of the own server run, which is not dead.
    """
    for home in homes:
        for folder in sorted(home.iterdir()):
            if folder == own or not _RUN.fullmatch(folder.name):
                continue
            with suppress(OSError, StateUnavailable), _held(folder) as dead:
                if dead:
                    yield folder


def remove_run(folder: Path, *, starter_ends: bool = False) -> None:
    """Remove a dead server run, unless there is a journal left or it is dead no more.

    Args:
        folder: Where it is.
        starter_ends: Whether its starter counts as gone already.
    """
    with suppress(OSError, StateUnavailable), _held(folder, starter_ends) as dead:
        if not dead or any(_is_wanted(path) for path in folder.glob("*.journal")):
            return
        for path in folder.iterdir():
            if _OWN_FILE.fullmatch(path.name):
                path.unlink()
        folder.rmdir()


def _is_wanted(journal: Path) -> bool:
    """Tell whether a journal may still be adopted: by an app that was not changed since."""
    return time.time() - journal.lstat().st_mtime < _STALE_SECONDS


@contextmanager
def _held(folder: Path, starter_ends: bool = False) -> Iterator[bool]:
    """Keep others from joining a server run meanwhile; yield whether it is dead.

    Raises:
        OSError: It is no server run, or gone.
        StateUnavailable: It is not ours alone.
    """
    check_private(folder)
    lock = folder / LOCK
    descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if not (try_lock(descriptor) and is_still(lock, descriptor)):
            yield False
            return
        starter = os.pread(descriptor, 64, 0).decode("ascii", "replace").strip()
        pid, _, since = starter.partition(" ")
        yield starter_ends or not (pid.isdecimal() and is_alive(int(pid), since))
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------ who is a sibling


def siblings_key() -> str:
    """Return what worker processes of one server have in common, and others have not.

    Their parent, told apart from a later process of the same number by when it started, and their
    process group, which a supervisor gives each server it starts.
    """
    parent = os.getppid()
    return f"{_boot_id()} {parent} {started(parent)} {os.getpgid(0)}"


def process_key() -> str:
    """Return what this process alone has."""
    return f"{_boot_id()} {os.getpid()} {started(os.getpid())} alone"


def started(pid: int) -> str:
    """Return when a process started, in clock ticks since boot (proc(5)).

    Returns:
        ``""`` if not known, or if the process has ended and nobody has asked how.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def is_alive(pid: int, since: str) -> bool:
    """Tell whether the process of that number is still the one that started then."""
    if since:
        return started(pid) == since
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def default_places(instance: Path) -> list[Path]:
    """Return where state is kept unless configured: the instance folder, if there is one already.

    Else a folder of the user's own among the system's temporary files: an app that never had an
    instance folder should not get one from us.
    """
    user = os.getuid() if hasattr(os, "getuid") else ""
    temporary = Path(tempfile.gettempdir(), f"flask-usage-metrics-{user}")
    return [instance / "usage-state", temporary] if instance.is_dir() else [temporary]


# ------------------------------------------------------------------------ what is ours alone


def make_private(folder: Path) -> Path:
    """Make a folder for its owner only, unless it exists, and check it.

    Raises:
        StateUnavailable: It cannot be made, or is not ours alone.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StateUnavailable(os.strerror(error.errno or 0)) from None
    check_private(folder)
    return folder


def check_private(folder: Path) -> None:
    """Refuse what another user could have planted or could change.

    Raises:
        StateUnavailable: It is no folder, a link, another user's, or open to others.
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
    """Open a file of ours for reading and writing, made if need be, and never through a link.

    Args:
        path: The file.
        exclusive: Only if it does not exist yet.

    Raises:
        OSError: It cannot be opened, or belongs to somebody else.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags | (os.O_EXCL if exclusive else 0), 0o600)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        os.close(descriptor)
        raise PermissionError("not a file of this user")
    return descriptor


def try_lock(descriptor: int) -> bool:
    """Take the exclusive ``flock`` if nobody holds one; it is given back when the file closes."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_still(path: Path, descriptor: int) -> bool:
    """Tell whether an open file is what the path names now."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except OSError:
        return False


def digest(text: str) -> str:
    """Return 16 hexadecimal characters that stand for a text."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest()
