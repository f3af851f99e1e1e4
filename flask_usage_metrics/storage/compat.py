"""Records in flask-track-usage's shapes: the dict a storage is given, an item of `get_usage`."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qsl

from flask_usage_metrics.records.record import UsageRecord


class UserAgent:
    """The client as flask-track-usage described it; prints as the User-Agent header.

    Attributes:
        browser: Such as ``"Chrome"``, or None.
        version: Major version, or None.
        platform: Operating system, such as ``"Windows"``, or None.
        language: First choice of Accept-Language, or None.
        string: The header; ``""`` if none came.
    """

    __slots__ = ("browser", "language", "platform", "string", "version")

    def __init__(self, record: UsageRecord) -> None:
        self.browser = record.browser
        self.version = record.browser_version
        self.platform = record.platform
        self.language = record.language
        self.string = record.user_agent or ""

    def __str__(self) -> str:
        return self.string

    def __repr__(self) -> str:
        return f"<UserAgent {self.browser!r}/{self.version!r}>"


def as_dict(record: UsageRecord) -> dict[str, Any]:
    """Return a record as the dict a custom storage is given; nobody else has it or parts of it.

    It has the 18 keys of flask-track-usage, and every field of `UsageRecord` under its own name,
    but a `UserAgent` under ``user_agent``.
    """
    fields = {name: getattr(record, name) for name in UsageRecord.__struct_fields__}
    for name in ("view_args", "ip_info", "track_var"):
        fields[name] = _copy(fields[name])
    url_args: dict[str, str] = {}
    for key, value in parse_qsl(record.query, keep_blank_values=True):
        url_args.setdefault(key, value)
    fields.update(
        url=record.url,
        user_agent=UserAgent(record),
        server_name=record.app,
        xforwardedfor=record.forwarded_for,
        speed=record.duration_seconds,
        date=int(record.started_at.timestamp()),
        content_length=record.bytes_sent,
        request=f"{record.method} {record.url} {record.protocol}",
        url_args=url_args,
    )
    return fields


def as_usage_item(record: UsageRecord) -> dict[str, Any]:
    """Return a record as one of the dicts of `Storage.get_usage`, as documented there.

    Objects are JSON texts, spelled as that package spelled them, and None if empty.
    """
    return {
        "url": record.url,
        "user_agent": {
            "browser": record.browser,
            "language": record.language,
            "platform": record.platform,
            "version": record.browser_version,
        },
        "blueprint": record.blueprint,
        "view_args": _as_text(record.view_args),
        "status": record.status,
        "remote_addr": record.remote_addr,
        "xforwardedfor": record.forwarded_for,
        "authorization": record.authorization,
        "ip_info": _as_text(record.ip_info),
        "path": record.path,
        "speed": record.duration_seconds,
        "date": record.started_at.replace(tzinfo=None),
        "username": record.username,
        "track_var": _as_text(record.track_var),
    }


def _as_text(value: dict[str, Any] | None) -> str | None:
    return json.dumps(value, ensure_ascii=False) if value else None


def _copy(value: Any) -> Any:
    """Return a deep copy of a JSON value."""
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_copy(inner) for inner in value]
    return value
