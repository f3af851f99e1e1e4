"""What is kept of a request: addresses shortened, secrets replaced, names taken away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from ipaddress import ip_address
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from flask_usage_metrics.pseudonyms import Pseudonyms
from flask_usage_metrics.record import UsageRecord
from flask_usage_metrics.redaction import REDACTED, Redactor

Preset = Literal["full", "balanced", "strict"]

PRESETS = ("full", "balanced", "strict")
"""From what flask-track-usage kept to what identifies nobody."""

REFUSALS = ("HTTP_SEC_GPC", "HTTP_DNT")
"""WSGI names of the headers by which a visitor asks not to be known, being ``"1"``: Global Privacy
Control (W3C) and its predecessor, Tracking Preference Expression."""

_OPTED_OUT = {
    "remote_addr": None,
    "forwarded_for": None,
    "ip_info": None,
    "visitor": None,
    "username": None,
    "user_agent": None,
}

_KEPT_BITS = {4: 24, 6: 48}
"""What `balanced` keeps of an address, by the version of IP."""

Changes = dict[str, Any]


class Policy:
    """Cleans records before anybody else has them: what they are sent to, counted by, shown in.

    Country and visitor are known by then; both need the whole address.

    Args:
        preset: How much is kept.
        redact: Parts of names whose values are secret, besides the usual ones.
        respects_refusals: Whether visitors who send one of `REFUSALS` are kept without address,
            visitor, user name and user agent.
        pseudonyms: What user names become with ``"balanced"``.

    Attributes:
        headers: WSGI names of the headers that `is_refused` is to be given.
        keeps_visitors: Whether records may tell visitors apart.
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
        self.keeps_visitors = preset != "strict"
        self._redactor = Redactor(redact, emails=preset != "full")
        self._pseudonyms = pseudonyms
        presets: dict[str, Callable[[UsageRecord], Changes]] = {
            "full": self._full,
            "balanced": self._balanced,
            "strict": self._strict,
        }
        self._changes = presets[preset]

    @staticmethod
    def is_refused(headers: Sequence[str]) -> bool:
        """Tell whether a visitor asks not to be known, by the values of `headers`."""
        return "1" in headers

    def clean(self, record: UsageRecord, *, refused: bool) -> UsageRecord:
        """Return what is kept of a record.

        Args:
            record: What is known of a request.
            refused: Whether the visitor asks not to be known.
        """
        changes = self._changes(record)
        if refused:
            changes.update(_OPTED_OUT)
        return msgspec.structs.replace(record, **changes) if changes else record

    # ------------------------------------------------------------------------ the presets

    def _full(self, record: UsageRecord) -> Changes:
        changes: Changes = self._redacted(record)
        if record.query:
            query = self._redactor.query(record.query)
            if query != record.query:
                changes["query"] = query
        if record.referrer is not None:
            referrer = self._redactor.url(record.referrer) or None
            if referrer != record.referrer:
                changes["referrer"] = referrer
        return changes

    def _balanced(self, record: UsageRecord) -> Changes:
        changes = self._redacted(record)
        changes.update(
            query="",
            remote_addr=shorten(record.remote_addr),
            forwarded_for=None,
            ip_info=None,
            user_agent=None,
            referrer=_host(record.referrer),
        )
        if record.username is not None:
            changes["username"] = self._pseudonyms.of(record.username)
        return changes

    def _strict(self, record: UsageRecord) -> Changes:
        return {
            **self._redacted(record),
            **_OPTED_OUT,
            "path": record.rule or "",
            "query": "",
            "view_args": None if record.view_args is None else {},
            "referrer": None,
            "track_var": {},
        }

    def _redacted(self, record: UsageRecord) -> Changes:
        """Replace secrets in the path, the view's arguments and ``g.track_var``."""
        changes: Changes = {}
        if record.consumer is not None and self._redactor.is_secret_text(record.consumer):
            changes["consumer"] = REDACTED  # the app named the key, in place of its owner
        redactor, arguments, rule = self._redactor, record.view_args, record.rule
        values = redactor.values(arguments) if arguments else arguments
        if values is not arguments:
            changes["view_args"] = values
        # Most requests have nothing of the kind, and need not be aligned with their rule.
        if values is not arguments or (rule is not None and redactor.is_secret_rule(rule)):
            path = redactor.path(record.path, rule, arguments)
        else:
            path = redactor.path(record.path)
        if path != record.path:
            changes["path"] = path
        if record.track_var:
            variables = self._redactor.variables(record.track_var)
            if variables is not record.track_var:
                changes["track_var"] = variables
        return changes


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


def _host(url: str | None) -> str | None:
    """Return the host of a referrer; None if it names none."""
    if url is None:
        return None
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
