"""The tables of a file of totals, and its rows as the objects they hold."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import msgspec

from flask_usage_metrics.metrics.exemplars import BucketExemplars
from flask_usage_metrics.metrics.families import LabelValues, Numbers
from flask_usage_metrics.metrics.gauges import Gauges
from flask_usage_metrics.runtime.processes import is_alive

SeriesKey = tuple[str, LabelValues]
"""Name of a family, and the label values of one of its series."""

FORMAT = 3
"""Number of this layout: workers of versions with another one share no file."""

# Texts are kept as bytes: SQLite does not check what it reads, and Python's module fails at it.
COPY_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS state (lineage BLOB, number INTEGER)",
    "CREATE TABLE IF NOT EXISTS ancestor (lineage BLOB PRIMARY KEY, number INTEGER, made INTEGER)",
    "CREATE TABLE IF NOT EXISTS branch (lineage BLOB, family BLOB, labels BLOB, numbers BLOB,"
    " PRIMARY KEY (lineage, family, labels)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS series (family BLOB, labels BLOB, numbers BLOB, changed INTEGER,"
    " PRIMARY KEY (family, labels)) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS series_changed ON series (changed)",
    "CREATE TABLE IF NOT EXISTS exemplar (family BLOB, labels BLOB, packed BLOB, changed INTEGER,"
    " PRIMARY KEY (family, labels)) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS exemplar_changed ON exemplar (changed)",
    "CREATE TABLE IF NOT EXISTS journal (id BLOB PRIMARY KEY, folded INTEGER) WITHOUT ROWID",
)
TOTALS_SCHEMA = (
    *COPY_SCHEMA,
    "CREATE TABLE IF NOT EXISTS worker (pid INTEGER PRIMARY KEY, started BLOB, gauges BLOB)",
)

MOST_BRANCHES = 64
"""How many lost histories are remembered: workers that have not come since the last losses may
know more of one."""

_to_json = msgspec.json.Encoder().encode
_numbers = msgspec.json.Decoder(Numbers).decode
_labels = msgspec.json.Decoder(LabelValues).decode
_buckets = msgspec.json.Decoder(BucketExemplars).decode
_gauges = msgspec.json.Decoder(Gauges).decode


class State(NamedTuple):
    """How far the history of a file has come.

    Attributes:
        lineage: Random name of its history; ``b""``: it has none yet.
        number: Of the last change.
    """

    lineage: bytes = b""
    number: int = 0


class Branch(NamedTuple):
    """What was counted in a history of a file that was lost, and not in those before it.

    Attributes:
        number: Of the last change that is in the sums.
        sums: Added up from that history alone; a series without any is left out.
    """

    number: int
    sums: dict[SeriesKey, Numbers]


@contextmanager
def damage_told() -> Iterator[None]:
    """Have what cannot be decoded count as damage of the file.

    Raises:
        sqlite3.DatabaseError: That class exactly, as SQLite raises it for a damaged file.
    """
    try:
        yield
    except (msgspec.MsgspecError, AttributeError, TypeError, ValueError) as error:
        raise sqlite3.DatabaseError(f"{type(error).__name__} in the totals") from error


def read_state(connection: sqlite3.Connection) -> State:
    """Return the state; one without a lineage if the file is new."""
    row = connection.execute("SELECT * FROM state").fetchone()
    return State() if row is None else State(*row)


def write_state(connection: sqlite3.Connection, state: State) -> None:
    """Replace the state."""
    connection.execute("DELETE FROM state")
    connection.execute("INSERT INTO state VALUES (?, ?)", state)


def read_series(
    connection: sqlite3.Connection, since: int, widths: Mapping[str, tuple[int, int]]
) -> dict[SeriesKey, Numbers]:
    """Return the sums that changed after a change.

    Args:
        connection: To the file.
        since: Number of the change; -1: all.
        widths: For each family known here, how many labels and numbers its series have.

    Raises:
        ValueError: Something is not what was written; or AttributeError, TypeError, MsgspecError.
    """
    rows = connection.execute(
        "SELECT family, labels, numbers FROM series WHERE changed > ?", (since,)
    )
    return _sums(rows, widths)


def _sums(
    rows: Iterable[tuple[bytes, bytes, bytes]], widths: Mapping[str, tuple[int, int]]
) -> dict[SeriesKey, Numbers]:
    sums = {}
    for family, labels, numbers in rows:
        name, values, found = family.decode(), _labels(labels), _numbers(numbers)
        if widths.get(name, (len(values), len(found))) != (len(values), len(found)):
            raise ValueError("a series of another shape")
        sums[name, values] = found
    return sums


def write_series(
    connection: sqlite3.Connection, sums: Mapping[SeriesKey, Numbers], change: int
) -> None:
    """Write the sums of series, changed by this change."""
    connection.executemany(
        "INSERT OR REPLACE INTO series VALUES (?, ?, ?, ?)",
        [
            (family.encode(), _to_json(labels), _to_json(numbers), change)
            for (family, labels), numbers in sums.items()
        ],
    )


def last_branch(connection: sqlite3.Connection) -> int:
    """Return a number that grows with each branch that is written; 0: there is none."""
    (made,) = connection.execute("SELECT ifnull(max(made), 0) FROM ancestor").fetchone()
    return int(made)


def read_branches(connection: sqlite3.Connection) -> dict[bytes, Branch]:
    """Return the lost histories whose sums are part of the file's, by lineage."""
    numbers = connection.execute("SELECT lineage, number FROM ancestor").fetchall()
    query = "SELECT family, labels, numbers FROM branch WHERE lineage = ?"
    return {
        lineage: Branch(int(number), _sums(connection.execute(query, (lineage,)), {}))
        for lineage, number in numbers
    }


def write_branch(connection: sqlite3.Connection, lineage: bytes, branch: Branch) -> None:
    """Note that the sums of a lost history are part of the file's up to a change."""
    connection.execute("DELETE FROM branch WHERE lineage = ?", (lineage,))
    connection.executemany(
        "INSERT INTO branch VALUES (?, ?, ?, ?)",
        [
            (lineage, family.encode(), _to_json(labels), _to_json(numbers))
            for (family, labels), numbers in branch.sums.items()
        ],
    )
    made = last_branch(connection) + 1
    connection.execute(
        "INSERT OR REPLACE INTO ancestor VALUES (?, ?, ?)", (lineage, branch.number, made)
    )
    connection.execute(
        "DELETE FROM ancestor WHERE lineage NOT IN"
        " (SELECT lineage FROM ancestor ORDER BY made DESC LIMIT ?)",
        (MOST_BRANCHES,),
    )
    connection.execute("DELETE FROM branch WHERE lineage NOT IN (SELECT lineage FROM ancestor)")


def read_exemplars(connection: sqlite3.Connection, since: int) -> dict[SeriesKey, BucketExemplars]:
    """Return the exemplars that changed after a change; -1: all."""
    rows = connection.execute(
        "SELECT family, labels, packed FROM exemplar WHERE changed > ?", (since,)
    )
    return {(family.decode(), _labels(labels)): _buckets(packed) for family, labels, packed in rows}


def write_exemplars(
    connection: sqlite3.Connection, rows: Mapping[SeriesKey, BucketExemplars], change: int
) -> None:
    """Write the exemplars of series, changed by this change."""
    connection.executemany(
        "INSERT OR REPLACE INTO exemplar VALUES (?, ?, ?, ?)",
        [
            (family.encode(), _to_json(labels), _to_json(row), change)
            for (family, labels), row in rows.items()
        ],
    )


def read_commit(connection: sqlite3.Connection, journal: str) -> int | None:
    """Return the number of a journal's last commit that is in the sums; None if not known."""
    row = connection.execute(
        "SELECT folded FROM journal WHERE id = ?", (journal.encode(),)
    ).fetchone()
    return None if row is None else int(row[0])


def write_commits(connection: sqlite3.Connection, commits: Mapping[str, int]) -> None:
    """Write, for each journal id, the number of its last commit that is in the sums."""
    connection.executemany(
        "INSERT OR REPLACE INTO journal VALUES (?, ?)",
        [(journal.encode(), number) for journal, number in commits.items()],
    )


def delete_commits(connection: sqlite3.Connection, journals: Iterable[str]) -> None:
    """Delete the commits of journals that are gone."""
    connection.executemany(
        "DELETE FROM journal WHERE id = ?", [(journal.encode(),) for journal in journals]
    )


def write_worker(connection: sqlite3.Connection, pid: int, since: str, gauges: Gauges) -> None:
    """Write the gauges of a worker, by its process id and when it started."""
    connection.execute(
        "INSERT OR REPLACE INTO worker VALUES (?, ?, ?)", (pid, since.encode(), _to_json(gauges))
    )


def delete_workers(connection: sqlite3.Connection, pids: Iterable[int]) -> None:
    """Delete the gauges of workers."""
    connection.executemany("DELETE FROM worker WHERE pid = ?", [(pid,) for pid in pids])


def read_workers(connection: sqlite3.Connection) -> tuple[dict[int, Gauges], list[int]]:
    """Return the gauges of living workers by process id, and the ids of the dead."""
    living: dict[int, Gauges] = {}
    dead = []
    for pid, since, gauges in connection.execute("SELECT * FROM worker"):
        if is_alive(pid, since.decode()):
            living[pid] = _gauges(gauges)
        else:
            dead.append(pid)
    return living, dead


def copy_changes(source: sqlite3.Connection, target: sqlite3.Connection) -> None:
    """Bring a copy of a file up to date; it takes what has changed since, or all."""
    state, known = read_state(source), read_state(target)
    if state == known or not state.lineage:
        return
    since = known.number
    if known.lineage != state.lineage or since > state.number:
        since = -1
        for table in ("series", "exemplar"):
            target.execute(f"DELETE FROM {table}")
    for table in ("series", "exemplar"):
        changed = source.execute(f"SELECT * FROM {table} WHERE changed > ?", (since,))
        target.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?, ?)", changed)
    copy_commits(source, target)
    ancestors = "SELECT * FROM ancestor ORDER BY lineage"
    if source.execute(ancestors).fetchall() != target.execute(ancestors).fetchall():
        _copy_table(source, target, "ancestor")
        _copy_table(source, target, "branch")
    write_state(target, state)


def copy_commits(source: sqlite3.Connection, target: sqlite3.Connection) -> None:
    """Copy the commits of journals."""
    _copy_table(source, target, "journal")


def _copy_table(source: sqlite3.Connection, target: sqlite3.Connection, table: str) -> None:
    target.execute(f"DELETE FROM {table}")
    rows = source.execute(f"SELECT * FROM {table}").fetchall()
    if rows:
        places = ", ".join("?" * len(rows[0]))
        target.executemany(f"INSERT INTO {table} VALUES ({places})", rows)
