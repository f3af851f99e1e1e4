"""Headers of a client -> browser, version, platform, kind, language."""

from __future__ import annotations

from functools import lru_cache

import msgspec

from flask_usage_metrics.enrich.clients.browsers import consult_ua_parser, sniff
from flask_usage_metrics.enrich.clients.kinds import kind_of
from flask_usage_metrics.enrich.clients.languages import language

__all__ = ["Client", "describe", "kind", "language"]

_MAX_USER_AGENT = 512
_CACHED = 4096


class Client(msgspec.Struct, frozen=True):
    """A client by its User-Agent header.

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


def describe(user_agent: str | None) -> Client:
    """Return the client that a User-Agent header belongs to.

    The first call for a person's browser may take some 50 ms, when ua-parser loads its rules.

    Args:
        user_agent: The User-Agent header; its first 512 characters are looked at. None or blank:
            an ``other-bot``, since every browser sends one and nothing tells which program this is.
    """
    return _describe((user_agent or "")[:_MAX_USER_AGENT])


def kind(user_agent: str) -> str:
    """Return the kind of client alone; quicker than all, as it never loads ua-parser's rules."""
    return _kind(user_agent[:_MAX_USER_AGENT])


_kind = lru_cache(_CACHED)(kind_of)


@lru_cache(_CACHED)
def _describe(user_agent: str) -> Client:
    found = _kind(user_agent)
    if found != "human":
        return Client(None, None, None, found)
    browser, version, platform = consult_ua_parser(user_agent) or sniff(user_agent)
    return Client(browser, version, platform, found)
