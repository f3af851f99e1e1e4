"""The files of an app about a day's visitors: one for the key, one for the tally."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import date
from pathlib import Path

from flask_usage_metrics.runtime.private_files import StateUnavailable, check_private, make_private
from flask_usage_metrics.runtime.state_dir import StateDir, digest

DAY_SECONDS = 86_400
_EPOCH = date(1970, 1, 1).toordinal()

_NAME = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2})\.(?:key|sqlite3(?:-wal|-shm|-journal)?)")


class VisitorFiles:
    """Paths of one app's files, in every place where there may be some.

    Days are counted since the epoch, in UTC.

    Args:
        state: Where the app's processes keep what they share; None: nowhere.
        app: Names the app among all that share the place.
    """

    def __init__(self, state: StateDir | None, app: str) -> None:
        self._state = state
        self._name = f"visitors-{digest(app)}"

    def keys(self, day: int) -> list[Path]:
        """Return where a day's key can be."""
        return [folder / f"{_text(day)}.key" for folder in self._folders(self._name)]

    def new_key(self, day: int) -> Path:
        """Return where a day's key is to be; the folder is made.

        Raises:
            OSError: It cannot be made.
            StateUnavailable: There is no place that is ours alone.
        """
        return self._made() / f"{_text(day)}.key"

    def tallies(self, day: int) -> list[Path]:
        """Return where a day's tally can be."""
        return [folder / f"{_text(day)}.sqlite3" for folder in self._folders(self._name)]

    def new_tally(self, day: int) -> Path:
        """Return where a day's tally is to be, as `new_key` does."""
        return self._made() / f"{_text(day)}.sqlite3"

    def all(self) -> Iterator[tuple[int, Path]]:
        """Yield day and path of every file, of other apps in the same places too.

        An app gets another name when its storages change, and nobody else looks after what it left
        under the old one. Files with names of another form are not ours.
        """
        for folder in self._folders("visitors-*"):
            with suppress(OSError):
                for path in folder.iterdir():
                    match = _NAME.fullmatch(path.name)
                    with suppress(ValueError):
                        if match is not None:
                            yield date.fromisoformat(match[1]).toordinal() - _EPOCH, path

    def _made(self) -> Path:
        if self._state is None:
            raise StateUnavailable("none is configured")
        return make_private(self._state.home() / self._name)

    def _folders(self, pattern: str) -> Iterator[Path]:
        for home in self._state.homes() if self._state is not None else ():
            with suppress(OSError):
                for folder in home.glob(pattern):
                    with suppress(StateUnavailable):
                        check_private(folder)
                        yield folder


def _text(day: int) -> str:
    return str(date.fromordinal(_EPOCH + day))
