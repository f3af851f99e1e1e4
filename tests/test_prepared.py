"""A program that begins with the libraries imported is otherwise as one that is started."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from helpers.process import Done, run_python, start_python

TELL = """
import gc, json, os, random, signal, sys, tempfile, threading, time
from pathlib import Path
print(json.dumps({
    "argv": sys.argv,
    "path": sys.path,
    "name": __name__,
    "names": sorted(set(globals()) - {"__annotations__"}),
    "main": sys.modules["__main__"].__dict__ is globals(),
    "folder": str(Path.cwd()),
    "environment": dict(os.environ),
    "temporary": tempfile.gettempdir(),
    "warnings": sys.warnoptions,
    "flags": str(sys.flags),
    "parent": os.getppid() == int(sys.argv[1]),
    "group": os.getpgid(0) == os.getpgid(os.getppid()),
    "descriptors": sorted(os.listdir("/proc/self/fd"))[:-1],
    "terminals": [stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)],
    "buffers": [stream.line_buffering for stream in (sys.stdin, sys.stdout, sys.stderr)],
    "encodings": [stream.encoding for stream in (sys.stdin, sys.stdout, sys.stderr)],
    "interrupted": str(signal.getsignal(signal.SIGINT)),
    "pipe": str(signal.getsignal(signal.SIGPIPE)),
    "threads": threading.active_count(),
    "collected": gc.isenabled(),
    "package": [name for name in sys.modules if name.startswith("flask_usage_metrics")],
    "input": sys.stdin.read(),
    "clock": time.process_time() < 5,
}))
print(random.random(), "flask" in sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize("warnings", [("error", "ignore:This process:DeprecationWarning"), ()])
def test_it_is_given_what_a_started_one_is(tmp_path: Path, warnings: tuple[str, ...]) -> None:
    (tmp_path / "temporary").mkdir()
    env = {"TMPDIR": str(tmp_path / "temporary"), "MORE": "\udce4ü\n"}
    fresh, prepared, another = (
        run_python(TELL, os.getpid(), "ü x", folder=tmp_path, env=env, warnings=warnings, fresh=it)
        for it in (True, False, False)
    )
    assert json.loads(prepared.stdout) == json.loads(fresh.stdout)
    assert json.loads(fresh.stdout)["parent"]
    said = [done.stderr.split() for done in (fresh, prepared, another)]
    assert [flask for _, flask in said] == ["False", "True", "True"]
    assert len({number for number, _ in said}) == 3


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("print('x')", Done(0, "x\n", "")),
        ("raise SystemExit(3)", Done(3, "", "")),
        ("raise SystemExit('no')", Done(1, "", "no\n")),
        ("import os; os._exit(4)", Done(4, "", "")),
        ("import os; os.kill(os.getpid(), 9)", Done(-9, "", "")),
        ("import atexit; atexit.register(print, 'last')", Done(0, "last\n", "")),
    ],
)
def test_it_ends_as_a_started_one_does(program: str, expected: Done) -> None:
    assert run_python(program) == run_python(program, fresh=True) == expected


def test_an_error_is_told_with_its_place() -> None:
    for fresh in (False, True):
        done = run_python("\n\nraise ValueError('x')", fresh=fresh)
        assert done.returncode == 1
        assert '  File "<string>", line 3, in <module>\n' in done.stderr
        assert done.stderr.endswith("ValueError: x\n")
    assert "SyntaxError" in run_python("(").stderr


def test_it_is_a_child_that_can_be_stopped() -> None:
    with start_python("import time; print('x', flush=True); time.sleep(60)") as process:
        assert process.line() == "x"
        assert process.poll() is None
        assert process.stop(signal.SIGTERM) == -signal.SIGTERM
