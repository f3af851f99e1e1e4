"""Headers of a client -> browser, version, platform, kind, language."""

from __future__ import annotations

from functools import lru_cache

import msgspec

from flask_usage_metrics.enrich.clients import kinds, parser
from flask_usage_metrics.enrich.clients.hints import improve, is_headless
from flask_usage_metrics.enrich.clients.kinds import kind_of
from flask_usage_metrics.enrich.clients.languages import language

__all__ = ["PERSON", "PREFETCH", "Client", "describe", "kind", "language", "load"]

PERSON = "human"
"""The kind of client that is a visitor."""

PREFETCH = "prefetch"
"""The kind of a person's browser that fetches of itself; no User-Agent header tells it."""

_MAX_HEADER = 512
_CACHED = 4096


class Client(msgspec.Struct, frozen=True):
    """A client by its headers.

    Attributes:
        browser: One of `browsers.BROWSERS`; None when unknown. Always None for a bot, as are
            `version` and `platform`: the browser it names is a disguise.
        version: Major version, 1 to 4 digits; browsers freeze or make up the rest.
        platform: One of `browsers.PLATFORMS`; None when unknown.
        kind: One of `kinds.KINDS`.
    """

    browser: str | None
    version: str | None
    platform: str | None
    kind: str


def load() -> None:
    """Read all data files, once a process: some 0.1 s with ua-parser; others return at once.

    Raises:
        OSError: One cannot be read; the next call, or the first header, tries again.
        MemoryError: Likewise.
    """
    kinds.load()
    parser.load()


def describe(
    user_agent: str | None, brands: str = "", platform: str = "", own: str | None = None
) -> Client:
    """Return the client that sent some headers, of each of which 512 characters are looked at.

    Args:
        user_agent: The User-Agent header. None or blank: an ``other-bot``, since every browser
            sends one and nothing tells which program this is.
        brands: The Sec-CH-UA header; ``""`` if absent.
        platform: The Sec-CH-UA-Platform header; ``""`` if absent.
        own: The kind that the app's owner says it is; None: as it is known.

    Raises:
        OSError: As `load`.
        MemoryError: As `load`.
    """
    user_agent = (user_agent or "")[:_MAX_HEADER]
    return _describe(user_agent, brands[:_MAX_HEADER], platform[:_MAX_HEADER], own)


def kind(user_agent: str) -> str:
    """Return the kind of client alone, by the User-Agent header; quicker than all."""
    return _kind(user_agent[:_MAX_HEADER])


_kind = lru_cache(_CACHED)(kind_of)


@lru_cache(_CACHED)
def _describe(user_agent: str, brands: str, platform: str, own: str | None) -> Client:
    found = own or _kind(user_agent)
    if own is None and found == PERSON and is_headless(brands):
        found = "other-bot"
    if found != PERSON:
        return Client(None, None, None, found)
    parsed = improve(parser.parse(user_agent), brands, platform)
    return Client(parsed.browser, parsed.version, parsed.platform, found)
