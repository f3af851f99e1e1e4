"""User name -> pseudonym: the same for the same name, and no way back without the key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import blake2b

_CACHED = 4096


class Pseudonyms:
    """Makes pseudonyms of user names by a keyed hash, BLAKE2b (RFC 7693).

    Args:
        keys: Returns the keys there are: the first makes pseudonyms, the others made those of older
            records. Called again while it returns none.
    """

    def __init__(self, keys: Callable[[], Sequence[bytes]]) -> None:
        self._keys = keys
        self._known: tuple[bytes, ...] = ()
        # Of the instance: a cache of the class would keep every instance alive.
        self._of = lru_cache(_CACHED)(self._hash)

    def of(self, name: str) -> str | None:
        """Return a name's pseudonym, 16 hexadecimal digits; None if there is no key."""
        names = self._of(name, self._all_keys()[:1])
        return names[0] if names else None

    def all(self, name: str) -> Sequence[str]:
        """Return every pseudonym that was made of a name by one of the keys."""
        return self._hash(name, self._all_keys())

    def _all_keys(self) -> tuple[bytes, ...]:
        if not self._known:
            self._known = tuple(self._keys())
        return self._known

    @staticmethod
    def _hash(name: str, keys: tuple[bytes, ...]) -> tuple[str, ...]:
        text = name.encode("utf-8", "surrogatepass")
        return tuple(
            # A key may have any length, which BLAKE2b limits to 64 bytes.
            blake2b(
                text, digest_size=8, key=blake2b(key).digest(), person=b"flask_usage user"
            ).hexdigest()
            for key in keys
        )
