"""The table ``flask_usage``: its columns, and a record as one of its rows."""

from __future__ import annotations

from datetime import datetime, timezone
from functools import lru_cache
from math import isfinite
from typing import Any
from urllib.parse import urlsplit

import msgspec
import sqlalchemy as sa

from flask_usage_metrics.query import as_utc
from flask_usage_metrics.record import UsageRecord

to_json = msgspec.json.Encoder().encode
_from_json = msgspec.json.Decoder().decode

# Column, type, field of the record. First flask-track-usage's in its order, which people's own
# SQL relies on, then ours. Text has no length: SQLite ignores it, and what is legal must fit.
COLUMNS: tuple[tuple[str, type[sa.types.TypeEngine[Any]], str], ...] = (
    ("url", sa.Text, "url"),
    ("ua_browser", sa.Text, "browser"),
    ("ua_language", sa.Text, "language"),
    ("ua_platform", sa.Text, "platform"),
    ("ua_version", sa.Text, "browser_version"),
    ("blueprint", sa.Text, "blueprint"),
    ("view_args", sa.Text, "view_args"),
    ("status", sa.Integer, "status"),
    ("remote_addr", sa.Text, "remote_addr"),
    ("xforwardedfor", sa.Text, "forwarded_for"),
    ("authorization", sa.Boolean, "authorization"),
    ("ip_info", sa.Text, "ip_info"),
    ("path", sa.Text, "path"),
    ("speed", sa.Float, "duration_seconds"),
    ("datetime", sa.DateTime, "started_at"),
    ("username", sa.Text, "username"),
    ("track_var", sa.Text, "track_var"),
    ("record_id", sa.Text, "id"),
    ("method", sa.Text, "method"),
    ("scheme", sa.Text, "scheme"),
    ("host", sa.Text, "host"),
    ("root_path", sa.Text, "root_path"),
    ("query", sa.Text, "query"),
    ("protocol", sa.Text, "protocol"),
    ("endpoint", sa.Text, "endpoint"),
    ("rule", sa.Text, "rule"),
    ("exception", sa.Text, "exception"),
    ("bytes_sent", sa.BigInteger, "bytes_sent"),
    ("bytes_received", sa.BigInteger, "bytes_received"),
    ("country", sa.Text, "country"),
    ("user_agent", sa.Text, "user_agent"),
    ("client", sa.Text, "client"),
    ("referrer", sa.Text, "referrer"),
    ("visitor", sa.Text, "visitor"),
    ("trace_id", sa.Text, "trace_id"),
    ("span_id", sa.Text, "span_id"),
    ("queue_seconds", sa.Float, "queue_seconds"),
    ("app", sa.Text, "app"),
    ("process", sa.Text, "process"),
    ("consumer", sa.Text, "consumer"),
    ("parent_span_id", sa.Text, "parent_span_id"),
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


def describe(name: str, metadata: sa.MetaData | None) -> sa.Table:
    """Return the table of that name, described in the metadata or in one of its own."""
    return sa.Table(
        name,
        sa.MetaData() if metadata is None else metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        *(sa.Column(column, kind) for column, kind, _ in COLUMNS),
        extend_existing=True,
    )


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
        url: The whole URL.
        fields: The values by field of the record, as stored.
    """
    fields["started_at"] = datetime.fromisoformat(fields["started_at"]).replace(tzinfo=timezone.utc)
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
