"""PostgreSQL: a batch is one JSON parameter, an array of values a column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from flask_usage_metrics.errors import ConfigError
from flask_usage_metrics.records.query import Every
from flask_usage_metrics.storage.sql.dialects.base import BUSY_SECONDS, Dialect, Fault
from flask_usage_metrics.storage.sql.dialects.columns_in_use import ColumnsInUse
from flask_usage_metrics.storage.sql.dialects.json_batch import check, divided, without_nul
from flask_usage_metrics.storage.sql.table import COLUMN_NAMES, Columns, to_json

CONNECT_SECONDS = 10
"""Seconds to wait for a server that does not answer; libpq would wait for minutes."""

_FEW = 100
"""Most values that become a parameter each: of these PostgreSQL knows how many rows have them."""

_PERIODS = {"hour": "YYYY-MM-DD HH24", "day": "YYYY-MM-DD", "month": "YYYY-MM"}

# Of SQLSTATE (https://www.postgresql.org/docs/current/errcodes-appendix.html). Not null: a record
# has no value for what is not ours.
_LOCK_NOT_AVAILABLE = "55P03"
_SCHEMA = {"42P01", "42703", "42P10", "23502"}
_CONFLICT = {"40001", "40P01"}
# Too much for an index, say.
_DATA_CLASSES = {"22", "23", "54"}
# The texts of these classes name tables and columns, those of others also values, hosts or users.
_TELLING_CLASSES = {"0A", "2B", "42"}
# Of failures to connect, which have no SQLSTATE: libpq's own words, or the server's.
_PHRASES = (
    "connection refused",
    "password authentication failed",
    "no pg_hba.conf entry",
    "does not exist",
    "timeout expired",
    "could not translate host name",
    "failed to resolve host",
    "too many clients",
    "starting up",
    "shutting down",
    "server closed the connection unexpectedly",
    "SSL",
)


# A JSON object of simple values, if there is no backslash in it.
_SIMPLE_TEXT = '"[^"[:cntrl:]]*"'
_SIMPLE_NUMBER = "-?(0|[1-9][0-9]*)([.][0-9]+)?([eE][+-]?[0-9]+)?"
_SIMPLE_PAIR = f"{_SIMPLE_TEXT}: *({_SIMPLE_TEXT}|{_SIMPLE_NUMBER}|true|false|null)"
_SIMPLE_OBJECT = f"^[{{]({_SIMPLE_PAIR}(, *{_SIMPLE_PAIR})*)?[}}]$"


class PostgreSQL(Dialect):
    """PostgreSQL. A batch is one statement with one JSON parameter, an array of values a column.

    No text can hold a NUL: it is left out. Bytes of deleted rows stay until a VACUUM, and until the
    space is used again.
    """

    name = "postgresql"
    drivers: ClassVar[Mapping[str, str]] = {
        "psycopg": "flask-usage-metrics[postgres]",
        "psycopg2": "psycopg2",
        "pg8000": "pg8000",
    }

    def __init__(self, engine: sa.Engine, *, owned: bool = False) -> None:
        super().__init__(engine, owned=owned)
        self._in_use = ColumnsInUse()
        self._inserts: dict[tuple[str, ...], sa.TextClause] = {}

    @classmethod
    def open(cls, location: sa.URL) -> PostgreSQL:
        """Return the dialect of a server."""
        arguments: dict[str, Any] = {}
        if location.drivername != "postgresql+pg8000" and "connect_timeout" not in location.query:
            arguments["connect_timeout"] = CONNECT_SECONDS
        engine = sa.create_engine(location, connect_args=arguments, hide_parameters=True)
        if engine.dialect.driver == "psycopg":
            dbapi: Any = engine.dialect.import_dbapi()
            _, options = engine.dialect.create_connect_args(location)
            try:
                dbapi.conninfo.make_conninfo(
                    **{name: value for name, value in options.items() if name != "context"}
                )
            except dbapi.ProgrammingError:
                raise ConfigError("the URL holds an option that psycopg does not know") from None
        return cls(engine, owned=True)

    @contextmanager
    def lock(
        self, connection: sa.Connection, name: str, wait_seconds: float = BUSY_SECONDS
    ) -> Iterator[None]:
        """Take an advisory lock of the transaction.

        ``CREATE TABLE IF NOT EXISTS`` alone fails in most of several processes that begin at once.
        """
        with connection.begin():
            timeout = str(int(wait_seconds * 1000))
            connection.execute(sa.select(sa.func.set_config("lock_timeout", timeout, True)))
            key = sa.func.hashtextextended(f"flask_usage_metrics {name}", 0)
            try:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(key)))
            except sa.exc.DBAPIError as error:
                if _state(error) == _LOCK_NOT_AVAILABLE:
                    raise TimeoutError("another process has the lock") from None
                raise
            yield

    def snapshot(self, connection: sa.Connection) -> None:
        """Set the isolation level, which by default lets each statement read a newer state."""
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")

    # -- the schema -----------------------------------------------------------------------------

    def indexed(self, quoted_column: str) -> str:
        """Put null where other databases do."""
        return f"{quoted_column} NULLS FIRST"

    def widen_column(self, column: sa.Column[Any]) -> str:
        """Return the clause; to widen an integer rewrites all rows, to widen a text none."""
        return f"ALTER COLUMN {self._quoted(column)} TYPE {self.type_of(column)}"

    def is_narrow(self, column: sa.Column[Any], found: Mapping[str, Any]) -> bool:
        """Compare lengths, sizes and precisions."""
        is_ = found["type"]
        if isinstance(is_, sa.String):
            return is_.length is not None
        if isinstance(is_, sa.Integer):
            sizes = [sa.SmallInteger, sa.Integer, sa.BigInteger]
            wanted = column.type.dialect_impl(self.engine.dialect)
            return sizes.index(_size(is_)) < sizes.index(_size(wanted))
        if isinstance(is_, postgresql.TIMESTAMP):
            return is_.precision not in (None, 6)
        return isinstance(is_, sa.REAL)

    def counts_up(self, column: Mapping[str, Any]) -> bool:
        """Look for a sequence or an identity."""
        return "nextval(" in str(column.get("default")) or column.get("identity") is not None

    # -- writing --------------------------------------------------------------------------------

    def insert(self, connection: sa.Connection, table: sa.Table, columns: Columns) -> None:
        """Insert rows as one JSON parameter: an array of values a column."""
        check(columns)
        in_use = self._in_use.with_rows(columns)
        names = tuple(compress(COLUMN_NAMES, in_use))
        statement = self._inserts.get(names)
        if statement is None:
            statement = self._inserts[names] = self._insert(table, names)
        for batch in divided(list(compress(columns, in_use)), list):
            connection.execute(statement, {"batch": without_nul(batch).decode()})

    def _insert(self, table: sa.Table, columns: Sequence[str]) -> sa.TextClause:
        quote = self.engine.dialect.identifier_preparer.quote
        names = ", ".join(map(quote, columns))
        values = ", ".join(
            f"v{position}"
            if isinstance(table.c[name].type, sa.String)
            else f"CAST(v{position} AS {self.type_of(table.c[name])})"
            for position, name in enumerate(columns)
        )
        arrays = ", ".join(
            f"jsonb_array_elements_text(given.batch -> {position})"
            for position in range(len(columns))
        )
        aliases = ", ".join(f"v{position}" for position in range(len(columns)))
        # Compared by the id alone: another rule of the table may refuse a record, and says so.
        return sa.text(
            f"INSERT INTO {self._in_text(table)} ({names}) SELECT {values} "
            "FROM (SELECT CAST(:batch AS jsonb) AS batch) AS given, "
            f"ROWS FROM ({arrays}) AS r ({aliases}) ON CONFLICT (record_id) DO NOTHING"
        )

    # -- expressions ----------------------------------------------------------------------------

    def period(self, moment: sa.ColumnElement[Any], every: Every) -> sa.ColumnElement[str]:
        """Format the time."""
        return sa.func.to_char(moment, sa.literal_column(f"'{_PERIODS[every]}'"))

    def variable(self, column: sa.Column[Any], key: str) -> sa.ColumnElement[str]:
        """Take the value out of what surely is JSON: PostgreSQL could tell only since version 16.

        That is what we wrote, and of flask-track-usage's rows those of simple values.
        """
        quoted: Any = sa.literal_column(f"'{key}'")
        parsed = sa.cast(column, postgresql.JSON)
        value = parsed.op("->")(quoted)
        kinds: list[Any] = [
            sa.literal_column(f"'{kind}'") for kind in ("string", "number", "boolean")
        ]
        is_ours = column.table.c.record_id.is_not(None)
        is_simple = sa.and_(
            column.bool_op("~")(sa.literal_column(f"'{_SIMPLE_OBJECT}'")),
            sa.func.strpos(column, sa.func.chr(sa.literal_column("92"))) == sa.literal_column("0"),
        )
        # CASE, as AND promises no order.
        return sa.case(
            (
                sa.or_(is_ours, is_simple),
                sa.case((sa.func.json_typeof(value).in_(kinds), parsed.op("->>")(quoted))),
            )
        )

    def any_of(
        self, expression: sa.ColumnElement[Any], values: Sequence[Any]
    ) -> sa.ColumnElement[bool]:
        """Return ``IN``; for many values ``= ANY`` of one parameter: a join would sort all rows."""
        if len(values) <= _FEW:
            return expression.in_(values)
        listed: Any = sa.func.jsonb_array_elements_text(
            sa.cast(sa.bindparam(None, to_json(values).decode(), sa.Text), postgresql.JSONB)
        ).column_valued()
        if isinstance(values[0], int):
            listed = sa.cast(listed, sa.BigInteger)
        return expression == sa.any_(sa.func.array(sa.select(listed).scalar_subquery()))

    def ascending(self, expression: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """Put null where other databases do."""
        return expression.asc().nulls_first()

    def descending(self, expression: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """Put null where other databases do."""
        return expression.desc().nulls_last()

    # -- errors ---------------------------------------------------------------------------------

    def fault_of(self, error: sa.exc.DBAPIError) -> Fault:
        """Go by the SQLSTATE."""
        state = _state(error)
        if state in _SCHEMA:
            return Fault.SCHEMA
        if state in _CONFLICT or error.connection_invalidated:
            return Fault.CONFLICT
        if state[:2] in _DATA_CLASSES or (not state and isinstance(error, sa.exc.DataError)):
            return Fault.DATA
        return Fault.UNAVAILABLE

    def reason(self, error: sa.exc.DBAPIError) -> str:
        """Return the kind of error; its text only where that holds names of tables and columns."""
        state, text = _state(error), str(error.orig)
        kind = type(error.orig).__name__
        if state[:2] in _TELLING_CLASSES:
            return f"{text.splitlines()[0]} ({state})"
        if state:
            return f"{kind} ({state})"
        lower = text.lower()
        said = [phrase for phrase in _PHRASES if phrase.lower() in lower]
        return f"{kind} ({', '.join(said)})" if said else kind


def _size(kind: Any) -> type[sa.Integer]:
    for size in (sa.SmallInteger, sa.BigInteger):
        if isinstance(kind, size):
            return size
    return sa.Integer


def _state(error: sa.exc.DBAPIError) -> str:
    """Return the SQLSTATE as psycopg, psycopg2 or pg8000 tells it; empty if there is none."""
    for name in ("sqlstate", "pgcode"):
        state = getattr(error.orig, name, None)
        if isinstance(state, str):
            return state
    arguments = getattr(error.orig, "args", ())
    if arguments and isinstance(arguments[0], dict):
        return str(arguments[0].get("C", ""))
    return ""
