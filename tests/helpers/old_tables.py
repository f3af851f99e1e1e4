"""A table as flask-track-usage made it, and SQLite without anything of ours."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OLD_TABLE = """CREATE TABLE flask_usage (
    id INTEGER NOT NULL, url VARCHAR(128), ua_browser VARCHAR(16), ua_language VARCHAR(16),
    ua_platform VARCHAR(16), ua_version VARCHAR(16), blueprint VARCHAR(16), view_args VARCHAR(64),
    status INTEGER, remote_addr VARCHAR(24), xforwardedfor VARCHAR(24), authorization BOOLEAN,
    ip_info VARCHAR(1024), path VARCHAR(32), speed FLOAT, datetime DATETIME, username VARCHAR(128),
    track_var VARCHAR(128), PRIMARY KEY (id))"""


@contextmanager
def plain(file: Path) -> Iterator[sqlite3.Connection]:
    """Open the file without anything of ours."""
    connection = sqlite3.connect(file, isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()
