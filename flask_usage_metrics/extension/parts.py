"""Makers of the parts that depend on the settings of an app; `wiring` puts them together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence, Set
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flask import Flask

from flask_usage_metrics.capture.prefetch import is_prefetch
from flask_usage_metrics.capture.visitor_cookie import VisitorCookie
from flask_usage_metrics.enrich import clients
from flask_usage_metrics.enrich.enricher import Enricher
from flask_usage_metrics.enrich.privacy.policy import Policy
from flask_usage_metrics.enrich.privacy.pseudonyms import Pseudonyms
from flask_usage_metrics.enrich.target_fields import blueprint_of
from flask_usage_metrics.enrich.visitors.daily_ids import VisitorIds
from flask_usage_metrics.enrich.visitors.tally import VisitorTally
from flask_usage_metrics.errors import ConfigError
from flask_usage_metrics.extension.settings import Settings
from flask_usage_metrics.metrics.totals import Totals
from flask_usage_metrics.pipeline.delivery.sink import Accepts, Sink
from flask_usage_metrics.pipeline.processing import METRICS_SINK
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.key_files import find_key, make_key
from flask_usage_metrics.runtime.passing import is_passing
from flask_usage_metrics.runtime.private_files import StateUnavailable
from flask_usage_metrics.runtime.state_dir import StateDir, default_place
from flask_usage_metrics.storage import Storage, Writer, as_writer

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from flask_usage_metrics.traces.conventions import Attributes
    from flask_usage_metrics.traces.live import Tracing

PSEUDONYMS = "pseudonyms.key"

logger = logging.getLogger("flask_usage_metrics")


def load_tables(faults: Faults) -> None:
    """Read what tells clients apart, before a request needs it; the first app of a process does.

    Raises:
        Exception: The package is not whole.
    """
    try:
        clients.load()
    except Exception as error:
        if not is_passing(error):
            raise
        faults.report("enrichment", error, "it is tried again with the first requests")


def make_writers(given: Any, settings: Settings, app: Flask) -> list[Writer]:
    """Return the storages that were meant.

    Raises:
        ConfigError: It is not understood, or a driver is missing.
    """
    where = "storage"
    if given is None:
        given, where = settings.storage, "TRACK_USAGE_STORAGE"
    if given is None:
        given = f"sqlite:///{Path(app.instance_path, 'usage.sqlite3').as_posix()}"
    items = given if isinstance(given, list | tuple) else [given]
    writers = [as_writer(item, where) for item in items]
    for writer in writers:
        writer.bind_app(app)
    return writers


def configure_storages(
    writers: Sequence[Writer],
    settings: Settings,
    pseudonyms: Pseudonyms,
    methods: Callable[[], Set[str]],
) -> None:
    """Configure the storages that can be read by the settings of this app."""
    for writer in writers:
        if isinstance(writer, Storage):
            # No method, whose name a subclass of the app's might have for something else.
            writer.bounds = settings.shape.buckets
            writer.is_of_app = True
            writer.pseudonyms = pseudonyms.all
            writer.known_methods = methods


def make_sinks(
    writers: Sequence[Writer],
    traces: Traces | None,
    totals: Totals,
    settings: Settings,
    *,
    idle_seconds: float,
    faults: Faults,
) -> list[Sink]:
    """Return a sink for each storage and one for the traces, with names that no other has."""
    days = settings.retention_days
    keep = None if days is None else timedelta(days=days)
    names = {METRICS_SINK}
    sinks = []
    targets: list[tuple[Writer, Accepts | None]] = [(writer, None) for writer in writers]
    if traces is not None:
        targets.append((traces.writer, traces.accepts))
    for writer, accepts in targets:
        name, number = writer.name, 1
        while name in names:
            number += 1
            name = f"{writer.name}-{number}"
        names.add(name)
        sinks.append(
            Sink(
                writer,
                totals.sink_counters(name),
                capacity=settings.buffer_records,
                # Longer than the worker, so that there is a thread for what it brings.
                idle_seconds=2 * idle_seconds + settings.flush_seconds,
                faults=faults,
                keep=keep,
                accepts=accepts,
            )
        )
    return sinks


def make_state_dir(app: Flask, settings: Settings) -> StateDir:
    """Return where the app's processes keep what they share."""
    name = f"{app.name} {app.import_name} {app.root_path}"
    if settings.state_dir is None:
        return StateDir([default_place(Path(app.instance_path))], name, or_temporary=True)
    return StateDir([Path(settings.state_dir)], name)


class Visitors(NamedTuple):
    """The parts that tell visitors apart, by hash and by cookie, and that count them.

    Attributes:
        ids: Hashes visitors; destroys the keys of past days, also of those when it was asked to
            hash and now is not.
        identifies: Whether visitors are told apart by hash now.
    """

    ids: VisitorIds
    identifies: bool = False
    cookie: VisitorCookie | None = None
    tally: VisitorTally | None = None


def make_visitors(
    settings: Settings, policy: Policy, totals: Totals, key: str, faults: Faults
) -> Visitors:
    """Return the parts that have to do with visitors."""
    ids = VisitorIds(totals.state, key, faults)
    if not (settings.cookie or settings.daily_visitors):
        return Visitors(ids)
    if not policy.keeps_visitors:
        logger.warning("TRACK_USAGE_PRIVACY = 'strict' keeps no visitors: they are not told apart")
        return Visitors(ids)
    return Visitors(
        ids,
        settings.daily_visitors,
        VisitorCookie(policy.headers) if settings.cookie else None,
        VisitorTally(totals.state, key, faults),
    )


def warn_of_empty_labels(settings: Settings, policy: Policy) -> None:
    """Say so if labels are asked for whose values are not kept."""
    if settings.shape.labels and policy.is_nameless:
        logger.warning(
            "TRACK_USAGE_PRIVACY = 'strict' keeps no g.track_var: TRACK_USAGE_LABELS are empty"
        )


def make_pseudonyms(app: Flask, totals: Totals, faults: Faults) -> Pseudonyms:
    """Return the maker of the pseudonyms that replace user names."""
    config = app.config  # rather than the app, which may be dropped before all is written

    def keys() -> list[bytes]:
        given = [config.get("SECRET_KEY"), *(config.get("SECRET_KEY_FALLBACKS") or ())]
        keys = [key.encode() if isinstance(key, str) else bytes(key) for key in given if key]
        if keys or totals.state is None:
            return keys
        try:
            files = [home / PSEUDONYMS for home in totals.state.homes()]
            return [find_key(files) or make_key(totals.state.home() / PSEUDONYMS)]
        except (OSError, StateUnavailable) as error:
            faults.report("pseudonyms", error, "no user names are kept")
            return []

    return Pseudonyms(keys)


class Traces(NamedTuple):
    """The parts that start spans of one app's requests, and end and export them.

    Attributes:
        accepts: Tells which requests have a span that `writer` has to end.
    """

    tracing: Tracing
    writer: Writer
    accepts: Accepts


def make_traces(
    app: Flask,
    settings: Settings,
    provider: Any,
    enricher: Enricher,
    *,
    version: str,
    faults: Faults,
) -> Traces | None:
    """Return the parts that trace requests; None if they are not to be traced.

    Raises:
        ConfigError: OpenTelemetry is not installed, or what was given is no provider.
    """
    if not settings.traces and provider is None:
        return None
    try:
        # Imported here: most apps have no traces, and OpenTelemetry is slow to import.
        from flask_usage_metrics.traces.conventions import hints_of
        from flask_usage_metrics.traces.export import TraceExport
        from flask_usage_metrics.traces.live import LiveSpans, Tracing
        from flask_usage_metrics.traces.writer import SpanWriter, has_own_span
    except ImportError:
        raise ConfigError(
            "opentelemetry is not installed: pip install 'flask-usage-metrics[otlp]'"
        ) from None
    if provider is not None and not hasattr(provider, "get_tracer"):
        raise ConfigError(
            f"tracer_provider must be a TracerProvider or None, not {type(provider).__name__}"
        )
    given = None if isinstance(settings.traces, bool) else settings.traces
    export = TraceExport(provider, given, app.name)
    live = LiveSpans(settings.buffer_records)

    def hints(environ: WSGIEnvironment, endpoint: str | None) -> Attributes:
        client = clients.kind(environ.get("HTTP_USER_AGENT", ""))
        if client == clients.PERSON and is_prefetch(environ):
            client = clients.PREFETCH
        return hints_of(endpoint, blueprint_of(endpoint), client, enricher.country_now(environ))

    tracing = Tracing(
        app,
        export.provider,
        live=live,
        hints=hints,
        skip=settings.metrics_path,
        version=version,
        faults=faults,
    )
    writer = SpanWriter(export, live, user=settings.traces_enduser, version=version)
    return Traces(tracing, writer, has_own_span)
