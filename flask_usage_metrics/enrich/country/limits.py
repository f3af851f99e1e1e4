"""Bounds that keep a slow, hung or gone source of countries from harming anything else."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

import msgspec


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of the blocking sources (HTTP service, function) and of looking after a database file.

    Attributes:
        connect_seconds: An HTTP service is given up that does not accept within.
        read_seconds: ... or is silent for so long.
        answer_seconds: ... or has not answered to the end, from its headers on, within.
        answer_bytes: ... or answers more than that.
        deadline_seconds: A record waits so long for a blocking source; after that it is unknown.
        questions: Addresses waiting for one blocking source; more are unknown.
        answers: Answers kept of one blocking source, the least recently used go first.
        answers_bytes: All ``ip_info`` kept of one service, likewise.
        keep_seconds: An answer of a service is kept.
        keep_failure_seconds: ... and that there was none.
        keep_function_seconds: An answer of a function is kept.
        keep_raised_seconds: ... and that it raised.
        pause_after: Failures in a row after which a service is left alone.
        pause_seconds: ... and for how long.
        stuck_seconds: A thread that hangs in one question for so long is left behind for another.
        stuck_threads: ... of which there are never more than this.
        retry_seconds: How often a source is tried that the machine had no room for.
        stat_seconds: How often a database file is looked at for a change.
        clock: Monotonic seconds.
    """

    connect_seconds: float = 2.0
    read_seconds: float = 2.0
    answer_seconds: float = 2.0
    answer_bytes: int = 65_536
    deadline_seconds: float = 5.0
    questions: int = 1_000
    answers: int = 10_000
    answers_bytes: int = 16_777_216
    keep_seconds: float = 86_400.0
    keep_failure_seconds: float = 600.0
    keep_function_seconds: float = 300.0
    keep_raised_seconds: float = 10.0
    pause_after: int = 5
    pause_seconds: float = 60.0
    stuck_seconds: float = 60.0
    stuck_threads: int = 3
    retry_seconds: float = 0.5
    stat_seconds: float = 60.0
    clock: Callable[[], float] = monotonic
