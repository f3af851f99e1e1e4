"""This process among the workers of its server: joins them, recovers what dead ones left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic

from flask_usage_metrics.metrics.shared_app_metrics import SharedAppMetrics
from flask_usage_metrics.metrics.totals import Totals
from flask_usage_metrics.pipeline.delivery.spool import Spool
from flask_usage_metrics.pipeline.journal_file import JournalFile
from flask_usage_metrics.records.observation import Origin
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.forks import FORKS
from flask_usage_metrics.runtime.private_files import StateUnavailable
from flask_usage_metrics.runtime.server_runs import (
    APP_METRICS,
    TOTALS,
    ServerRun,
    dead_runs,
    join_run,
    remove_run,
)
from flask_usage_metrics.runtime.servers import Server
from flask_usage_metrics.runtime.state_dir import StateDir, digest

_GROUP_SECONDS = 0.5
_DEAD_RUNS_SECONDS = 60.0


class WorkerGroup:
    """One process among the workers of its server, for one app: a member of a `ServerRun`.

    Args:
        state: Where the app's processes keep what they share; None: nowhere.
        app: Name of the app, which no other on the same registry has.
        totals: Shared with the other workers.
        app_metrics: Likewise.
        spool_bytes: Size of what may wait on disk for each sink, at most.
        faults: Where it is reported that there is no place for what is shared.
    """

    def __init__(
        self,
        state: StateDir | None,
        app: str,
        *,
        totals: Totals,
        app_metrics: SharedAppMetrics,
        spool_bytes: int,
        faults: Faults,
    ) -> None:
        self.app = app
        self._spool_bytes = spool_bytes
        self._state = state
        self._totals = totals
        self._app_metrics = app_metrics
        self._faults = faults
        self._start_anew()
        FORKS.register(self)

    def _start_anew(self) -> None:
        self._server_run: ServerRun | None = None
        self._complaint: str | None = None
        self._shares_app_metrics = False
        self._group_due = self._dead_runs_due = 0.0

    @property
    def is_member(self) -> bool:
        """Whether this process has joined a server run."""
        return self._server_run is not None

    def join(self, origin: Origin, server: Server) -> JournalFile | None:
        """Join the server run, share the totals with its workers, and make a journal file.

        To be called again after it returned None: what it has done by then it does not do twice.
        Blocks some seconds at most.

        Args:
            origin: This process.
            server: Of this process.

        Returns:
            None if there is no place for a file; that is reported.
        """
        try:
            if self._state is None:
                raise StateUnavailable("none is configured")
            run = self._server_run
            if run is None:
                run = self._server_run = join_run(self._state, server, self._totals.key)
                path = run.folder / TOTALS if server.is_shared else None
                self._totals.share(path, is_alone=server.is_alone)
                if server.is_shared:
                    self._shares_app_metrics = True
                    self._app_metrics.share(
                        run.folder / APP_METRICS,
                        is_alone=server.is_alone,
                        is_several=server.is_multiprocess,
                        faults=self._faults,
                    )
            elif not run.folder.exists():
                self.rejoin()
            file = JournalFile.create(run.folder, origin)
        except (OSError, StateUnavailable) as error:
            self.complain(error)
            if server.is_shared and self._server_run is None:
                self._totals.stay_alone(server)
            return None
        self.take_back()
        return file

    def sync(self) -> bool:
        """Sync the totals and the app's own metrics with the other workers; never raises.

        Returns:
            Whether all that was counted here is where the other workers have it too.
        """
        is_added = self._totals.sync()
        if self._shares_app_metrics:
            self._app_metrics.sync()
        return is_added

    def spool(self, sink: str) -> Spool | None:
        """Return the spool of a sink, by its name; None if there is no place for one."""
        if self._server_run is None:
            return None
        # Of the app rather than of the run: a storage may be down for longer than that.
        name = digest(f"{self.app} {sink}")
        return Spool(self._server_run.folder.parent / f"spool-{name}", self._spool_bytes)

    def leftovers(self) -> Iterator[JournalFile]:
        """Yield journals of the server's dead workers and of dead server runs; they are ours now.

        Looks for dead workers every 0.5 s, for dead server runs every 60 s, and yields nothing in
        between.
        """
        if self._server_run is None or self._state is None:
            return
        now = monotonic()
        if now >= self._group_due:
            self._group_due = now + _GROUP_SECONDS
            yield from self._recover(self._server_run.folder)
        if now >= self._dead_runs_due:
            self._dead_runs_due = now + _DEAD_RUNS_SECONDS
            run = self._server_run
            for folder in list(dead_runs(self._state.homes(), run.folder, run.note)):
                yield from self._recover(folder)
                remove_run(folder)

    def end(self) -> None:
        """Leave the server run, and remove it if nobody needs it; its other files are closed."""
        if self._shares_app_metrics:
            self._app_metrics.leave()
        if self._server_run is not None:
            self._server_run.end()
        self._start_anew()

    def forget(self, file: JournalFile) -> None:
        """Remove a recovered journal in which all is durable, and its run if that was the last."""
        self._totals.forget(file)
        file.close(remove=True)
        if self._server_run is None or file.folder != self._server_run.folder:
            remove_run(file.folder)

    def reset_after_fork(self) -> None:
        """Leave the parent's server run in a forked child; the parent stays a member."""
        if self._server_run is not None:
            self._server_run.release()
        self._start_anew()

    def _recover(self, folder: Path) -> Iterator[JournalFile]:
        paths: list[Path] = []
        with suppress(OSError):  # another process may remove a dead run while this one looks there
            paths = sorted(folder.glob("*.journal"))
        for path in paths:
            file = JournalFile.recover(path, self.app)
            if file is not None:
                yield file

    def rejoin(self) -> None:
        """Become a member of the same server run again, whose folder was removed.

        Raises:
            OSError: The folder cannot be made.
            StateUnavailable: Other users may write there.
        """
        if self._server_run is not None:
            self._server_run.release()
            self._server_run.join()

    def take_back(self) -> None:
        """Note that there is a place again: the same reason is told once more if it is not."""
        self._complaint = None

    def complain(self, error: Exception) -> None:
        """Report, once for each reason, that there is no place for what is kept on disk."""
        reason = str(error) if isinstance(error, StateUnavailable) else type(error).__name__
        if isinstance(error, OSError) and error.errno:
            reason = os.strerror(error.errno)
        # Whoever tries again and again for the same reason has told so.
        if reason == self._complaint:
            return
        self._complaint = reason
        self._faults.report(
            "state",
            f"no place for the state directory ({reason})",
            "what is captured does not survive a kill",
        )
