"""Puts the parts of one app together; the only module that knows every room."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Set
from typing import Any, NamedTuple

from flask import Flask, Response, request
from prometheus_client import CollectorRegistry

from flask_usage_metrics.capture import track_var
from flask_usage_metrics.capture.bypass import Bypass
from flask_usage_metrics.capture.context import ContextReader
from flask_usage_metrics.capture.middleware import Middleware
from flask_usage_metrics.capture.observer import LiveExchanges, Observer
from flask_usage_metrics.capture.scope import Marks, Scope
from flask_usage_metrics.capture.scrapes import Scrapes
from flask_usage_metrics.capture.users import Users
from flask_usage_metrics.enrich.country import make_country_lookup
from flask_usage_metrics.enrich.enricher import Enricher
from flask_usage_metrics.enrich.privacy.policy import Policy
from flask_usage_metrics.errors import ConfigError
from flask_usage_metrics.extension.methods import methods_of
from flask_usage_metrics.extension.parts import (
    configure_storages,
    load_tables,
    make_pseudonyms,
    make_sinks,
    make_state_dir,
    make_traces,
    make_visitors,
    make_writers,
    warn_of_empty_labels,
)
from flask_usage_metrics.extension.settings import read
from flask_usage_metrics.extension.tracking import Tracking, keep, package_version
from flask_usage_metrics.metrics.exposition.collector import collector_of
from flask_usage_metrics.metrics.exposition.view import Exposition
from flask_usage_metrics.metrics.totals import Totals
from flask_usage_metrics.pipeline.journal import Journal
from flask_usage_metrics.pipeline.pipeline import Pipeline
from flask_usage_metrics.pipeline.processing import Processor
from flask_usage_metrics.pipeline.worker_group import WorkerGroup
from flask_usage_metrics.runtime.collected import OWNERS
from flask_usage_metrics.runtime.faults import Faults

METRICS_ENDPOINT = "track_usage_metrics"

IDLE_SECONDS = 60.0
"""Time without work after which a thread of ours ends; the next request starts it again."""

_EXIT_SECONDS = 5.0


class Given(NamedTuple):
    """Arguments of `TrackUsage` that hold for each of its apps, and the views it marked."""

    registry: CollectorRegistry
    country: Callable[[str], str | None] | None
    username: Callable[[], object] | None
    consumer: Callable[[], object] | None
    tracer_provider: Any
    included: Marks
    excluded: Marks


def track(app: Flask, given: Given, storage: Any, owner: object) -> None:
    """Track an app from now on.

    Args:
        app: The app, whose configuration is read.
        given: Arguments and marks of the `TrackUsage`.
        storage: Where records go, as it was given; None: see the settings.
        owner: The `TrackUsage`.

    Raises:
        ConfigError: A setting or argument is wrong.
    """
    settings = read(app.config)
    OWNERS.add(app)
    faults = Faults()
    load_tables(faults)
    version = package_version()
    collector = collector_of(given.registry, settings.shape, version)
    country_lookup = make_country_lookup(
        settings.country,
        trusted_proxies=bool(settings.trusted_proxies),
        use_freegeoip=settings.use_freegeoip,
        freegeoip_endpoint=settings.freegeoip_endpoint,
        function=given.country,
        faults=faults,
    )
    writers = make_writers(storage, settings, app)
    exposition = Exposition(given.registry, collector, settings.metrics_token, faults)
    if settings.metrics_path is not None:
        _add_route(app, settings.metrics_path, exposition)
    key = collector.totals.join(
        app.name, [writer.identity for writer in writers], make_state_dir(app, settings)
    )
    pseudonyms = make_pseudonyms(app, collector.totals, faults)
    methods = methods_of(app)
    configure_storages(writers, settings, pseudonyms, methods)
    policy = Policy(
        settings.privacy,
        settings.redact,
        respects_refusals=settings.respect_gpc,
        pseudonyms=pseudonyms,
    )
    warn_of_empty_labels(settings, policy)
    visitors = make_visitors(settings, policy, collector.totals, key, faults)
    enricher = Enricher(
        app.name,
        key,
        country_lookup=country_lookup,
        trusted=settings.trusted_proxies,
        visitors=visitors.ids,
        identifies=visitors.identifies,
        policy=policy,
        own_kinds=settings.clients,
    )
    # The sinks: storages, and traces if there are any.
    traces = make_traces(
        app, settings, given.tracer_provider, enricher, version=version, faults=faults
    )
    sinks = make_sinks(
        writers, traces, collector.totals, settings, idle_seconds=IDLE_SECONDS, faults=faults
    )
    # From the request to the sinks.
    journal = Journal(settings.buffer_records)
    processor = Processor(
        journal=journal,
        worker_group=WorkerGroup(
            collector.totals.state,
            key,
            totals=collector.totals,
            app_metrics=collector.app_metrics,
            spool_bytes=settings.spool_bytes,
            faults=faults,
        ),
        enricher=enricher,
        tally=visitors.tally,
        totals=collector.totals,
        sinks=sinks,
        faults=faults,
    )
    live = LiveExchanges()
    pipeline = Pipeline(
        journal=journal,
        processor=processor,
        sinks=sinks,
        flush_seconds=settings.flush_seconds,
        idle_seconds=IDLE_SECONDS,
        inline=settings.inline,
        in_progress=live.in_progress,
        faults=faults,
    )
    # In the request's thread.
    scope = Scope(
        app,
        include_only=settings.include_only,
        included=given.included,
        excluded=given.excluded,
        never=settings.exclude or (),
        static=settings.exclude is None,
        own=METRICS_ENDPOINT,
        own_path=settings.metrics_path,
    )
    observer = Observer(
        app,
        scope=scope,
        submit=pipeline.submit,
        lose=pipeline.lose,
        context_reader=ContextReader(
            Users(app, username=given.username, consumer=given.consumer, faults=faults),
            visitors.cookie,
            None if traces is None else traces.tracing,
            faults,
        ),
        headers=enricher.headers,
        faults=faults,
        live=live,
    )
    middleware = Middleware(
        app,
        observer,
        start=_start(pipeline, collector.totals, methods),
        beside=collector.middlewares,
    )
    track_var.install(app)
    answer = middleware.wsgi_app
    if settings.metrics_path is not None and settings.metrics_token is not None:
        answer = Scrapes(
            middleware,
            path=settings.metrics_path,
            may_read=exposition.may_read,
            metrics_app=exposition.wsgi_app(),
        ).wsgi_app
    app.wsgi_app = answer  # type: ignore[method-assign]
    Bypass(app, middleware)
    tracking = Tracking(
        owner=owner,
        given_storage=storage,
        writers=writers,
        exposition=exposition,
        middleware=middleware,
        pipeline=pipeline,
        traces=traces,
        faults=faults,
    )
    keep(app, tracking)
    collector.totals.watch(pipeline, pipeline.counters(), faults)


def _add_route(app: Flask, path: str, exposition: Exposition) -> None:
    if getattr(app, "_got_first_request", False):  # Flask adds no routes any more
        raise ConfigError(
            f"the app {app.name!r} has answered a request already: call TrackUsage(app) or "
            f"init_app(app) where the app is made, or do without {path}, by "
            "TRACK_USAGE_METRICS_PATH = None"
        )
    for rule in app.url_map.iter_rules():
        if rule.rule == path and "GET" in (rule.methods or ()):
            raise ConfigError(
                f"the path {path} belongs to the endpoint {rule.endpoint!r}: "
                "set TRACK_USAGE_METRICS_PATH to another path, or to None"
            )

    # A function of its own, with any arguments: extensions mark it, and rules of hosts have some.
    def track_usage_metrics(**_host: str) -> Response:
        return exposition.answer(request)

    app.add_url_rule(path, METRICS_ENDPOINT, track_usage_metrics)
    # On every host: Prometheus asks by an address.
    any_host: dict[str, Any] = {}
    if app.url_map.host_matching:
        any_host = {"host": "<_host>"}
    elif app.subdomain_matching:
        any_host = {"subdomain": "<_host>"}
    if any_host:
        app.add_url_rule(path, METRICS_ENDPOINT, track_usage_metrics, **any_host)


def _start(
    pipeline: Pipeline, totals: Totals, methods: Callable[[], Set[str]]
) -> Callable[[bool, bool], Callable[[], None] | None]:
    """Return the function that the middleware calls before the first request of a process."""

    def start(multiprocess: bool, ends: bool) -> Callable[[], None] | None:
        # Not earlier: exit handlers run in reverse order, and ours has to run before that of a
        # tracer provider, which the app has made by now.
        _at_exit(pipeline)
        totals.methods.update(methods())
        return pipeline.start(multiprocess, ends)

    return start


def _at_exit(pipeline: Pipeline) -> None:
    # A weak reference: the handler must not keep the pipeline of an app that is gone, nor stay.
    reference = weakref.ref(pipeline)

    def close() -> None:
        alive = reference()
        if alive is not None:
            alive.close(_EXIT_SECONDS)

    atexit.register(close)
    weakref.finalize(pipeline, atexit.unregister, close).atexit = False
