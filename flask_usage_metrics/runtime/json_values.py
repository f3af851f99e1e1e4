"""Anything of the app's, such as view arguments, as JSON."""

from __future__ import annotations

from typing import Any

import msgspec

_MAX_DEPTH = 20
"""Levels of nested values kept as such; a deeper one becomes text."""


def encode_json(value: dict[Any, Any]) -> bytes:
    """Return a dict of anything as JSON; a value of a type that JSON lacks becomes text.

    It calls ``__str__`` of objects of the app; one that raises becomes the name of its class.
    """
    try:
        return _encode(value)
    except Exception:  # noqa: BLE001 - odd keys, lone surrogates, cycles, a raising __str__
        return _encode(_plain(value, _MAX_DEPTH))


_encode = msgspec.json.Encoder(enc_hook=str).encode


def _plain(value: Any, depth: int) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**64:
        return _text(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if depth and isinstance(value, dict):
        return {_text(key): _plain(inner, depth - 1) for key, inner in list(value.items())}
    if depth and isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner, depth - 1) for inner in list(value)]
    return _text(value)


def _text(value: Any) -> str:
    try:
        return str(value).encode("utf-8", "replace").decode()
    except Exception:  # noqa: BLE001 - the __str__ is the app's
        return f"<{type(value).__name__}>"
