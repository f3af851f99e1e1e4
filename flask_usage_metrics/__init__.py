"""Knows how a Flask app is used: metrics and records from one and the same observation."""

from flask_usage_metrics.errors import ConfigError, StorageUnavailable, UsageMetricsError
from flask_usage_metrics.extension import TrackUsage
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
