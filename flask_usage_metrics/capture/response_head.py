"""The numbers in the head of a response, its status and its Content-Length, by their texts."""

from __future__ import annotations

from typing import Final

from flask_usage_metrics.runtime.caches import TwoGenerationCache

_MOST_TEXTS = 4096
_LONGEST_TEXT = 31

_MOST_DIGITS = 15
"""Digits of a length that is read, as in `enrich.cleaning`; of 4 301 CPython reads none."""


def _length(text: str) -> int | None:
    return int(text) if len(text) <= _MOST_DIGITS and _is_number(text) else None


def _code(status_line: str) -> int:
    # Three digits (RFC 9110, 15), no more: the first three of 5000 are another status.
    code, after = status_line[:3], status_line[3:4]
    return int(code) if len(code) == 3 and not after.strip() and _is_number(code) else 0


def _is_number(text: str) -> bool:
    return text.isdecimal() and text.isascii()


# Looked up instead of parsed: see tests/benchmarks/README.md.
LENGTHS: Final = TwoGenerationCache(_length, len, most=_MOST_TEXTS, longest=_LONGEST_TEXT)
"""Number of bytes by the text of a Content-Length; None if that is no number of up to 15 digits."""

STATUSES: Final = TwoGenerationCache(_code, len, most=_MOST_TEXTS, longest=_LONGEST_TEXT)
"""Status code by a status line; 0 if that does not begin with a number of three digits."""
