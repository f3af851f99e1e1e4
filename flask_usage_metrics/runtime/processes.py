"""Processes identified by id and start time, because the system reuses ids."""

from __future__ import annotations

import os
from pathlib import Path


def server_key() -> str:
    """Return a text that the worker processes of one server share, and no others.

    It names their parent (by boot, id and start time) and their process group, which a supervisor
    gives each server it starts.
    """
    parent = os.getppid()
    return f"{_boot_id()} {parent} {started(parent)} {os.getpgid(0)}"


def process_key() -> str:
    """Return a text that only this process has."""
    return f"{_boot_id()} {os.getpid()} {started(os.getpid())} alone"


def started(pid: int) -> str:
    """Return when a process started, in clock ticks since boot (proc(5), field 22).

    Returns:
        ``""`` if there is no such process, it has ended, or the system does not tell.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def is_alive(pid: int, since: str) -> bool:
    """Tell whether a process id still belongs to the process that started then.

    Args:
        pid: Process id.
        since: As `started` told; ``""``: any process of that id counts.
    """
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
