"""One run of a server, from start to stop, as a folder its worker processes are members of."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import finalize

from flask_usage_metrics.runtime.private_files import (
    StateUnavailable,
    check_private,
    is_still,
    lock_shared,
    make_private,
    open_existing,
    open_private,
    try_lock,
)
from flask_usage_metrics.runtime.processes import is_alive, started
from flask_usage_metrics.runtime.state_dir import digest

LOCK = "lock"

_LOCK_SECONDS = 1.0
"""How long a process waits to become a member: who looks for dead runs holds the lock for less than
a millisecond, unless it is stopped meanwhile."""

_STALE_SECONDS = 30 * 86_400.0
"""Age at which a journal that nobody recovered may be deleted: its app is gone, or its settings
changed."""

_RUN = re.compile(r"g-[0-9a-f]{16}")
_OWN_FILE = re.compile(r"lock|totals\.sqlite3(-wal|-shm|-journal)?|[0-9a-f]{16}\.journal")


class ServerRun:
    """One run of the server, which this process may be a member of.

    A member holds a shared ``flock``, which the kernel gives back however a process ends. A run is
    dead when it has no members and the process that would start more has ended.

    Args:
        home: The app's folder.
        key: Text that the members have in common, such as `processes.server_key`.
        starter: Id of the process that starts members: their parent, or the only member itself.

    Attributes:
        folder: Where the members keep the files they share; it exists once one has joined.
    """

    def __init__(self, home: Path, key: str, starter: int) -> None:
        self.folder = home / f"g-{digest(key)}"
        self._starter = starter
        self._close: finalize[..., Any] | None = None

    def join(self) -> None:
        """Become a member; blocks for a second at most, as a request may wait for it.

        Raises:
            OSError: The folder cannot be used, or its lock is held for longer than a second.
            StateUnavailable: Other users may write the folder.
        """
        deadline = time.monotonic() + _LOCK_SECONDS
        while self._close is None:
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "the lock of the server run is held")
            make_private(self.folder)
            try:
                descriptor = open_private(self.folder / LOCK)
            except FileNotFoundError:  # somebody took the run for dead and removed it
                continue
            close = finalize(self, os.close, descriptor)
            close.atexit = False  # the pipeline ends later, by an exit handler of its own
            is_held = lock_shared(descriptor, deadline)
            if is_held and is_still(self.folder / LOCK, descriptor):
                os.pwrite(descriptor, f"{self._starter} {started(self._starter)}\n".encode(), 0)
                self._close = close
            else:
                close()

    def release(self) -> None:
        """Stop being a member; in a forked child too, whose parent remains one."""
        if self._close is not None:
            self._close()
            self._close = None

    def end(self) -> None:
        """Stop being a member, and remove the folder if this process started the run."""
        self.release()
        if self._starter == os.getpid():
            remove_run(self.folder, starter_ends=True)


def dead_runs(homes: Iterable[Path], own: Path) -> Iterator[Path]:
    """Yield the folders of an app's runs that are dead.

    Args:
        homes: See `StateDir.homes`.
        own: Folder of this process's run, which is skipped.
    """
    for home in homes:
        folders: list[Path] = []
        with suppress(OSError):  # somebody may remove it meanwhile
            folders = sorted(home.iterdir())
        for folder in folders:
            if folder == own or not _RUN.fullmatch(folder.name):
                continue
            with suppress(OSError, StateUnavailable), _held(folder) as dead:
                if dead:
                    yield folder


def remove_run(folder: Path, *, starter_ends: bool = False) -> None:
    """Remove a dead run, unless it holds a journal to recover or has members again; never raises.

    Args:
        folder: Of the run.
        starter_ends: Whether the process that started it counts as ended already.
    """
    with suppress(OSError, StateUnavailable), _held(folder, starter_ends) as dead:
        if not dead or any(_is_wanted(path) for path in folder.glob("*.journal")):
            return
        for path in folder.iterdir():
            if _OWN_FILE.fullmatch(path.name):
                path.unlink()
        folder.rmdir()


def _is_wanted(journal: Path) -> bool:
    """Tell whether a journal may still be recovered."""
    return time.time() - journal.lstat().st_mtime < _STALE_SECONDS


@contextmanager
def _held(folder: Path, starter_ends: bool = False) -> Iterator[bool]:
    """Keep processes from joining a run inside the block; yield whether it is dead.

    Raises:
        OSError: It is no run, or gone.
        StateUnavailable: Other users may write it.
    """
    check_private(folder)
    lock = folder / LOCK
    descriptor = open_existing(lock)
    try:
        if not (try_lock(descriptor) and is_still(lock, descriptor)):
            yield False
            return
        starter = os.pread(descriptor, 64, 0).decode("ascii", "replace").strip()
        pid, _, since = starter.partition(" ")
        yield starter_ends or not (pid.isdecimal() and is_alive(int(pid), since))
    finally:
        os.close(descriptor)
