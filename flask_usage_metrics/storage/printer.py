"""Records printed to standard output: to see at once what is tracked."""

from __future__ import annotations

from typing import Any

from flask_usage_metrics.storage.writer import Writer


class PrintWriter(Writer):
    """Prints the dict of every record.

    Standard output that is closed or broken makes these records count as failed, nothing more.
    """

    name = "print"

    def store(self, data: dict[str, Any]) -> None:
        """Print one record, to what is ``sys.stdout`` at this moment."""
        # Flushed, so that a broken pipe is met with the record it lost, not at the next one or,
        # as a traceback, at the interpreter's exit.
        print(data, flush=True)


PrintStorage = PrintWriter
