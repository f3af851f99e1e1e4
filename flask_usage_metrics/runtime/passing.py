"""Exceptions that tell of the machine, not of what was tried: it may go well the next time."""

from __future__ import annotations

import errno
import os

_PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR}


def is_passing(error: BaseException) -> bool:
    """Tell whether there was too little of something, such as memory or open files."""
    if isinstance(error, ImportError):  # of a shared library: it has no number, only the words
        return any(os.strerror(number) in str(error) for number in _PASSING)
    return isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno in _PASSING
    )
