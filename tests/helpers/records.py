"""Usage records for tests."""

from __future__ import annotations

import itertools
from datetime import datetime, timedelta, timezone
from typing import Any

from flask_usage_metrics.records.record import UsageRecord

UTC = timezone.utc
START = datetime(2026, 11, 22, 9, 0, tzinfo=UTC)
"""`started_at` of a record made without one."""

_serial = itertools.count(1)


def make_record(**overrides: Any) -> UsageRecord:
    """Return a record of an ordinary request with an id of its own."""
    fields: dict[str, Any] = {
        "id": f"019aa5c0-0000-7000-8000-{next(_serial):012x}",
        "started_at": START,
        "duration_seconds": 0.012345678,
        "method": "GET",
        "scheme": "https",
        "host": "shop.example",
        "root_path": "",
        "path": "/user/ann",
        "query": "tab=orders",
        "protocol": "HTTP/1.1",
        "endpoint": "user",
        "rule": "/user/<name>",
        "blueprint": None,
        "view_args": {"name": "ann"},
        "status": 200,
        "exception": None,
        "bytes_sent": 1234,
        "bytes_received": None,
        "remote_addr": "203.0.113.7",
        "forwarded_for": None,
        "country": "DE",
        "ip_info": None,
        "user_agent": "Mozilla/5.0 (X11; Linux x86_64) Chrome/126.0 Safari/537.36",
        "browser": "Chrome",
        "browser_version": "126",
        "platform": "Linux",
        "language": "de-DE",
        "client": "human",
        "referrer": "https://search.example/?q=shop",
        "authorization": False,
        "username": None,
        "visitor": None,
        "track_var": {},
        "trace_id": None,
        "span_id": None,
        "queue_seconds": None,
        "app": "shop",
        "process": "web1:4711",
        "consumer": None,
        "parent_span_id": None,
        "first_byte_seconds": None,
        "utm_source": None,
        "utm_medium": None,
        "utm_campaign": None,
        "ref": None,
    }
    return UsageRecord(**(fields | overrides))


def make_records(
    count: int, *, step: timedelta = timedelta(seconds=1), **overrides: Any
) -> list[UsageRecord]:
    """Return records that start one `step` after the other, oldest first."""
    return [make_record(started_at=START + number * step, **overrides) for number in range(count)]
