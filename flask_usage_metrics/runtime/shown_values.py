"""Shows a value that was given in a message, unless it could be a token or hold a password."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

_MOST_ITEMS = 8
_MOST_BITS = 64
_LONGEST = 24

# A word or two, a number, a path, an address with its port: neither userinfo, nor a query, nor a
# long token.
_PLAIN = re.compile(rf"[\w ./,*+%<>-]{{0,{_LONGEST}}}|[0-9.:/]{{0,{_LONGEST}}}", re.ASCII)


def shown(value: object) -> str:
    """Return a value as it was given if it is plain and short; else only of what kind it is.

    Not to be used for values that are always secrets, such as a token: a short password is plain.

    Args:
        value: Of any type.

    Returns:
        Such as ``"'lots'"``, ``"[1, 0.5]"``, ``"a text of 40 characters"`` or ``"bytes"``.
    """
    if value is None or isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if value.bit_length() <= _MOST_BITS else "a huge int"
    if type(value) is str:
        return repr(value) if _PLAIN.fullmatch(value) else f"a text of {len(value)} characters"
    if isinstance(value, list | tuple | dict):
        return _shown_items(value)
    return type(value).__name__


def _shown_items(values: Collection[object]) -> str:
    kind = type(values).__name__
    if len(values) > _MOST_ITEMS:
        return f"a {kind} of {len(values)} items"
    nested = values.values() if isinstance(values, Mapping) else values
    if any(isinstance(item, list | tuple | dict) for item in nested):
        return f"a {kind}"
    if isinstance(values, Mapping):
        return f"{{{', '.join(f'{shown(name)}: {shown(item)}' for name, item in values.items())}}}"
    return f"[{', '.join(map(shown, values))}]"
