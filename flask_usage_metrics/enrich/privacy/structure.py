"""The structure of a text from a stranger: its percent-encoding, its pairs, its userinfo."""

from __future__ import annotations

import re
from urllib.parse import unquote

_DECODINGS = 4
_SHORTEST_USERINFO = 3  # "a@b"

_SEPARATORS = re.compile(r"[&;?#/\\\s,\"'(){}<>|]+")
_QUOTED_NAME = re.compile(r"[\"']([^\"']{1,200})[\"']\s*:")

_GAPS = re.compile(r"[\s\"'<>{}`]+")
_DELIMITERS = re.compile(r"[/\\?#&;]")
_AUTHORITY = re.compile(
    r"(?:^|[:=&?#;,|(])[/\\]{2,}|(?<=[a-z0-9+.-]{2}):[/\\]+|\b(?:https?|wss?|ftp):[/\\]*",
    re.IGNORECASE,
)
"""What an authority follows (RFC 3986, 3.2).

To browsers a backslash is a slash, and none is enough after ``https:``; Werkzeug makes one of two.
"""

_PORT = re.compile(r"[^:]*:[0-9]{0,5}")
_LAST_WORD = re.compile(r"[^A-Za-z]+")
_ADDRESSES = frozenset(("mailto", "acct", "sip", "sips", "xmpp", "im", "pres"))
"""Schemes whose URLs are an address without a password, as in ``mailto:jane@example.com``."""


def decodings(text: str) -> list[str] | None:
    """Return a text as it is, percent-decoded, decoded again, and so on.

    Sign-in pages are sent a URL in a URL in a URL.

    Returns:
        All different; None if it is still encoded after four times.
    """
    found = [text]
    while "%" in text:
        decoded = unquote(text)
        if decoded == text:
            break
        if len(found) > _DECODINGS:
            return None
        found.append(decoded)
        text = decoded
    return found


def names_in(text: str) -> list[str]:
    """Return the names of the ``name=value`` and ``"name": value`` pairs in a decoded text."""
    names: list[str] = []
    if ":" in text and ('"' in text or "'" in text):
        names = _QUOTED_NAME.findall(text)
    if "=" in text:
        # Not by one regular expression: searching for [^=]+= takes quadratic time without "=".
        names += [_SEPARATORS.split(name.rstrip())[-1] for name in text.split("=")[:-1]]
    return names


def holds_userinfo(text: str) -> bool:
    """Tell whether a decoded text holds the userinfo of a URL: ``user:password@``, ``//key@``."""
    if "@" not in text or len(text) < _SHORTEST_USERINFO:
        return False
    return any(map(_ends_in_userinfo, text.split("@")[:-1]))


def replace_userinfo(text: str, by: str) -> str:
    """Return a decoded text with the userinfo that it holds, up to the last ``@``, replaced.

    Args:
        text: For which `holds_userinfo` holds.
        by: Stands in its place.
    """
    authority = _AUTHORITY.search(text, 0, text.index("@"))
    start = authority.end() if authority else text.rfind("/", 0, text.index("@")) + 1
    return f"{text[:start]}{by}{text[text.rindex('@') :]}"


def _ends_in_userinfo(before: str) -> bool:
    """Tell whether what stands before an ``@`` ends in a URL's userinfo."""
    tail = _GAPS.split(before)[-1]
    last = _DELIMITERS.split(tail)[-1]
    scheme, colon, password = last.partition(":")
    if colon and password and _LAST_WORD.split(scheme)[-1].lower() not in _ADDRESSES:
        return True
    # A URL may stand in the path of another.
    for authority in _AUTHORITY.finditer(tail):
        start = authority.end()
        if last and start == len(tail) - len(last):
            return True
        # A password may have slashes in it once it is decoded; a port has digits only.
        delimiter = _DELIMITERS.search(tail, start)
        first = tail[start : delimiter.start() if delimiter else None]
        if ":" in first and not _PORT.fullmatch(first):
            return True
    return False
