"""The totals of a server, for a process that is no member: gunicorn's master, a sidecar."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from operator import add
from pathlib import Path

from flask_usage_metrics.metrics.counts import Counts
from flask_usage_metrics.metrics.exemplars import BucketExemplars
from flask_usage_metrics.metrics.families import Numbers
from flask_usage_metrics.metrics.gauges import Gauges
from flask_usage_metrics.metrics.shape import Shape
from flask_usage_metrics.metrics.shared_totals import SharedTotals
from flask_usage_metrics.metrics.totals_tables import SeriesKey
from flask_usage_metrics.runtime.private_files import StateUnavailable
from flask_usage_metrics.runtime.run_notes import RunNote
from flask_usage_metrics.runtime.server_runs import TOTALS, living_runs
from flask_usage_metrics.runtime.servers import Server, this_server
from flask_usage_metrics.runtime.state_dir import StateDir


class Onlooker:
    """Reads the totals that workers share, and adds nothing to them.

    A process that listens at an address of the server, as the parent of its workers does, sees
    those of this server; another one those of all servers that the app has in the state directory,
    added together. A worker that has no place to share its own sees those of its server only.

    Not thread-safe: `Totals` has a lock.

    Args:
        shape: Of the families.

    Attributes:
        folders: Of the runs of these servers, as of the last look.
    """

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self.folders: list[Path] = []
        self._files: dict[Path, SharedTotals] = {}

    def look(
        self, state: StateDir, key: str, server: Server | None = None
    ) -> tuple[Counts, dict[int, Gauges]] | None:
        """Return what the workers have counted, and the gauges of each by its process id.

        Args:
            state: Of the app.
            key: Text that the totals of the workers have in common.
            server: That this process is a worker of; None: it is none.

        Returns:
            None if there are no workers, or none has counted anything.

        Raises:
            TimeoutError: There are some, and what they have counted cannot be read now.
        """
        counts = Counts(self._shape)
        note = RunNote.of(server or this_server(multiprocess=False), key)
        runs = [
            (folder, known) for folder, known in living_runs(state.homes()) if known.is_like(note)
        ]
        folders = [folder for folder, known in runs if known.is_of(note)]
        if server is None:
            folders = folders or [folder for folder, _ in runs]
        self.folders = folders
        paths = [folder / TOTALS for folder in folders]
        for path in set(self._files).difference(paths):
            self._files.pop(path).close()
        sums: dict[SeriesKey, Numbers] = {}
        exemplars: dict[SeriesKey, BucketExemplars] = {}
        workers: dict[int, Gauges] = {}
        for path in paths:
            file = self._files.setdefault(path, SharedTotals(path, counts.widths()))
            try:
                file.read()
            except (sqlite3.Error, OSError, StateUnavailable) as error:
                # Nothing would be less than what was shown before, by this process or another.
                if not file.is_known and file.exists():
                    raise TimeoutError("the totals of the workers cannot be read") from error
            _add(sums, file.merged)
            exemplars.update(file.exemplars)
            workers.update(file.workers)
        if not sums:
            return None
        for (name, values), numbers in sums.items():
            table = counts.tables.get(name)  # None: of a worker of a later version
            if table is not None:
                table.apply(values, numbers, exemplars.get((name, values)))
        return counts, workers

    def close(self) -> None:
        """Close the files; the next look opens them again."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def _add(sums: dict[SeriesKey, Numbers], more: Mapping[SeriesKey, Numbers]) -> None:
    for key, numbers in more.items():
        sums[key] = [*map(add, sums[key], numbers)] if key in sums else numbers
