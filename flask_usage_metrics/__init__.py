"""Knows how a Flask app is used: metrics and records from one and the same observation."""

from __future__ import annotations

from flask_usage_metrics.errors import ConfigError, StorageUnavailable, UsageMetricsError
from flask_usage_metrics.extension import TrackUsage
from flask_usage_metrics.extension.tracking import package_version
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.records.summary import Summary
from flask_usage_metrics.storage import open_storage

__all__ = [
    "ConfigError",
    "StorageUnavailable",
    "Summary",
    "TrackUsage",
    "UsageMetricsError",
    "UsageRecord",
    "open_storage",
]


def __getattr__(name: str) -> str:
    """Return ``__version__``; only when asked for, as the metadata has to be read."""
    if name == "__version__":
        return package_version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
