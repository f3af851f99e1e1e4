"""Rate, errors, duration: panels about whatever requests are chosen."""

from __future__ import annotations

from grafana_foundation_sdk.builders import heatmap, stat, timeseries
from grafana_foundation_sdk.models import units
from panels import BY_STATUS, ERRORS, LATENCY, big_number, heat, lines, over_time, steps
from promql import quantile, share

RATE = "sum(rate(flask_usage_requests_total{CHOSEN}[$__rate_interval]))"
BUCKETS = """\
sum by (le) (rate(flask_usage_request_duration_seconds_bucket{CHOSEN}[$__rate_interval]))"""
COUNTS = """\
sum by (le) (increase(flask_usage_request_duration_seconds_bucket{CHOSEN}[$__rate_interval]))"""

SERVER_ERRORS = 'status=~"5.."'
CLIENT_ERRORS = 'status=~"4.."'

ONE_PERCENT = steps("transparent", (0.01, "red"))


def request_rate() -> stat.Panel:
    return big_number(
        "Requests per second",
        "Now, with the trend of the chosen range behind it.",
        over_time(RATE),
        unit=units.RequestsPerSecond,
    )


def server_errors() -> stat.Panel:
    return big_number(
        "Server errors",
        "Share answered 5xx. 4xx are the client's and are not counted here.",
        over_time(share(SERVER_ERRORS, of=RATE)),
        unit=units.PercentUnit,
        colors=ERRORS,
        missing="no requests",
    )


def p95_latency() -> stat.Panel:
    return big_number(
        "p95 latency",
        "95 of 100 requests were answered faster (estimated inside its bucket).",
        over_time(quantile(0.95, BUCKETS)),
        unit=units.Seconds,
        colors=LATENCY,
        missing="no requests",
    )


def requests_by_status() -> timeseries.Panel:
    return lines(
        "Requests by status",
        "2xx green, 3xx blue, 4xx orange, 5xx red.",
        over_time(
            "sum by (status) (rate(flask_usage_requests_total{CHOSEN}[$__rate_interval]))",
            "{{status}}",
        ),
        unit=units.RequestsPerSecond,
        shades=BY_STATUS,
        stacked=True,
    )


def error_ratio() -> timeseries.Panel:
    return lines(
        "Error ratio",
        "Stays at 0, not empty, while there are requests but no errors. The line is at 1 %.",
        over_time(share(SERVER_ERRORS, of=RATE), "5xx"),
        over_time(share(CLIENT_ERRORS, of=RATE), "4xx"),
        unit=units.PercentUnit,
        marks=ONE_PERCENT,
        missing="no requests",
        shades=BY_STATUS,
    )


def latency() -> timeseries.Panel:
    return lines(
        "Latency",
        "Half, 90 and 99 of 100 requests were answered faster. "
        "Diamonds are exemplars: click one to open that request's trace.",
        over_time(quantile(0.5, BUCKETS), "p50"),
        over_time(quantile(0.9, BUCKETS), "p90"),
        # Of one line only: the exemplars are those of the buckets, the same for each.
        over_time(quantile(0.99, BUCKETS), "p99", exemplars=True),
        unit=units.Seconds,
        missing="no requests",
        shades={"p50": "green", "p90": "yellow", "p99": "orange"},
    )


def latency_heatmap() -> heatmap.Panel:
    return heat(
        "Latency heatmap",
        "Requests by how long they took. Shows two humps (cache hit and miss) that quantiles "
        "hide. Diamonds are exemplars.",
        COUNTS,
        missing="no requests",
    )
