"""Ids of records, UUIDv7 (RFC 9562), made for many at once: see tests/benchmarks/README.md."""

from __future__ import annotations

import struct
from collections.abc import Sequence

NUMBER_BITS = 62
"""Low bits of an id: the process's random nonce plus the request's sequence number."""

_MOST = 2**NUMBER_BITS - 1
_LATEST_NS = 2**48 * 1_000_000 - 1

# The variant, in front of the number, as the first hexadecimal digit shows both.
_WITH_VARIANT = bytes.maketrans(b"0123", b"89ab")


def record_ids(started_ns: Sequence[int], numbers: Sequence[int]) -> list[str]:
    """Return the id of each request; the same arguments always give the same id.

    The 12 bits after the milliseconds hold their fraction (method 3 of section 6.2).

    Args:
        started_ns: When each request started, in nanoseconds since the epoch; beyond the 48 bits
            of milliseconds it is brought to the nearest that fits.
        numbers: For each request a number that no other has; >= 0, cut to `NUMBER_BITS`.

    Returns:
        Texts such as ``"019aa5c0-0000-7000-8000-000000000001"``, in the order of the arguments.
    """
    if not started_ns:
        return []
    if min(started_ns) < 0 or max(started_ns) > _LATEST_NS:  # the clock is far off
        started_ns = [min(max(moment, 0), _LATEST_NS) for moment in started_ns]
    if max(numbers) > _MOST:
        numbers = [number & _MOST for number in numbers]
    # In 1/4096 milliseconds.
    moments = [moment * 4096 // 1_000_000 for moment in started_ns]
    count = len(moments)
    words = [0] * (2 * count)
    # Room for the version between the milliseconds and their fraction.
    words[::2] = [moment + (moment >> 12) * 0xF000 for moment in moments]
    words[1::2] = numbers
    # "0123-4567-89ab-cdef-…" -> "01234567-89ab-cdef-…"
    text = bytearray(struct.pack(f">{2 * count}Q", *words).hex("-", 2) + "-", "ascii")
    text[15::40] = b"7" * count
    text[20::40] = text[20::40].translate(_WITH_VARIANT)
    text[4::40] = text[29::40] = text[34::40] = bytes(count)
    text[39::40] = b" " * count
    return text.translate(None, b"\0").decode().split()
