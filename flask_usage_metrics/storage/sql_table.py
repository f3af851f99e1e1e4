"""The table ``flask_usage``: its columns, and a record as one of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from functools import lru_cache
from math import isfinite
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from flask_usage_metrics.query import as_utc
from flask_usage_metrics.record import UsageRecord

to_json = msgspec.json.Encoder().encode
_from_json = msgspec.json.Decoder().decode

# Types of columns, as wide as each database has them. MySQL's TEXT ends after 65 535 bytes, and
# MariaDB 10.11 cuts what an INSERT … SELECT brings without a word; its FLOAT has four bytes, and
# its DATETIME whole seconds.
_MYSQL = ("mysql", "mariadb")
TEXT = sa.Text().with_variant(mysql.LONGTEXT(), *_MYSQL)
INTEGER = sa.Integer()
BIG_INTEGER = sa.BigInteger()
FLOAT: sa.types.TypeEngine[float] = sa.Double().with_variant(sa.Float(), "sqlite")
BOOLEAN = sa.Boolean()
MOMENT = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), *_MYSQL)
# SQLite counts up only what is declared exactly so, and has 64 bits all the same.
SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
MOST_KEY_CHARACTERS = 255
"""Length of a text that an index is for: all MySQL can have in one, of four bytes each."""
# In PostgreSQL texts are sorted as the database says, such as without regard to "-".
KEY = (
    sa.Text()
    .with_variant(sa.Text(collation="C"), "postgresql")
    .with_variant(sa.String(MOST_KEY_CHARACTERS), *_MYSQL)
)

# Column, type, field of the record. First flask-track-usage's in its order, which people's own
# SQL relies on, then ours. Text has no length: what is legal must fit.
COLUMNS: tuple[tuple[str, sa.types.TypeEngine[Any], str], ...] = (
    ("url", TEXT, "url"),
    ("ua_browser", TEXT, "browser"),
    ("ua_language", TEXT, "language"),
    ("ua_platform", TEXT, "platform"),
    ("ua_version", TEXT, "browser_version"),
    ("blueprint", TEXT, "blueprint"),
    ("view_args", TEXT, "view_args"),
    ("status", INTEGER, "status"),
    ("remote_addr", TEXT, "remote_addr"),
    ("xforwardedfor", TEXT, "forwarded_for"),
    ("authorization", BOOLEAN, "authorization"),
    ("ip_info", TEXT, "ip_info"),
    ("path", TEXT, "path"),
    ("speed", FLOAT, "duration_seconds"),
    ("datetime", MOMENT, "started_at"),
    ("username", TEXT, "username"),
    ("track_var", TEXT, "track_var"),
    ("record_id", KEY, "id"),
    ("method", TEXT, "method"),
    ("scheme", TEXT, "scheme"),
    ("host", TEXT, "host"),
    ("root_path", TEXT, "root_path"),
    ("query", TEXT, "query"),
    ("protocol", TEXT, "protocol"),
    ("endpoint", TEXT, "endpoint"),
    ("rule", TEXT, "rule"),
    ("exception", TEXT, "exception"),
    ("bytes_sent", BIG_INTEGER, "bytes_sent"),
    ("bytes_received", BIG_INTEGER, "bytes_received"),
    ("country", TEXT, "country"),
    ("user_agent", TEXT, "user_agent"),
    ("client", TEXT, "client"),
    ("referrer", TEXT, "referrer"),
    ("visitor", TEXT, "visitor"),
    ("trace_id", TEXT, "trace_id"),
    ("span_id", TEXT, "span_id"),
    ("queue_seconds", FLOAT, "queue_seconds"),
    ("app", TEXT, "app"),
    ("process", TEXT, "process"),
    ("consumer", TEXT, "consumer"),
    ("parent_span_id", TEXT, "parent_span_id"),
)
COLUMN_NAMES = tuple(column for column, _, _ in COLUMNS)
COLUMN_OF = {field: column for column, _, field in COLUMNS}

# A row of flask-track-usage lacks our columns; what a record cannot do without is read as this,
# and also grouped and filtered by it, so that all ways of reading agree.
IF_NULL: dict[str, Any] = {
    "path": "",
    "status": 0,
    "duration_seconds": 0.0,
    "bytes_sent": 0,
    "method": "",
    "client": "",
    "app": "",
    "process": "",
    "protocol": "",
}


class Index(NamedTuple):
    """An index, described apart from its table, so that nobody else makes it, and otherwise."""

    name: str
    table: sa.Table
    columns: tuple[str, ...]
    unique: bool = False


def time_index(table: sa.Table) -> Index:
    """Return the index that pages are read by."""
    return Index(f"ix_{table.name}_datetime", table, ("datetime", "record_id"))


def record_index(table: sa.Table) -> Index:
    """Return the index that tells duplicates."""
    return Index(f"ix_{table.name}_record_id", table, ("record_id",), unique=True)


def describe(name: str, metadata: sa.MetaData | None) -> sa.Table:
    """Return the table of that name, described in the metadata or in one of its own."""
    return sa.Table(
        name,
        sa.MetaData() if metadata is None else metadata,
        sa.Column("id", SERIAL, primary_key=True),
        *(sa.Column(column, kind) for column, kind, _ in COLUMNS),
        extend_existing=True,
    )


class Filled:
    """Which columns rows have ever had a value for; the others need not be named.

    Up to Python 3.11 sqlite3 looks for an adapter for each None, at 3 000 instructions, and a row
    has ten of them: leaving them out made writing a third cheaper. MariaDB takes 40 columns out of
    JSON in twice the time it takes 28.
    """

    def __init__(self) -> None:
        self._columns = (False,) * len(COLUMNS)

    def with_rows(self, rows: Sequence[Sequence[Any]]) -> tuple[bool, ...]:
        """Return for each column whether it has a value in these rows, or had one before."""
        self._columns = tuple(
            known or any(row[position] is not None for row in rows)
            for position, known in enumerate(self._columns)
        )
        return self._columns


def to_row(record: UsageRecord) -> tuple[Any, ...]:
    """Return the values of `COLUMNS`."""
    # SQLite would store NaN as null; a time without zone could be any.
    if not (isfinite(record.duration_seconds) and isfinite(record.queue_seconds or 0.0)):
        raise ValueError("a duration is not finite")
    if record.started_at.tzinfo is None:
        raise ValueError("started_at has no time zone")
    return (
        record.url,
        record.browser,
        record.language,
        record.platform,
        record.browser_version,
        record.blueprint,
        None if record.view_args is None else to_json(record.view_args).decode(),
        record.status,
        record.remote_addr,
        record.forwarded_for,
        int(record.authorization),  # as None, a bool is looked up an adapter for
        None if record.ip_info is None else to_json(record.ip_info).decode(),
        record.path,
        record.duration_seconds,
        to_text(record.started_at),
        record.username,
        to_json(record.track_var).decode() if record.track_var else "{}",
        record.id,
        record.method,
        record.scheme,
        record.host,
        record.root_path,
        record.query,
        record.protocol,
        record.endpoint,
        record.rule,
        record.exception,
        record.bytes_sent,
        record.bytes_received,
        record.country,
        record.user_agent,
        record.client,
        record.referrer,
        record.visitor,
        record.trace_id,
        record.span_id,
        record.queue_seconds,
        record.app,
        record.process,
        record.consumer,
        record.parent_span_id,
    )


def to_record(key: int, url: str | None, fields: dict[str, Any]) -> UsageRecord:
    """Return the record of a row; where one of flask-track-usage has no value, something apt.

    Args:
        key: The primary key, of which an id is made if there is none.
        url: The whole URL, if there is no scheme.
        fields: The values by field of the record, as stored.
    """
    moment = fields["started_at"]
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment)
    fields["started_at"] = moment.replace(tzinfo=timezone.utc)
    fields["authorization"] = bool(fields["authorization"])
    fields["view_args"] = _object(fields["view_args"])
    fields["ip_info"] = _object(fields["ip_info"])
    fields["track_var"] = _object(fields["track_var"]) or {}
    if fields["id"] is None:
        fields["id"] = f"00000000-0000-0000-0000-{key:012x}"
    if fields["scheme"] is None:
        fields.update(_parts(url or "", fields["path"]))
    return UsageRecord(**fields)


def _object(text: str | None) -> dict[str, Any] | None:
    """Parse a JSON object; flask-track-usage cut some in the middle: nothing is left of these."""
    if text is None:
        return None
    try:
        value = _from_json(text)
    except (msgspec.DecodeError, TypeError):
        return None
    return value if isinstance(value, dict) else None


def _parts(url: str, path: str) -> dict[str, str]:
    """Take apart the URL of an old row, so that put together again it is the same."""
    front, _, query = url.partition("?")
    try:
        parts = urlsplit(front)
    except ValueError:
        return {"scheme": "", "host": "", "root_path": "", "query": query}
    return {
        "scheme": parts.scheme,
        "host": parts.netloc,
        "root_path": parts.path.removesuffix(path),
        "query": query,
    }


def to_text(moment: datetime) -> str:
    """Return UTC as SQLAlchemy's DateTime stores it in SQLite; naive is taken as UTC."""
    if moment.tzinfo is not timezone.utc:
        moment = as_utc(moment) or moment
    second = _second(
        moment.year, moment.month, moment.day, moment.hour, moment.minute, moment.second
    )
    return f"{second}.{moment.microsecond:06}"


@lru_cache(64)
def _second(*parts: int) -> str:
    # The seconds are few; isoformat() of an aware datetime costs 6 000 instructions more.
    return "{:04}-{:02}-{:02} {:02}:{:02}:{:02}".format(*parts)
