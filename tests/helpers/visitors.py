"""An app's visitors: its state directory, its clock, processes that start there."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flask_usage_metrics.enrich.visitors.daily_ids import VisitorIds
from flask_usage_metrics.enrich.visitors.tally import VisitorTally
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.state_dir import StateDir, digest

from .process import Process, run_python, start_python

DAY = 86_400.0
MIDNIGHT = 20_000 * DAY
"""2024-10-04T00:00:00Z."""
NOON = MIDNIGHT + DAY / 2
TODAY, TOMORROW = "2024-10-04", "2024-10-05"
PERSON = ("203.0.113.9", "Mozilla/5.0", "shop.example")

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
STRANGER = 12345


class Clock:
    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Shop:
    """One app's state directory, and processes that start there.

    A process is stood in for by an instance with nothing in memory, where none is needed.
    """

    def __init__(self, place: Path, *more: Path) -> None:
        self.state = StateDir([place, *more], "shop")
        self.clock = Clock()
        self.faults = Faults()
        self._tallies: list[VisitorTally] = []

    def ids(self) -> VisitorIds:
        return VisitorIds(self.state, "shop", self.faults, clock=self.clock)

    def tally(self) -> VisitorTally:
        tally = VisitorTally(self.state, "shop", self.faults, clock=self.clock)
        self._tallies.append(tally)
        return tally

    def close(self) -> None:
        for tally in self._tallies:
            tally.close()

    def who(self, ids: VisitorIds | None = None, moment: float | None = None) -> str | None:
        return (ids or self.ids()).identify(self.clock() if moment is None else moment, *PERSON)

    @property
    def folder(self) -> Path:
        """Where it is kept today."""
        return self.state.home() / f"visitors-{digest('shop')}"

    def make_folder(self) -> Path:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        return self.folder

    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    def fault_count(self) -> int:
        return self.faults.counts().get("visitors", 0)


def mode(path: Path) -> int:
    """Return the permissions of a file or folder."""
    return path.stat().st_mode & 0o7777


def python(script: str, *arguments: object) -> str:
    """Run a script in a process of its own; return what it prints."""
    done = run_python(script, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@contextmanager
def other_process(script: str, *arguments: object) -> Iterator[Process]:
    """Run a script that prints a line when it is ready, and is killed in the end."""
    with start_python(script, *arguments) as process:
        assert process.line() == "ready"
        yield process


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Do some work in so many threads that start at once; raise if one of them raises."""
    barrier = threading.Barrier(count)
    failures = []

    def run(number: int) -> None:
        barrier.wait()
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def plant_file(folder: Path) -> None:
    folder.write_text("x")


def plant_link(folder: Path) -> None:
    folder.with_name("target").mkdir()
    folder.symlink_to(folder.with_name("target"))


def plant_open(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    (folder / f"{TODAY}.key").write_bytes(b"k" * 32)
    (folder / f"{TODAY}.sqlite3").write_bytes(b"")


def plant_strangers(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / f"{TODAY}.key").write_bytes(b"k" * 32)
    os.chown(folder, STRANGER, STRANGER)
