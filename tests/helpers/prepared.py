"""Python programs that begin with the libraries imported: forked from a process that has them.

To import Flask, SQLAlchemy and their like takes most of the time of a program that answers twenty
requests. So each process of pytest starts one Python that imports them, and has it forked for each
program; our own package is imported by each program itself. What such a program is given, and
whose child it is, is as if it had been started. Its hashes are those of its siblings.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence

LIBRARIES = (
    "flask, jinja2, msgspec, prometheus_client, prometheus_client.openmetrics.exposition",
    "requests, sqlalchemy, sqlalchemy.dialects.mysql, sqlalchemy.dialects.sqlite, werkzeug.test",
)

# Ends with the process that asks: the socket is closed then, but a child of it may have kept it.
PROGRAM = """
import json, os, select, socket, sys, tempfile
import {libraries}

def begin():
    asked, parent = socket.socket(fileno=int(sys.argv[1])), os.getppid()
    asked.send(b"ready")
    while True:
        while not select.select([asked], [], [], 5)[0]:
            if os.getppid() != parent:
                os._exit(0)
        message, descriptors, _, _ = socket.recv_fds(asked, 1 << 20, 3)
        if not message:
            os._exit(0)
        between = os.fork()
        if between == 0:
            pid = os.fork()
            if pid == 0:
                break
            asked.send(str(pid).encode())
            os._exit(0)
        os.waitpid(between, 0)
        for descriptor in descriptors:
            os.close(descriptor)
        asked.send(b"over")
    asked.close()
    source, arguments, folder, environment = json.loads(message)
    for standard, descriptor in enumerate(descriptors):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    sys.argv[1:] = arguments
    code = compile(source, "<string>", "exec", dont_inherit=True)
    ours = globals()
    for name in [name for name in ours if not name.startswith("__")]:
        del ours[name]
    return code

exec(begin())
"""

# What is read once, by Python or by what is imported.
_READ_ONCE = ("PYTHON", "PROMETHEUS_", "LANG", "LC_", "LD_", "TZ", "SQLALCHEMY_")

_PR_SET_CHILD_SUBREAPER = 36

Environment = dict[str, str]


class Prepared:
    """A Python that has imported the libraries, and is forked for each program.

    Args:
        flags: Its options.
        environment: Whose `_READ_ONCE` the programs must have, too.
    """

    def __init__(self, flags: Sequence[str], environment: Environment) -> None:
        self._lock = threading.Lock()
        self._read_once = _read_once(environment)
        self._pid = os.getpid()
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = PROGRAM.format(libraries=", ".join(LIBRARIES))
        with other:
            self._process = subprocess.Popen(
                [sys.executable, *flags, "-c", program, str(other.fileno())],
                env=environment,
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._hear(b"ready")

    def is_for(self, environment: Environment) -> bool:
        """Return whether a program with this environment may begin here."""
        return self._pid == os.getpid() and self._read_once == _read_once(environment)

    def start(
        self,
        source: str,
        arguments: Sequence[str],
        folder: str,
        environment: Environment,
        descriptors: Sequence[int],
    ) -> int:
        """Start a program, as a child of this process; return its id.

        Args:
            source: What ``python -c`` is given.
            arguments: Its ``sys.argv[1:]``.
            folder: Where it runs.
            environment: All of it.
            descriptors: Its standard input, output and errors.
        """
        message = json.dumps([source, arguments, folder, environment]).encode()
        with self._lock:
            # Whose parent ends becomes a child of ours meanwhile, rather than of process 1.
            _adopt(True)
            try:
                socket.send_fds(self._socket, [message], descriptors)
                pid = int(self._hear())
                self._hear(b"over")
            finally:
                _adopt(False)
        return pid

    def _hear(self, expected: bytes | None = None) -> bytes:
        heard = self._socket.recv(100)
        assert heard
        assert expected in (None, heard), heard
        return heard


def _read_once(environment: Environment) -> Environment:
    return {name: text for name, text in environment.items() if name.startswith(_READ_ONCE)}


def _adopt(does: bool) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_SET_CHILD_SUBREAPER, int(does), 0, 0, 0) == 0, ctypes.get_errno()


_prepared: dict[tuple[str, ...], Prepared] = {}
_preparing = threading.Lock()


def prepared(flags: tuple[str, ...], environment: Environment) -> Prepared | None:
    """Return the process to fork from for a Python with some options; None: there is none."""
    if sys.platform != "linux":
        return None
    with _preparing:
        if flags not in _prepared:
            _prepared[flags] = Prepared(flags, environment)
        found = _prepared[flags]
    return found if found.is_for(environment) else None
