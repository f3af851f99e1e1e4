"""All that tracks one app, as ``app.extensions["track_usage"]``: for the views and the commands."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from flask import Flask

from flask_usage_metrics.capture.middleware import Middleware
from flask_usage_metrics.extension.parts import Traces
from flask_usage_metrics.metrics.exposition.view import Exposition
from flask_usage_metrics.pipeline.pipeline import Pipeline
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.storage import Storage, Writer

_EXTENSION = "track_usage"


class Tracking:
    """The parts of one tracked app, which it has for as long as it lives.

    Args:
        owner: The `TrackUsage` that tracks the app.
        given_storage: What it was told to store in, as it was given.
        writers: Every storage, the first that can be read is read from.
        exposition: Answers scrapes.
        middleware: Wraps the app.
        pipeline: Takes what was captured.
        traces: Makes and ends spans; None: there are none.
        faults: Counts failures inside this package.
    """

    def __init__(
        self,
        *,
        owner: object,
        given_storage: Any,
        writers: Sequence[Writer],
        exposition: Exposition,
        middleware: Middleware,
        pipeline: Pipeline,
        traces: Traces | None,
        faults: Faults,
    ) -> None:
        self.owner = owner
        self.given_storage = given_storage
        self.writers = writers
        self.exposition = exposition
        self.middleware = middleware
        self.pipeline = pipeline
        self.traces = traces
        self.faults = faults

    @property
    def storage(self) -> Storage:
        """The first storage that can be read.

        Raises:
            RuntimeError: There is none.
        """
        for writer in self.writers:
            if isinstance(writer, Storage):
                return writer
        raise RuntimeError("none of the app's storages can be read")


def tracking_of(app: Flask) -> Tracking | None:
    """Return what tracks an app; None: nothing does."""
    tracking: Tracking | None = app.extensions.get(_EXTENSION)
    return tracking


def keep(app: Flask, tracking: Tracking) -> None:
    """Have `tracking_of` find it, for as long as the app lives."""
    app.extensions[_EXTENSION] = tracking


def package_version() -> str:
    """Return the version of this package as it was installed, or ``"unknown"``."""
    try:
        return version("flask-usage-metrics")
    except PackageNotFoundError:  # run from a folder that was never installed
        return "unknown"
