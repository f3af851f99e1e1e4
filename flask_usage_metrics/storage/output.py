"""The storage that writes records as text to an open file or stream."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from flask_usage_metrics.storage.writer import Writer


class OutputWriter(Writer):
    """Writes every record to an open file.

    Args:
        output: Has ``write`` and ``writable``; flushed after each record if it has ``flush``, never
            closed. None: ``sys.stderr`` at the time of writing.
        transform: Called with a record's dict (see `compat.as_dict`), returns the text to write;
            nothing is added to it, not even a newline.

    Raises:
        TypeError: `output` has no ``write`` or no ``writable``.
        ValueError: `output` is not writable.
    """

    name = "output"

    def set_up(self, output: Any = None, transform: Callable[[dict[str, Any]], Any] = str) -> None:
        """Check and keep the constructor's arguments."""
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
