"""The country from a header that the CDN or proxy in front of the app sets."""

from __future__ import annotations

import re

from flask_usage_metrics.enrich.country.answer import UNKNOWN, Answer, as_answer

# RFC 9110, 5.6.2, without what no country header has.
_NAME = re.compile(r"[A-Za-z0-9_-]+")

# Akamai's X-Akamai-Edgescape: "georegion=1,country_code=US,region_code=CA,...".
_EDGESCAPE = re.compile(r"(?:^|,)\s*country_code=([A-Za-z]{2})\s*(?:,|$)")


class Header:
    """Believes one header, if a trusted proxy sent it.

    Special values (``XX``, ``ZZ``, ``T1``, ``A1``, ``A2``, ``O1``, ``AP``, ``EU``, ``**``) are no
    countries, and a header sent twice is none either.

    Args:
        position: Where the header is among those that `locate` is given.
    """

    is_static = False

    def __init__(self, position: int) -> None:
        self._position = position

    def locate(self, address: str | None, headers: tuple[str, ...], trusted: bool) -> Answer:
        """Answer from the header's value."""
        if not trusted:
            return UNKNOWN
        value = headers[self._position].strip()
        if len(value) > 2 and (found := _EDGESCAPE.search(value)):
            value = found[1]
        return as_answer(value)


def wsgi_name(name: str) -> str | None:
    """Return the key a header has in a WSGI environ; None if no header can have that name."""
    if not _NAME.fullmatch(name):
        return None
    return "HTTP_" + name.upper().replace("-", "_")
