"""TrackUsage: wires the parts for one app; does no work itself."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, TypeVar

from flask import Flask, Response, current_app, has_app_context, request
from prometheus_client import REGISTRY, CollectorRegistry

from flask_usage_metrics.capture import track_var
from flask_usage_metrics.capture.context import ContextReader
from flask_usage_metrics.capture.middleware import Middleware
from flask_usage_metrics.capture.observer import Observer
from flask_usage_metrics.capture.scope import Marks, Scope
from flask_usage_metrics.capture.users import Users
from flask_usage_metrics.enrich.country import make_country_lookup
from flask_usage_metrics.enrich.enricher import Enricher
from flask_usage_metrics.enrich.privacy.policy import Policy
from flask_usage_metrics.enrich.visitors.tally import VisitorTally
from flask_usage_metrics.errors import ConfigError
from flask_usage_metrics.extension import settings as configuration
from flask_usage_metrics.extension.wiring import (
    Traces,
    configure_storages,
    join_totals,
    make_pseudonyms,
    make_sinks,
    make_traces,
    make_visitors,
    make_writers,
)
from flask_usage_metrics.metrics.exposition.collector import collector_of
from flask_usage_metrics.metrics.exposition.view import Exposition
from flask_usage_metrics.metrics.totals import Totals
from flask_usage_metrics.pipeline.journal import Journal
from flask_usage_metrics.pipeline.worker import Pipeline
from flask_usage_metrics.pipeline.worker_group import WorkerGroup
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.storage import Storage, Writer

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

EXTENSION = "track_usage"
METRICS_ENDPOINT = "track_usage_metrics"

IDLE_SECONDS = 60.0
"""A thread of ours without work ends after this long; starting one costs 0.1 ms."""

_EXIT_SECONDS = 5.0

Target = TypeVar("Target")


class TrackUsage:
    """Tracks, counts and stores the requests of Flask apps.

    Args:
        app: The app, if there is one already; `init_app` is called for it.
        storage: Where records go: a URL such as ``"sqlite:///usage.sqlite3"``, a storage, any
            callable that takes one dict, or a list of these (empty: nowhere). None: as
            ``TRACK_USAGE_STORAGE`` says, or ``usage.sqlite3`` in the instance folder.
        registry: Where the Prometheus metrics are found; None: client_python's default one, so
            that the app's own metrics come out of the same ``/metrics``. Apps on one registry
            add up.
        country: Called with a normalised address; returns an ISO 3166-1 alpha-2 code or None. Used
            instead of ``TRACK_USAGE_COUNTRY``; it is never called in a request.
        username: Called without arguments in a request's context; what it returns, if not None, is
            the record's ``username``. Else it is the id of the user Flask-Login has loaded, or the
            name given in Basic authentication.
        consumer: Called likewise; names the API client, such as the owner of a key or a tenant.
            It becomes the record's ``consumer``, and a label at ``/metrics``.
        tracer_provider: OpenTelemetry's, for spans of the requests. None: without
            ``TRACK_USAGE_TRACES`` there are none; with it the global provider, or one that sends
            to a collector.

    Raises:
        ConfigError: A setting or argument is wrong.
    """

    def __init__(
        self,
        app: Flask | None = None,
        storage: Any = None,
        *,
        registry: CollectorRegistry | None = None,
        country: Callable[[str], str | None] | None = None,
        username: Callable[[], object] | None = None,
        consumer: Callable[[], object] | None = None,
        tracer_provider: Any = None,
    ) -> None:
        self._storage = storage
        self._registry = REGISTRY if registry is None else registry
        self._country = _callable_or_none("country", country)
        self._username = _callable_or_none("username", username)
        self._consumer = _callable_or_none("consumer", consumer)
        self._tracer_provider = tracer_provider
        self._included = Marks()
        self._excluded = Marks()
        self._apps: weakref.WeakSet[Flask] = weakref.WeakSet()
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask, storage: Any = None) -> None:
        """Track an app; before or after its routes and blueprints exist.

        Doing it again with nothing new does nothing.

        Args:
            app: The app.
            storage: As in the constructor; None: what was given there.

        Raises:
            ConfigError: A setting or argument is wrong, or the app is tracked otherwise already.
        """
        wanted = self._storage if storage is None else storage
        known: Tracking | None = app.extensions.get(EXTENSION)
        if known is not None:
            if known.owner is self and (storage is None or known.storage is wanted):
                return
            raise ConfigError(
                f"the app {app.name!r} is tracked already, with another "
                f"{'storage' if known.owner is self else 'TrackUsage'}"
            )
        settings = configuration.read(app.config)
        faults = Faults()
        own = own_version()
        collector = collector_of(self._registry, settings.shape, own)
        country_lookup = make_country_lookup(
            settings.country,
            trusted_proxies=bool(settings.trusted_proxies),
            use_freegeoip=settings.use_freegeoip,
            freegeoip_endpoint=settings.freegeoip_endpoint,
            function=self._country,
            faults=faults,
        )
        writers = make_writers(wanted, settings, app)
        exposition = Exposition(self._registry, collector, settings.metrics_token, faults)
        if settings.metrics_path is not None:
            _add_route(app, settings.metrics_path, lambda: exposition.answer(request))
        key = join_totals(collector.totals, app, settings, writers)
        pseudonyms = make_pseudonyms(app, collector.totals, faults)
        configure_storages(writers, settings, pseudonyms)
        policy = Policy(
            settings.privacy,
            settings.redact,
            respects_refusals=settings.respect_gpc,
            pseudonyms=pseudonyms,
        )
        visitors = make_visitors(settings, policy, collector.totals, key, faults)
        enricher = Enricher(
            app.name,
            key,
            country_lookup=country_lookup,
            trusted=settings.trusted_proxies,
            visitors=visitors.ids,
            identifies=visitors.identifies,
            policy=policy,
        )
        traces = make_traces(
            app, settings, self._tracer_provider, enricher, version=own, faults=faults
        )
        to_write = writers if traces is None else [*writers, traces.writer]
        sinks = make_sinks(
            to_write, collector.totals, settings, idle_seconds=IDLE_SECONDS, faults=faults
        )
        pipeline = Pipeline(
            journal=Journal(settings.buffer_records),
            worker_group=WorkerGroup(
                collector.totals.state,
                key,
                totals=collector.totals,
                spool_bytes=settings.spool_bytes,
                faults=faults,
            ),
            enricher=enricher,
            tally=visitors.tally,
            totals=collector.totals,
            spans=None if traces is None else sinks[-1],
            sinks=sinks,
            flush_seconds=settings.flush_seconds,
            idle_seconds=IDLE_SECONDS,
            inline=settings.inline,
            faults=faults,
        )
        scope = Scope(
            app,
            include_only=settings.include_only,
            included=self._included,
            excluded=self._excluded,
            never=settings.exclude,
            own=(METRICS_ENDPOINT,),
        )
        observer = Observer(
            app,
            scope=scope,
            submit=pipeline.submit,
            lose=pipeline.lose,
            context_reader=ContextReader(
                Users(app, username=self._username, consumer=self._consumer, faults=faults),
                visitors.cookie,
                None if traces is None else traces.tracing,
                faults,
            ),
            headers=enricher.headers,
            faults=faults,
        )
        middleware = Middleware(app, observer, start=_start(pipeline))
        track_var.install(app)
        app.wsgi_app = middleware.wsgi_app  # type: ignore[method-assign]
        tracking = Tracking(
            self, wanted, writers, exposition, middleware, pipeline, visitors.tally, traces, faults
        )
        app.extensions[EXTENSION] = tracking
        collector.totals.watch(tracking, faults)
        _at_fork(collector.totals, tracking)
        self._apps.add(app)

    # ------------------------------------------------------------------------ what is tracked

    def include(self, view: Target) -> Target:
        """Track a view, where ``TRACK_USAGE_INCLUDE_OR_EXCLUDE_VIEWS`` is ``"include"``.

        Args:
            view: A view (so this is a decorator, above or below ``@app.route``), an endpoint, a
                glob of endpoints such as ``"api.*"``, or a path or glob that starts with ``/``.

        Returns:
            What was given.

        Raises:
            ConfigError: It is none of these.
        """
        self._included.add(view)
        return view

    def exclude(self, view: Target) -> Target:
        """Do not track a view; see `include`. None stands for requests that no route matched."""
        self._excluded.add(view)
        return view

    def include_blueprint(self, blueprint: Target) -> Target:
        """Track a blueprint, given itself or by name, with all that is or will be nested in it."""
        self._included.add_blueprint(blueprint)
        return blueprint

    def exclude_blueprint(self, blueprint: Target) -> Target:
        """Do not track a blueprint; see `include_blueprint`."""
        self._excluded.add_blueprint(blueprint)
        return blueprint

    # ------------------------------------------------------------------------ for the app's owner

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until all that was captured so far is folded and written.

        Args:
            timeout: Seconds to wait at most.

        Returns:
            Whether nothing is left; False also when a storage cannot be written to now.

        Raises:
            RuntimeError: It is not clear which app is meant.
        """
        return self._tracking().pipeline.flush(timeout)

    @property
    def storage(self) -> Storage:
        """The first storage that can be read: of the current app, or of the only one.

        Raises:
            RuntimeError: It is not clear which app is meant, or none of its storages can be read.
        """
        for writer in self._tracking().writers:
            if isinstance(writer, Storage):
                return writer
        raise RuntimeError("none of the app's storages can be read")

    def metrics_app(self) -> WSGIApplication:
        """Return a WSGI app that serves the metrics, for another port or a dispatcher.

        Raises:
            RuntimeError: It is not clear which app is meant.
        """
        return self._tracking().exposition.wsgi_app()

    def _tracking(self) -> Tracking:
        apps = list(self._apps)
        if has_app_context() and EXTENSION in current_app.extensions:
            tracking: Tracking = current_app.extensions[EXTENSION]
            return tracking
        if len(apps) == 1:
            tracking = apps[0].extensions[EXTENSION]
            return tracking  # noqa: RET504 - typed, where extensions holds anything
        raise RuntimeError(
            "this TrackUsage has no app: call init_app(app) first"
            if not apps
            else "this TrackUsage has several apps: enter the context of one, app.app_context()"
        )


class Tracking:
    """All parts of one app, as ``app.extensions["track_usage"]``."""

    def __init__(
        self,
        owner: TrackUsage,
        storage: Any,
        writers: Sequence[Writer],
        exposition: Exposition,
        middleware: Middleware,
        pipeline: Pipeline,
        tally: VisitorTally | None,
        traces: Traces | None,
        faults: Faults,
    ) -> None:
        self.owner = owner
        self.storage = storage
        self.writers = writers
        self.exposition = exposition
        self.middleware = middleware
        self.pipeline = pipeline
        self.traces = traces
        self.faults = faults
        # What the totals' gauges are read from.
        self.drain = pipeline.drain
        self.pending = pipeline.pending
        self.up = pipeline.up
        self.is_journaled = pipeline.is_journaled
        self.in_progress = middleware.observer.in_progress
        self.visitors = (lambda: None) if tally is None else tally.today

    def reset_after_fork(self) -> None:
        """Start anew in a forked child: locks, threads, and what the parent will write."""
        self.faults.reset_after_fork()
        self.pipeline.reset_after_fork()
        self.middleware.reset_after_fork()
        if self.traces is not None:
            self.traces.tracing.reset_after_fork()


def _add_route(app: Flask, path: str, view: Callable[[], Response]) -> None:
    for rule in app.url_map.iter_rules():
        if rule.rule == path and "GET" in (rule.methods or ()):
            raise ConfigError(
                f"the path {path} belongs to the endpoint {rule.endpoint!r}: "
                "set TRACK_USAGE_METRICS_PATH to another path, or to None"
            )
    app.add_url_rule(path, METRICS_ENDPOINT, view)


def _at_fork(totals: Totals, tracking: Tracking) -> None:
    if not hasattr(os, "register_at_fork"):  # Windows
        return
    references = weakref.ref(totals), weakref.ref(tracking)

    def reset() -> None:
        for part in (references[0](), references[1]()):
            if part is not None:
                part.reset_after_fork()

    os.register_at_fork(after_in_child=reset)


def _start(pipeline: Pipeline) -> Callable[[bool, bool], Callable[[], None] | None]:
    """Return what gets a process ready for its first request."""

    def start(multiprocess: bool, ends: bool) -> Callable[[], None] | None:
        # So late, for exit handlers run in reverse order: ours has to come before that of a
        # tracer provider, which the app has made by now.
        _at_exit(pipeline)
        return pipeline.begin(multiprocess, ends)

    return start


def _at_exit(pipeline: Pipeline) -> None:
    # By way of a weak reference: a pipeline lives as long as its app, or as its worker has work.
    reference = weakref.ref(pipeline)

    def close() -> None:
        alive = reference()
        if alive is not None:
            alive.close(_EXIT_SECONDS)

    atexit.register(close)


def _callable_or_none(name: str, given: Any) -> Any:
    if given is not None and not callable(given):
        raise ConfigError(f"{name} must be a callable or None, not {type(given).__name__}")
    return given


def own_version() -> str:
    """Return the version of the package, as it was installed."""
    try:
        return version("flask-usage-metrics")
    except PackageNotFoundError:  # run from a folder that was never installed
        return "unknown"
