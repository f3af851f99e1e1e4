"""Failures inside this package: counted each time, logged once per kind, never raised."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from flask_usage_metrics.errors import StorageError
from flask_usage_metrics.runtime.fault_acts import act_of
from flask_usage_metrics.runtime.forks import FORKS
from flask_usage_metrics.runtime.private_files import StateUnavailable

logger = logging.getLogger("flask_usage_metrics")

QUIET_SECONDS = 300.0
"""A fault of the same kind is logged at most once in this time."""

_MOST_KINDS = 1000


class Faults:
    """Counts what went wrong inside this package, by the part it went wrong in.

    A line says what happened and why, what it means, and what to do. An exception's own text may
    hold an address, a query string or a token, so only its class and what `reason_of` finds is
    logged; where it was raised follows at level DEBUG.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self._logged_at: dict[tuple[str, str], float] = {}
        FORKS.register(self)

    def report(self, part: str, error: BaseException | str, consequence: str) -> None:
        """Count a fault, and log it unless one of its kind was logged lately.

        Args:
            part: Where it happened, from a small fixed set (``"capture"``, ``"country"``, ...).
            error: What happened. Of an exception `reason_of` is logged; a text is logged as it is
                and must not hold anything that came with a request.
            consequence: What it means for the user, as a clause.
        """
        kind = error if isinstance(error, str) else reason_of(error)
        now = time.monotonic()
        with self._lock:
            self._counts[part] = self._counts.get(part, 0) + 1
            logged_at = self._logged_at.get((part, kind))
            quiet = logged_at is not None and now - logged_at < QUIET_SECONDS
            if not quiet:
                if len(self._logged_at) >= _MOST_KINDS:
                    self._logged_at.clear()
                self._logged_at[part, kind] = now
        if quiet:
            return
        act = act_of(part)
        logger.warning("%s: %s; %s%s", part, kind, consequence, f"; {act}" if act else "")
        if isinstance(error, BaseException):
            logger.debug("%s: %s\n%s", part, kind, _where(error))

    @contextmanager
    def caught(
        self, part: str, consequence: str, kinds: type[BaseException] = Exception
    ) -> Iterator[None]:
        """Report what the block raises instead of raising it; off the hot path.

        Args:
            part: As in `report`.
            consequence: As in `report`.
            kinds: Class of the exceptions that are caught; `BaseException` around code of the
                app's, which may even call ``exit()``.
        """
        try:
            yield
        except kinds as error:
            self.report(part, error, consequence)

    def counts(self) -> dict[str, int]:
        """Return how many faults each part had since the start of the process."""
        with self._lock:
            return dict(self._counts)

    def reset_after_fork(self) -> None:
        """Start anew in a forked child, whose parent keeps counting its own."""
        self._lock = threading.Lock()
        self._counts = {}


def reason_of(error: BaseException) -> str:
    """Return an exception's class and why it was raised, never its own text.

    Returns:
        Such as ``"PermissionError (Permission denied)"``; the class alone where nothing but its
        text tells why.
    """
    said: object = None
    if isinstance(error, StorageError):
        said = error.reason
    elif isinstance(error, StateUnavailable):
        said = error
    elif isinstance(error, sqlite3.Error):
        said = getattr(error, "sqlite_errorname", None)  # of CPython 3.11 and later
    elif isinstance(error, OSError) and error.errno is not None:
        said = os.strerror(error.errno) if error.errno in errno.errorcode else None
    name = type(error).__name__
    return f"{name} ({said})" if said else name


def _where(error: BaseException) -> str:
    """Return the traceback of an exception and of its causes, without their texts."""
    parts: list[str] = []
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        parts = [*traceback.format_tb(cause.__traceback__), f"{type(cause).__name__}\n", *parts]
        cause = cause.__cause__ or cause.__context__
    return "".join(parts)
