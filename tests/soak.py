"""Faults at random under load, with the README's two lines: one number in the end; run by hand.

    python tests/soak.py --seconds 600

Workers are killed, recycled, reloaded, and stopped for a while; the disk fills up; the totals, the
storage and the locks of server runs are held; the totals or their copy are cut, emptied,
overwritten, replaced or deleted, the next only when every worker counts on.
No shown value falls meanwhile, and in the end counter = histogram = rows, which is what was
answered; a request that a kill cut may be in it or not.

The disk is a small tmpfs, which only root may mount; without it, that fault is left out. While it
is full, or a lock is held, and until the journals are back, nothing is killed: the app says itself
(``flask_usage_journaled`` 0) that a kill would lose something then.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from helpers.damage import break_it
from helpers.process import until
from helpers.watched import Watched, total

COMMAND = (
    *(sys.executable, "-m", "gunicorn", "shop:app", "-b", "127.0.0.1:{port}"),
    *("-w", "4", "--threads", "2", "--max-requests", "3000", "--max-requests-jitter", "1000"),
)
SHARED = "flask_usage_totals_shared"
DAMAGES = ("removed", "emptied", "garbage", "half", "replaced")


class Soak:
    """Faults that befall a server.

    Args:
        server: It runs, and is watched.
        seed: Of what happens when.
        disk: Where a file fills the disk; None: it cannot be filled.
    """

    def __init__(self, server: Watched, seed: int, disk: Path | None) -> None:
        self.server = server
        self.faults: Counter[str] = Counter()
        self._rng = random.Random(seed)
        self._disk = disk
        self._stop = threading.Event()
        self.told: list[str] = []

    def run(self, seconds: float, visitors: int) -> None:
        """Visit the server, and let faults happen, for some seconds."""
        faults: list[Callable[[], None]] = [
            *(self.kill, self.kill, self.damage, self.damage, self.pause, self.reload, self.lock)
        ]
        if self._disk is not None:
            faults.append(self.fill)
        end = time.monotonic() + seconds
        with self._visitors(visitors):
            while time.monotonic() < end:
                time.sleep(self._rng.uniform(0.05, 1.0))
                fault = self._rng.choice(faults)
                self.faults[fault.__name__] += 1
                self.told.append(f"{fault.__name__} at {self.server.most:g}")
                fault()

    def kill(self) -> None:
        with suppress(ProcessLookupError, IndexError):
            os.kill(self._rng.choice(self.server.workers()), signal.SIGKILL)

    def pause(self) -> None:
        with suppress(ProcessLookupError, IndexError):
            worker = self._rng.choice(self.server.workers())
            os.kill(worker, signal.SIGSTOP)
            time.sleep(self._rng.uniform(0.1, 3))
            os.kill(worker, signal.SIGCONT)

    def reload(self) -> None:
        self.server.process.send_signal(signal.SIGHUP)

    def damage(self) -> None:
        """Damage the totals or their copy; the other one is left until the first is whole again."""
        for totals in self.server.totals():
            path = self._rng.choice([totals, totals.with_name("totals-copy.sqlite3")])
            with suppress(OSError):
                break_it(path, how := self._rng.choice(DAMAGES))
                self.told.append(f"{path.name} {how}")
        until(self._stands, "", 60)

    def lock(self) -> None:
        seconds = self._rng.uniform(0.1, 4)
        instance = self.server.folder / "instance"
        held = [*self.server.totals(), instance / "usage.sqlite3", *instance.glob("**/lock")]
        path = self._rng.choice([path for path in held if path.exists()] or [Path(os.devnull)])
        if path.suffix == ".sqlite3":
            with suppress(sqlite3.Error), closing(sqlite3.connect(path, timeout=1)) as holder:
                holder.execute("BEGIN IMMEDIATE")
                time.sleep(seconds)
        else:
            with suppress(OSError), path.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                time.sleep(seconds)
        until(self._is_journaled, True, 30)  # else a worker that came meanwhile has no journal yet

    def fill(self) -> None:
        assert self._disk is not None
        with filled(self._disk):
            time.sleep(self._rng.uniform(0.5, 4))
        until(self._is_journaled, True, 30)

    def _stands(self) -> str:
        """Return what anybody shows who shows no more than was shown when this was called."""
        before = self.server.most
        time.sleep(0.6)
        texts = [self.server.scrape() for _ in range(8)]
        behind = [text for text in texts if text is None or total(text) <= before]
        return "; ".join(
            "no answer"
            if text is None
            else f"{total(text):g} after {before:g}, shared {total(text, SHARED):g},"
            f" of {total(text, 'flask_usage_workers'):g} workers"
            for text in behind
        )

    def _is_journaled(self) -> bool:
        texts = [self.server.scrape() or "" for _ in range(8)]
        return all(total(text, "flask_usage_journaled") == 1 for text in texts)

    @contextmanager
    def _visitors(self, number: int) -> Iterator[None]:
        threads = [threading.Thread(target=self._visit) for _ in range(number)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _visit(self) -> None:
        while not self._stop.is_set():
            self.server.visit_once()
            time.sleep(0.005)


@contextmanager
def filled(disk: Path) -> Iterator[None]:
    """Leave no room on a disk inside the block."""
    filler = disk / "filler"
    try:
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            free = os.statvfs(disk)
            os.posix_fallocate(file.fileno(), 0, max(free.f_bavail - 16, 1) * free.f_bsize)
            file.seek(0, os.SEEK_END)
            while True:
                file.write(bytes(4096))
        yield
    finally:
        filler.unlink()


@contextmanager
def small_disk(folder: Path, size: str = "2g") -> Iterator[Path | None]:
    """Mount a disk that can be filled up; None if this user may not."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def soak(folder: Path, seconds: float, *, visitors: int = 3, seed: int = 0) -> str:
    """Run it; return what happened.

    Raises:
        AssertionError: A number is wrong.
    """
    with small_disk(folder / "instance") as disk, Watched(folder, *COMMAND) as server:
        server.visit(20)
        faults = Soak(server, seed, disk)
        try:
            faults.run(seconds, visitors)
            server.assert_one_number(seconds=60)
        except AssertionError as error:
            log = {line for line in server.log().splitlines() if "[INFO]" not in line}
            raise AssertionError(f"{error}\n{faults.told}\n" + "\n".join(sorted(log))) from None
        what = ", ".join(f"{name} {times}" for name, times in sorted(faults.faults.items()))
        return (
            f"answered {server.answered}, cut {server.failed}, stored and counted "
            f"{server.stored()}, scrapes {server.scrapes} ({what})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--visitors", type=int, default=3, help="threads that make requests")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        print(
            soak(Path(place), options.seconds, visitors=options.visitors, seed=options.seed),
        )


if __name__ == "__main__":
    main()
