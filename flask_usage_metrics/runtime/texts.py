"""Texts of servers, clients and the app that may hold what is no Unicode, or what databases refuse.

Two kinds come in. A server's texts are bytes decoded as Latin-1 (PEP 3333), which `from_wsgi` turns
into what the bytes meant. The app's own are Unicode but may hold a lone surrogate, which no encoder
takes: `encodable`. Neither may keep a NUL, which PostgreSQL refuses: `without_nul`.
"""

from __future__ import annotations

import re
from typing import Any

CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def from_wsgi(text: str) -> str:
    """Return a text of a WSGI environ as the UTF-8 text that was sent.

    Args:
        text: Bytes decoded as Latin-1. A character beyond that, which can come from a server that
            decodes otherwise or from a test client, becomes ``"?"``.

    Returns:
        Valid Unicode, with U+FFFD for bytes that are no UTF-8.
    """
    return text.encode("latin-1", "replace").decode("utf-8", "replace")


def encodable(text: str) -> str:
    r"""Return a text whose lone surrogates are spelled out, as ``\udc80``; all else stays."""
    return text.encode("utf-8", "backslashreplace").decode()


def printable(text: str) -> str:
    """Return a text without NUL, and with U+FFFD for each other control character.

    These would break a line of a log, or command the terminal that shows a record.
    """
    return CONTROLS.sub("\ufffd", text.replace("\0", ""))


def without_nul(value: Any) -> Any:
    """Return a JSON value whose texts, also as names, hold no NUL; of two equal names the last."""
    if isinstance(value, str):
        return value.replace("\0", "")
    if isinstance(value, list):
        return [without_nul(inner) for inner in value]
    if isinstance(value, dict):
        return {key.replace("\0", ""): without_nul(inner) for key, inner in value.items()}
    return value
