"""What the owner of an app calls clients: TRACK_USAGE_CLIENTS, patterns of User-Agent headers."""

from __future__ import annotations

import re
from collections.abc import Mapping

from flask_usage_metrics.enrich.clients.kinds import KINDS
from flask_usage_metrics.errors import ConfigError
from flask_usage_metrics.runtime.shown_values import shown

_MAX_USER_AGENT = 512


class OwnKinds:
    """Kinds of client by regular expressions, which may be slow: not to be asked in a request.

    Args:
        kinds: Kind by pattern, which is searched for anywhere, in either case. The first that is
            found holds, before all that is known otherwise.

    Raises:
        ConfigError: A pattern does not compile, or a kind is none.
    """

    def __init__(self, kinds: Mapping[str, str]) -> None:
        self._kinds = [(_compiled(pattern), _known(kind)) for pattern, kind in kinds.items()]

    def kind_of(self, user_agent: str) -> str | None:
        """Return the kind of a client; None if no pattern is found.

        Args:
            user_agent: The User-Agent header, ``""`` if absent; its first 512 characters count.
        """
        for pattern, kind in self._kinds:
            if pattern.search(user_agent, 0, _MAX_USER_AGENT):
                return kind
        return None


def _compiled(pattern: object) -> re.Pattern[str]:
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"TRACK_USAGE_CLIENTS: a pattern must be a text, not {shown(pattern)}")
    try:
        return re.compile(pattern, re.IGNORECASE)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"TRACK_USAGE_CLIENTS: {pattern[:100]!r} is no regular expression: {error}"
        ) from None


def _known(kind: object) -> str:
    if kind not in KINDS:
        raise ConfigError(
            f"TRACK_USAGE_CLIENTS: a kind must be one of {', '.join(KINDS)}, not {shown(kind)}"
        )
    return str(kind)
