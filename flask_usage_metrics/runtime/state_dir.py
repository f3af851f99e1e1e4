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

    Attributes:
        name: Of the app's folder.
    """

    def __init__(self, places: Sequence[Path], app: str) -> None:
        self.places = tuple(places)
        slug = re.sub(r"[^A-Za-z0-9]+", "-", app)[:24].strip("-") or "app"
        self.name = f"{slug}-{digest(app)}"

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


def default_places(instance: Path) -> list[Path]:
    """Return where state is kept unless configured, for all processes of an app the same.

    In the instance folder, or, where that cannot be made or written, in a folder of this user among
    the system's temporary files. It does not matter whether the instance folder exists now: some
    workers may start before it does, and others later.
    """
    user = os.getuid() if hasattr(os, "getuid") else ""
    return [
        instance / "usage-state",
        Path(tempfile.gettempdir(), f"flask-usage-metrics-{user}"),
    ]


def digest(text: str) -> str:
    """Return a text's BLAKE2b hash of 8 bytes, as 16 hexadecimal digits: a name for a file."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest()
