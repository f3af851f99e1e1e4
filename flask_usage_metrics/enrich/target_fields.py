"""The target of a request -> fields of its record: method, host, path, query, rule, campaign."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import msgspec

from flask_usage_metrics.enrich.campaigns import CampaignFields, campaign_of
from flask_usage_metrics.enrich.cleaning import (
    encode,
    json_object,
    label,
    wsgi_path,
    wsgi_query,
    wsgi_text,
)
from flask_usage_metrics.enrich.privacy.policy import Policy
from flask_usage_metrics.records.observation import ENVIRON_KEYS
from flask_usage_metrics.runtime.caches import TwoGenerationCache

TARGET = slice(ENVIRON_KEYS.index("REMOTE_ADDR"))
"""The texts of an observation's environ from which a target is made."""

TargetKey = tuple[tuple[str, ...], str | None, str | None, bytes | None]
"""The texts of `TARGET`, endpoint, rule, and the view's arguments as JSON."""

TargetFields = tuple[
    str, str, str, str, str, str, str, str | None, str | None, str | None
]  # fmt: skip
"""The fields of a record from `method` to `blueprint`, in its order."""


class Target(msgspec.Struct, frozen=True, gc=False):
    """The target of a request, as records keep it: the same for all requests for it.

    Attributes:
        asked_host: The host as it came, before it was cleaned and cut.
        fields: Fields of the record.
        view_args: JSON values; None when no route matched.
        nested: The same as JSON, if they are not all plain values: a copy would share some.
        campaign: Further fields of the record.
    """

    asked_host: str
    fields: TargetFields
    view_args: dict[str, Any] | None
    nested: bytes | None
    campaign: CampaignFields


class Targets(TwoGenerationCache[TargetKey, Target]):
    """A cache of targets by their texts in the environ: many requests have the same.

    Args:
        policy: What is kept.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__(self._target, _characters)
        self._policy = policy

    def _target(self, key: TargetKey) -> Target:
        (method, scheme, host, root_path, path, query, protocol), endpoint, rule, arguments = key
        endpoint, rule = label(endpoint), label(rule)
        view_args: dict[str, Any] | None = None if endpoint is None else {}
        if arguments is not None:
            view_args = json_object(arguments)
        query = wsgi_query(query, 4096)
        campaign = campaign_of(self._policy.campaign_query(query) if query else "")
        path, query, view_args = self._policy.target(wsgi_path(path, 2048), query, rule, view_args)
        fields = (
            # As Flask answers it: to "get" as to GET.
            wsgi_text(method, 32).upper()[:32],
            wsgi_text(scheme, 8),
            self._policy.host(wsgi_text(host, 255)),
            self._policy.root_path(wsgi_path(root_path, 1024).rstrip("/")),
            path,
            query,
            wsgi_text(protocol, 16),
            endpoint,
            rule,
            blueprint_of(endpoint),
        )
        nested = None if _is_flat(view_args) else encode(view_args)
        return Target(host, fields, view_args, nested, campaign)


@lru_cache(4096)
def blueprint_of(endpoint: str | None) -> str | None:
    """Return the blueprint of an endpoint, dotted when nested; None if it is in none."""
    if endpoint is None or "." not in endpoint:
        return None
    return label(endpoint.rpartition(".")[0])


def _characters(key: TargetKey) -> int:
    return len("".join(key[0])) + len(key[3] or b"")


def _is_flat(values: dict[str, Any] | None) -> bool:
    """Tell whether no value is a dict or list: a shallow copy then shares nothing."""
    return values is None or not any(isinstance(value, dict | list) for value in values.values())
