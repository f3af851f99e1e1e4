"""The app's own client_python metrics of all workers of a server, which share them in a file."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic, thread_time

import msgspec
from prometheus_client import CollectorRegistry, values
from prometheus_client.metrics_core import Metric

from flask_usage_metrics.metrics import app_tables as tables
from flask_usage_metrics.metrics.app_families import (
    AppFamily,
    OwnFamilies,
    encodable_family,
)
from flask_usage_metrics.metrics.app_onlooker import AppOnlooker
from flask_usage_metrics.metrics.app_remains import (
    Ancestor,
    Known,
    Rows,
    add_ancestors,
    bring_back,
    bury,
)
from flask_usage_metrics.metrics.app_sums import shown
from flask_usage_metrics.metrics.app_tables import DEAD, AppState
from flask_usage_metrics.metrics.totals_tables import damage_told
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.forks import FORKS
from flask_usage_metrics.runtime.private_files import StateUnavailable
from flask_usage_metrics.runtime.processes import started
from flask_usage_metrics.runtime.server_runs import APP_METRICS
from flask_usage_metrics.runtime.shared_database import SharedDatabase

_MOST_SAMPLES = 20_000
_MOST_BYTES = 4 << 20

_LEAST_SECONDS = 0.25
_SHARE_OF_CPU = 0.05

_LOCK_SECONDS = 5.0
_QUICK_SECONDS = 0.5
_PAUSE_SECONDS = 1.0
"""Seconds after a sync that failed, and took longer than the above, before the next."""

_UNUSABLE = (sqlite3.Error, OSError, StateUnavailable)


class SharedAppMetrics:
    """What the app's own client_python metrics hold, of all workers of a server; for any thread.

    Each worker writes what its metrics hold into a file, and reads what others wrote there. What
    one that ended had counted is added to the rows of the dead, once. The file may be lost or
    damaged at any moment: workers make it anew of what they know.

    Nothing of that happens in client_python's multiprocess mode, which shares by itself.

    Args:
        registry: With the metrics; referenced weakly.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._own = OwnFamilies(registry)
        self._ancestors: list[Ancestor] = []
        self._pid = os.getpid()
        self._start_anew()
        FORKS.register(self)

    def _start_anew(self) -> None:
        self._lock = threading.Lock()
        self._database: SharedDatabase | None = None
        self._faults: Faults | None = None
        self._users = 0
        self._onlooker = AppOnlooker()
        self._is_alone = self._is_several = False
        self._due = self._retry_at = 0.0
        self._forget()

    def _forget(self) -> None:
        self._known = Known(AppState(), frozenset(), {}, {})
        self._decoded: dict[tuple[int, bytes], tuple[bytes, AppFamily]] = {}
        self._left_out: set[bytes] = set()

    def reset_after_fork(self) -> None:
        """Leave to the parent what it has counted, and its file."""
        self._start_anew()
        # Not raised into FORKS; without it the parent's counts would be shown for each child.
        with suppress(Exception):
            found = self._own.take_inherited()
            if found:
                parent = os.getppid()
                self._ancestors = [*self._ancestors, Ancestor(parent, started(parent), found)]
        self._pid = os.getpid()

    # ------------------------------------------------------------------------ sharing

    def share(self, path: Path, *, is_alone: bool, is_several: bool, faults: Faults) -> None:
        """Share the metrics with other workers in a file, from the next sync on, until `leave`.

        Args:
            path: The file.
            is_alone: Whether no other process can be asked for them meanwhile.
            is_several: Whether the server says that it has several workers.
            faults: Where it is reported that they cannot be shared.
        """
        with self._lock:
            self._users += 1
            self._onlooker.close()
            if self._database is None and not _shares_by_itself():
                self._database = SharedDatabase(path, tables.SCHEMA, stays_open=True)
            self._is_alone, self._is_several, self._faults = is_alone, is_several, faults

    def sync(self) -> None:
        """Write what changed here, and read what changed elsewhere; never raises.

        Does nothing if the last time was lately, so that it takes 5 % of a processor at most.
        """
        if self._database is None or monotonic() < self._due:
            return
        if self._lock.acquire(timeout=_LOCK_SECONDS):
            try:
                self._sync()
            finally:
                self._lock.release()

    def leave(self) -> None:
        """Write what changed here, and close the file if no app of this process shares it now."""
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            return
        try:
            self._users -= 1
            if self._database is not None:
                self._sync()
                if not self._users:
                    self._database.close()
                    self._database = None
                    self._forget()
        finally:
            self._lock.release()

    def _sync(self) -> dict[bytes, AppFamily] | None:
        """Sync; return the families of this process if they are in the file now."""
        assert self._database is not None
        if monotonic() < self._retry_at:
            return None
        began, since = thread_time(), monotonic()
        try:
            families = {family.name.encode(): family for family in self._own.read()}
            rows = self._bounded(families)
            try:
                self._exchange(rows)
            except _UNUSABLE:
                if monotonic() > since + _QUICK_SECONDS:  # it is locked
                    raise
                # The file was lost or damaged: there is a new one to be made, or made already.
                self._drop_damaged()
                self._exchange(rows)
        except Exception as error:  # noqa: BLE001 - also of a version that is not known yet
            self._report("totals", error, "the app's own metrics are added together later")
            if monotonic() > since + _QUICK_SECONDS:
                self._retry_at = monotonic() + _PAUSE_SECONDS
            return None
        finally:
            pause = (thread_time() - began) / _SHARE_OF_CPU
            self._due = monotonic() + max(pause, _LEAST_SECONDS)
        return families

    def _bounded(self, families: dict[bytes, AppFamily]) -> Rows:
        """Return the rows of this process, as many as are shared; spell out what cannot be."""
        rows: Rows = {}
        left_out: set[bytes] = set()
        samples = size = 0
        for name, family in families.items():
            try:
                data = tables.encode(family)
            except UnicodeEncodeError:
                families[name] = encodable_family(family)
                data = tables.encode(families[name])
            if samples + len(family.samples) > _MOST_SAMPLES or size + len(data) > _MOST_BYTES:
                left_out.add(name)
                continue
            samples += len(family.samples)
            size += len(data)
            rows[name] = data
        if left_out - self._left_out:
            self._report(
                "multiprocess",
                f"the app's own metrics have more than {_MOST_SAMPLES} samples",
                "those beyond are each worker's own",
            )
        self._left_out = left_out
        known = self._known.rows.get(self._pid, {})
        # What was shared before stays as it was: others must not see it fall.
        gone = {name: known[name] if name in left_out else b"" for name in known}
        return {**gone, **rows}

    def _exchange(self, rows: Rows) -> None:
        """Write the rows of this process and read those of others, in one transaction.

        Raises:
            sqlite3.Error: The file cannot be used now; nothing was written.
            OSError: It cannot be opened.
            StateUnavailable: Its folder may be written by others.
        """
        assert self._database is not None
        known = self._known.state
        with self._database.transaction() as connection, damage_told():
            state = tables.read_state(connection)
            is_other = state.lineage != known.lineage or state.number < known.number
            change = state.number + 1
            several = int(state.several or self._is_several)
            new = AppState(state.lineage or os.urandom(8), state.number, state.deaths, several)
            workers = tables.read_workers(connection)
            dead = self._known.dead
            if is_other or state.deaths != known.deaths:
                dead = tables.read_dead(connection)
            if is_other:
                new, dead = bring_back(connection, new, workers, dead, self._known, self._pid)
            add_ancestors(connection, self._ancestors, workers, change)
            new, dead = bury(connection, new, workers, dead)
            written = {} if is_other else self._known.rows.get(self._pid, {})
            changed = {name: data for name, data in rows.items() if written.get(name) != data}
            if workers.get(self._pid) is None:
                workers[self._pid] = started(self._pid)
                tables.write_worker(connection, self._pid, workers[self._pid])
                changed = rows
            tables.write_rows(connection, self._pid, changed, change)
            since = -1 if is_other else known.number
            theirs = tables.read_rows(connection, since, self._pid)
            if changed or new != state:
                new = new._replace(number=change)
                tables.write_state(connection, new)
        self._learn(Known(new, dead, workers, {} if is_other else self._known.rows), theirs)
        self._known.rows[self._pid] = rows
        self._ancestors = [ancestor._replace(families=[]) for ancestor in self._ancestors]

    def _learn(self, known: Known, found: Iterable[tuple[int, bytes, bytes]]) -> None:
        """Note the state of the file, with the rows of before and those that were found."""
        rows = {
            pid: dict(of) for pid, of in known.rows.items() if pid == DEAD or pid in known.workers
        }
        for pid, name, data in found:
            rows.setdefault(pid, {})[name] = data
        self._known = known._replace(rows=rows)
        self._decoded = {key: value for key, value in self._decoded.items() if key[0] in rows}

    # ------------------------------------------------------------------------ showing

    def families(self, run: Path | None = None) -> dict[str, Metric]:
        """Return the app's own families as all workers together see them, by name.

        Args:
            run: Folder of a server run, whose workers are asked while this process is none of them.

        Returns:
            Those that are shared; empty while this process is known to be the only one.

        Raises:
            TimeoutError: Another thread has held the file for 5 seconds, or it cannot be read now
                and never was.
        """
        if self._database is None and (run is None or _shares_by_itself()):
            return {}
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            raise TimeoutError("the app's own metrics are in use")
        try:
            if self._database is not None:
                return self._shown(self._sync())
            return {} if run is None else self._onlooker.look(run / APP_METRICS)
        finally:
            self._lock.release()

    def _shown(self, own: Mapping[bytes, AppFamily] | None) -> dict[str, Metric]:
        if own is None:
            assert self._database is not None
            try:
                self._read()
            except _UNUSABLE as error:
                if not (self._known.state.lineage or self._is_alone) and self._database.exists():
                    raise TimeoutError("the app's own metrics cannot be read") from error
            if self._is_alone:
                own = {family.name.encode(): family for family in self._own.read()}
        several = bool(self._known.state.several)
        if not self._known.state.lineage or not (several or self._known.rows.keys() - {self._pid}):
            return {}
        found: dict[bytes, dict[int, AppFamily]] = {}
        for pid, rows in self._known.rows.items():
            for name, data in rows.items():
                if data and (pid != self._pid or own is None):
                    family = self._family(pid, name, data)
                    if family is not None:
                        found.setdefault(name, {})[pid] = family
        for name, family in (own or {}).items():
            found.setdefault(name, {})[self._pid] = family
        return {
            metric.name: metric
            for name, families in found.items()
            if name not in self._left_out
            for metric in [shown(families, own=self._pid, is_several=several)]
        }

    def _family(self, pid: int, name: bytes, data: bytes) -> AppFamily | None:
        """Return a family; what it was last if its data is damaged, None if nobody knows."""
        known = self._decoded.get((pid, name))
        if known is None or known[0] is not data:
            try:
                known = data, tables.decode(data)
            except msgspec.MsgspecError as error:
                self._discard(error)
                if known is not None:
                    known = data, known[1]
            if known is None:
                return None
            self._decoded[pid, name] = known
        return known[1]

    def _discard(self, error: Exception) -> None:
        """Have the file made anew of what the workers know."""
        assert self._database is not None
        self._report("totals", error, "the app's own metrics are shared anew")
        with suppress(*_UNUSABLE), self._database.transaction():
            raise sqlite3.DatabaseError("a family that cannot be decoded")

    def _drop_damaged(self) -> None:
        """Forget what cannot be decoded, so that it is not in the next file."""
        for pid, rows in self._known.rows.items():
            for name, data in list(rows.items()):
                if not _is_good(data):
                    good = self._decoded.get((pid, name))
                    rows[name] = b"" if good is None else tables.encode(good[1])

    def _read(self) -> None:
        """Read what others wrote while nothing can be written.

        Raises:
            sqlite3.Error: The file cannot be read now, or is another one.
            OSError: It cannot be opened.
            StateUnavailable: Its folder may be written by others.
        """
        assert self._database is not None
        known = self._known.state
        with self._database.reading() as connection, damage_told():
            state = tables.read_state(connection)
            if known.lineage and (state.lineage != known.lineage or state.number < known.number):
                return
            workers = tables.read_workers(connection)
            theirs = tables.read_rows(connection, known.number if known.lineage else -1, self._pid)
            dead = tables.read_dead(connection)
        self._learn(Known(state, dead, workers, self._known.rows), theirs)

    def _report(self, part: str, error: Exception | str, consequence: str) -> None:
        if self._faults is not None:
            self._faults.report(part, error, consequence)


def _shares_by_itself() -> bool:
    """Tell whether client_python's multiprocess mode is in force, or was meant to be."""
    name = "PROMETHEUS_MULTIPROC_DIR"
    is_set = os.environ.get(name) or os.environ.get(name.lower())
    return bool(is_set or getattr(values.ValueClass, "_multiprocess", False))


def _is_good(data: bytes) -> bool:
    try:
        return not data or bool(tables.decode(data))
    except (msgspec.MsgspecError, TypeError):
        return False
