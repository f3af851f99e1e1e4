"""Processes identified by id and start time, because the system reuses ids."""

from __future__ import annotations

import os
from pathlib import Path

_FORKED = 0x40
"""The flag PF_FORKNOEXEC of proc(5), field 9."""


def system_name() -> str:
    """Return a text that names this boot of this machine, and the namespaces of this container.

    Process ids and addresses of another one mean something else.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return " ".join([boot, *map(_namespace, ("net", "pid"))])


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


def is_fork() -> bool:
    """Tell whether this process is a copy of its parent that has run no program since."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return bool(int(fields[6]) & _FORKED)


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


def _namespace(kind: str) -> str:
    """Return a text that the processes of one container have in common."""
    try:
        return os.readlink(f"/proc/self/ns/{kind}")  # noqa: PTH115 - it is no path
    except OSError:
        return ""
