"""What was made of strangers' texts, by these texts: of short ones, and of the latest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Key = TypeVar("Key", bound=tuple[object, ...])
Made = TypeVar("Made")


class TwoGenerationCache(dict[Key, Made]):
    """Subscripting it calls a function with a key, unless what that returned is known.

    What is known costs a third less than with `functools.lru_cache`, as only of what is new it is
    asked how long the texts are: strangers could fill the memory with long ones. For one caller at
    a time.

    Args:
        make: Called with the parts of a key.
        characters: Returns how long the texts of a key are.
        most: How many keys are remembered, half of them at least the latest ones.
        longest: Characters of a key that is.
    """

    def __init__(
        self,
        make: Callable[..., Made],
        characters: Callable[[Key], int],
        *,
        most: int = 1024,
        longest: int = 1024,
    ) -> None:
        super().__init__()
        self._make = make
        self._characters = characters
        self._half = most // 2
        self._longest = longest
        self._older: dict[Key, Made] = {}

    def __missing__(self, key: Key) -> Made:
        if key in self._older:
            made = self._older.pop(key)
        else:
            made = self._make(*key)
            if self._characters(key) > self._longest:
                return made
        if len(self) >= self._half:
            self._older = self.copy()
            self.clear()
        self[key] = made
        return made

    def everything(self) -> dict[Key, Made]:
        """Return all that is remembered."""
        return {**self._older, **self}
