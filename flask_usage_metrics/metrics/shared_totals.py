"""The totals of a server's workers, added together in one small SQLite file that they share."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from flask_usage_metrics.metrics import totals_tables as tables
from flask_usage_metrics.metrics.exemplars import BucketExemplars, newest
from flask_usage_metrics.metrics.families import Numbers
from flask_usage_metrics.metrics.gauges import Gauges
from flask_usage_metrics.metrics.histories import (
    Histories,
    histories_of,
    missing,
    plus,
    with_more,
)
from flask_usage_metrics.metrics.totals_tables import SeriesKey, State, damage_told
from flask_usage_metrics.runtime.private_files import StateUnavailable
from flask_usage_metrics.runtime.processes import started
from flask_usage_metrics.runtime.shared_database import SharedDatabase

_COPY_PAUSE_SECONDS = 1.0
"""Seconds after a failure before the copy is tried again."""

_QUICK_SECONDS = 0.5
_ATTEMPTS = 3

_UNUSABLE = (sqlite3.Error, OSError, StateUnavailable)


class Changes(NamedTuple):
    """The series that this or another worker changed since this worker's last sync.

    Attributes:
        sums: The sums of all workers.
        exemplars: The newest of all workers.
    """

    sums: dict[SeriesKey, Numbers]
    exemplars: dict[SeriesKey, BucketExemplars]


class SharedTotals:
    """The sums of all workers of a server; each adds what it counted since its last sync.

    A sync is one transaction: it reads what others changed and writes what is new here. A worker
    that dies takes nothing away, and nothing grows with the number of workers there ever were.

    The file may be lost, emptied or damaged at any moment; no sum falls, and none is missing:

    - Each sync brings a copy of the file up to date before it says that anything was added. Whoever
      finds the file lost makes a new one of the copy, or of what it remembers if that is more.
    - A new file has a history of its own (`State.lineage`), and keeps apart what was counted in
      each of those that were lost. A worker that remembers more of one adds the difference, once.

    Each bucket keeps the newest exemplar of all workers.

    Not thread-safe: `Totals` has a lock.

    Args:
        path: The file; its copy lies beside it.
        widths: For each family known here, how many labels and numbers its series have: others are
            taken as damage.

    Attributes:
        merged: The sums of all workers, as of the last sync.
        exemplars: The newest of all workers, as of the last sync.
        workers: Gauges of the living workers by process id, as of the last sync.
    """

    def __init__(self, path: Path, widths: Mapping[str, tuple[int, int]] | None = None) -> None:
        self._database = SharedDatabase(path, tables.TOTALS_SCHEMA, stays_open=True)
        copy = path.with_name(f"{path.stem}-copy{path.suffix}")
        self._copy = SharedDatabase(copy, tables.COPY_SCHEMA, stays_open=True)
        self._copy_at = 0.0
        self._widths = widths or {}
        self.merged: dict[SeriesKey, Numbers] = {}
        self.exemplars: dict[SeriesKey, BucketExemplars] = {}
        self.workers: dict[int, Gauges] = {}
        self._commits: dict[str, int] = {}
        self._forgotten: set[str] = set()
        self._state = State()
        self._branches: dict[bytes, tables.Branch] = {}
        self._last_branch = 0
        self._pid = os.getpid()

    @property
    def is_known(self) -> bool:
        """Whether the file or its copy was ever read."""
        return bool(self._state.lineage)

    def exists(self) -> bool:
        """Tell whether there is a file, or a copy of it."""
        return self._database.exists() or self._copy.exists()

    # ------------------------------------------------------------------------ adding

    def sync(
        self,
        new: Mapping[SeriesKey, Numbers],
        commits: Mapping[str, int],
        gauges: Gauges,
        exemplars: Mapping[SeriesKey, BucketExemplars] = {},
    ) -> Changes:
        """Add the numbers counted here, and read those that other workers added.

        Args:
            new: Numbers counted here since the last sync; added once, or not at all if this raises.
            commits: For each journal id, the number of the last commit that is part of `new`.
            gauges: Of this process.
            exemplars: Those observed here since the last sync; kept where they are the newest.

        Returns:
            The changed series, those that changed here among them.

        Raises:
            sqlite3.Error: The file cannot be used now; nothing was added.
            OSError: The file cannot be opened.
            StateUnavailable: Its folder may be written by others.
        """
        began = monotonic()
        try:
            changes = self._add(new, commits, gauges, exemplars)
        except _UNUSABLE:
            if monotonic() > began + _QUICK_SECONDS:  # it is locked
                raise
            # The file was lost or damaged: there is a new one to be made, or made already.
            changes = self._add(new, commits, gauges, exemplars)
        # It is added, whatever comes: what is known of a lost file is added to the next.
        self._commits.update(commits)
        for _ in range(_ATTEMPTS):
            if self._update_copy():
                break
            # The file was lost as soon as this was added.
            with suppress(*_UNUSABLE):
                more = self._add({}, {}, gauges, {})
                changes = Changes(changes.sums | more.sums, changes.exemplars | more.exemplars)
        return changes

    def _add(
        self,
        new: Mapping[SeriesKey, Numbers],
        commits: Mapping[str, int],
        gauges: Gauges,
        exemplars: Mapping[SeriesKey, BucketExemplars],
    ) -> Changes:
        with self._transaction() as (connection, state):
            is_other = state.lineage != self._state.lineage
            since = -1 if is_other else self._state.number
            theirs = tables.read_series(connection, since, self._widths)
            newer = self._newer(tables.read_exemplars(connection, since), exemplars)
            if is_other:
                newer = self._newer(newer, self.exemplars)
            sums = {
                key: numbers if before is None else plus(before, numbers)
                for key, numbers in new.items()
                for before in [theirs.get(key) or self._merged(key, is_other)]
            }
            change = state.number + 1
            tables.write_series(connection, sums, change)
            rows = {key: newer[key] for key in (*exemplars, *(self.exemplars if is_other else ()))}
            tables.write_exemplars(connection, rows, change)
            tables.write_commits(connection, {**self._commits, **commits} if is_other else commits)
            tables.write_worker(connection, self._pid, started(self._pid), gauges)
            workers, dead = tables.read_workers(connection)
            tables.delete_workers(connection, dead)
            state = state._replace(number=change)
            tables.write_state(connection, state)
            branches = self._read_branches(connection, is_other)
        self._last_branch, self._branches = branches
        return self._learn(state, workers, Changes({**theirs, **sums}, newer))

    def _merged(self, key: SeriesKey, is_other: bool) -> Numbers | None:
        # All that this worker knew is in a file of another history by now.
        return None if is_other else self.merged.get(key)

    def _learn(self, state: State, workers: dict[int, Gauges], changes: Changes) -> Changes:
        self.merged.update(changes.sums)
        self.exemplars.update(changes.exemplars)
        self.workers = workers
        self._state = state
        return changes

    def _read_branches(
        self, connection: sqlite3.Connection, is_other: bool
    ) -> tuple[int, dict[bytes, tables.Branch]]:
        """Return the number of the file's last branch, and all, read anew if there are others."""
        last = tables.last_branch(connection)
        if is_other or last != self._last_branch:
            return last, tables.read_branches(connection)
        return last, self._branches

    # ------------------------------------------------------------------------ reading

    def read(self) -> Changes:
        """Read what other workers added, from the file or else from its copy; write nothing.

        Raises:
            sqlite3.Error: Neither can be read now, or they hold less than is known already.
            OSError: Neither can be opened.
            StateUnavailable: Their folder may be written by others.
        """
        try:
            return self._read(self._database)
        except _UNUSABLE:
            return self._read(self._copy)

    def _read(self, database: SharedDatabase) -> Changes:
        with database.reading() as connection, damage_told():
            state, known = tables.read_state(connection), self._state
            is_other = state.lineage != known.lineage
            since = -1 if is_other else known.number
            theirs = tables.read_series(connection, since, self._widths)
            oldest = 0 if is_other else known.number
            if database is self._database:
                oldest = max(oldest, self._shown(state.lineage))
            is_old = state.number < oldest
            branches = self._read_branches(connection, is_other)
            lacks = is_other and missing(
                self._histories(), histories_of(state, theirs, branches[1])
            )
            if not state.lineage or is_old or lacks:
                raise sqlite3.OperationalError("less than is known already")
            newer = self._newer(tables.read_exemplars(connection, since))
            workers = self.workers
            if database is self._database:
                workers, _ = tables.read_workers(connection)
        self._last_branch, self._branches = branches
        return self._learn(state, workers, Changes(theirs, newer))

    def last_commit(self, journal: str) -> int | None:
        """Return the number of a journal's last commit that is in the sums; None if not known.

        Raises:
            sqlite3.Error: The file cannot be used now.
            OSError: The file cannot be opened.
            StateUnavailable: Its folder may be written by others.
        """
        with self._transaction() as (connection, _):
            return tables.read_commit(connection, journal)

    # ------------------------------------------------------------------------ leaving

    def forget(self, journals: Iterable[str]) -> None:
        """Delete the commits of journals that are gone, in the next transaction."""
        for journal in journals:
            self._commits.pop(journal, None)
            self._forgotten.add(journal)

    def release(self) -> None:
        """Take this process's gauges out of the file and close it; best effort, never raises."""
        with suppress(*_UNUSABLE), self._transaction() as (connection, _):
            tables.delete_workers(connection, [self._pid])
        self._update_copy()  # nobody else may know what was added last
        self.close()

    def close(self) -> None:
        """Close the file; the next sync opens it again."""
        self._database.close()
        self._copy.close()

    # ------------------------------------------------------------------------ losses

    @contextmanager
    def _transaction(self) -> Iterator[tuple[sqlite3.Connection, State]]:
        """Begin a transaction on a file that has all that this worker knows.

        Yields:
            A connection, and the state of the file.

        Raises:
            sqlite3.DatabaseError: Of that class exactly: the file was damaged; it is deleted.
        """
        with self._database.transaction() as connection, damage_told():
            state, known = tables.read_state(connection), self._state
            if not state.lineage:
                state = self._fill(connection)
            elif state.lineage == known.lineage:
                if state.number < max(known.number, self._shown(state.lineage)):
                    raise ValueError("an earlier state")
            elif known.lineage:
                state = self._add_what_was_lost(connection, state)
            tables.delete_commits(connection, self._forgotten)
            yield connection, state
        self._forgotten.clear()

    def _shown(self, lineage: bytes) -> int:
        """Return the number of the last change of a history that somebody has shown, if known."""
        with suppress(*_UNUSABLE), self._copy.reading() as copy, damage_told():
            state = tables.read_state(copy)
            return state.number if state.lineage == lineage else 0
        return 0

    def _fill(self, connection: sqlite3.Connection) -> State:
        """Begin a new history, with what the copy has and what is known here."""
        with suppress(*_UNUSABLE), self._copy.reading() as copy, damage_told():
            state = tables.read_state(copy)
            if state.lineage:  # else it is lost as well
                sums = tables.read_series(copy, -1, self._widths)
                histories = histories_of(state, sums, tables.read_branches(copy))
                exemplars = tables.read_exemplars(copy, -1)
                tables.copy_commits(copy, connection)
                return self._begin(connection, state.number, sums, exemplars, histories)
        number = self._state.number
        return self._begin(connection, number, self.merged, self.exemplars, self._histories())

    def _begin(
        self,
        connection: sqlite3.Connection,
        number: int,
        sums: Mapping[SeriesKey, Numbers],
        exemplars: Mapping[SeriesKey, BucketExemplars],
        histories: Histories,
    ) -> State:
        tables.write_series(connection, sums, number)
        tables.write_exemplars(connection, exemplars, number)
        for lineage, branch in histories.items():
            tables.write_branch(connection, lineage, branch)
        state = self._add_what_was_lost(connection, State(os.urandom(8), number))
        tables.write_state(connection, state)
        return state

    def _add_what_was_lost(self, connection: sqlite3.Connection, state: State) -> State:
        """Add what this worker knows of any history and the file does not have."""
        sums = tables.read_series(connection, -1, self._widths)
        theirs = histories_of(state, sums, tables.read_branches(connection))
        more = missing(self._histories(), theirs)
        if not more:
            return state
        number = state.number
        for lineage, branch in more.items():
            if lineage == state.lineage:  # an earlier state of it has come back
                number = branch.number
            else:
                tables.write_branch(connection, lineage, branch)
        state = state._replace(number=number + 1)
        tables.write_series(connection, with_more(sums, more, theirs), state.number)
        tables.write_state(connection, state)
        return state

    def _histories(self) -> Histories:
        """Return what this worker knows."""
        if not self._state.lineage:
            return {}
        return histories_of(self._state, self.merged, self._branches)

    def _update_copy(self) -> bool:
        """Bring the copy up to date; best effort, never raises.

        Returns:
            False if the file has another history than at the last sync.
        """
        if monotonic() < self._copy_at:
            return True
        for _ in range(2):
            try:
                with self._copy.transaction() as target:
                    return self._copy_to(target)
            except _UNUSABLE as error:
                if type(error) is not sqlite3.DatabaseError:  # else a damaged one was deleted
                    break
        self._copy_at = monotonic() + _COPY_PAUSE_SECONDS
        return True

    def _copy_to(self, target: sqlite3.Connection) -> bool:
        try:
            with self._database.reading() as source:
                tables.copy_changes(source, target)
                return tables.read_state(source).lineage == self._state.lineage
        except (sqlite3.DatabaseError, OSError):  # the file is lost
            return False

    def _newer(
        self, *found: Mapping[SeriesKey, BucketExemplars]
    ) -> dict[SeriesKey, BucketExemplars]:
        """Return the series that were found, each bucket with the newest that is known now."""
        newer: dict[SeriesKey, BucketExemplars] = {}
        for rows in found:
            for key, row in rows.items():
                newer[key] = newest(newer.get(key) or self.exemplars.get(key), row)
        return newer
