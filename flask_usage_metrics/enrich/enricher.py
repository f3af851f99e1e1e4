"""An Observation -> the UsageRecord: texts cleaned; country, client and visitor found; privacy."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import msgspec

from flask_usage_metrics.enrich.caller_fields import CALLER, Callers, nameless, prefetching
from flask_usage_metrics.enrich.cleaning import (
    MAX_INT,
    app_text,
    decode,
    json_object,
    label,
    queue_seconds,
    wsgi_text,
)
from flask_usage_metrics.enrich.clients.own_kinds import OwnKinds
from flask_usage_metrics.enrich.country import CountryLookup
from flask_usage_metrics.enrich.privacy.policy import Policy
from flask_usage_metrics.enrich.target_fields import TARGET, Targets
from flask_usage_metrics.enrich.trusted_proxies import TrustedProxies
from flask_usage_metrics.enrich.visitors.daily_ids import VisitorIds
from flask_usage_metrics.records.ids import NUMBER_BITS, record_ids
from flask_usage_metrics.records.observation import ENVIRON_KEYS, Observation, Origin
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.runtime.caches import TwoGenerationCache
from flask_usage_metrics.runtime.forks import FORKS

_LATEST = 253_402_300_799.0  # the last second of the year 9999, the last one that datetime has

# Positions in an observation's environ.
_TEXTS = len(ENVIRON_KEYS)
_USER_AGENT = ENVIRON_KEYS.index("HTTP_USER_AGENT")
_REFERRER = ENVIRON_KEYS.index("HTTP_REFERER")
_REQUEST_START = ENVIRON_KEYS.index("HTTP_X_REQUEST_START")


class Enricher:
    """Makes records of one app's observations; for one caller at a time.

    It owns the country lookup and the visitors' ids: `close` ends their threads and keys.

    Targets, callers and referrers repeat: what is made of their texts is remembered.

    Args:
        app: Name of the app.
        key: Name of the app that no other on the same registry has; the same in all processes.
        country_lookup: Where countries are looked up.
        trusted: The proxies whose X-Forwarded-For is believed.
        visitors: Tells visitors without a cookie apart; destroys the keys of past days.
        identifies: Whether records get these ids; if False only old keys are destroyed.
        policy: What is kept.
        own_kinds: What the app's owner calls clients.

    Attributes:
        headers: WSGI names of the headers that observations hold after those of `ENVIRON_KEYS`.
        origin: Origin of what this process captures.
        country_now: As `Callers.country_now`.
    """

    def __init__(
        self,
        app: str,
        key: str,
        *,
        country_lookup: CountryLookup,
        trusted: TrustedProxies,
        visitors: VisitorIds,
        identifies: bool,
        policy: Policy,
        own_kinds: OwnKinds,
    ) -> None:
        self._app = app_text(app)[:128]
        self._key = key
        self._country_lookup = country_lookup
        self._visitors = visitors
        self._identifies = identifies
        self._policy = policy
        self.headers = (*country_lookup.headers, *policy.headers)
        self._sources = len(country_lookup.headers)
        self._targets = Targets(policy)
        self._callers = Callers(country_lookup, trusted, policy, own_kinds)
        self.country_now = self._callers.country_now
        self._referrers: TwoGenerationCache[str, str | None] = TwoGenerationCache(
            self._referrer, len
        )
        self._take_identity()
        FORKS.register(self)

    def _take_identity(self) -> None:
        self.origin = Origin(
            app=self._key,
            process=app_text(f"{socket.gethostname()}:{os.getpid()}")[:128],
            nonce=secrets.randbits(NUMBER_BITS),
            headers=self.headers,
        )

    def stamps(
        self, seen: Sequence[Observation], numbers: Sequence[int]
    ) -> Iterator[tuple[str, datetime]]:
        """Yield the id and the start time of the record of each observation.

        Args:
            seen: The observations.
            numbers: For each the nonce of its origin plus its sequence number in the journal.
        """
        started_ns = [one.started_ns for one in seen]
        return zip(record_ids(started_ns, numbers), _moments(started_ns), strict=True)

    def enrich(
        self, seen: Observation, origin: Origin, record_id: str, started_at: datetime
    ) -> UsageRecord | None:
        """Return the record of an observation; None while its country is being asked for.

        Args:
            seen: The observation.
            origin: Of the process that captured it, which may have been another one.
            record_id: As `stamps` yields it.
            started_at: As `stamps` yields it.

        Raises:
            Exception: No record can be made of this observation; the next one is not affected.
        """
        texts = seen.environ
        extras = seen.extras
        caller = self._callers[texts[CALLER], None if extras is None else extras.peer]
        headers = self._headers(texts, origin) if self.headers else ()
        answer = caller.answer
        if answer is None:
            located_by = headers[: self._sources]
            answer = self._country_lookup.locate(caller.address, located_by, caller.is_trusted)
            if answer is None:
                return None
        target = self._targets[texts[TARGET], seen.endpoint, seen.rule, seen.view_args]
        view_args = target.view_args
        if view_args is not None:
            view_args = view_args.copy() if target.nested is None else decode(target.nested)
        policy = self._policy
        visitor = username = ip_info = referrer = exception = trace_id = span_id = None
        consumer = parent_span_id = received = first_byte_seconds = None
        authorization = False
        track_var: dict[str, Any] = {}
        if extras is not None:
            authorization, visitor, username = (
                extras.authorization,
                extras.visitor,
                extras.username,
            )
            if extras.exception is not None:
                exception = label(extras.exception)
            if extras.track_var is not None:
                track_var = policy.variables(json_object(extras.track_var))
            if extras.consumer is not None:
                consumer = policy.consumer(app_text(extras.consumer))
            if extras.trace is not None:
                trace = extras.trace
                trace_id, span_id = trace.trace_id, trace.span_id
                parent_span_id = trace.parent_span_id
            if caller.is_called_program:
                visitor = None  # nobody knew when it was given the cookie
            received = extras.bytes_received
            if extras.is_prefetch:
                caller = prefetching(caller)
            if extras.first_byte_ns is not None:
                first_byte_seconds = extras.first_byte_ns / 1e9
        if headers and "1" in headers[self._sources :]:
            visitor = username = None
            caller = nameless(caller)
        elif policy.is_nameless:
            visitor = username = None
        else:
            if caller.is_prefetching:
                visitor = None
            elif visitor is None and self._identifies:
                agent = texts[_USER_AGENT]
                if "\n" in agent:
                    agent = agent.partition("\n")[0]
                visitor = self._visitors.identify(
                    seen.started_ns / 1e9, caller.address, agent, target.asked_host
                )
            if username is not None:
                username = policy.username(app_text(username))
            if answer.ip_info is not None:
                ip_info = policy.ip_info(answer.ip_info)
        if texts[_REFERRER]:
            referrer = self._referrers[texts[_REFERRER]]
        queued = texts[_REQUEST_START]
        # By position, in the order of the fields: see "Enrichment" in tests/benchmarks/README.md.
        return UsageRecord(
            record_id,
            started_at,
            seen.duration_ns / 1e9,
            *target.fields,
            view_args,
            seen.status,
            exception,
            seen.bytes_sent if seen.bytes_sent <= MAX_INT else MAX_INT,
            received,
            caller.remote_addr,
            caller.forwarded_for,
            answer.country,
            ip_info,
            *caller.client_fields,
            referrer,
            authorization,
            username,
            visitor,
            track_var,
            trace_id,
            span_id,
            queue_seconds(queued, seen.started_ns) if queued and caller.is_trusted else None,
            self._app,
            origin.process,
            consumer,
            parent_span_id,
            first_byte_seconds,
            *target.campaign,
        )

    def _headers(self, texts: tuple[str, ...], origin: Origin) -> tuple[str, ...]:
        """Return the values of `headers` in an observation, in that order; ``""`` if absent."""
        headers = texts[_TEXTS:]
        if origin.headers == self.headers:
            return headers
        # That process had other settings.
        named: dict[str, str] = dict(zip(origin.headers, headers, strict=False))
        return tuple([named.get(name, "") for name in self.headers])

    # ------------------------------------------------------------------------ life of the parts

    def reset_after_fork(self) -> None:
        """Take an identity of its own in a forked child."""
        self._take_identity()

    def maintain(self) -> None:
        """Destroy the keys of visitors that are due, here and on disk; it never raises."""
        self._visitors.maintain()

    def due_in(self) -> float | None:
        """Return in how many seconds `maintain` has something to do, >= 0; None: it never has."""
        return self._visitors.due_in()

    def wait(self, timeout: float) -> None:
        """Block until the country of some observation may be known; see `CountryLookup.wait`.

        Args:
            timeout: Seconds, at most. It returns at once when no country is being asked for.
        """
        self._country_lookup.wait(timeout)

    def wait_local(self, timeout: float) -> None:
        """Block until no country function of the app is being asked; not for HTTP services.

        Args:
            timeout: Seconds, at most.
        """
        self._country_lookup.wait_local(timeout)

    def close(self) -> None:
        """End the threads and forget the keys; the next observation brings them back.

        Blocks at most a second for each blocking country source that is at work.
        """
        self._country_lookup.close()
        self._visitors.close()

    # ------------------------------------------------------------------------ what is remembered

    def _referrer(self, text: str) -> str | None:
        return self._policy.referrer(wsgi_text(text, 2048)) or None


def _moments(started_ns: Sequence[int]) -> list[datetime]:
    """Return moments in nanoseconds since the epoch as UTC datetimes, cut to microseconds."""
    # By a converter in C: see "Enrichment" in tests/benchmarks/README.md.
    seconds = [moment // 1000 / 1e6 for moment in started_ns]
    if seconds and not 0 <= min(seconds) <= max(seconds) <= _LATEST:  # the clock is far off
        seconds = [min(max(moment, 0.0), _LATEST) for moment in seconds]
    return msgspec.convert(seconds, list[datetime], strict=False)
