"""The state directory: where the processes of one app find what they leave for each other."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from flask_usage_metrics.runtime.private_files import (
    StateUnavailable,
    check_private,
    make_private,
    require_locks,
)


class StateDir:
    """The folder of one app, below the first of some places that can be used.

    Args:
        places: Folders, in order of preference.
        app: Text that no other app in the same place has.
        or_temporary: Whether the last place is a folder of this user among the system's temporary
            files.

    Attributes:
        name: Of the app's folder.
    """

    def __init__(self, places: Sequence[Path], app: str, *, or_temporary: bool = False) -> None:
        self._places = tuple(places)
        self._or_temporary = or_temporary
        slug = re.sub(r"[^A-Za-z0-9]+", "-", app)[:24].strip("-") or "app"
        self.name = f"{slug}-{digest(app)}"

    @property
    def places(self) -> tuple[Path, ...]:
        """Return the places, the same in each process of this user.

        A worker may be another user's than the process in which the app was set up.
        """
        return (*self._places, *([temporary_place()] if self._or_temporary else []))

    def home(self) -> Path:
        """Return the app's folder, made if need be, for this user only.

        Raises:
            StateUnavailable: None of the places can be used; the last reason is given.
        """
        require_locks()
        reason = "no place is configured"
        for place in self.places:
            try:
                make_private(place)
                return make_private(place / self.name)
            except StateUnavailable as error:
                reason = str(error)
        raise StateUnavailable(reason)

    def homes(self) -> Iterator[Path]:
        """Yield the app's folders that exist in any of the places and only this user may write."""
        for place in self.places:
            home = place / self.name
            with suppress(StateUnavailable):
                check_private(place)
                check_private(home)
                yield home


def default_place(instance: Path) -> Path:
    """Return where state is kept unless configured, for all processes of an app the same.

    It does not matter whether the instance folder exists now: some workers may start before it
    does, and others later.
    """
    return instance / "usage-state"


def temporary_place() -> Path:
    """Return where state is kept if the default place cannot be made or written."""
    user = os.geteuid() if hasattr(os, "geteuid") else ""
    return Path(tempfile.gettempdir(), f"flask-usage-metrics-{user}")


def digest(text: str) -> str:
    """Return a text's BLAKE2b hash of 8 bytes, as 16 hexadecimal digits: a name for a file."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest()
