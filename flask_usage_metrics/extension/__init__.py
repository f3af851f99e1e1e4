"""TrackUsage: what an app's author calls; its parts are wired in `wiring`."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from flask import Flask, current_app, has_app_context
from prometheus_client import REGISTRY, CollectorRegistry

from flask_usage_metrics.capture.middleware import uncounted
from flask_usage_metrics.capture.scope import Marks
from flask_usage_metrics.errors import ConfigError
from flask_usage_metrics.extension.tracking import Tracking, tracking_of
from flask_usage_metrics.extension.wiring import Given, track
from flask_usage_metrics.storage import Storage

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

logger = logging.getLogger("flask_usage_metrics")

Target = TypeVar("Target")

_THREADS_SECONDS = 1.0
"""How long `TrackUsage.close` waits for threads: one whose storage hangs ends when that answers."""


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
        self._included = Marks()
        self._excluded = Marks()
        self._given = Given(
            REGISTRY if registry is None else registry,
            _callable_or_none("country", country),
            _callable_or_none("username", username),
            _callable_or_none("consumer", consumer),
            tracer_provider,
            self._included,
            self._excluded,
        )
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
        known = tracking_of(app)
        if known is not None:
            if known.owner is self and (storage is None or known.given_storage is wanted):
                return
            raise ConfigError(
                f"the app {app.name!r} is tracked already, with another "
                f"{'storage' if known.owner is self else 'TrackUsage'}"
            )
        track(app, self._given, wanted, self)
        self._apps.add(app)
        for name in ("before_request", "after_request"):
            if hasattr(self, name):  # what subclasses of flask-track-usage's override
                logger.warning(
                    "%s.%s is not called: see username=, TRACK_USAGE_EXCLUDE, g.track_var and "
                    "the hooks of a storage",
                    type(self).__name__,
                    name,
                )

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
        """Wait until all that was captured so far is counted and written.

        Of the current app, or outside of the contexts of this tracker's apps of all of these.

        Args:
            timeout: Seconds to wait at most, for all apps together.

        Returns:
            Whether nothing is left; False also when a storage cannot be written to now.

        Raises:
            RuntimeError: There is no app.
        """
        pipelines = [tracking.pipeline for tracking in self._trackings()]
        if len(pipelines) > 1:
            # All begin at once: an app whose storage hangs must not use up the time of the others.
            for pipeline in pipelines:
                pipeline.flush(0)
        deadline = monotonic() + timeout
        flushed = [pipeline.flush(max(deadline - monotonic(), 0)) for pipeline in pipelines]
        return all(flushed)

    def close(self, timeout: float = 5.0) -> None:
        """Write what was captured, and give up threads and files, of every app of this tracker.

        An app that is dropped does so by itself. The next request opens all again.

        Args:
            timeout: Seconds to wait at most for the storages of each app. What they have not taken
                then waits on disk for the next process, or is lost without a state directory.
        """
        for app in list(self._apps):
            tracking = tracking_of(app)
            if tracking is not None:
                tracking.pipeline.close(timeout)
                tracking.pipeline.join(_THREADS_SECONDS)

    def __enter__(self) -> TrackUsage:
        """Return itself; `close` is called in the end."""
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    @property
    def storage(self) -> Storage:
        """The first storage that can be read: of the current app, or of the only one.

        Raises:
            RuntimeError: It is not clear which app is meant, or none of its storages can be read.
        """
        return self._tracking().storage

    def metrics_app(self) -> WSGIApplication:
        """Return a WSGI app that serves the metrics, for another port or a dispatcher.

        Raises:
            RuntimeError: It is not clear which app is meant.
        """
        return uncounted(self._tracking().exposition.wsgi_app())

    def _tracking(self) -> Tracking:
        trackings = self._trackings()
        if len(trackings) > 1:
            raise RuntimeError(
                "this TrackUsage has several apps: enter the context of one, app.app_context()"
            )
        return trackings[0]

    def _trackings(self) -> list[Tracking]:
        """Return what tracks the current app, if this tracker does, else all apps it tracks."""
        if has_app_context():
            current = tracking_of(current_app)
            if current is not None and current.owner is self:
                return [current]
        known = [tracking_of(app) for app in list(self._apps)]
        trackings = [tracking for tracking in known if tracking is not None]
        if not trackings:
            raise RuntimeError("this TrackUsage has no app: call init_app(app) first")
        return trackings


def _callable_or_none(name: str, given: Any) -> Any:
    if given is not None and not callable(given):
        raise ConfigError(f"{name} must be a callable or None, not {type(given).__name__}")
    return given
