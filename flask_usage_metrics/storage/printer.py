"""The storage that prints records, to see at once what is tracked."""

from __future__ import annotations

from typing import Any

from flask_usage_metrics.storage.writer import Writer


class PrintWriter(Writer):
    """Prints the dict of every record to standard output.

    Records that cannot be printed, because it is closed or broken, count as failed.
    """

    name = "print"

    def store(self, data: dict[str, Any]) -> None:
        """Print one record to the ``sys.stdout`` of this moment."""
        # Flushed, so that a broken pipe fails the record that is lost, not the next one or, with a
        # traceback, the interpreter's exit.
        print(data, flush=True)


PrintStorage = PrintWriter
