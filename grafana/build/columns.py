"""Columns of the tables that have a row for each endpoint, or for each country."""

from __future__ import annotations

from grafana_foundation_sdk.models import units
from panels import COUNT, ERRORS, LATENCY
from promql import quantile, share
from red import SERVER_ERRORS
from tables import Column

BUSY = """\
sum by (endpoint) (increase(flask_usage_request_duration_seconds_sum{CHOSEN}[$__range]))
/ $__range_s > 0"""


def requests(label: str) -> Column:
    return Column("Requests", f"{_requests(label)} > 0", COUNT, decimals=0)


def server_errors(label: str) -> Column:
    return Column("5xx", share(SERVER_ERRORS, of=_requests(label)), units.PercentUnit, ERRORS, 2)


def latency(label: str, of_all: float) -> Column:
    # Not from a histogram without the label: it would make a row of its own.
    buckets = f"""\
sum by ({label}, le) (
  increase(flask_usage_request_duration_seconds_bucket{{CHOSEN,{label}!=""}}[$__range])
)"""
    return Column(f"p{of_all * 100:.0f}", quantile(of_all, buckets), units.Seconds, LATENCY)


def busy() -> Column:
    return Column("Busy", BUSY, units.PercentUnit)


def sent() -> Column:
    sizes = "sum by (endpoint) (increase(flask_usage_response_bytes_total{ROUTE}[$__range]))"
    # Bytes have no country: not of endpoints that the chosen ones did not visit.
    return Column("Sent", f"{sizes}\nand on (endpoint) {_requests('endpoint')} > 0", units.BytesIEC)


def _requests(label: str) -> str:
    return f"sum by ({label}) (increase(flask_usage_requests_total{{CHOSEN}}[$__range]))"
