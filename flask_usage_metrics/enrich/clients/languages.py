"""The language a client would like best, by its Accept-Language header."""

from __future__ import annotations

import re
from functools import lru_cache

_MAX_ACCEPT_LANGUAGE = 200
_CACHED = 4096


def language(accept_language: str | None) -> str | None:
    """Return the language a client would like best.

    Args:
        accept_language: The Accept-Language header; the choices that lie wholly in its first 200
            characters are looked at.

    Returns:
        Language, script and region as far as given (``"en-US"``, ``"zh-Hant-TW"``, ``"es-419"``),
        at most 11 characters; None when no language is named, which ``*`` does not.
    """
    text = accept_language or ""
    if len(text) > _MAX_ACCEPT_LANGUAGE:
        # "en-GB;q=0.25" cut to "en-GB;q=0" or to "en" would be another wish.
        text = text[:_MAX_ACCEPT_LANGUAGE].rpartition(",")[0]
    return _language(text)


@lru_cache(_CACHED)
def _language(accept_language: str) -> str | None:
    first, highest = None, 0.0
    for item in accept_language.split(","):
        tag, *parameters = item.split(";")
        quality = _quality(parameters)
        if quality > highest and (language := _canonical(tag.strip().lower())):
            first, highest = language, quality
    return first


_QUALITY = re.compile(r"\s*q\s*=\s*([01](?:\.[0-9]{0,9})?|\.[0-9]{1,9})\s*", re.ASCII)
_TAG = re.compile(r"([a-z]{2,3})(?:[-_]([a-z]{4}))?(?:[-_]([a-z]{2}|[0-9]{3}))?(?:[-_][a-z0-9]+)*")


def _quality(parameters: list[str]) -> float:
    """Return the weight between 0 and 1 of a choice; 0, which is never chosen, if malformed."""
    for parameter in parameters:
        if parameter.strip()[:1] in ("q", "Q"):
            given = _QUALITY.fullmatch(parameter.lower())
            quality = float(given[1]) if given else 0.0
            return quality if quality <= 1 else 0.0
    return 1.0


def _canonical(tag: str) -> str | None:
    """Return a lower-case language tag as RFC 5646, 2.1.1 spells it, without its variants."""
    parts = _TAG.fullmatch(tag)
    if parts is None:
        return None
    name, script, region = parts.groups()
    if script:
        name += f"-{script.title()}"
    if region:
        name += f"-{region.upper()}"
    return name
