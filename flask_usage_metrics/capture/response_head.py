"""The numbers in the head of a response, its status and its Content-Length, by their texts."""

from __future__ import annotations

from typing import Final

from flask_usage_metrics.runtime.caches import TwoGenerationCache

_MOST_TEXTS = 4096
_LONGEST_TEXT = 31


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() and text.isascii() else None


def _code(status_line: str) -> int:
    return _number(status_line[:3]) or 0


# Looked up instead of parsed: see tests/benchmarks/README.md.
LENGTHS: Final = TwoGenerationCache(_number, len, most=_MOST_TEXTS, longest=_LONGEST_TEXT)
"""Number of bytes by the text of a Content-Length; None if that is no number."""

STATUSES: Final = TwoGenerationCache(_code, len, most=_MOST_TEXTS, longest=_LONGEST_TEXT)
"""Status code by a status line; 0 if it has none."""
