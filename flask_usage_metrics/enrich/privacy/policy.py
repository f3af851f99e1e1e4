"""Decides what is kept of a request: shortens addresses, replaces secrets, takes names away."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from ipaddress import ip_address
from typing import Any, Literal
from urllib.parse import urlsplit

from flask_usage_metrics.enrich.privacy.pseudonyms import Pseudonyms
from flask_usage_metrics.enrich.privacy.redaction import Redactor
from flask_usage_metrics.enrich.privacy.secrets import REDACTED, SecretFinder
from flask_usage_metrics.enrich.privacy.structure import holds_userinfo

Preset = Literal["full", "balanced", "strict"]

PRESETS = ("full", "balanced", "strict")
"""From keeping what flask-track-usage kept to keeping nothing that identifies anybody."""

REFUSALS = ("HTTP_SEC_GPC", "HTTP_DNT")
"""WSGI names of the headers by which a visitor asks not to be known, being ``"1"``: Global Privacy
Control (W3C) and its predecessor, Tracking Preference Expression."""

_KEPT_BITS = {4: 24, 6: 48}
"""Leading bits of an address that `balanced` keeps, by the version of IP."""

_MAX_HEADER = 512

_CUTS = (2048, 4096)
"""Lengths that texts are cut to, in the capture and by the enricher."""

Values = dict[str, Any]
"""JSON values by name."""


class Policy:
    """Decides what is kept of a request, before anything else has it.

    Everything downstream (storages, metrics, spans) sees only what it returns. Country and visitor
    are found first; both need the whole address.

    Args:
        preset: How much is kept, one of `PRESETS`.
        redact: Parts of names whose values are secret, besides the usual ones; see `SecretFinder`.
        respects_refusals: Whether records of visitors who send one of `REFUSALS` are nameless.
        pseudonyms: Makes the pseudonyms that replace user names with ``"balanced"``.

    Attributes:
        headers: `REFUSALS` if they are respected, else empty.
        keeps_visitors: Whether records may tell visitors apart.
        is_nameless: Whether all records are nameless: without address, X-Forwarded-For, visitor,
            user name and user agent. Those of visitors who refuse are, too.
    """

    def __init__(
        self,
        preset: Preset,
        redact: Sequence[str],
        *,
        respects_refusals: bool,
        pseudonyms: Pseudonyms,
    ) -> None:
        self.headers = REFUSALS if respects_refusals else ()
        self.is_nameless = preset == "strict"
        self.keeps_visitors = not self.is_nameless
        self._is_full = preset == "full"
        self._secrets = SecretFinder(redact, emails=not self._is_full)
        self._redactor = Redactor(self._secrets)
        self._pseudonyms = pseudonyms

    def target(
        self, path: str, query: str, rule: str | None, arguments: Values | None
    ) -> tuple[str, str, Values | None]:
        """Return what is kept of the path, of the query string and of the view's arguments.

        Args:
            path: Below the app's root; the last segment is not kept of one that may be cut.
            query: As it came; the last pair is not kept of one that may be cut.
            rule: The URL rule; None when no route matched.
            arguments: JSON values.
        """
        if self.is_nameless:
            return rule or "", "", None if arguments is None else {}
        redactor = self._redactor
        path, query = _uncut(path, "/"), _uncut(query, "&")
        values = redactor.values(arguments) if arguments else arguments
        # Most requests hold no secret argument: their path need not be aligned with its rule.
        if values is not arguments or (rule is not None and redactor.is_secret_rule(rule)):
            path = redactor.path(path, rule, arguments)
        else:
            path = redactor.path(path)
        return path, redactor.query(query) if self._is_full else "", values

    def campaign_query(self, query: str) -> str:
        """Return the query string that the campaign is taken from; ``""`` if none is kept.

        Args:
            query: As in `target`.
        """
        return "" if self.is_nameless else self._redactor.query(_uncut(query, "&"))

    def address(self, address: str | None) -> str | None:
        """Return what is kept of an address."""
        if self.is_nameless:
            return None
        return address if self._is_full else shorten(address)

    def header(self, text: str) -> str | None:
        """Return what is kept of X-Forwarded-For, or of the user agent; at most 512 characters."""
        if not text or not self._is_full:
            return None
        # Not by shape: user agents name many versions and builds.
        if holds_userinfo(text) or self._secrets.names_secret(text):
            return REDACTED
        return text[:_MAX_HEADER]

    def host(self, host: str) -> str:
        """Return what is kept of a Host header: not the userinfo that it must not have."""
        return host.rpartition("@")[2]

    def root_path(self, path: str) -> str:
        """Return what is kept of the prefix the app is mounted under."""
        return self._redactor.path(path)

    def ip_info(self, info: Values) -> Values | None:
        """Return what is kept of what an HTTP country service answered."""
        return info if self._is_full else None

    def referrer(self, url: str) -> str | None:
        """Return what is kept of a Referer header."""
        if self.is_nameless:
            return None
        if self._is_full:
            return self._redactor.url(_uncut(url, "/")) or None
        host = _host(url)
        return None if host is None or self._secrets.is_secret_text(host) else host

    def username(self, name: str) -> str | None:
        """Return what is kept of a user's name."""
        return name if self._is_full else self._pseudonyms.of(name)

    def consumer(self, name: str) -> str:
        """Return what is kept of an API client's name."""
        # The app may have named the key, in place of its owner.
        return REDACTED if self._secrets.is_secret_text(name) else name

    def variables(self, values: Values) -> Values:
        """Return what is kept of ``g.track_var``."""
        return {} if self.is_nameless else self._redactor.variables(values)


@lru_cache(8192)
def shorten(address: str | None) -> str | None:
    """Return the network of an address: /24 of IPv4, /48 of IPv6, which many people share."""
    if address is None:
        return None
    parsed = ip_address(address)
    gone = parsed.max_prefixlen - _KEPT_BITS[parsed.version]
    kept = int(parsed) >> gone << gone
    # By its own class: a small number of an IPv6 address would be taken for IPv4.
    return str(type(parsed)(kept))


def _uncut(text: str, between: str) -> str:
    """Return a text without its last part if it may have been cut there.

    What is left of a secret would not be known as one: half a token, or a password without its @.
    """
    if len(text) not in _CUTS:
        return text
    kept, separator, _ = text.rpartition(between)
    return f"{kept}{separator}{REDACTED}"


def _host(url: str) -> str | None:
    """Return the host of a referrer; None if it names none."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
