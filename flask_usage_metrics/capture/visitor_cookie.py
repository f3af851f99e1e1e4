"""The cookie by which a visitor is recognised, where TRACK_USAGE_COOKIE asks for one."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flask_usage_metrics.enrich import clients

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

NAME = "usage_visitor"

_YEAR_SECONDS = 365 * 24 * 3600
_BROUGHT = re.compile(rf"(?:^|;)\s*{NAME}=([0-9a-f]{{32}})\s*(?:;|$)")

Headers = list[tuple[str, str]]


class VisitorCookie:
    """Recognises visitors by a random number, and chooses one for those who have none.

    Args:
        refused_by: WSGI names of headers whose value ``"1"`` refuses the cookie.
    """

    def __init__(self, refused_by: Sequence[str] = ()) -> None:
        self._refused_by = tuple(refused_by)

    def read(self, environ: WSGIEnvironment) -> str | None:
        """Return the number in the cookie, 32 hexadecimal digits; None: none, or refused."""
        if self._is_refused(environ):
            return None
        text = environ.get("HTTP_COOKIE", "")
        brought = _BROUGHT.search(text) if NAME in text else None
        return None if brought is None else brought[1]

    def choose(self, environ: WSGIEnvironment, headers: Headers) -> str | None:
        """Return 128 random bits for a visitor without a cookie, or None: give no cookie.

        None for programs, which would not bring it back and be a new visitor each time; and with
        responses that shared caches keep: a cache would hand the same cookie to everybody or, as
        Varnish does, cease to keep the response.

        Returns:
            32 hexadecimal digits, or None.
        """
        agent = environ.get("HTTP_USER_AGENT", "")
        if self._is_refused(environ) or clients.kind(agent) != "human" or _is_shared(headers):
            return None
        return secrets.token_hex(16)

    @staticmethod
    def header(visitor: str, environ: WSGIEnvironment) -> tuple[str, str]:
        """Return name and value of the header that sets the cookie, for a year."""
        secure = "; Secure" if environ.get("wsgi.url_scheme") == "https" else ""
        attributes = f"Max-Age={_YEAR_SECONDS}; Path=/; HttpOnly; SameSite=Lax{secure}"
        return "Set-Cookie", f"{NAME}={visitor}; {attributes}"

    def _is_refused(self, environ: WSGIEnvironment) -> bool:
        return any(environ.get(name) == "1" for name in self._refused_by)


def _is_shared(headers: Headers) -> bool:
    """Tell whether a response invites shared caches to keep it (RFC 9111, 5.2.2)."""
    return any(
        "public" in value.lower() or "s-maxage" in value.lower()
        for name, value in headers
        if name.lower() == "cache-control"
    )
