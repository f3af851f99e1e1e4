"""Random keys that an app's processes on one machine share, each in a private file."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from flask_usage_metrics.runtime.private_files import (
    is_still,
    make_private,
    open_existing,
    open_private,
    try_lock,
)

KEY_BYTES = 32

_LOCK_SECONDS = 1.0


def find_key(paths: Iterable[Path]) -> bytes | None:
    """Return the key of `KEY_BYTES` bytes in the first of these files that holds one, or None."""
    for path in paths:
        with suppress(OSError):
            descriptor = open_existing(path, os.O_RDONLY)
            try:
                # No lock: it is written at once, and would be held by whoever hangs.
                key = _read(descriptor)
            finally:
                os.close(descriptor)
            if key is not None:
                return key
    return None


def make_key(path: Path) -> bytes:
    """Return the key all processes agree on, from a file that one of them writes.

    Args:
        path: The file; its folder is made, for this user only.

    Raises:
        OSError: The file cannot be used, or is locked for longer than a second.
        StateUnavailable: Other users may write the folder.
    """
    make_private(path.parent)
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        descriptor = open_private(path)
        try:
            is_mine = try_lock(descriptor) and is_still(path, descriptor)
            key = _read(descriptor)
            if key is not None:
                return key
            if is_mine:
                key = os.urandom(KEY_BYTES)
                # So that who reads it meanwhile sees all of it or too little.
                os.ftruncate(descriptor, 0)
                if os.pwrite(descriptor, key, 0) != KEY_BYTES:
                    raise OSError("no room for a key")
                return key
        finally:
            os.close(descriptor)
        if time.monotonic() >= deadline:
            raise TimeoutError("the key's file is locked")
        time.sleep(0.005)


def destroy_key(path: Path) -> None:
    """Overwrite a key and remove its file; several processes may do so at once.

    Raises:
        OSError: It is still there.
    """
    with suppress(OSError):
        descriptor = open_existing(path, os.O_WRONLY)
        try:
            # In place: a removed file's content stays on the disk.
            os.pwrite(descriptor, bytes(min(os.fstat(descriptor).st_size, 4096)), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    path.unlink(missing_ok=True)


def _read(descriptor: int) -> bytes | None:
    """Return the key in an open file; None if it is missing, incomplete or destroyed."""
    content = os.pread(descriptor, KEY_BYTES + 1, 0)
    return content if len(content) == KEY_BYTES and any(content) else None
