"""Cleans what clients, servers and the app send: valid Unicode, no NUL, bounded; numbers read."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import msgspec

from flask_usage_metrics.runtime.texts import (
    CONTROLS,
    encodable,
    from_wsgi,
    printable,
    without_nul,
)

MAX_INT = 2**63 - 1
"""The largest integer of the databases; larger numbers are cut to it."""

_MAX_LABEL = 512
_NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\udc80-\udcff]")

_MAX_QUEUE_SECONDS = 300.0
"""Seconds a request may have waited; who is still there after more? Proxies give up much earlier
(nginx's proxy_read_timeout: 60 seconds)."""


def wsgi_text(text: str, length: int) -> str:
    """Return a text of a WSGI environ as the UTF-8 text it is, without control characters, cut.

    Args:
        text: Bytes decoded as Latin-1 (PEP 3333).
        length: Characters that are kept at most.
    """
    if len(text) <= length and text.isascii() and text.isprintable():
        return text
    text = text[: 4 * length]
    if not text.isascii():
        text = from_wsgi(text)
    return printable(text)[:length]


def wsgi_path(text: str, length: int) -> str:
    """Return a path of a WSGI environ as `wsgi_text` does, but with control characters encoded."""
    if not text.isascii() or not text.isprintable():
        text = from_wsgi(text[: 4 * length])
        text = CONTROLS.sub(lambda found: quote(found[0]), text)
    return text[:length]


def wsgi_query(text: str, length: int) -> str:
    """Return a query string of a WSGI environ as `wsgi_path` does, its invalid bytes encoded.

    Flask takes those for U+FFFD in a path, and encodes them in a query.
    """
    if not text.isascii() or not text.isprintable():
        # Lone surrogates stand for the bytes.
        text = text[: 4 * length].encode("latin-1", "replace").decode("utf-8", "surrogateescape")
        text = _NO_TEXT.sub(lambda found: quote(found[0], errors="surrogateescape"), text)
    return text[:length]


def app_text(text: str) -> str:
    """Return a text of the app's own with only valid Unicode, without control characters."""
    if text.isascii() and text.isprintable():
        return text
    return printable(encodable(text))


@lru_cache(4096)
def label(text: str | None) -> str | None:
    """Return a name out of the app's code, as `app_text` does, cut to 512 characters."""
    return None if text is None else app_text(text)[:_MAX_LABEL]


def json_object(encoded: bytes) -> dict[str, Any]:
    """Return a JSON object without NUL; of any other JSON value ``{"value": it}``.

    Raises:
        msgspec.DecodeError: It is no JSON.
    """
    value = decode(encoded)
    if b"\\u0000" in encoded:
        value = without_nul(value)
    # The app may have put something else in place of the dict.
    return value if isinstance(value, dict) else {"value": value}


def queue_seconds(text: str, started_ns: int) -> float | None:
    """Return how long a request waited between the proxy and the app, by the proxy's header.

    Args:
        text: X-Request-Start of a trusted proxy: ``t=`` and seconds (nginx), milliseconds (Heroku)
            or microseconds (Apache) since the epoch; which of these, its size tells.
        started_ns: When the request reached the app, in nanoseconds since the epoch.

    Returns:
        Seconds from 0 to 300; None if the header says nothing of the kind.
    """
    text = text.strip().removeprefix("t=")
    try:
        came = float(text)
    except ValueError:
        return None
    for scale in (1.0, 1e3, 1e6, 1e9):
        waited = started_ns / 1e9 - came / scale
        if -1.0 <= waited <= _MAX_QUEUE_SECONDS:
            return max(waited, 0.0)  # two machines' clocks differ
    return None


encode = msgspec.json.Encoder().encode
"""Return JSON values as JSON."""

decode = msgspec.json.Decoder().decode
"""Return JSON as JSON values."""
