"""The table of records, ``flask_usage``: its columns, and records as rows of it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from itertools import chain
from math import isfinite
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
import sqlalchemy as sa
from msgspec.structs import astuple
from sqlalchemy.dialects import mysql

from flask_usage_metrics.records.query import as_utc
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.records.urls import url_of
from flask_usage_metrics.runtime.caches import TwoGenerationCache
from flask_usage_metrics.runtime.gil import GilYielder

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
"""Most characters of a text that is indexed: the most MySQL takes, of four bytes each."""
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
    ("first_byte_seconds", FLOAT, "first_byte_seconds"),
    ("utm_source", TEXT, "utm_source"),
    ("utm_medium", TEXT, "utm_medium"),
    ("utm_campaign", TEXT, "utm_campaign"),
    ("ref", TEXT, "ref"),
)
_FIELDS = UsageRecord.__struct_fields__
_URL_FIELDS = ("scheme", "host", "root_path", "path", "query")
_URLS: TwoGenerationCache[tuple[str, ...], str] = TwoGenerationCache(
    lambda parts: url_of(*parts), lambda parts: sum(map(len, parts))
)
_STEP = 128
"""Rows between two points at which other threads may have the GIL."""

_TEXT_CHARACTERS = len("2026-11-22 09:00:00.000001")

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
    """An index; not part of its `sqlalchemy.Table`, or ``metadata.create_all`` would create it.

    Attributes:
        name: Its name.
        table: Its table.
        columns: Names of columns, in order.
        unique: Whether it refuses duplicates.
    """

    name: str
    table: sa.Table
    columns: tuple[str, ...]
    unique: bool = False


def time_index(table: sa.Table) -> Index:
    """Return the index that records are read in order by."""
    return Index(f"ix_{table.name}_datetime", table, ("datetime", "record_id"))


def record_index(table: sa.Table) -> Index:
    """Return the index that keeps a record from being stored twice."""
    return Index(f"ix_{table.name}_record_id", table, ("record_id",), unique=True)


def describe(name: str, metadata: sa.MetaData | None) -> sa.Table:
    """Return the description of the table.

    Args:
        name: Its name.
        metadata: Where it is to be described; None: in metadata of its own.
    """
    return sa.Table(
        name,
        sa.MetaData() if metadata is None else metadata,
        sa.Column("id", SERIAL, primary_key=True),
        *(sa.Column(column, kind) for column, kind, _ in COLUMNS),
        extend_existing=True,
    )


Columns = list[Sequence[Any]]
"""A batch by column: for each of `COLUMNS` in order, its values, one a row."""


def to_columns(batch: Sequence[UsageRecord]) -> Columns:
    """Return a batch of records as `Columns`, converted to what databases take.

    Times become texts, JSON objects texts, booleans integers. Hot path, so column by column, with
    functions in C: see tests/benchmarks/README.md.

    Args:
        batch: One record at least.

    Raises:
        ValueError: A value cannot be kept.
        TypeError: Likewise.
    """
    yielder = GilYielder()
    flat: list[Any] = []
    for step in yielder.steps(batch, _STEP):
        for record in step:
            flat.extend(astuple(record))
    fields: dict[str, Sequence[Any]] = {
        field: flat[position :: len(_FIELDS)] for position, field in enumerate(_FIELDS)
    }
    # SQLite would store NaN as null.
    durations = chain(
        fields["duration_seconds"],
        filter(None, fields["queue_seconds"]),
        filter(None, fields["first_byte_seconds"]),
    )
    if not all(map(isfinite, durations)):
        raise ValueError("a duration is not finite")
    parts = zip(*map(fields.__getitem__, _URL_FIELDS), strict=True)
    # As `UsageRecord.url`, which costs more.
    fields["url"] = [_URLS[target] for step in yielder.steps(list(parts), _STEP) for target in step]
    fields["started_at"] = _to_texts(fields["started_at"])
    # For a bool sqlite3 would look up an adapter.
    fields["authorization"] = [1 if given else 0 for given in fields["authorization"]]
    for field in ("view_args", "ip_info"):
        fields[field] = [
            None if value is None else to_json(value).decode()
            for step in yielder.steps(fields[field], _STEP)
            for value in step
        ]
    fields["track_var"] = [
        to_json(value).decode() if value else "{}" for value in fields["track_var"]
    ]
    return [fields[field] for _, _, field in COLUMNS]


def to_record(key: int, url: str | None, fields: dict[str, Any]) -> UsageRecord:
    """Return a row as a record; fields that a row of flask-track-usage lacks are derived.

    Args:
        key: The primary key; the id is made of it if the row has no record id.
        url: The whole URL, from which its parts are taken if there is no scheme; may be None.
        fields: The stored values by field of the record; changed in place.
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
    """Parse a JSON object; None if it is none, such as those flask-track-usage cut off.

    None also if it is nested deeper than this process can read: another CPython wrote it.
    """
    if text is None:
        return None
    try:
        value = _from_json(text)
    except (msgspec.DecodeError, TypeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _parts(url: str, path: str) -> dict[str, str]:
    """Split the URL of a row of flask-track-usage so that `UsageRecord.url` is the same again."""
    front, _, query = url.partition("?")
    try:
        parts = urlsplit(front)
    except ValueError:
        return {"scheme": "", "host": "", "root_path": "", "query": query}
    if not parts.path.endswith(path):  # as it is in a URL
        path = url_of("http", "host", "", path, "").removeprefix("http://host")
    return {
        "scheme": parts.scheme,
        "host": parts.netloc,
        "root_path": parts.path.removesuffix(path),
        "query": query,
    }


def to_text(moment: datetime) -> str:
    """Return a time as SQLAlchemy stores it in SQLite, in UTC; naive means UTC."""
    utc = as_utc(moment) or moment
    return utc.replace(tzinfo=None).isoformat(" ", "microseconds")


def _to_texts(moments: Sequence[datetime]) -> list[str]:
    """Return `to_text` of each time, faster: by the JSON encoder, which is in C.

    Raises:
        ValueError: One is naive.
    """
    # ["2026-11-22T09:00:00.000001Z","2026-11-22T09:00:00.000002Z"]
    texts = to_json(moments).decode()[2:-3].replace("T", " ").split('Z","')
    if len(texts) == len(moments) and set(map(len, texts)) == {_TEXT_CHARACTERS}:
        return texts
    # One is of a whole second, which is encoded shorter, or not UTC.
    if any(moment.tzinfo is None for moment in moments):
        raise ValueError("started_at has no time zone")  # it could be any
    return list(map(to_text, moments))
