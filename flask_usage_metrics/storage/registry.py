"""Storages by the scheme of a URL: ours, and those that installed distributions register.

A distribution registers a storage with an entry point of the group `GROUP`: its name is the scheme
in lower case, its object a callable that takes the whole URL (str) and returns a `Writer`, such as
a subclass of `Writer` whose only argument is the URL. The call neither opens, makes nor connects to
anything. If the URL is wrong or a driver is missing it raises `ConfigError`, whose message does not
repeat the URL::

    [project.entry-points."flask_usage_metrics.storages"]
    redis = "my_package.storage:open_redis"

A URL ``redis+tls://…`` means the entry point ``redis+tls``, else ``redis``.

The schemes of `BUILT_IN` are never looked up there: an entry point of such a name is ignored, so no
distribution can take over where an app's records go. If two distributions register one scheme, its
URLs are refused. Entry points are read only for a scheme that is not built in, and only that
scheme's is imported: a broken one does not harm the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from flask_usage_metrics.errors import ConfigError
from flask_usage_metrics.storage.writer import CallableWriter, Writer

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Maker = Callable[[str], Writer]
"""Makes a storage from a URL; nothing is opened, made or connected to yet."""

GROUP = "flask_usage_metrics.storages"
"""The group of the entry points."""

_JSONL = "jsonl:///relative/file or jsonl:////absolute/file: three slashes or four"
_EXPECTED = (
    "expected sqlite:///file, postgresql://user:password@host/database, "
    "mysql://user:password@host/database, jsonl:///file or print:"
)


def open_storage(url: str) -> Writer:
    """Return the storage a URL names; nothing is opened, made or connected to yet.

    Args:
        url: ``sqlite:///relative/file``, ``sqlite:////absolute/file``, ``sqlite://`` (in memory),
            ``postgresql://user:password@host/database``, ``mysql://user:password@host/database``,
            ``jsonl:///relative/file``, ``jsonl:////absolute/file``, ``print:``, or a URL whose
            scheme an installed distribution registers (see `storage.registry`). A relative path is
            taken from the directory the process is in now.

    Raises:
        ConfigError: The URL is not one of these, what it needs is not installed, or the
            distribution's storage is broken. The message never repeats the URL, which may hold a
            password, only its scheme.
    """
    return _open(url, "storage URL")


def as_writer(given: Any, where: str) -> Writer:
    """Return the storage that a URL, a storage or a callable stands for.

    Args:
        given: A URL, a storage, or a callable that takes one dict.
        where: Name of the setting or argument for messages, such as ``"storage"``.

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


# -- ours ---------------------------------------------------------------------------------------
# Each imports its module when it is called: an app without a SQL storage does not wait 0.2 s for
# SQLAlchemy.


def _open_print(url: str) -> Writer:
    from flask_usage_metrics.storage.printer import PrintWriter

    if url.partition(":")[2] not in ("", "//"):
        raise ConfigError(f"nothing may follow print: ({_EXPECTED})")
    return PrintWriter()


def _open_jsonl(url: str) -> Writer:
    from flask_usage_metrics.storage.jsonl import JSONLinesStorage

    rest = url.partition(":")[2]
    path = rest.removeprefix("///")
    if not path or path == rest:
        raise ConfigError(f"expected {_JSONL}")
    return JSONLinesStorage(path)


def _open_sql(url: str) -> Writer:
    from flask_usage_metrics.storage.sql import SQLStorage

    return SQLStorage.from_url(url)


BUILT_IN: Mapping[str, Maker] = {
    "print": _open_print,
    "jsonl": _open_jsonl,
    "sqlite": _open_sql,
    "postgresql": _open_sql,
    "postgres": _open_sql,
    "mysql": _open_sql,
    "mariadb": _open_sql,
}
"""Makers by scheme, without the driver that may follow it after a ``+``."""


def _open(url: str, where: str) -> Writer:
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", url)
    if match is None:
        raise ConfigError(f"{where} has no scheme: {_EXPECTED}")
    scheme = match[1].lower()
    kind, plus, _ = scheme.partition("+")
    make = BUILT_IN.get(kind)
    if make is None or (plus and make is not _open_sql):  # print and jsonl have no drivers
        return _open_registered(url, scheme, where)
    try:
        return make(url)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


# -- those of other distributions ---------------------------------------------------------------


def _open_registered(url: str, scheme: str, where: str) -> Writer:
    registered = _registered(where)
    found = registered.get(scheme) or registered.get(scheme.partition("+")[0])
    if found is None:
        more = f"; installed besides: {', '.join(sorted(registered))}" if registered else ""
        raise ConfigError(f"{where} of kind {scheme!r} is not supported: {_EXPECTED}{more}")
    if len({entry_point.value for entry_point in found}) > 1:
        raise ConfigError(
            f"{where} of kind {scheme!r} is registered by several distributions: "
            f"{_described(found)}; uninstall all but one"
        )
    name = f"{where}: the storage of {_described(found[:1])}"
    try:
        make = found[0].load()
    except Exception as error:
        raise ConfigError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(make):
        raise ConfigError(f"{name} must be a callable that takes a URL, not {type(make).__name__}")
    try:
        writer = make(url)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except Exception as error:  # noqa: BLE001 - it may raise anything
        # Without its text and traceback: they may hold the URL, and so a password.
        raise ConfigError(f"{name} raised {type(error).__name__}") from None
    if not isinstance(writer, Writer):
        raise ConfigError(f"{name} must return a Writer, not {type(writer).__name__}")
    return writer


def _registered(where: str) -> dict[str, list[EntryPoint]]:
    """Return the entry points by scheme, those of built-in schemes left out; none is imported.

    Raises:
        ConfigError: The metadata of some distribution cannot be read.
    """
    # Imported here: it costs time, and few apps have such a storage.
    from importlib.metadata import entry_points

    try:
        installed = entry_points(group=GROUP)
    except Exception as error:
        raise ConfigError(
            f"{where}: the entry points of the installed distributions cannot be read: "
            f"{type(error).__name__}"
        ) from error
    found: dict[str, list[EntryPoint]] = {}
    for entry_point in installed:
        scheme = entry_point.name.lower()
        if scheme.partition("+")[0] not in BUILT_IN:
            found.setdefault(scheme, []).append(entry_point)
    return found


def _described(entry_points: Iterable[EntryPoint]) -> str:
    """Return entry points for a message: ``my-package's entry point redis = my_package:open``."""
    return " and ".join(
        f"{'an unknown distribution' if each.dist is None else each.dist.name}'s entry point "
        f"{each.name} = {each.value}"
        for each in entry_points
    )
