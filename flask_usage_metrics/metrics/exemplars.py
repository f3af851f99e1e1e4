"""Exemplars: for each bucket of a histogram's series, the trace of its newest request."""

from __future__ import annotations

import re
from struct import Struct

import msgspec

from flask_usage_metrics.records.record import UsageRecord

BucketExemplars = list[bytes]
"""The packed exemplar of each bucket of a series; ``b""`` where there is none."""

_IDS = re.compile(r"[0-9a-fA-F]{32} [0-9a-fA-F]{16}")
_TRACE_DIGITS = 32

# 40 bytes instead of four objects: there may be one a bucket of 10 000 series, in every worker.
# The time comes first, and big-endian, so that of two packed exemplars the newer is the greater.
_LAYOUT = Struct(">d24sd")


class Exemplar(msgspec.Struct, frozen=True):
    """One request of those that a bucket counted.

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: 16 hexadecimal digits.
        value: What was observed, in seconds.
        timestamp: When it was, in seconds since the epoch, to the millisecond.
    """

    trace_id: str
    span_id: str
    value: float
    timestamp: float


def pack(record: UsageRecord) -> bytes:
    """Return the exemplar of a record, packed; ``b""`` if its ids are not those of a span."""
    ids = f"{record.trace_id} {record.span_id}"
    if not _IDS.fullmatch(ids):
        return b""
    ended = record.started_at.timestamp() + record.duration_seconds
    return _LAYOUT.pack(ended, bytes.fromhex(ids), record.duration_seconds)


def unpack(packed: bytes) -> Exemplar:
    """Return a packed exemplar; `packed` must not be empty."""
    ended, ids, value = _LAYOUT.unpack(packed)
    digits = ids.hex()
    return Exemplar(digits[:_TRACE_DIGITS], digits[_TRACE_DIGITS:], value, round(ended, 3))


def newest(one: BucketExemplars | None, other: BucketExemplars) -> BucketExemplars:
    """Return the newer exemplar of each bucket, in a new list."""
    return list(other) if one is None else [*map(max, one, other)]
