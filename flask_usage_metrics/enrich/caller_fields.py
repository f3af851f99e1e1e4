"""The caller of a request -> fields of its record: address, X-Forwarded-For, browser, language."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from flask_usage_metrics.enrich import clients
from flask_usage_metrics.enrich.cleaning import wsgi_text
from flask_usage_metrics.enrich.clients.own_kinds import OwnKinds
from flask_usage_metrics.enrich.country import Answer, CountryLookup
from flask_usage_metrics.enrich.privacy.policy import Policy
from flask_usage_metrics.enrich.trusted_proxies import TrustedProxies
from flask_usage_metrics.records.address import normalise
from flask_usage_metrics.records.observation import ENVIRON_KEYS
from flask_usage_metrics.runtime.caches import TwoGenerationCache

CALLER = slice(ENVIRON_KEYS.index("REMOTE_ADDR"), ENVIRON_KEYS.index("HTTP_REFERER"))
"""The texts of an observation's environ from which a caller is made."""

CallerKey = tuple[tuple[str, ...], str | None]
"""The texts of `CALLER`, and the address of the peer where ProxyFix replaced it."""

ClientFields = tuple[str | None, str | None, str | None, str | None, str | None, str]
"""The fields of a record from `user_agent` to `client`, in its order."""


class Caller(msgspec.Struct, frozen=True, gc=False):
    """The client behind a request, as records keep it: the same for all its requests.

    Attributes:
        address: The whole address, normalised; None if not known. Records keep `remote_addr`.
        is_trusted: Whether a trusted proxy sent the request.
        answer: The country, if it never changes for the address; else None.
        remote_addr: Field of the record.
        forwarded_for: Field of the record.
        client_fields: Fields of the record.
        is_called_program: Whether the app's owner says that it is a program.
        is_prefetching: Whether a person's browser fetched what nobody asked for yet.
    """

    address: str | None
    is_trusted: bool
    answer: Answer | None
    remote_addr: str | None
    forwarded_for: str | None
    client_fields: ClientFields
    is_called_program: bool = False
    is_prefetching: bool = False


class Callers(TwoGenerationCache[CallerKey, Caller]):
    """A cache of callers by their texts in the environ: one client sends many requests.

    Args:
        country_lookup: Where countries are looked up.
        trusted: The proxies whose X-Forwarded-For is believed.
        policy: What is kept.
        own_kinds: What the app's owner calls clients.
    """

    def __init__(
        self,
        country_lookup: CountryLookup,
        trusted: TrustedProxies,
        policy: Policy,
        own_kinds: OwnKinds,
    ) -> None:
        super().__init__(self._caller, _characters)
        self._country_lookup = country_lookup
        self._trusted = trusted
        self._policy = policy
        self._own_kinds = own_kinds

    def country_now(self, environ: Mapping[str, Any]) -> str | None:
        """Return the country of a request under way, if it is known at once; for any thread.

        Args:
            environ: Of the request (WSGI).
        """
        proxied = environ.get("werkzeug.proxy_fix.orig")
        address, is_trusted = self._whence(
            str(environ.get("REMOTE_ADDR") or ""),
            str(environ.get("HTTP_X_FORWARDED_FOR", "")),
            None if proxied is None else str(proxied.get("REMOTE_ADDR") or ""),
        )
        headers = tuple([str(environ.get(name, "")) for name in self._country_lookup.headers])
        return self._country_lookup.locate_now(address, headers, is_trusted)

    def _caller(self, key: CallerKey) -> Caller:
        (remote_addr, forwarded_for, agent, language), peer = key
        user_agent, _, hints = agent.partition("\n")
        brands, _, platform = hints.partition("\n")
        address, is_trusted = self._whence(remote_addr, forwarded_for, peer)
        policy, country_lookup = self._policy, self._country_lookup
        own = self._own_kinds.kind_of(user_agent)
        client = clients.describe(user_agent, brands, platform, own)
        return Caller(
            address,
            is_trusted,
            country_lookup.locate(address, (), is_trusted) if country_lookup.is_static else None,
            policy.address(address),
            policy.header(wsgi_text(forwarded_for, 2048)),
            (
                policy.header(wsgi_text(user_agent, 2048)),
                client.browser,
                client.version,
                client.platform,
                clients.language(language),
                client.kind,
            ),
            own not in (None, clients.PERSON),
        )

    def _whence(
        self, remote_addr: str, forwarded_for: str, proxied: str | None
    ) -> tuple[str | None, bool]:
        """Return the client's address, and whether a trusted proxy sent the request."""
        trusted = self._trusted
        if proxied is not None:
            # ProxyFix has replaced the address: it has read the header already.
            return normalise(remote_addr), trusted.trusts(proxied)
        return trusted.client(remote_addr, forwarded_for), trusted.trusts(remote_addr)


def nameless(caller: Caller) -> Caller:
    """Return a caller who does not want to be known: without addresses and user agent."""
    return msgspec.structs.replace(
        caller,
        remote_addr=None,
        forwarded_for=None,
        client_fields=(None, *caller.client_fields[1:]),
    )


def prefetching(caller: Caller) -> Caller:
    """Return a person as one whose browser fetches of itself; a program as it is."""
    *others, client = caller.client_fields
    if client != clients.PERSON:
        return caller
    return msgspec.structs.replace(
        caller, client_fields=(*others, clients.PREFETCH), is_prefetching=True
    )


def _characters(key: CallerKey) -> int:
    return len("".join(key[0]))
