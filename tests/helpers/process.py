"""Programs that tests run beside themselves: bounded in time, and ended by their own id.

`run` and `run_python` wait for the end; `Process` and `start_python` do not. What a program writes
is in the message of a failure. As a plugin of pytest, loaded by conftest.py, it ends what a test
that fails leaves running.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
import weakref
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .prepared import prepared

TESTS = Path(__file__).parents[1]
SECONDS = 60.0
"""How long a program may take, on a busy machine too."""

# Python 3.12 warns of any fork beside threads; forks are what some tests are about.
STRICT = ("error", "ignore:This process:DeprecationWarning")

PREPARED = ((), tuple(flag for action in STRICT for flag in ("-W", action)))
"""Options of Python with which most programs are started."""

_started: weakref.WeakSet[Process] = weakref.WeakSet()


class Done(NamedTuple):
    """A program that has ended.

    Attributes:
        returncode: Its exit status; of one that a signal has ended, minus the signal's number.
        stdout: All it wrote.
        stderr: Likewise.
    """

    returncode: int
    stdout: str
    stderr: str


class Inline(NamedTuple):
    """A Python program in a command line.

    Attributes:
        flags: Python's options.
        source: The program.
        arguments: Its arguments.
    """

    flags: tuple[str, ...]
    source: str
    arguments: list[str]


def inline(command: list[str]) -> Inline | None:
    """Return what ``python -c`` is to run with the options we prepare for, if a command is that."""
    for flags in PREPARED:
        before = [sys.executable, *flags, "-c"]
        if command[: len(before)] == before:
            source, *arguments = command[len(before) :]
            return Inline(flags, source, arguments)
    return None


class Process(subprocess.Popen[str]):
    """A program that runs; ``with`` kills it in the end.

    Args:
        command: The program and its arguments.
        folder: Where it runs; None: where the tests do.
        env: Added to the environment, in which `PYTHONPATH` finds the package and the helpers.
        fresh: Whether it imports all by itself; otherwise one that is ``python -c`` and has no
            special options begins with the libraries, which takes a fraction of the time.
        **options: Of Popen; its input, its output and its errors are pipes unless said otherwise.
    """

    def __init__(
        self,
        *command: object,
        folder: Path | None = None,
        env: dict[str, str] | None = None,
        fresh: bool = False,
        **options: Any,
    ) -> None:
        pipe = subprocess.PIPE
        self._is_fresh = fresh or not {"stdin", "stdout", "stderr"}.issuperset(options)
        super().__init__(
            list(map(str, command)),
            cwd=folder,
            env=environment(**env or {}),
            text=True,
            **{"stdin": pipe, "stdout": pipe, "stderr": pipe} | options,
        )
        _started.add(self)

    def _execute_child(self, command: list[str], *rest: Any) -> None:
        # Of Popen, which waits, reads and kills as ever.
        found = None if self._is_fresh else inline(command)
        (_, _, _, _, folder, env, _, _, _), pipes = rest[:9], rest[9:15]
        root = found and prepared(found.flags, env)
        if not found or not root:
            super()._execute_child(command, *rest)  # type: ignore[misc]
            return
        ends = (pipes[0], pipes[3], pipes[5])
        descriptors = [own if own != -1 else standard for standard, own in enumerate(ends)]
        place = str(folder or Path.cwd())
        self.pid = root.start(found.source, found.arguments, place, env, descriptors)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def __exit__(self, *raised: Any) -> None:
        self.kill()
        super().__exit__(*raised)

    def line(self, seconds: float = SECONDS) -> str:
        """Return the next line that it writes, without its end; "" if it has closed its output."""
        assert self.stdout is not None
        deadline = time.monotonic() + seconds
        said = b""
        # Not through the buffer, in which `finish` would not look.
        while not said.endswith(b"\n"):
            readable, _, _ = select.select([self.stdout], [], [], deadline - time.monotonic())
            assert readable, f"nothing in {seconds} seconds but {said!r}"
            if not (byte := os.read(self.stdout.fileno(), 1)):
                break
            said += byte
        return said.decode().rstrip("\n")

    def finish(self, seconds: float = SECONDS) -> Done:
        """Close its input, and wait for its end.

        Raises:
            AssertionError: It has not ended in time; it is killed.
        """
        try:
            out, err = self.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            out, err = self.communicate()
            raise AssertionError(f"it ran for {seconds} seconds\n{out}\n{err}") from None
        return Done(self.returncode, out, err)

    def stop(self, how: signal.Signals = signal.SIGTERM, seconds: float = 40) -> int:
        """End it as a supervisor does; return its exit status.

        Raises:
            AssertionError: It has not ended in time; it is killed.
        """
        self.send_signal(how)
        try:
            return self.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it ran for {seconds} seconds after {how!r}") from None
        finally:
            self.kill()
            self.wait()

    def children(self) -> list[int]:
        """Return the ids of the processes that it has started and that run."""
        path = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(pid) for pid in path.read_text().split()]


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment for a program that may import what the tests import."""
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    ours = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}
    # Else each of hundreds of programs compiles the package anew.
    ours.pop("PYTHONDONTWRITEBYTECODE", None)
    return ours


def start_python(
    source: str, *arguments: object, warnings: tuple[str, ...] = STRICT, **options: Any
) -> Process:
    """Start a Python program.

    Args:
        source: Its text, which may be indented.
        *arguments: Its ``sys.argv[1:]``.
        warnings: For Python's option ``-W``, each.
        **options: See `Process`.
    """
    flags = [flag for action in warnings for flag in ("-W", action)]
    return Process(sys.executable, *flags, "-c", textwrap.dedent(source), *arguments, **options)


def run_python(source: str, *arguments: object, seconds: float = SECONDS, **options: Any) -> Done:
    """Run a Python program to its end; see `start_python` and `Process.finish`."""
    with start_python(source, *arguments, **options) as process:
        return process.finish(seconds)


def run(*command: object, seconds: float = SECONDS, **options: Any) -> Done:
    """Run a program to its end; see `Process` and `Process.finish`."""
    with Process(*command, **options) as process:
        return process.finish(seconds)


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def until(what: Callable[[], object], expected: object, seconds: float = 15.0) -> None:
    """Wait until a function returns what is expected; fail with what it returns instead."""
    deadline = time.monotonic() + seconds
    while (found := what()) != expected:
        assert time.monotonic() < deadline, f"{found!r} instead of {expected!r}"
        time.sleep(0.02)


def need(found: object, name: str) -> None:
    """Skip the test at a desk if something was not found, and fail it in CI."""
    if not found:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{name} is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    before = set(_started)
    try:
        return (yield)
    except BaseException:
        for process in set(_started) - before:
            with process:  # which kills it
                pass
        raise
