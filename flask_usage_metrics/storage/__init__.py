"""Storages: what records are written to, and where they are read from."""

from __future__ import annotations

import re
from typing import Any

from flask_usage_metrics.errors import ConfigError
from flask_usage_metrics.storage.base import Storage
from flask_usage_metrics.storage.writer import CallableWriter, Writer

__all__ = ["Storage", "Writer", "as_writer", "open_storage"]

_EXPECTED = (
    "expected sqlite:///file, postgresql://user:password@host/database, "
    "mysql://user:password@host/database, jsonl:///file or print:"
)
_SQL = ("sqlite", "postgresql", "postgres", "mysql", "mariadb")


def open_storage(url: str) -> Writer:
    """Return the storage a URL names; nothing is opened, made or connected to yet.

    Args:
        url: ``sqlite:///relative/file``, ``sqlite:////absolute/file``, ``sqlite://`` (in memory),
            ``postgresql://user:password@host/database``, ``mysql://user:password@host/database``,
            ``jsonl:///relative/file``, ``jsonl:////absolute/file`` or ``print:``. What is
            relative is so to the directory the process is in now.

    Raises:
        ConfigError: The URL is not one of these, or what it needs is not installed. The message
            never repeats the URL, which may hold a password, only its scheme.
    """
    return _open(url, "storage URL")


def as_writer(given: Any, where: str) -> Writer:
    """Return the storage that was meant.

    Args:
        given: A URL, a storage, or a callable that takes one dict.
        where: What the value was given as, such as ``"storage"``; for messages.

    Raises:
        ConfigError: It is none of these.
    """
    if isinstance(given, str):
        return _open(given, where)
    if isinstance(given, Writer):
        return given
    if isinstance(given, type) and issubclass(given, Writer):
        raise ConfigError(
            f"{where} must be a storage, not the class {given.__name__}: "
            f"call it, as in {given.__name__}(...)"
        )
    if callable(given):
        return CallableWriter(given)
    raise ConfigError(
        f"{where} must be a URL, a storage, a callable or a list of these, "
        f"not {type(given).__name__}"
    )


def _open(url: str, where: str) -> Writer:
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", url)
    if match is None:
        raise ConfigError(f"{where} has no scheme: {_EXPECTED}")
    scheme = match[1].lower()
    # Imported here: SQLAlchemy takes 0.2 s, which whoever stores elsewhere need not wait for.
    if scheme == "print" and url[match.end() :] in ("", "//"):
        from flask_usage_metrics.storage.printer import PrintWriter

        return PrintWriter()
    if scheme == "jsonl":
        from flask_usage_metrics.storage.jsonl import JSONLinesStorage

        path = url[match.end() :].removeprefix("///")
        if not path or path == url[match.end() :]:
            raise ConfigError(
                f"{where} must be jsonl:///relative/file or jsonl:////absolute/file: "
                "three slashes or four"
            )
        return JSONLinesStorage(path)
    if scheme.partition("+")[0] in _SQL:
        from flask_usage_metrics.storage.sql import SQLStorage

        try:
            return SQLStorage.from_url(url)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    raise ConfigError(f"{where} of kind {scheme!r} is not supported: {_EXPECTED}")
