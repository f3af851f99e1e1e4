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
    make_private,
    open_existing,
    open_private,
    try_lock,
    wait_for_lock,
)
from flask_usage_metrics.runtime.run_notes import RunNote
from flask_usage_metrics.runtime.servers import Server
from flask_usage_metrics.runtime.state_dir import StateDir, digest

LOCK = "lock"

TOTALS = "totals.sqlite3"
"""Name of the file in which the members add their totals together."""

APP_METRICS = "app-metrics.sqlite3"
"""Name of the file in which they share the app's own metrics."""

_LOCK_SECONDS = 1.0
"""How long a process waits to become a member: who looks for dead runs holds the lock for less than
a millisecond, unless it is stopped meanwhile."""

_STALE_SECONDS = 30 * 86_400.0
"""Age at which a journal that nobody recovered may be deleted: its app is gone, or its settings
changed."""

_FOREIGN_SECONDS = 600.0
"""Age at which a run of another container or machine counts as dead when it has no members: whether
somebody there would start more cannot be seen from here."""

_RUN = re.compile(r"g-[0-9a-f]{16}")
_OWN_FILE = re.compile(
    r"lock|(totals(-copy)?|app-metrics)\.sqlite3(-wal|-shm|-journal)?|[0-9a-f]{16}\.journal"
)


class ServerRun:
    """One run of a server, which this process may be a member of.

    A member holds a shared ``flock``, which the kernel gives back however a process ends. A run is
    dead when it has no members and the process that would start more has ended.

    Args:
        folder: See the attribute.
        note: See the attribute.

    Attributes:
        folder: Where the members keep the files they share; it exists once one has joined.
        note: Of this process.
    """

    def __init__(self, folder: Path, note: RunNote) -> None:
        self.folder = folder
        self.note = note
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
            is_held = wait_for_lock(descriptor, deadline, shared=True)
            if is_held and is_still(self.folder / LOCK, descriptor):
                self.note.write(descriptor)
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
        if self.note.starter == str(os.getpid()):
            remove_run(self.folder, starter_ends=True)


def join_run(state: StateDir, server: Server, key: str) -> ServerRun:
    """Join the run of a server, which the first of its workers makes; blocks some seconds at most.

    Args:
        state: Of the app. A run is looked for in all its places, as the first one may have been of
            no use when the first worker came.
        server: Of this process.
        key: Text that the members have in common beside a name of the server.

    Raises:
        OSError: No folder can be used, or a lock is held for longer than a second.
        StateUnavailable: None of the places can be used.
    """
    home = state.home()
    note = RunNote.of(server, key)
    with _one_by_one(home):
        living = living_runs(state.homes())
        found = [folder for folder, known in living if known.is_of(note)]
        if not found and server.has_master:
            found = [folder for folder, known in living if known.is_of_master(note)]
        run = ServerRun(found[0] if found else home / f"g-{digest(repr(note))}", note)
        run.join()
    return run


def living_runs(homes: Iterable[Path]) -> list[tuple[Path, RunNote]]:
    """Return the folders of an app's runs that are not dead, and their notes."""
    found = []
    for folder in _folders(homes):
        with suppress(OSError, StateUnavailable), _held(folder) as (note, is_free):
            if not (is_free and _is_over(note)):
                found.append((folder, note))
    return found


def dead_runs(homes: Iterable[Path], own: Path, note: RunNote | None = None) -> Iterator[Path]:
    """Yield the folders of an app's runs that are dead.

    Args:
        homes: See `StateDir.homes`.
        own: Folder of this process's run, which is skipped.
        note: Of this process: runs of its master's that have no members count as dead too if their
            key is another, as after a reload with other settings. None: they do not.
    """
    for folder in _folders(homes):
        if folder != own:
            with suppress(OSError, StateUnavailable), _held(folder) as (known, is_free):
                if is_free and (_is_over(known) or (note is not None and note.follows(known))):
                    yield folder


def remove_run(folder: Path, *, starter_ends: bool = False) -> None:
    """Remove a dead run, unless it holds a journal to recover or has members again; never raises.

    Args:
        folder: Of the run.
        starter_ends: Whether the process that started it counts as ended already.
    """
    with suppress(OSError, StateUnavailable), _held(folder) as (note, is_free):
        if not (is_free and (starter_ends or _is_over(note))):
            return
        if any(_is_wanted(path) for path in folder.glob("*.journal")):
            return
        if note.is_foreign() and _age_seconds(folder / LOCK) < _FOREIGN_SECONDS:
            return
        for path in folder.iterdir():
            if _OWN_FILE.fullmatch(path.name):
                path.unlink()
        folder.rmdir()


def _is_over(note: RunNote) -> bool:
    """Tell whether nobody would start members of a run any more."""
    return not note.starter_lives()


def _folders(homes: Iterable[Path]) -> Iterator[Path]:
    for home in homes:
        folders: list[Path] = []
        with suppress(OSError):  # somebody may remove it meanwhile
            folders = sorted(home.iterdir())
        yield from (folder for folder in folders if _RUN.fullmatch(folder.name))


def _is_wanted(journal: Path) -> bool:
    """Tell whether a journal may still be recovered."""
    return _age_seconds(journal) < _STALE_SECONDS


def _age_seconds(path: Path) -> float:
    return time.time() - path.lstat().st_mtime


@contextmanager
def _one_by_one(home: Path) -> Iterator[None]:
    """Let one process at a time look for a run and make one; nobody waits for longer than a second.

    Whoever does not get the lock goes on: workers make a folder of the same name unless each
    listens at an address of its own besides.

    Raises:
        OSError: The lock's file cannot be used.
    """
    descriptor = open_private(home / "joining")
    try:
        wait_for_lock(descriptor, time.monotonic() + _LOCK_SECONDS, shared=False)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _held(folder: Path) -> Iterator[tuple[RunNote, bool]]:
    """Keep processes from joining a run without members inside the block.

    Yields:
        Its note, and whether it has none.

    Raises:
        OSError: It is no run, or gone.
        StateUnavailable: Other users may write it.
    """
    check_private(folder)
    lock = folder / LOCK
    descriptor = open_existing(lock)
    try:
        note = RunNote.read(descriptor)
        yield note, try_lock(descriptor) and is_still(lock, descriptor)
    finally:
        os.close(descriptor)
