"""The app's own metrics of a server's workers, for a process that is none of its members."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from prometheus_client.metrics_core import Metric

from flask_usage_metrics.metrics import app_tables as tables
from flask_usage_metrics.metrics.app_families import AppFamily
from flask_usage_metrics.metrics.app_sums import shown
from flask_usage_metrics.metrics.totals_tables import damage_told
from flask_usage_metrics.runtime.private_files import StateUnavailable
from flask_usage_metrics.runtime.shared_database import SharedDatabase

_UNUSABLE = (sqlite3.Error, OSError, StateUnavailable)


class AppOnlooker:
    """Reads the families that workers share in a file, and adds nothing to them.

    Not thread-safe: whoever owns it has a lock.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._database: SharedDatabase | None = None
        self._last: dict[str, Metric] | None = None

    def look(self, path: Path) -> dict[str, Metric]:
        """Return the families as all workers together see them, by name.

        Args:
            path: The file.

        Returns:
            What was read last if it cannot be read now; empty if there is no file.

        Raises:
            TimeoutError: It cannot be read now, and never was.
        """
        if self._database is None or self._path != path:
            self.close()
            self._path = path
            self._database = SharedDatabase(path, tables.SCHEMA, stays_open=True)
        try:
            self._last = self._read(self._database)
        except _UNUSABLE as error:
            if self._last is None and self._database.exists():
                raise TimeoutError("the app's own metrics cannot be read") from error
        return self._last or {}

    def _read(self, database: SharedDatabase) -> dict[str, Metric]:
        found: dict[bytes, dict[int, AppFamily]] = {}
        with database.reading() as connection, damage_told():
            state = tables.read_state(connection)
            for pid, name, data in tables.read_rows(connection, -1, os.getpid()):
                if data:  # else the family is gone
                    found.setdefault(name, {})[pid] = tables.decode(data)
        metrics = [
            shown(families, own=os.getpid(), is_several=bool(state.several))
            for families in found.values()
        ]
        return {metric.name: metric for metric in metrics}

    def close(self) -> None:
        """Close the file; the next look opens it again."""
        if self._database is not None:
            self._database.close()
        self._database = self._last = None
