"""Bounded caches: values of client data cannot fill the memory.

Two, as they differ in where values come from. `TwoGenerationCache` makes a value where it is asked
for one, and a hit costs no more than a dict's. `ExpiringCache` is told values that were learnt
elsewhere, perhaps large ones, each good for a time of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

_NOTHING: Any = object()


class TwoGenerationCache(dict[Key, Value]):
    """Values computed from keys: ``cache[key]`` calls a function if the value is not known.

    New keys, and old ones that are asked for again, go into the younger of two generations. When
    that holds half of `most` keys it becomes the older one, and the previous older one is
    forgotten: so at least the latest half is known. Unlike `functools.lru_cache`, a hit moves
    nothing, and keys that are too long to be kept need no check before each call.

    For any thread. Two that ask for the same new key at once may both make its value.

    Args:
        make: Called with a key; what it raises is raised, and nothing is kept.
        size: Returns how many characters a key has; called with new keys only.
        most: Keys that are remembered, at least 2.
        longest: Characters of a key that is remembered; of a longer one the value is made each
            time.
    """

    def __init__(
        self,
        make: Callable[[Key], Value],
        size: Callable[[Key], int],
        *,
        most: int = 1024,
        longest: int = 1024,
    ) -> None:
        super().__init__()
        self._make = make
        self._size = size
        self._half = most // 2
        self._longest = longest
        self._older: dict[Key, Value] = {}

    def __missing__(self, key: Key) -> Value:
        value: Value = self._older.pop(key, _NOTHING)
        if value is _NOTHING:
            value = self._make(key)
            if self._size(key) > self._longest:
                return value
        if len(self) >= self._half:
            self._older = self.copy()
            self.clear()
        self[key] = value
        return value


class ExpiringCache(Generic[Key, Value]):
    """Values that callers `put`, each with an expiry of its own; the least recently used go first.

    For one caller at a time.

    Args:
        weigh: Returns what a value weighs, such as its bytes; always the same for the same value.
        most: Values that are kept.
        most_weight: What they may weigh together; a value that alone weighs more is not kept.
    """

    def __init__(self, weigh: Callable[[Value], int], *, most: int, most_weight: int) -> None:
        self._weigh = weigh
        self._most = most
        self._most_weight = most_weight
        self._weight = 0
        self._kept: dict[Key, tuple[float, Value]] = {}  # the least recently used one first

    def get(self, key: Key, now: float) -> Value | None:
        """Return the value of a key; None if there is none, or its time is over.

        Args:
            key: As `put` was given it.
            now: By the clock that `until` was read from.
        """
        kept = self._kept.pop(key, None)
        if kept is None:
            return None
        until, value = kept
        if now < until:
            self._kept[key] = kept
            return value
        self._weight -= self._weigh(value)
        return None

    def put(self, key: Key, value: Value, until: float) -> None:
        """Keep a value; it takes the place of one with the same key.

        Args:
            key: What `get` finds it by.
            value: Not None.
            until: From this moment on it is not found.
        """
        if key in self._kept:
            self._forget(key)
        self._kept[key] = (until, value)
        self._weight += self._weigh(value)
        while len(self._kept) > self._most or self._weight > self._most_weight:
            self._forget(next(iter(self._kept)))

    def _forget(self, key: Key) -> None:
        _, value = self._kept.pop(key)
        self._weight -= self._weigh(value)
