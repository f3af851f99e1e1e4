"""The note in a server run's lock file: whose run it is, so that the next worker finds it."""

from __future__ import annotations

import os
from typing import NamedTuple

from flask_usage_metrics.runtime.processes import is_alive, started, system_name
from flask_usage_metrics.runtime.servers import Server
from flask_usage_metrics.runtime.state_dir import digest

_STARTER_BYTES = 64
_NOTE_BYTES = 4096
_NAMES = 64
"""Names in a note, at most: each worker of an app may listen at a port of its own besides."""


class RunNote(NamedTuple):
    """The content of a lock file; hashes stand for texts.

    Attributes:
        starter: Id of the process that starts the members.
        since: When that started, see `processes.started`.
        system: Of `processes.system_name`; ``""``: an earlier version wrote the note.
        key: Of the text that the members have in common.
        names: Of the names of the server, the latest first.
    """

    starter: str = ""
    since: str = ""
    system: str = ""
    key: str = ""
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, server: Server, key: str) -> RunNote:
        """Return the note of a process."""
        return cls(
            str(server.starter),
            started(server.starter),
            digest(system_name()),
            digest(key),
            tuple(sorted(map(digest, server.names))),
        )

    @classmethod
    def read(cls, descriptor: int) -> RunNote:
        """Return the note in an open lock file, as far as it is one.

        Raises:
            OSError: It cannot be read.
        """
        text = os.pread(descriptor, _NOTE_BYTES, 0).decode("ascii", "replace")
        starter, _, rest = text.partition("\n")
        pid, _, since = starter.strip().partition(" ")
        system, key, *names = [*rest.split(), "", ""] if rest.strip() else ["", ""]
        return cls(pid, since, system, key, tuple(filter(None, names)))

    def write(self, descriptor: int) -> None:
        """Write the note, which also holds the names of an earlier one, into an open lock file.

        Raises:
            OSError: It cannot be written.
        """
        known = RunNote.read(descriptor)
        names = dict.fromkeys([*self.names, *(known.names if known.is_like(self) else ())])
        # Earlier versions read the starter from the first bytes.
        starter = f"{self.starter} {self.since}".ljust(_STARTER_BYTES - 1)
        rest = " ".join([self.system, self.key, *[*names][:_NAMES]])
        os.pwrite(descriptor, f"{starter}\n{rest}\n".encode(), 0)

    def is_like(self, other: RunNote) -> bool:
        """Tell whether both are of one system, and have the same key."""
        return (self.system, self.key) == (other.system, other.key)

    def is_of(self, other: RunNote) -> bool:
        """Tell whether both are of workers of one server."""
        return self.is_like(other) and not {*self.names}.isdisjoint(other.names)

    def is_of_master(self, other: RunNote) -> bool:
        """Tell whether one process starts the workers of both."""
        starters = (self.starter, self.since), (other.starter, other.since)
        return self.is_like(other) and starters[0] == starters[1] and bool(self.since)

    def follows(self, other: RunNote) -> bool:
        """Tell whether one process starts the workers of both, with another key since then."""
        one, another = (self.system, self.since), (other.system, other.since)
        is_same = bool(self.since) and self.starter == other.starter and one == another
        return is_same and self.key != other.key

    def is_foreign(self) -> bool:
        """Tell whether its process ids are not of this system, so that nobody knows who lives."""
        return self.system not in ("", digest(system_name()))

    def starter_lives(self) -> bool:
        """Tell whether the starter is known to live."""
        is_known = self.starter.isdecimal() and not self.is_foreign()
        return is_known and is_alive(int(self.starter), self.since)
