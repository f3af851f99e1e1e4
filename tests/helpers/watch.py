"""What this process has open or running because of one test, whatever earlier tests left."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

import pytest


def descriptors(folder: Path) -> int:
    """Return the number of files below a folder that this process has open."""
    count = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # it was closed meanwhile
            count += str(descriptor.readlink()).startswith(f"{folder}/")
    return count


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The threads of the package that were started during the test, the ended ones as well."""
    threads: list[threading.Thread] = []
    start = threading.Thread.start

    def noted(thread: threading.Thread) -> None:
        if thread.name.startswith("flask_usage_metrics"):
            threads.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", noted)
    return threads


def alive(threads: list[threading.Thread]) -> list[str]:
    """Return the names of those threads that run."""
    return [thread.name for thread in threads if thread.is_alive()]
