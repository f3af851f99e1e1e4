"""What whoever reads of a fault is to do: by the part it happened in, as the log line says it."""

from __future__ import annotations

_BUG = "report a bug, with the traceback at level DEBUG"
_DISK = "look at the disk and the rights of TRACK_USAGE_STATE_DIR"

ACTS = {
    "capture": _BUG,
    "consumer": "mend the function given as consumer=",
    "cookie": _BUG,
    "country": "look at TRACK_USAGE_COUNTRY and what it names",
    "enrichment": _BUG,
    "exit": "let TRACK_USAGE_STATE_DIR be a folder that only the app's user may use",
    "exposition": "mend the collector of the app's own",
    "hook": "mend the hook",
    "journal": "have more workers, or raise TRACK_USAGE_BUFFER_RECORDS",
    "multiprocess": "set PROMETHEUS_MULTIPROC_DIR, to an empty folder, where the server is started",
    "pipeline": "look for a limit of threads or memory; else report a bug",
    "pseudonyms": "set SECRET_KEY",
    "sink": "look at the storage in TRACK_USAGE_STORAGE: is it up, has it room, who may write",
    "sink traces": "look at the collector of OTEL_EXPORTER_OTLP_ENDPOINT",
    "spool": f"{_DISK}; TRACK_USAGE_SPOOL_BYTES is what may wait there",
    "state": "let TRACK_USAGE_STATE_DIR be a folder that only the app's user may use",
    "totals": _DISK,
    "traces": "look at the tracer provider, or leave out TRACK_USAGE_TRACES",
    "track_var": "keep less in g.track_var",
    "username": "mend the function given as username=, or get_id() of Flask-Login's user",
    "view_args": "nothing, if it is rare: somebody sends long URLs",
    "visitors": _DISK,
}
"""By part, or by its first word where a name follows it."""


def act_of(part: str) -> str:
    """Return what to do about a fault in a part; ``""`` if there is no advice."""
    return ACTS.get(part) or ACTS.get(part.partition(" ")[0], "")
