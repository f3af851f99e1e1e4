"""The contract `Writer`: a storage that records are written to; a plain callable as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from inspect import signature
from math import inf
from typing import Any, cast

from flask_usage_metrics.errors import ConfigError, RecordsRejected
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.storage.compat import as_dict
from flask_usage_metrics.storage.given import as_record
from flask_usage_metrics.storage.hooks import as_hooks, set_up_hooks
from flask_usage_metrics.summarization import Summation


class _ClassName:
    """The name of a storage without one: that of its class in lower case."""

    def __get__(self, instance: object, owner: type) -> str:
        return _clean_name(owner.__name__.lower())


class Writer:
    """A storage that records are written to.

    A subclass overrides either `write`, which takes a batch and is called again after a failure,
    or, as with flask-track-usage, `set_up` and `store`, which takes one dict and is called once.
    It need not call this constructor.

    Args:
        *args: For `set_up`.
        hooks: Functions, or callable instances or their classes, to call for each record: see
            `call_hooks`, and `hooks.set_up_hooks` for how they are set up. A storage that can be
            read also takes flask-track-usage's sums, such as ``sumUrl`` of
            `flask_usage_metrics.summarization` or ``"sumUrl"``, though `Storage.get_sum` needs
            none. One of these or a list; None: none.
        **kwargs: For `set_up`, with `hooks` if that has a parameter of this name.

    Attributes:
        name: Short name, the value of the label ``sink``, without an address or a secret. Default:
            the name of the class in lower case.

    Raises:
        ConfigError: A hook is none of these.
    """

    name: str = cast(str, _ClassName())
    # For subclasses that do not call our constructor.
    _functions: Sequence[Callable[..., Any]] = ()
    _has_sums = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        parameters = signature(self.set_up)
        arguments = {**kwargs, **self._parent()}
        if "hooks" in parameters.parameters:
            # By position too, as in SQLStorage(engine, metadata, table_name, db, hooks).
            hooks = as_hooks(parameters.bind(*args, **kwargs).arguments.get("hooks"))
        else:
            hooks = as_hooks(kwargs.pop("hooks", None))
        for hook in hooks:
            if isinstance(hook, Summation) and not self._has_sums:
                raise ConfigError(
                    f"hooks: {type(self).__name__} cannot be read, so there is no {hook.name} of it"
                )
        self.set_up(*args, **kwargs)
        self._functions = set_up_hooks(hooks, arguments)

    def set_up(self, *args: Any, **kwargs: Any) -> None:
        """Take the constructor's arguments; for subclasses."""

    def store(self, data: dict[str, Any]) -> Any:
        """Keep one record, a dict as `given.as_record` takes it; for subclasses.

        Raises:
            Exception: It is not kept; see `write`, and `given.as_record`.
        """
        if type(self).write is Writer.write:
            raise NotImplementedError(f"{type(self).__name__} overrides neither store nor write")
        self.write([as_record(data)])
        return data

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """Keep one record at once, in the caller's thread, and call the hooks.

        As code and hooks for flask-track-usage do. It can be read when this returns, and is not
        counted at ``/metrics``.

        Args:
            data: See `given.as_record`; it stays as it is. With the ``id`` of a record that is kept
                already, that one stays.

        Returns:
            What was given.

        Raises:
            Exception: As `store` raises, or a hook: then the record is kept.
        """
        self.store(data)
        for function in self._functions:
            function(**{**data, **self._parent()})
        return data

    def write(self, batch: Sequence[UsageRecord]) -> None:
        """Keep a batch; may block.

        Called by one thread at a time of each app it is given to, never by a request's; and by that
        of a caller of the storage itself (see `__call__`).

        If a record with the same id is kept already, it must stay as it is.

        Args:
            batch: In the order of processing; may be empty.

        Raises:
            StorageUnavailable: Nothing was written; the same batch is written again later.
            RecordsRejected: The named records can never be written; all others were.
            Exception: Nothing was written. The batch is split and written again, to find the record
                that is the cause.
        """
        rejected: list[int] = []
        reason = ""
        for position, record in enumerate(batch):
            try:
                self.store(as_dict(record))
            except BaseException as error:  # noqa: BLE001 - it must not end the writing thread
                reason = reason or type(error).__name__
                rejected.append(position)
        if rejected:
            raise RecordsRejected(rejected, reason)

    def call_hooks(
        self, batch: Sequence[UsageRecord], report: Callable[[str, BaseException], None]
    ) -> None:
        """Call the functions among the hooks for each record of a batch that was kept.

        As in flask-track-usage: ``hook(**data)`` with a fresh dict of `as_dict`,
        ``_parent_class_name``, and ``_parent_self``, this storage; but in the thread that writes,
        without Flask's context. The next batch waits meanwhile. An exception of a hook touches
        neither the record, nor other hooks, nor other records.

        Each hook is called once for each record that was kept, but again if a batch is written
        again, such as after the process was killed. The record's id tells.

        Args:
            batch: In the order they were written in.
            report: Called with a hook's name and its exception.
        """
        if not self._functions:
            return
        parent = self._parent()
        for record in batch:
            for function in self._functions:
                try:
                    function(**as_dict(record), **parent)
                except BaseException as error:  # noqa: BLE001 - it must not end the writing thread
                    report(_callable_name(function), error)

    def _parent(self) -> dict[str, Any]:
        return {"_parent_class_name": type(self).__name__, "_parent_self": self}

    @property
    def identity(self) -> str:
        """A text that no other storage of the app has, the same in every process."""
        return f"{type(self).__module__}.{type(self).__qualname__} {self.name}"

    def bind_app(self, app: Any) -> None:
        """Take the Flask app that is tracked; for storages that need its context."""

    def flush(self) -> None:
        """Write records that the storage itself buffers, if any."""

    def maintain(self, keep: timedelta | None, now: datetime) -> float:
        """Do a small piece of maintenance, in the thread that writes: writing waits meanwhile.

        Args:
            keep: How long records are kept; None: for ever.
            now: Aware UTC.

        Returns:
            Seconds until it is to be called again: less than one if there is more to do, infinity
            if never.

        Raises:
            StorageUnavailable: The storage cannot be reached now.
        """
        return inf

    def close(self) -> None:
        """Close connections and files; the next use opens them again."""

    def reset_after_fork(self) -> None:
        """Drop connections and locks that are the parent process's, without closing them."""


class CallableWriter(Writer):
    """A plain callable as a storage; named after it.

    Args:
        function: Called once for each record with the dict of `as_dict`; a record for which it
            raises counts as failed.
    """

    def set_up(self, function: Callable[[dict[str, Any]], Any]) -> None:
        """Keep the callable."""
        self._function = function
        self.name = _callable_name(function)

    def store(self, data: dict[str, Any]) -> Any:
        """Call the callable."""
        return self._function(data)


def _callable_name(function: Callable[..., Any]) -> str:
    return _clean_name(str(getattr(function, "__name__", type(function).__name__)))


def _clean_name(name: str) -> str:
    """Return a name as the value of a label: 64 characters at most, ``_`` for unprintable ones."""
    return "".join(character if character.isprintable() else "_" for character in name[:64])
