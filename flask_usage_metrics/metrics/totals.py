"""The totals behind the metrics: of all apps on one registry, and of all workers of the server."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Protocol

from flask_usage_metrics.metrics.counts import Counts
from flask_usage_metrics.metrics.families import Family
from flask_usage_metrics.metrics.gauges import Gauges, GaugeSource, gauge_families, read_gauges
from flask_usage_metrics.metrics.names import (
    DESCRIPTIONS,
)
from flask_usage_metrics.metrics.onlooker import Onlooker
from flask_usage_metrics.metrics.shape import Shape
from flask_usage_metrics.metrics.shared_totals import Changes, SharedTotals
from flask_usage_metrics.metrics.sink_counters import SinkCounters
from flask_usage_metrics.metrics.totals_tables import FORMAT
from flask_usage_metrics.metrics.tracked_apps import TrackedApps
from flask_usage_metrics.records.methods import METHODS
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.forks import FORKS
from flask_usage_metrics.runtime.private_files import StateUnavailable
from flask_usage_metrics.runtime.servers import Server
from flask_usage_metrics.runtime.state_dir import StateDir, digest

_LOCK_SECONDS = 5.0
_QUICK_SECONDS = 0.5
_FRESH_SECONDS = 0.1
"""Seconds after a sync in which there is no need of another if there is nothing to tell: workers
that end at once would wait for each other."""

_PAUSE_SECONDS = 1.0
"""Seconds after a sync that failed, and took longer than the above, before the next."""


_REGISTRIES: defaultdict[str, Iterator[int]] = defaultdict(count)
"""Numbers registries in the order in which apps are set up, the same in each worker: the totals of
two in one process, such as in tests, must not be added together."""


class CountedJournal(Protocol):
    """The part of a `JournalFile` that totals know: how far it was counted.

    Attributes:
        id: Unique name.
        committed: Number of the last commit that is in the totals.
    """

    id: str
    committed: int


class Totals:
    """Adds up the records of the apps on one registry.

    In a server of several workers each adds what it counts to a file that they share, and shows the
    sums of all.

    Args:
        shape: Labels, buckets and bound of the families.
        version: Version of the package.

    Attributes:
        methods: The values of the label ``method`` but for ``_OTHER``: those of HTTP, and what
            the rules of the apps name.
        state: Where the apps keep what their processes share; None: no app has joined.
        key: Text that those of the other workers have too: format of the shared file, shape, and
            number among the registries of this process that have the same shape and place.
    """

    def __init__(self, shape: Shape, version: str) -> None:
        self.shape = shape
        self.methods = set(METHODS)
        self.state: StateDir | None = None
        self.key = ""
        self._version = version
        self._apps = 0
        self._tracked = TrackedApps()
        self.reset_after_fork()
        FORKS.register(self)

    def reset_after_fork(self) -> None:
        """Start at zero: the parent process keeps counting its own."""
        self._file: SharedTotals | None = None
        self._is_shared, self._is_alone = True, False
        self._retry_at = self._synced_at = 0.0
        self._told: Gauges | None = None
        self._workers: list[int] = []
        self._lock = threading.Lock()
        self._counts = Counts(self.shape, self.methods)
        # Until this process counts as one of the server's.
        self._onlooker: Onlooker | None = Onlooker(self.shape)
        self._server: Server | None = None
        self._commits: dict[CountedJournal, int] = {}
        self._tracked.reset()

    # ------------------------------------------------------------------------ set-up

    def join(self, app: str, storages: Iterable[str], state: StateDir) -> str:
        """Add up the records of one more app.

        Args:
            app: Its name.
            storages: Identity of each of its storages: what is meant for one must not come to
                another.
            state: Where its processes keep what they share; that of the first app holds for all.

        Returns:
            A name for the app, the same in all its processes, that no other app has.
        """
        if self.state is None:
            self.state = state
            shared = digest(f"{self.shape} {state.places} {state.name}")
            self.key = f"{FORMAT} {self.shape} {next(_REGISTRIES[shared])}"
        key = f"{app} {self._apps} {' '.join(storages)}"
        self._apps += 1
        return key

    def sink_counters(self, sink: str) -> SinkCounters:
        """Return new counters; those of the same sink are added up."""
        with self._lock:
            return self._tracked.sink_counters(sink)

    def watch(
        self, source: GaugeSource, counters: Collection[SinkCounters], faults: Faults
    ) -> None:
        """Read the gauges of an app for as long as their source lives; what it counted stays.

        Args:
            source: Of the gauges.
            counters: Of the app's sinks, which `sink_counters` made.
            faults: Of the app.
        """
        with self._lock:
            self._tracked.add(source, counters, faults)

    # ------------------------------------------------------------------------ counting

    def add(
        self,
        records: Iterable[UsageRecord],
        commits: Mapping[CountedJournal, int],
        sampled: Collection[str] = frozenset(),
    ) -> None:
        """Count records; each is in exactly one series of each family it belongs to.

        Args:
            records: To be counted.
            commits: For the journals they come from, the number of this commit.
            sampled: Ids of those records whose span is exported: they may become exemplars.
        """
        with self._lock:
            self._counts.add(records, sampled)
            self._commits.update(commits)
            if self._file is None:
                self._note_commits()

    # ------------------------------------------------------------------------ sharing

    def share(self, path: Path | None, *, is_alone: bool = False) -> None:
        """Share the totals with other workers in a file, from the next sync on.

        Args:
            path: The file; None: there are no other workers.
            is_alone: Whether no other process can be asked for them meanwhile.
        """
        with self._lock:
            if self._onlooker is not None:
                self._onlooker.close()
                self._onlooker = None
            self._is_alone = is_alone
            if path is not None and self._file is None:
                self._file = SharedTotals(path, self._counts.widths())
                for table in self._counts.tables.values():
                    table.resend()

    def stay_alone(self, server: Server) -> None:
        """Note that there are other workers, and no place to share totals with them now.

        Until there is one, scrapes of this process show what those have counted who have a place.

        Args:
            server: Of this process.
        """
        with self._lock:
            self._server, self._is_shared = server, False

    def sync(self) -> bool:
        """Sync with the shared file, if there is need; never raises, and a later sync tries again.

        Blocks for a second at most, once in two seconds, while the file is locked.

        Returns:
            Whether all that was counted here is in the file now, or there is none to share.
        """
        with self._lock:
            return self._sync_if_need()

    def _sync_if_need(self) -> bool:
        if monotonic() < self._synced_at + _FRESH_SECONDS:
            self._tracked.update(self._counts)
            is_dirty = any(table.dirty for table in self._counts.tables.values())
            if not is_dirty and not self._commits and self._tracked.gauges() == self._told:
                return True
        return self._sync() or self._file is None

    def last_commit(self, journal: CountedJournal) -> int | None:
        """Return the number of the last commit of a recovered journal that was counted.

        Returns:
            None if the shared file cannot be read now: the journal must wait.
        """
        number = None
        with self._lock:
            if self._file is not None:
                began = monotonic()
                if began < self._retry_at:
                    return None
                try:
                    number = self._file.last_commit(journal.id)
                except (sqlite3.Error, OSError, StateUnavailable) as error:
                    self._miss(error, began)
                    return None
        if number is None:  # of another server run, or of a process that was alone
            return journal.committed
        journal.committed = number
        return number

    def forget(self, journal: CountedJournal) -> None:
        """Forget a journal that is about to be closed."""
        with self._lock:
            self._commits.pop(journal, None)
            if self._file is not None:
                self._file.forget([journal.id])

    def close(self) -> None:
        """Add all unshared numbers to the shared file and close it."""
        with self._lock:
            if self._file is not None:
                self._sync_if_need()
                self._synced_at = 0.0
                # Nobody waits twice for who holds the file: the others see when this process ends.
                if monotonic() < self._retry_at:
                    self._file.close()
                else:
                    self._file.release()

    def _sync(self) -> bool:
        """Sync with the shared file; return whether all that was counted here is in it now."""
        # A file that is locked costs a second, which not every scrape and batch should wait.
        if self._file is None or monotonic() < self._retry_at:
            return False
        self._tracked.update(self._counts)
        tables = self._counts.tables
        dirty = [(name, series) for name, table in tables.items() for series in table.dirty]
        new = {
            (name, series.values): series.new for name, series in dirty if series.new is not None
        }
        exemplars = {
            (name, series.values): series.exemplars
            for name, series in dirty
            if series.exemplars is not None
        }
        commits = {journal.id: number for journal, number in self._commits.items()}
        gauges = self._tracked.gauges()
        began = monotonic()
        try:
            changes = self._file.sync(new, commits, gauges, exemplars)
        except (sqlite3.Error, OSError, StateUnavailable) as error:
            self._miss(error, began)
            return False
        self._is_shared, self._told, self._synced_at = True, gauges, monotonic()
        for table in tables.values():
            table.clear_new()
        self._note_commits()
        self._apply(changes)
        return True

    def _show_what_is_shared(self) -> None:
        """Have scrapes show what is in the shared file, whether it can be written to now or not.

        Numbers that are not in it yet are shown only if no other worker can be asked: it would
        answer the next scrape without them, and its counters would seem to fall.
        """
        file = self._file
        if file is None or self._sync():
            return
        try:
            self._apply(file.read())
        except sqlite3.OperationalError as error:
            # It is locked, or there is no room to open it: the others may have counted much.
            if not file.is_known and not self._is_alone and file.exists():
                raise TimeoutError("the totals of the other workers cannot be read") from error
        except (sqlite3.Error, OSError, StateUnavailable):
            pass
        if self._is_alone or not file.is_known:
            self._tracked.update(self._counts)
            for table in self._counts.tables.values():
                table.show_new()

    def _apply(self, changes: Changes) -> None:
        tables = self._counts.tables
        for key, sums in changes.sums.items():
            name, values = key
            known = tables.get(name)  # None: of a worker of a later version
            if known is not None:
                known.apply(values, sums, changes.exemplars.get(key))

    def _miss(self, error: Exception, began: float) -> None:
        """Report that the shared file could not be used, and leave it alone if it is locked."""
        self._is_shared = False
        if monotonic() > began + _QUICK_SECONDS:
            self._retry_at = monotonic() + _PAUSE_SECONDS
        self._tracked.report(error, "workers are added together later")

    def _note_commits(self) -> None:
        """Tell the journals which of their commits are in the totals."""
        for journal, number in self._commits.items():
            with suppress(ValueError, TypeError):  # it was closed meanwhile
                journal.committed = number
        self._commits.clear()

    # ------------------------------------------------------------------------ reading

    def families(self) -> list[Family]:
        """Return all families, after processing what the apps have buffered.

        Raises:
            TimeoutError: Another thread has held the totals for 5 seconds, as where the disk of the
                shared file hangs.
        """
        sources = self._tracked.sources()
        # Before as well: what is processed is counted here.
        self._acquire()
        self._lock.release()
        for source in sources:
            source.drain()
        self._acquire()
        try:
            counts, workers = self._seen() or self._counted(sources)
            self._workers = sorted(workers)
            families = counts.families()
        finally:
            self._lock.release()
        visitors = [count for source in sources if (count := source.visitors()) is not None]
        families |= gauge_families(
            self.shape,
            list(workers.values()),
            visitors=sum(visitors) if visitors else None,
            is_shared=self._is_shared,
            version=self._version,
        )
        return [families[description] for description in DESCRIPTIONS]

    def _seen(self) -> tuple[Counts, dict[int, Gauges]] | None:
        """Return what the workers of the server have counted, unless this process is one.

        Raises:
            TimeoutError: There are some, and what they have counted cannot be read now.
        """
        if self._onlooker is None or self.state is None:
            return None
        return self._onlooker.look(self.state, self.key, self._server)

    def _counted(self, sources: Iterable[GaugeSource]) -> tuple[Counts, dict[int, Gauges]]:
        """Return what this process and other workers of its server have counted."""
        workers: dict[int, Gauges] = {}
        if self._file is None:
            self._tracked.update(self._counts)
            for table in self._counts.tables.values():
                table.merge_local()
        else:
            self._show_what_is_shared()
            workers.update(self._file.workers)
        workers[os.getpid()] = read_gauges(sources)
        return self._counts, workers

    def _acquire(self) -> None:
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            raise TimeoutError("the totals are in use")

    def descriptions(self) -> list[Family]:
        """Return all families without samples; nothing is processed for it."""
        return [
            Family(description, self.shape.labels_of(description), buckets=self.shape.buckets)
            for description in DESCRIPTIONS
        ]

    def in_progress(self) -> int:
        """Return the number of requests being answered in this process."""
        return sum(source.in_progress() for source in self._tracked.sources())

    def seen_run(self) -> Path | None:
        """Return the folder of the server run that `families` looked at last, as it is no member.

        Returns:
            None if it is one, or saw none or several.
        """
        folders = self._onlooker.folders if self._onlooker is not None else []
        return folders[0] if len(folders) == 1 else None

    def workers(self) -> list[int]:
        """Return the process ids of all living workers, as `families` met them last."""
        return self._workers or [os.getpid()]
