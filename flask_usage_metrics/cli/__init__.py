"""`flask usage …`: the commands for the owner of an app, a file each.

A command adds itself to the group `usage` when it is imported here. Results go to stdout, all else
to stderr. The exit code is 0 for success, 1 for a failure (trying again may help), 2 for a wrong
call or set-up, 130 after Ctrl-C.
"""

from __future__ import annotations

from flask_usage_metrics.cli import grafana, migrate, replay_spans  # noqa: F401 - they add themselves
from flask_usage_metrics.cli.group import usage

__all__ = ["usage"]
