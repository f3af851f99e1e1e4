"""Values of ``g.track_var``, each as the one text that labels, filters and groups have of it."""

from __future__ import annotations

import re
from math import isfinite
from typing import Any

import msgspec

VARIABLE = "track_var."
"""Begins the name of a filter or group that is a key of ``g.track_var``: ``"track_var.plan"``."""

# Nothing that would have to be escaped in SQL, or in a path of JSON.
_KEY = re.compile(r"[^\W\d][\w-]*")

_to_json = msgspec.json.Encoder().encode


def variable_key(field: str) -> str | None:
    """Return the key that a filter or group names; None if it is none of ``g.track_var``.

    Args:
        field: Such as ``"track_var.plan"``; the key may have letters, digits, ``_`` and ``-``.
    """
    key = field.removeprefix(VARIABLE)
    return key if key != field and _KEY.fullmatch(key) else None


def variable_text(value: Any) -> str | None:
    """Return a JSON value as a text.

    Args:
        value: Of ``g.track_var``, as a record has it.

    Returns:
        A text as it is, ``"true"``, ``"false"``, or a number as JSON writes it; None for all else:
        what is absent or null, and a list or an object, which are no values to count by.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    return _to_json(value).decode() if isinstance(value, float) and isfinite(value) else None
