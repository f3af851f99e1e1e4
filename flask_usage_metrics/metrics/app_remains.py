"""What workers leave to others: counts of the dead, of parents, and of a file that was lost."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import NamedTuple

from flask_usage_metrics.metrics import app_tables as tables
from flask_usage_metrics.metrics.app_families import CUMULATIVE, AppFamily, encodable_family
from flask_usage_metrics.metrics.app_sums import added, larger
from flask_usage_metrics.metrics.app_tables import DEAD, AppState, dead_name
from flask_usage_metrics.runtime.processes import is_alive

Rows = dict[bytes, bytes]
"""Data of families by name; empty data: the family has gone."""


class Known(NamedTuple):
    """What a worker knows of the file, as of its last sync.

    Attributes:
        state: How far its history had come.
        dead: Names of the last workers that have ended, see `dead_name`.
        workers: When each worker started, by process id.
        rows: Of each worker by process id, and of the dead; its own as it wrote them.
    """

    state: AppState
    dead: frozenset[bytes]
    workers: dict[int, str]
    rows: dict[int, Rows]


class Ancestor(NamedTuple):
    """A process that this one was forked from.

    Attributes:
        pid: Its process id.
        since: When it started, see `processes.started`.
        families: What it had counted itself before the fork; empty: the file has it.
    """

    pid: int
    since: str
    families: list[AppFamily]


def bring_back(
    connection: sqlite3.Connection,
    state: AppState,
    workers: dict[int, str],
    dead: frozenset[bytes],
    known: Known,
    own: int,
) -> tuple[AppState, frozenset[bytes]]:
    """Write what is known of a lost file, and what the new one does not have.

    Args:
        connection: To the new file.
        state: Of it.
        workers: In it; those that it has now are added.
        dead: In it.
        known: Of the lost one.
        own: Id of this process, which writes its own rows.

    Returns:
        State and dead of the new file now.
    """
    change = state.number + 1
    if not known.dead <= dead:
        rows = tables.rows_of(connection, DEAD)
        mine = known.rows.get(DEAD, {})
        more = {name: _larger(data, rows.get(name)) for name, data in mine.items()}
        tables.write_rows(connection, DEAD, more, change)
        deaths = max(state.deaths, known.state.deaths)
        tables.write_dead(connection, known.dead - dead, deaths)
        state, dead = state._replace(deaths=deaths), dead | known.dead
    for pid, since in known.workers.items():
        if pid != own and pid not in workers and dead_name(pid, since) not in dead:
            workers[pid] = since
            tables.write_worker(connection, pid, since)
            tables.write_rows(connection, pid, known.rows.get(pid, {}), change)
    return state, dead


def add_ancestors(
    connection: sqlite3.Connection,
    ancestors: Iterable[Ancestor],
    workers: dict[int, str],
    change: int,
) -> None:
    """Write what was counted in the processes that this one was forked from.

    Args:
        connection: To the file.
        ancestors: The processes.
        workers: In the file; those that it has now are added.
        change: Number of this change.
    """
    for pid, since, families in ancestors:
        # Of one that has ended another child has told, or nobody can tell.
        if families and is_alive(pid, since) and workers.get(pid, since) == since:
            rows = tables.rows_of(connection, pid)
            more = {}
            for family in map(encodable_family, families):
                name = family.name.encode()
                data = _larger(tables.encode(family), rows.get(name))
                if data != rows.get(name):
                    more[name] = data
            workers[pid] = since
            tables.write_worker(connection, pid, since)
            tables.write_rows(connection, pid, more, change)


def bury(
    connection: sqlite3.Connection,
    state: AppState,
    workers: dict[int, str],
    dead: frozenset[bytes],
) -> tuple[AppState, frozenset[bytes]]:
    """Add what workers that have ended had counted to what the dead had, and delete their rows.

    Args:
        connection: To the file.
        state: Of it.
        workers: In it; those that have ended are removed.
        dead: In it.

    Returns:
        State and dead of the file now.
    """
    for pid, since in list(workers.items()):
        if is_alive(pid, since):
            continue
        total = tables.rows_of(connection, DEAD)
        more = {}
        for name, data in tables.rows_of(connection, pid).items():
            family = tables.decode(data) if data else None
            if family is not None and family.type in CUMULATIVE:
                before = [tables.decode(total[name])] if name in total else []
                same = [one for one in before if one.type == family.type]
                more[name] = tables.encode(added([*same, family], exactly=True))
        tables.write_rows(connection, DEAD, more, state.number + 1)
        tables.delete_worker(connection, pid)
        del workers[pid]
        state = state._replace(deaths=state.deaths + 1)
        ended = dead_name(pid, since)
        tables.write_dead(connection, [ended], state.deaths)
        dead = dead | {ended}
    return state, dead


def _larger(one: bytes, other: bytes | None) -> bytes:
    if not one or not other:
        return one or other or b""
    return tables.encode(larger(tables.decode(one), tables.decode(other)))
