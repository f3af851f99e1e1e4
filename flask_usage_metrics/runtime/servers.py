"""The server that this process belongs to: whatever accepts connections at one address."""

from __future__ import annotations

import os
from typing import NamedTuple

from flask_usage_metrics.runtime.listeners import Listener, has_one_of, listeners
from flask_usage_metrics.runtime.processes import started


class Server(NamedTuple):
    """The server that a process belongs to: processes with a name in common are its workers.

    Attributes:
        names: The addresses it listens at; if there are none, one text of its parent or of the
            process itself.
        starter: Id of the process that starts its workers: their parent, or the only one itself.
        is_shared: Whether it has an address, or other processes, so that its totals are looked for.
        is_alone: Whether it is known that no other process has a name in common with this one.
    """

    names: frozenset[str]
    starter: int
    is_shared: bool = True
    is_alone: bool = False


def this_server(*, multiprocess: bool) -> Server:
    """Return the server of this process.

    Whatever accepts connections at one address is one server: no two can have the same, unless they
    share it, and then either may be asked for the metrics. Neither the parent nor PEP 3333's
    ``wsgi.multiprocess`` tells as much: servers started by one script have the same parent, workers
    without a master have none in common, and several servers say wrongly that they are, or are not,
    of several processes.

    Args:
        multiprocess: What the server says (PEP 3333), for a process that listens nowhere, such as
            a CGI script or a worker that is sent its requests: then its siblings are those of the
            same parent and process group.
    """
    found = listeners()
    names = frozenset(listener.address for listener in found)
    parent, group = os.getppid(), os.getpgid(0)
    if not names:
        own = f"{parent} {started(parent)} {group}" if multiprocess else os.urandom(8).hex()
        names = frozenset([own])
    is_shared = bool(found) or multiprocess
    starter = parent if is_shared and _is_started_by(parent, found) else os.getpid()
    return Server(names, starter, is_shared, starter == os.getpid() and not multiprocess)


def _is_started_by(parent: int, found: list[Listener]) -> bool:
    """Tell whether this process is a worker that its parent would replace by another one.

    Args:
        parent: Id of the parent.
        found: Listening sockets of this process.
    """
    # What leads its group was started by a supervisor or a shell, which would start it in another;
    # a worker stays in that of its server. A parent outside of the container has the id 0.
    if os.getpgid(0) == os.getpid() or parent <= 0:
        return False
    if not found or any(listener.is_one_of_several for listener in found):
        return True
    return has_one_of(parent, {listener.inode for listener in found})
