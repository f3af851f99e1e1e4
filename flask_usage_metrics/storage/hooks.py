"""The ``hooks`` of a storage, checked: flask-track-usage's sums, and functions to call."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, iscoroutinefunction, signature
from typing import Any

from flask_usage_metrics.errors import ConfigError
from flask_usage_metrics.records.query import as_tuple
from flask_usage_metrics.summarization import KNOWN, Summation, find_summation


def as_hooks(given: object) -> tuple[Summation | Callable[..., Any], ...]:
    """Return hooks as functions and sums.

    Args:
        given: A sum, its name, a function that takes ``**data``, or a list of these; None: none.

    Raises:
        ConfigError: One is none of these.
    """
    return () if given is None else tuple(_as_hook(hook) for hook in as_tuple(given))


def _as_hook(given: object) -> Summation | Callable[..., Any]:
    if isinstance(given, str | Summation):
        try:
            return find_summation(given)
        except NotImplementedError as error:
            raise ConfigError(f"hooks: {error}, or a function") from None
    if isinstance(given, type):
        raise ConfigError(f"hooks: a class is none, but {given.__name__}(...) may be one")
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
