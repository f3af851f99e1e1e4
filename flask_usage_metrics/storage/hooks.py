"""The ``hooks`` of a storage, checked and set up: flask-track-usage's sums, and what to call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import Parameter, iscoroutinefunction, signature
from typing import Any

from flask_usage_metrics.errors import ConfigError, UnknownName
from flask_usage_metrics.records.query import as_tuple
from flask_usage_metrics.summarization import KNOWN, Summation, find_summation


def as_hooks(given: object) -> tuple[Summation | Callable[..., Any], ...]:
    """Return hooks as sums, functions, callable instances, and classes of these.

    Args:
        given: A sum, its name, a function that takes ``**data``, a callable instance, a class of
            such instances, or a list of these; None: none.

    Raises:
        ConfigError: One is none of these.
    """
    return () if given is None else tuple(_as_hook(hook) for hook in as_tuple(given))


def set_up_hooks(
    hooks: Iterable[Summation | Callable[..., Any]], arguments: dict[str, Any]
) -> list[Callable[..., Any]]:
    """Return the hooks to call for each record, set up as flask-track-usage did.

    First a class becomes an instance, ``hook(**arguments)``; then ``hook.set_up(**arguments)`` is
    called on all that have it. What these raise is raised.

    Args:
        hooks: Those of `as_hooks`; sums are left out.
        arguments: Keywords the storage was given, ``_parent_class_name`` and ``_parent_self``.

    Raises:
        ConfigError: Instances of a class are no hooks, or a ``set_up`` takes no keywords.
    """
    made = [
        _as_function(hook(**arguments)) if isinstance(hook, type) else hook
        for hook in hooks
        if not isinstance(hook, Summation)
    ]
    for hook in made:
        set_up = getattr(hook, "set_up", None)
        if set_up is not None:
            if not _takes_keywords(set_up):
                name = type(hook).__name__
                raise ConfigError(f"hooks: {name}.set_up must be like def set_up(self, **kwargs)")
            set_up(**arguments)
    return made


def _as_hook(given: object) -> Summation | Callable[..., Any]:
    if isinstance(given, str | Summation):
        try:
            return find_summation(given)
        except NotImplementedError as error:
            raise UnknownName(f"hooks: {error}, or a function") from None
    if isinstance(given, type):
        if not _takes_keywords(given):
            name = given.__name__
            raise ConfigError(
                f"hooks: {name} must be like class {name}: def __init__(self, **kwargs), "
                f"or be given as an instance: {name}(...)"
            )
        return given
    return _as_function(given)


def _as_function(given: object) -> Callable[..., Any]:
    if not callable(given):
        raise ConfigError(
            f"hooks must be sums ({KNOWN}), their names or functions, or a list of these, "
            f"not {type(given).__name__}"
        )
    if not _takes_keywords(given):
        name = getattr(given, "__name__", type(given).__name__)
        raise ConfigError(f"hooks: {name} must be like def {name}(**data)")
    return given


def _takes_keywords(function: Callable[..., Any]) -> bool:
    """Tell whether it takes any keywords: those of a record, of future versions too.

    Checked at set-up: else it would fail for every record, and only the log would tell.
    """
    if iscoroutinefunction(function):
        return False
    try:
        # A decorator may well take other arguments than what it decorates.
        parameters = signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):  # some builtins cannot be asked
        return True
    return any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters)
