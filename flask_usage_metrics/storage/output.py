"""Records written as text to an open file or stream."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from flask_usage_metrics.storage.writer import Writer


class OutputWriter(Writer):
    """Writes every record to something open for writing.

    Args:
        output: Has ``write`` and ``writable``; it is flushed after each record and never closed.
            None: what is ``sys.stderr`` at the time of writing.
        transform: Makes of a record's dict what is written; nothing is added, no newline either.

    Raises:
        TypeError: `output` has no ``write`` or no ``writable``.
        ValueError: `output` is not writable.
    """

    name = "output"

    def set_up(self, output: Any = None, transform: Callable[[dict[str, Any]], Any] = str) -> None:
        """Check and keep the output and the transformation."""
        checked = sys.stderr if output is None else output
        for method in ("write", "writable"):
            if not hasattr(checked, method):
                raise TypeError(
                    f"output must have write and writable, but {type(checked).__name__} "
                    f"has no {method}"
                )
        if not checked.writable():
            raise ValueError("output must be open for writing")
        self._output = output
        self._transform = transform

    def store(self, data: dict[str, Any]) -> None:
        """Write one record and flush."""
        output = sys.stderr if self._output is None else self._output
        output.write(self._transform(data))
        flush = getattr(output, "flush", None)
        if flush is not None:
            flush()
