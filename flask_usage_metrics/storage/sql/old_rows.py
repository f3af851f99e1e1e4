"""Values of flask-track-usage's rows, spelled as ours are: then one GROUP BY does not split."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from flask_usage_metrics.records.address import normalise
from flask_usage_metrics.storage.sql.database import Database

# By Werkzeug up to 2.0 (werkzeug/useragents.py), which parsed user agents for flask-track-usage,
# and by enrich/clients/browsers.py. Names that have none there stay, such as google for a robot.
BROWSERS = {
    "chrome": "Chrome",
    "edge": "Edge",
    "firefox": "Firefox",
    "msie": "IE",
    "opera": "Opera",
    "safari": "Safari",
}
PLATFORMS = {
    "android": "Android",
    "blackberry": "BlackBerry",
    "bsd": "BSD",
    "chromeos": "ChromeOS",
    "dragonflybsd": "BSD",
    "freebsd": "BSD",
    "ipad": "iOS",
    "iphone": "iOS",
    "linux": "Linux",
    "macos": "macOS",
    "netbsd": "BSD",
    "openbsd": "BSD",
    "windows": "Windows",
}

_COLUMNS = (
    *("ua_browser", "ua_version", "ua_platform"),
    *("view_args", "ip_info", "track_var", "remote_addr"),
)
_AT_ONCE = 1000
"""Rows read, and changed, in one transaction, for which writers wait."""

_MAJOR = re.compile("[0-9]{1,4}")


def respell(database: Database, table: sa.Table, *, only_count: bool = False) -> int:
    """Spell the values of rows that flask-track-usage wrote as ours are spelled.

    Browsers, their versions and platforms, addresses, and JSON. In chunks, each a transaction of
    its own: what an interrupted call did stays done, and another goes on. Blocks until all is done.

    Args:
        database: Where the table is.
        table: That of the records.
        only_count: Change nothing.

    Returns:
        How many rows were changed, or would be.

    Raises:
        StorageUnavailable: The database cannot be reached or written now.
    """
    key = table.c.id
    old = table.c.record_id.is_(None)
    page = sa.select(key, *(table.c[name] for name in _COLUMNS)).where(old).order_by(key)
    update = (
        sa.update(table)
        .where(key == sa.bindparam("old_key"), old)
        .values({name: sa.bindparam(f"new_{name}") for name in _COLUMNS})
    )
    total, last = 0, -(2**63)
    while rows := database.fetch(page.where(key > last).limit(_AT_ONCE)):
        changes = _changes(rows)
        total += len(changes)
        if changes and not only_count:

            def change(connection: sa.Connection, changes: Any = changes) -> None:
                connection.execute(update, changes)

            database.run(change, create=False, absent=None)
            # SQLite's lock is not fair: without a pause the writers that wait would get no turn.
            time.sleep(0.005)
        last = rows[-1][0]
    return total


def _changes(rows: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """Return the parameters of the update for the rows that change."""
    changes = []
    for key, *values in rows:
        row = dict(zip(_COLUMNS, values, strict=True))
        now = spelled(row)
        if now != row:
            changes.append({"old_key": key, **{f"new_{name}": now[name] for name in _COLUMNS}})
    return changes


def spelled(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a row that `respell` looks at, by column, as ours are spelled."""
    browser = BROWSERS.get(row["ua_browser"])
    version, platform = row["ua_version"], row["ua_platform"]
    if browser is not None:
        if browser == "Safari" and platform in ("android", "Android"):
            browser = "Android Browser"
        major = _MAJOR.match(version or "")
        version = major[0] if major else None
    address = row["remote_addr"]
    return {
        "ua_browser": browser or row["ua_browser"],
        "ua_version": version,
        "ua_platform": PLATFORMS.get(platform, platform),
        "view_args": _json(row["view_args"]),
        "ip_info": _json(row["ip_info"]),
        "track_var": _json(row["track_var"]),
        "remote_addr": (address and normalise(address)) or address,
    }


def _json(text: str | None) -> str | None:
    """Return a JSON object without blanks, and null as None; anything else stays."""
    try:
        value = json.loads(text or "null")
        if value is None:
            return None
        if not isinstance(value, dict):
            return text
        # Infinity, such as of 1e999, and NaN are not JSON.
        dense = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        dense.encode()  # a lone surrogate that was escaped
    except (ValueError, RecursionError):  # flask-track-usage cut it off
        return text
    return dense
