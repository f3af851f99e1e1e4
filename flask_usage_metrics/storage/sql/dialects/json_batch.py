"""Rows as JSON texts, for the databases that take a batch as one parameter."""

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
"""What a text is divided at, unless it is one row: 512 rows of ordinary requests have 0.4 MB."""

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
    """Refuse what a database would refuse, or MySQL change without a word.

    Args:
        columns: Of `sql_table.to_columns`.

    Raises:
        ValueError: A value is not of its column's kind, or out of its range; the column is named.
    """
    try:
        # All at once: what it makes of the type costs 50 µs each time.
        msgspec.convert(columns, _Columns)
    except msgspec.ValidationError as error:
        raise ValueError(_named(str(error))) from None


def divided(columns: Columns, shape: Callable[[Columns], Any]) -> Iterator[bytes]:
    """Yield rows as JSON texts, divided where these would be too long.

    Args:
        columns: Of one row at least.
        shape: Returns what is to be a JSON text.

    Raises:
        ValueError: A text is no Unicode.
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
    """Return a JSON text whose texts hold no NUL."""
    # A backslash before the escape may be one itself: then there was none.
    return to_json(texts.without_nul(_from_json(batch))) if b"\\u0000" in batch else batch


def _named(message: str) -> str:
    """Return msgspec's message, which holds no value, with the column instead of its position."""
    what, _, place = message.partition(" - at `$[")
    position = place.partition("]")[0]
    return f"{COLUMNS[int(position)][0]}: {what}" if position.isdecimal() else what
