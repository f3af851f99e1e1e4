"""A batch as JSON texts, checked, for the databases that take it as one parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any

import msgspec

from flask_usage_metrics.runtime import texts
from flask_usage_metrics.storage.sql.table import (
    COLUMNS,
    KEY,
    MOST_KEY_CHARACTERS,
    Columns,
    to_json,
)

MOST_BYTES = 2_000_000
"""Most bytes of a JSON text of several rows; 512 ordinary ones have less than a quarter of it."""

_from_json = msgspec.json.Decoder().decode


def _range(bits: int) -> Any:
    return Annotated[int, msgspec.Meta(ge=-(2 ** (bits - 1)), le=2 ** (bits - 1) - 1)]


_TYPES: dict[str, Any] = {
    "text": str,
    "integer": _range(32),
    "big_integer": _range(64),
    "boolean": int,
    "double": float,
    "datetime": str,
}
_KINDS = tuple(
    Annotated[str, msgspec.Meta(max_length=MOST_KEY_CHARACTERS)]
    if kind is KEY
    else _TYPES[kind.__visit_name__] | None
    for _, kind, _ in COLUMNS
)
_Columns: Any = tuple.__class_getitem__(tuple(map(list.__class_getitem__, _KINDS)))


def check(columns: Columns) -> None:
    """Refuse values that a database would refuse, or that MySQL would change silently.

    Args:
        columns: Of `table.to_columns`.

    Raises:
        ValueError: A value is not of its column's type, or out of its range; the column is named.
    """
    try:
        # All columns at once: to prepare for a type is dear.
        msgspec.convert(columns, _Columns)
    except msgspec.ValidationError as error:
        raise ValueError(_named(str(error))) from None


def divided(columns: Columns, shape: Callable[[Columns], Any]) -> Iterator[bytes]:
    """Yield a batch as JSON texts of `MOST_BYTES` at most, or of one row.

    Args:
        columns: Of one row at least.
        shape: Converts columns to the value that becomes a JSON text: rows, or an array a column.

    Raises:
        ValueError: A text holds a surrogate.
    """
    encoded = to_json(shape(columns))
    count = len(columns[0])
    if len(encoded) <= MOST_BYTES or count == 1:
        yield encoded
        return
    middle = count // 2
    yield from divided([column[:middle] for column in columns], shape)
    yield from divided([column[middle:] for column in columns], shape)


def without_nul(batch: bytes) -> bytes:
    """Return a JSON text without the NULs in its texts."""
    # The escape may be an escaped backslash and u0000: then there is no NUL, and nothing changes.
    return to_json(texts.without_nul(_from_json(batch))) if b"\\u0000" in batch else batch


def _named(message: str) -> str:
    """Return msgspec's message, which holds no value, with the column's name for its position."""
    what, _, path = message.partition(" - at `$[")
    position = path.partition("]")[0]
    return f"{COLUMNS[int(position)][0]}: {what}" if position.isdecimal() else what
