"""Prefetches: requests that a browser makes of itself, for a page that perhaps nobody will see."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

# Fetch (the standard) and Chrome, Firefox, Safari; then what their older versions send.
_PURPOSES = ("HTTP_SEC_PURPOSE", "HTTP_PURPOSE", "HTTP_X_PURPOSE", "HTTP_X_MOZ")

_WORDS = ("prefetch", "prerender", "preview")
"""Of which ``Sec-Purpose`` may have several, as in ``prefetch;prerender``."""


def is_prefetch(environ: WSGIEnvironment) -> bool:
    """Tell whether a request is a prefetch, by what its browser says of it.

    Args:
        environ: Of the request (WSGI).
    """
    said = " ".join([str(environ.get(name, "")) for name in _PURPOSES]).lower()
    return any(word in said for word in _WORDS)
