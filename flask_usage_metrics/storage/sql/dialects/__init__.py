"""SQL dialects, a module each, and the choice of one by an engine or a database URL."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from flask_usage_metrics.errors import ConfigError
from flask_usage_metrics.storage.sql.dialects.base import Dialect


def dialect_of(engine: Any) -> Dialect:
    """Return the dialect for a caller's engine.

    Raises:
        ConfigError: It is no engine, or its database or driver is not supported.
    """
    if not isinstance(engine, sa.Engine):
        hint = ": for a URL there is SQLStorage.from_url" if isinstance(engine, str) else ""
        raise ConfigError(f"engine must be an SQLAlchemy Engine, not {type(engine).__name__}{hint}")
    if engine.dialect.is_async:
        raise ConfigError(f"the driver {engine.dialect.driver} is async: engine must have another")
    return _class_of(engine.dialect.name)(engine)


def open_dialect(url: str) -> Dialect:
    """Return the dialect for a database URL, with an engine of its own; nothing is connected to.

    Raises:
        ConfigError: The URL is wrong, or its driver is not installed; the message does not repeat
            it.
    """
    try:
        location = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        raise ConfigError(
            "not a database URL: expected sqlite:///file, postgresql://user:password@host/database "
            "or mysql://user:password@host/database"
        ) from None
    kind, _, driver = location.drivername.partition("+")
    # Hosters still hand out this scheme, which SQLAlchemy dropped in 1.4.
    kind = "postgresql" if kind == "postgres" else kind
    found = _class_of(kind)
    driver = driver or next(iter(found.drivers))
    if driver not in found.drivers:
        raise ConfigError(
            f"{kind}+{driver} is not supported: expected one of "
            + ", ".join(f"{kind}+{name}" for name in found.drivers)
        )
    location = location.set(drivername=f"{kind}+{driver}")
    try:
        location.get_dialect().import_dbapi()
    except ImportError:
        raise ConfigError(
            f"{driver} is not installed: pip install '{found.drivers[driver]}'"
        ) from None
    return found.open(location)


def _class_of(kind: str) -> type[Dialect]:
    """Return the dialect of what SQLAlchemy calls a database; only its module is imported."""
    if kind == "sqlite":
        from flask_usage_metrics.storage.sql.dialects.sqlite import SQLite

        return SQLite
    if kind == "postgresql":
        from flask_usage_metrics.storage.sql.dialects.postgresql import PostgreSQL

        return PostgreSQL
    if kind in ("mysql", "mariadb"):
        from flask_usage_metrics.storage.sql.dialects.mariadb import MariaDB

        return MariaDB
    raise ConfigError(f"{kind} is not supported: expected sqlite, postgresql, mysql or mariadb")
