"""MariaDB and MySQL: a batch is one JSON text, and texts compare by their characters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from inspect import signature
from itertools import compress
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from flask_usage_metrics.errors import ConfigError, StorageError
from flask_usage_metrics.records.query import Every
from flask_usage_metrics.storage.sql.dialects.base import BUSY_SECONDS, Dialect, Fault
from flask_usage_metrics.storage.sql.dialects.columns_in_use import ColumnsInUse
from flask_usage_metrics.storage.sql.dialects.json_batch import MOST_BYTES, check, divided
from flask_usage_metrics.storage.sql.table import COLUMN_NAMES, Columns

# A time as text is "2026-11-22 09:00:00.000001".
_PERIOD_CHARACTERS = {"hour": 13, "day": 10, "month": 7}

# https://mariadb.com/kb/en/mariadb-error-code-reference/
_SCHEMA = {1054, 1146, 1364}  # no such column, no such table, no default for what is not ours
_CONFLICT = {1213}  # deadlock
_DATA = {
    1048,  # null where there must be something
    1062,  # a duplicate, in an index that is not ours
    1118,  # row too large
    1153,  # packet too large
    1264,  # out of range
    1265,  # truncated
    1292,  # no date
    1366,  # no number, or a character there is not
    1406,  # too long
    1690,  # out of range, of a calculation
}
_REASONS = {
    1040: "too many connections",
    1044: "access denied to the database",
    1045: "access denied",
    1049: "unknown database",
    1054: "unknown column",
    1114: "the table is full",
    1142: "the user may not do that",
    1146: "no such table",
    1205: "lock wait timeout",
    1213: "deadlock",
    1290: "read-only",
    2002: "cannot connect",
    2003: "cannot connect",
    2005: "unknown host",
    2006: "the connection was lost",
    2013: "the connection was lost",
    1364: "a column that is not ours has no default",
    1836: "read-only",
}
_NOT_SUPPORTED = 1235


class MariaDB(Dialect):
    """MariaDB since 10.6, MySQL since 8.0.4: for JSON_TABLE.

    Texts are LONGTEXT, compared by their characters alone, trailing spaces included. A batch is one
    statement with one JSON text. Bytes of deleted rows stay until InnoDB purged them, and until the
    space is used again.
    """

    name = "mysql"
    drivers: ClassVar[Mapping[str, str]] = {
        "pymysql": "flask-usage-metrics[mysql]",
        "mysqldb": "mysqlclient",
        "mysqlconnector": "mysql-connector-python",
        "mariadbconnector": "mariadb",
    }

    def __init__(self, engine: sa.Engine, *, owned: bool = False) -> None:
        super().__init__(engine, owned=owned)
        self._in_use = ColumnsInUse()

    @classmethod
    def open(cls, location: sa.URL) -> MariaDB:
        """Return the dialect of a server."""
        driver = location.drivername.partition("+")[2]
        if driver in ("pymysql", "mysqldb") and "charset" not in location.query:
            location = location.update_query_dict({"charset": "utf8mb4"})
        engine = sa.create_engine(location, hide_parameters=True)
        if driver == "pymysql":
            dbapi: Any = engine.dialect.import_dbapi()
            arguments, options = engine.dialect.create_connect_args(location)
            try:
                signature(dbapi.connections.Connection).bind(*arguments, **options)
            except TypeError:
                raise ConfigError("the URL holds an option that PyMySQL does not know") from None
        return cls(engine, owned=True)

    @contextmanager
    def lock(
        self, connection: sa.Connection, name: str, wait_seconds: float = BUSY_SECONDS
    ) -> Iterator[None]:
        """Take a named lock of the server; statements about tables commit by themselves."""
        # Names are the server's, not the database's, and have 64 characters.
        name = f"{self.engine.url.database}.{name}"
        key = f"flask_usage_metrics {sha256(name.encode()).hexdigest()[:32]}"
        try:
            got = connection.execute(sa.select(sa.func.get_lock(key, wait_seconds))).scalar()
        except sa.exc.DBAPIError as error:
            if _code(error) != _NOT_SUPPORTED:
                raise
            got = 1  # a cluster has no such locks, and does without
        if not got:
            raise TimeoutError("another process has the lock")
        try:
            # For an ALTER TABLE: its default is a day.
            seconds = max(1, round(wait_seconds))
            connection.exec_driver_sql(f"SET SESSION lock_wait_timeout = {seconds}")
            yield
            connection.commit()
        finally:
            if not connection.invalidated:
                connection.rollback()
                connection.exec_driver_sql("SET SESSION lock_wait_timeout = DEFAULT")
                connection.execute(sa.select(sa.func.release_lock(key)))
                connection.rollback()

    # -- the schema -----------------------------------------------------------------------------

    def create_table(self, table: sa.Table) -> str:
        """Have texts compare by their characters."""
        return f"{super().create_table(table)} {self._charset()} ROW_FORMAT=DYNAMIC"

    def alter_table(self, table: sa.Table, clauses: Sequence[str]) -> list[str]:
        """Copy the table once; an old one may have a format that lacks room for our columns."""
        return super().alter_table(table, [*clauses, "ROW_FORMAT=DYNAMIC"])

    def widen_column(self, column: sa.Column[Any]) -> str:
        """Return the clause; MODIFY also has to say whether the column may be null."""
        serial = " NOT NULL AUTO_INCREMENT" if column.primary_key else ""
        return f"MODIFY {self._quoted(column)} {self.type_of(column)}{serial}"

    def type_of(self, column: sa.Column[Any]) -> str:
        """Return the type; that of a text names its collation."""
        kind = super().type_of(column)
        return f"{kind} {self._charset()}" if isinstance(column.type, sa.String) else kind

    def is_narrow(self, column: sa.Column[Any], found: Mapping[str, Any]) -> bool:
        """Compare lengths, sizes, precisions and collations."""
        is_: Any = found["type"]
        wanted = column.type.dialect_impl(self.engine.dialect)
        if isinstance(is_, sa.String):
            as_long = isinstance(is_, mysql.LONGTEXT) or (is_.length or 0) >= (
                getattr(wanted, "length", None) or 2**32
            )
            return not as_long or found.get("collation") != self._collation()
        if isinstance(is_, sa.Integer):
            return _bits(is_) < _bits(wanted)
        if isinstance(is_, mysql.DATETIME):
            return is_.fsp != 6
        return isinstance(is_, mysql.FLOAT)

    def collations(self, connection: sa.Connection, table: sa.Table) -> Mapping[str, str]:
        """Return the collations of texts; the inspector does not tell the table's default."""
        rows = connection.execute(
            sa.text(
                "SELECT column_name, collation_name FROM information_schema.columns WHERE "
                "table_schema = COALESCE(:db, DATABASE()) AND table_name = :name "
                "AND collation_name IS NOT NULL"
            ),
            {"db": table.schema, "name": table.name},
        )
        return {str(name): str(collation) for name, collation in rows}

    def _charset(self) -> str:
        return f"CHARACTER SET utf8mb4 COLLATE {self._collation()}"

    def _collation(self) -> str:
        # The others of the kind ignore trailing spaces. Known once there was a connection.
        is_mariadb = getattr(self.engine.dialect, "is_mariadb", True)
        return "utf8mb4_nopad_bin" if is_mariadb else "utf8mb4_0900_bin"

    # -- writing --------------------------------------------------------------------------------

    def insert(self, connection: sa.Connection, table: sa.Table, columns: Columns) -> None:
        """Insert rows as one JSON text, in hexadecimal digits: a driver is slow to quote texts."""
        check(columns)
        in_use = self._in_use.with_rows(columns)
        names = tuple(compress(COLUMN_NAMES, in_use))
        for batch in divided(list(compress(columns, in_use)), _rows):
            if len(batch) > MOST_BYTES // 4:
                self._check_packet(connection, batch)
            connection.exec_driver_sql(self._insert(table, names, batch))

    def _check_packet(self, connection: sa.Connection, batch: bytes) -> None:
        # The server would close the connection, which looks like an outage.
        most = connection.exec_driver_sql("SELECT @@max_allowed_packet").scalar_one()
        if 2 * len(batch) > most - 10_000:
            raise StorageError(reason="mysql: records are larger than max_allowed_packet")

    def _insert(self, table: sa.Table, columns: Sequence[str], batch: bytes) -> str:
        prepare = self.engine.dialect.identifier_preparer
        quoted = prepare.format_table(table)
        names = list(map(prepare.quote, columns))
        # All as texts: of a JSON_TABLE's numbers, those that are too big are clamped.
        paths = ", ".join(
            f"{name} LONGTEXT PATH '$[{position}]'" for position, name in enumerate(names)
        )
        # Not IGNORE, which changes what does not fit.
        return (
            f"INSERT INTO {quoted} ({', '.join(names)}) "
            f"SELECT r.* FROM JSON_TABLE(_utf8mb4 X'{batch.hex()}', '$[*]' COLUMNS ({paths})) AS r "
            f"ON DUPLICATE KEY UPDATE id = {quoted}.id"
        )

    # -- expressions ----------------------------------------------------------------------------

    def period(self, moment: sa.ColumnElement[Any], every: Every) -> sa.ColumnElement[str]:
        """Return the first characters of the time as text."""
        length: Any = sa.literal_column(str(_PERIOD_CHARACTERS[every]))
        return sa.func.left(sa.cast(moment, sa.CHAR(26)), length)

    def variable(self, column: sa.Column[Any], key: str) -> sa.ColumnElement[str]:
        """Take the value out; its text compares as the columns do."""
        path: Any = sa.literal_column(f"""'$."{key}"'""")
        value = sa.func.json_extract(column, path)
        others: list[Any] = [sa.literal_column(f"'{kind}'") for kind in ("NULL", "ARRAY", "OBJECT")]
        return sa.case(
            (sa.func.json_valid(column) == sa.literal_column("0"), sa.null()),
            (
                sa.func.json_type(value).not_in(others),
                sa.collate(sa.func.json_unquote(value), self._collation()),
            ),
        )

    def any_of(
        self, expression: sa.ColumnElement[Any], values: Sequence[Any]
    ) -> sa.ColumnElement[bool]:
        """Return ``IN`` with a parameter a value."""
        return expression.in_(values)

    # -- errors ---------------------------------------------------------------------------------

    def fault_of(self, error: sa.exc.DBAPIError) -> Fault:
        """Go by the number of the error."""
        code = _code(error)
        if code in _SCHEMA:
            return Fault.SCHEMA
        if code in _CONFLICT or error.connection_invalidated:
            return Fault.CONFLICT
        if code in _DATA or isinstance(error, sa.exc.DataError):
            return Fault.DATA
        return Fault.UNAVAILABLE

    def reason(self, error: sa.exc.DBAPIError) -> str:
        """Return the kind and number of the error; its text may hold anything."""
        code = _code(error)
        kind = type(error.orig).__name__
        said = _REASONS.get(code)
        return f"{kind} ({code}: {said})" if said else f"{kind} ({code})"


def _rows(columns: Columns) -> list[tuple[Any, ...]]:
    return list(zip(*columns, strict=True))


def _bits(kind: Any) -> int:
    for size, bits in (
        (mysql.TINYINT, 8),
        (sa.Boolean, 8),
        (sa.SmallInteger, 16),
        (mysql.MEDIUMINT, 24),
        (sa.BigInteger, 64),
    ):
        if isinstance(kind, size):
            return bits
    return 32


def _code(error: sa.exc.DBAPIError) -> int:
    arguments = getattr(error.orig, "args", ())
    return arguments[0] if arguments and isinstance(arguments[0], int) else 0
