"""Identifies visitors for one day, without a cookie, so that nobody can trace them later."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import lru_cache, partial
from hashlib import blake2b
from ipaddress import ip_address

from flask_usage_metrics.enrich.visitors.files import DAY_SECONDS, VisitorFiles
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.forks import FORKS
from flask_usage_metrics.runtime.key_files import KEY_BYTES, destroy_key, find_key, make_key
from flask_usage_metrics.runtime.private_files import StateUnavailable
from flask_usage_metrics.runtime.state_dir import StateDir

GRACE_SECONDS = 600.0
"""Seconds a key is kept after its day: the last requests of the day are processed later."""

_RETRY_SECONDS = 60.0
_CACHED = 8192
_MAX_ADDRESS, _MAX_USER_AGENT, _MAX_HOST = 64, 512, 255

_Identify = Callable[[str, str, str], str | None]


class VisitorIds:
    """Makes identifiers of visitors with a random key for each UTC day, destroyed after the day.

    All processes of the app on this machine share the key through a file. Until the day is over
    an identifier is pseudonymous, because whoever has the key can try all addresses; after that
    nobody can tell it from a random number, not even the owner.

    Args:
        state: Where the app's processes keep what they share; None: nowhere.
        app: Names the app among all that share the place.
        faults: Where it is reported that keys cannot be shared, or not destroyed.
        clock: Seconds since the epoch; for tests.
    """

    def __init__(
        self,
        state: StateDir | None,
        app: str,
        faults: Faults,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._files = VisitorFiles(state, app)
        self._faults = faults
        self._clock = clock
        self._lock = threading.Lock()
        self._keys: dict[int, _Identify] = {}
        self._alone: set[int] = set()
        self._due = float("-inf")
        self._is_left = False
        FORKS.register(self)

    def identify(
        self, moment: float, address: str | None, user_agent: str, host: str
    ) -> str | None:
        """Return the identifier of a visitor; blocks a second at most, at the first one of a day.

        Args:
            moment: When the request started, in seconds since the epoch.
            address: As `address.normalise` returns it.
            user_agent: The header; only its first 512 characters count.
            host: The host that was asked, in upper or lower case.

        Returns:
            16 hexadecimal characters, the same all day in all processes. None without a valid
            address: everybody behind a Unix socket would be one visitor; and for a request of a
            day whose key is destroyed, or of which there never was one.
        """
        if address is None or len(address) > _MAX_ADDRESS:
            return None
        now = self._clock()
        self._maintain(now)
        day = int(moment // DAY_SECONDS)
        key = self._keys.get(day) or self._obtain(day, now)
        # Cut before they are keys of the cache, which would keep a megabyte.
        return None if key is None else key(address, user_agent[:_MAX_USER_AGENT], host[:_MAX_HOST])

    def maintain(self) -> None:
        """Destroy the keys of past days, here and on disk, of dead processes too; never raises."""
        self._maintain(self._clock())

    def due_in(self) -> float | None:
        """Return in how many seconds `maintain` has something to destroy, >= 0.

        Returns:
            None if this process holds no key, and none was left that could not be destroyed.
        """
        with self._lock:
            due = [(day + 1) * DAY_SECONDS + GRACE_SECONDS for day in self._keys]
            if self._is_left:
                due.append(self._due)
        return max(0.0, min(due) - self._clock()) if due else None

    def reset_after_fork(self) -> None:
        """Read shared keys again; keys of the parent alone are kept, its children agree on them."""
        self._lock = threading.Lock()
        self._keys = {day: key for day, key in self._keys.items() if day in self._alone}

    def close(self) -> None:
        """Forget the keys; the file of today stays, for the next start on the same day."""
        with self._lock:
            self._keys.clear()
            self._alone.clear()

    # ------------------------------------------------------------------------ today's key

    def _obtain(self, day: int, now: float) -> _Identify | None:
        """Return the key of a day, made if the day is not over; None if there is none."""
        start = day * DAY_SECONDS
        end = start + DAY_SECONDS
        # Tomorrow's, too, shortly before: the clock was set back a little since the request.
        if not start - GRACE_SECONDS <= now < end + GRACE_SECONDS:
            return None
        with self._lock:
            if day not in self._keys:
                secret = find_key(self._files.keys(day))
                if secret is None:
                    if now >= end:
                        return None
                    try:
                        secret = make_key(self._files.new_key(day))
                    except (OSError, StateUnavailable) as error:
                        self._faults.report(
                            "visitors", error, "visitors are counted once for each process"
                        )
                        # For all day, even if there is a file soon: ids must not change.
                        secret = os.urandom(KEY_BYTES)
                        self._alone.add(day)
                self._keys[day] = lru_cache(_CACHED)(partial(_identify, secret))
            return self._keys[day]

    # ------------------------------------------------------------------------ keys of the past

    def _maintain(self, now: float) -> None:
        # From both sides: a clock that was years ahead must not put this off for years.
        if self._due - DAY_SECONDS <= now < self._due:
            return
        with self._lock:
            for day in [day for day in self._keys if _is_outdated(day, now)]:
                del self._keys[day]
                self._alone.discard(day)
            days = (now - GRACE_SECONDS) // DAY_SECONDS + 1
            self._due = days * DAY_SECONDS + GRACE_SECONDS
            self._is_left = False
            outdated = [path for day, path in self._files.all() if _is_outdated(day, now)]
            for path in outdated:
                try:
                    if path.suffix == ".key":
                        destroy_key(path)
                    else:  # a tally, which somebody may have ceased to keep
                        path.unlink(missing_ok=True)
                except OSError as error:
                    self._is_left = True
                    self._due = now + _RETRY_SECONDS
                    self._faults.report("visitors", error, "a key of a past day is left")


def _identify(secret: bytes, address: str, user_agent: str, host: str) -> str | None:
    try:
        # Of IPv6 the /64: privacy addresses change inside it (RFC 8981).
        network = ip_address(address).packed[:8]
    except ValueError:
        return None
    # A lone surrogate can come with a header that was decoded in some other way.
    texts = f"\0{user_agent}\0{host.lower()}".encode("utf-8", "surrogatepass")
    return blake2b(network + texts, key=secret, digest_size=8, person=b"visitor").hexdigest()


def _is_outdated(day: int, now: float) -> bool:
    """Tell whether a day is over, or so far ahead that the clock was wrong when it was made."""
    start = day * DAY_SECONDS
    return not start - DAY_SECONDS <= now < start + DAY_SECONDS + GRACE_SECONDS
