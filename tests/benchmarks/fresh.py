"""Fresh processes to measure in: none has what another has imported, and none compiles anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flask import Flask

from .variants import VARIANTS, Flush

BARE = "bare Flask"
OURS = ("ours, metrics", "ours, SQLite", "ours, SQLite, ua-parser")
EXPORTER = "prometheus-flask-exporter"
TRACES = "opentelemetry-flask"
TRACES_AND_METRICS = "opentelemetry-flask-and-metrics"

_VARIANTS = dict(zip((BARE, *OURS), ("bare", "metrics-only", "all-in", "all-in"), strict=True))

WHO = (BARE, *OURS, EXPORTER, TRACES, TRACES_AND_METRICS)
"""Who is compared. Ours is without the extra ``ua``, as a plain installation is, where the name
does not say so; iptocc is installed for all."""


def set_up(who: str, app: Flask, batch: int) -> Flush | None:
    """Make an app one of `WHO`, in a fresh process; see `variants`."""
    if who in OURS and "ua-parser" not in who:
        # As if it were not installed.
        sys.modules.update(dict.fromkeys(("ua_parser_rs", "re2")))  # type: ignore[arg-type]
    return VARIANTS[_VARIANTS.get(who, who)](app, batch)


@contextmanager
def fresh_processes(module: str, *, quick: bool) -> Iterator[Callable[..., dict[str, Any]]]:
    """Lend what runs a module in a process of its own and returns the JSON object it prints.

    The first run of each kind compiles, and is not to be counted.

    Args:
        module: Of this package.
        quick: Whether nobody reads the figures: nothing is compiled for them then.
    """
    # Byte code is there, as for any installed package: compiling would take thrice as long as
    # importing, and leave twice the memory. In a folder of its own, for it may be switched off,
    # or its usual place not be writable.
    with tempfile.TemporaryDirectory() as bytecode:
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        if not quick:
            environment["PYTHONPYCACHEPREFIX"] = bytecode

        def run(*arguments: str) -> dict[str, Any]:
            command = [sys.executable, "-m", f"{__package__}.{module}", *arguments]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"{' '.join(command)}: {done.returncode}\n{done.stderr}")
            measured: dict[str, Any] = json.loads(done.stdout)
            return measured

        yield run
