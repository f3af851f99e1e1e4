"""The storage in a SQL database: SQLite, PostgreSQL, MariaDB and MySQL, through SQLAlchemy Core."""

from __future__ import annotations

from flask_usage_metrics.storage.sql.storage import SQLStorage

__all__ = ["SQLStorage"]
