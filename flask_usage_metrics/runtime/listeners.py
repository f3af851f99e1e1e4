"""The sockets at which this process accepts connections: they tell which server it belongs to."""

from __future__ import annotations

import _socket
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

# Without this flag a socket object makes the socket non-blocking where an app has set a default
# timeout; the server's own would be made so too, as it is the same socket.
_TYPE = socket.SOCK_STREAM | getattr(socket, "SOCK_NONBLOCK", 0)


class Listener(NamedTuple):
    """A listening socket.

    Attributes:
        address: Such as ``"0.0.0.0 8000"``, or the absolute path of a Unix socket.
        inode: Number of the socket, which a process has in common with those it was inherited from.
        is_one_of_several: Whether other sockets may listen at the same address (SO_REUSEPORT).
    """

    address: str
    inode: int
    is_one_of_several: bool


def listeners() -> list[Listener]:
    """Return the listening sockets of this process.

    Inherited ones are among them: the workers of a prefork server have those of their parent.
    Takes some microseconds a descriptor, whatever the number of connections of the machine.

    Returns:
        In no order; none where the system does not list the descriptors of a process.
    """
    found = []
    descriptors: list[Path] = []
    with suppress(OSError):
        descriptors = list(Path("/dev/fd").iterdir())
    for descriptor in descriptors:
        with suppress(OSError, ValueError):  # it was closed meanwhile, such as that of the listing
            listener = _listener(int(descriptor.name))
            if listener is not None:
                found.append(listener)
    return found


def has_one_of(pid: int, inodes: set[int]) -> bool | None:
    """Tell whether a process has one of some sockets open.

    Args:
        pid: Id of the process.
        inodes: Of the sockets.

    Returns:
        None if that cannot be known: it is another user's, or the system does not list it.
    """
    names = {f"socket:[{inode}]" for inode in inodes}
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return None
    for descriptor in descriptors:
        with suppress(OSError):  # it was closed meanwhile
            if os.readlink(descriptor) in names:  # noqa: PTH115 - it is no path
                return True
    return False


def _listener(descriptor: int) -> Listener | None:
    """Return the listening socket of a descriptor; None if it is something else.

    Raises:
        OSError: There is no such descriptor.
    """
    found = os.fstat(descriptor)
    if not stat.S_ISSOCK(found.st_mode):
        return None
    opened = _socket.socket(type=_TYPE, fileno=descriptor)
    try:
        if not opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return None
        name = opened.getsockname()
        is_inet = isinstance(name, tuple)
        is_one_of_several = is_inet and opened.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
    finally:
        opened.detach()  # the descriptor is the server's, and stays open
    return Listener(_text(name), found.st_ino, bool(is_one_of_several))


def _text(name: tuple[object, ...] | str | bytes) -> str:
    if isinstance(name, tuple):
        return f"{name[0]} {name[1]}"
    path = os.fsdecode(name)
    if path.startswith("\0"):  # of Linux, in no folder
        return path
    with suppress(OSError):  # the current directory is gone
        path = os.path.abspath(path)  # noqa: PTH100 - whatever links there are
    return path
