"""The server that this process belongs to: whatever accepts connections at one address."""

from __future__ import annotations

import os
from typing import NamedTuple

from flask_usage_metrics.runtime.listeners import has_one_of, listeners
from flask_usage_metrics.runtime.processes import is_fork, started


class Server(NamedTuple):
    """The server that a process belongs to: processes with a name in common are its workers.

    Attributes:
        names: The addresses it listens at; if there are none, one text of its parent or of the
            process itself.
        starter: Id of the process that starts its workers: their parent, or the only one itself.
        is_shared: Whether it has an address, or other processes, so that its totals are looked for.
        is_alone: Whether it is known that no other process has a name in common with this one.
        has_master: Whether the starter has the listening sockets of this process: all that it
            starts are workers of one server, also where a reload gives them another address.
        is_multiprocess: Whether the server says that it has several processes.
    """

    names: frozenset[str]
    starter: int
    is_shared: bool = True
    is_alone: bool = False
    has_master: bool = False
    is_multiprocess: bool = False


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
    if not is_shared or not _may_start_others(parent):
        return Server(
            names, os.getpid(), is_shared, is_alone=not multiprocess, is_multiprocess=multiprocess
        )
    holds = has_one_of(parent, {listener.inode for listener in found}) if found else None
    if holds is None:  # a master of root's may be known from that this process is a copy of it
        return Server(
            names,
            parent,
            is_shared,
            has_master=bool(found) and is_fork(),
            is_multiprocess=multiprocess,
        )
    if holds or any(listener.is_one_of_several for listener in found):
        return Server(names, parent, is_shared, has_master=holds, is_multiprocess=multiprocess)
    return Server(
        names, os.getpid(), is_shared, is_alone=not multiprocess, is_multiprocess=multiprocess
    )


def _may_start_others(parent: int) -> bool:
    """Tell whether a parent might replace this process by another one of the same server."""
    # What leads its group was started by a supervisor or a shell, which would start it in another;
    # a worker stays in that of its server. A parent outside of the container has the id 0.
    return os.getpgid(0) != os.getpid() and parent > 0
