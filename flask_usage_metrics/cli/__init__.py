"""`flask usage …`: what the owner of an app can ask for in a terminal; a file a command.

Results go to stdout, all else to stderr. A command ends with 0 if it did all it was asked for, 1 if
not, so that trying again makes sense, 2 if it was asked for wrongly, and 130 after Ctrl-C.
"""

from __future__ import annotations

from flask_usage_metrics.cli import grafana, migrate, replay_spans  # noqa: F401 - they add themselves
from flask_usage_metrics.cli.group import usage

__all__ = ["usage"]
