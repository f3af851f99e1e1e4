"""The country from iptocc: the registries' own lists, inside the package, nothing to set up."""

from __future__ import annotations

import iptocc

from flask_usage_metrics.enrich.country.answer import KNOWN, UNKNOWN, Answer


class Offline:
    """Knows in which country an address is registered."""

    is_static = True

    def __init__(self) -> None:
        self._country_code = iptocc.country_code

    def locate(self, address: str | None, headers: tuple[str, ...], trusted: bool) -> Answer:
        """Answer from the lists, which also hold ``EU`` and other codes of no country."""
        code = None if address is None else self._country_code(address)
        return UNKNOWN if code is None else KNOWN.get(code, UNKNOWN)
