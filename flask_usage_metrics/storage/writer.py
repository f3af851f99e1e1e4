"""The contract of what records are written to, and plain callables in its shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from inspect import signature
from math import inf
from typing import Any, cast

from flask_usage_metrics.errors import ConfigError, RecordsRejected
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.storage.compat import as_dict
from flask_usage_metrics.storage.hooks import as_hooks
from flask_usage_metrics.summarization import Summation


class _ClassName:
    """The name of a storage that was given none: that of its class."""

    def __get__(self, instance: object, owner: type) -> str:
        return _clean_name(owner.__name__.lower())


class Writer:
    """Something records are written to.

    A subclass overrides either `write`, which takes a batch and is asked again after a failure,
    or, as with flask-track-usage, `set_up` and `store`, which takes one dict and is asked once.

    Args:
        *args: Those of `set_up`.
        hooks: Functions to call for each record, as `call_hooks` does. A storage that can be read
            also takes what flask-track-usage calls hooks, such as ``sumUrl`` of
            `flask_usage_metrics.summarization` or ``"sumUrl"``, though `Storage.get_sum` does
            without. One of these or a list.
        **kwargs: Those of `set_up`, which is given `hooks` too if it names them.

    Attributes:
        name: Short name, the value of the label ``sink``; it never holds an address or a secret.
            Unless a subclass or an instance sets one: the name of its class in lower case.

    Raises:
        ConfigError: A hook is none of these.
    """

    name: str = cast(str, _ClassName())
    # For subclasses that do not call our constructor.
    _functions: Sequence[Callable[..., Any]] = ()
    _has_sums = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        parameters = signature(self.set_up)
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
        self._functions = [hook for hook in hooks if not isinstance(hook, Summation)]
        self.set_up(*args, **kwargs)

    def set_up(self, *args: Any, **kwargs: Any) -> None:
        """Take the constructor's arguments; for subclasses."""

    def store(self, data: dict[str, Any]) -> Any:
        """Keep one record, given as the dict of `as_dict`; for subclasses."""
        raise NotImplementedError(f"{type(self).__name__} overrides neither store nor write")

    def __call__(self, data: dict[str, Any]) -> Any:
        """Keep one record, as `store` does."""
        return self.store(data)

    def write(self, batch: Sequence[UsageRecord]) -> None:
        """Keep a batch; called by one thread at a time, never by a request.

        Writing a record again that is already kept must change nothing: its id tells.

        Raises:
            StorageUnavailable: Nothing was written; the same batch will be offered again.
            RecordsRejected: The named records can never be written; all others were.
            Exception: Nothing was written. The batch is offered again in parts, to find the
                record that is the cause.
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

        As in flask-track-usage, ``hook(**data)`` with the dict of `as_dict`, made afresh, and
        ``_parent_class_name`` and ``_parent_self``, this storage; but in the thread that writes,
        without Flask's context. The next batch waits meanwhile. What a hook raises changes nothing
        for the record, the other hooks and the other records.

        Each record that was kept is given to each hook: once, but once more if it is written once
        more, such as after the process was killed before the batch was done with. Its id tells.

        Args:
            batch: In the order they were written in.
            report: Called with a hook's name and what it raised.
        """
        if not self._functions:
            return
        parent = {"_parent_class_name": type(self).__name__, "_parent_self": self}
        for record in batch:
            for function in self._functions:
                try:
                    function(**as_dict(record), **parent)
                except BaseException as error:  # noqa: BLE001 - it must not end the writing thread
                    report(_callable_name(function), error)

    @property
    def identity(self) -> str:
        """What tells this storage from others of its kind, the same in every process."""
        return f"{type(self).__module__}.{type(self).__qualname__} {self.name}"

    def bind_app(self, app: Any) -> None:
        """Take the Flask app that is tracked, for what can be had in its context only."""

    def flush(self) -> None:
        """Hand over what the storage itself holds back, if anything."""

    def maintain(self, keep: timedelta | None, now: datetime) -> float:
        """Do a small piece of upkeep, in the thread that writes; return when there is more to do.

        Args:
            keep: How long records are kept; None: for ever.
            now: Aware UTC.

        Returns:
            Seconds until it is to be called again; less than one if there is more to do.

        Raises:
            StorageUnavailable: The storage cannot be reached now.
        """
        return inf

    def close(self) -> None:
        """Give back connections and files; the next use opens them again."""

    def reset_after_fork(self) -> None:
        """Forget, without closing, what must not be shared with the parent process."""


class CallableWriter(Writer):
    """A plain callable that takes one dict.

    Args:
        function: Called once a record; what it raises counts as a failed record.
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
    return "".join(character if character.isprintable() else "_" for character in name[:64])
