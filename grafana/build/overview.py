"""Overview: is the app well, and if not, which endpoint is it?"""

from __future__ import annotations

import columns
import health
import objectives
import red
import variables
from assembly import Row, assemble
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard
from links import TO_ENDPOINT
from panels import COUNT, at_the_end, bars, big_number, lines, over_time, steps
from promql import busiest, quantile
from tables import Column, grid

NONE_LOST = steps("green", (1, "red"))


def dashboard() -> Dashboard:
    return assemble(
        "flask-usage-overview",
        "Flask usage: overview",
        "Rate, errors and duration of a Flask app's requests, where the time goes, the error "
        "budget, and whether the measuring itself is well.",
        [
            variables.data_source(),
            variables.job(),
            variables.instance(),
            variables.endpoint(),
            variables.country(),
        ],
        at_a_glance(),
        rate_errors_duration(),
        objectives.row(),
        endpoints(),
        health.row(),
    )


def at_a_glance() -> Row:
    panels = [
        red.request_rate(),
        red.server_errors(),
        red.p95_latency(),
        big_number(
            "Requests in progress",
            "Over all workers. Near workers x threads: the app is saturated.",
            over_time("sum(flask_usage_requests_in_progress{HERE})"),
            unit=units.Short,
        ),
        big_number(
            "Records waiting",
            "Captured, not yet written by the sink that is furthest behind. "
            "Grows: storage is slower than traffic, or away.",
            over_time("sum(max by (instance) (flask_usage_records_pending{HERE}))"),
            unit=units.Short,
        ),
        big_number(
            "Records lost",
            "Raw records that never reached storage in the chosen range. "
            "Not 0: records and metrics no longer agree.",
            at_the_end(
                """
                sum(increase(
                  flask_usage_records_total{HERE,result=~"dropped|failed"}[$__range]
                )) or vector(0)
                """
            ),
            unit=COUNT,
            colors=NONE_LOST,
        ).decimals(0),
    ]
    return Row("At a glance", [panel.span(4).height(4) for panel in panels])


def rate_errors_duration() -> Row:
    return Row(
        "Rate, errors, duration",
        [
            red.requests_by_status().span(8).height(8),
            red.error_ratio().span(8).height(8),
            red.latency().span(8).height(8),
            red.latency_heatmap().span(12).height(8),
            lines(
                "Now and a week ago",
                "Is this load normal for this hour of the week?",
                over_time(red.RATE, "now"),
                over_time(
                    "sum(rate(flask_usage_requests_total{CHOSEN}[$__rate_interval] offset 1w))",
                    "a week ago",
                ),
                unit=units.RequestsPerSecond,
                shades={"now": "blue", "a week ago": "purple"},
            )
            .span(12)
            .height(8),
        ],
    )


def endpoints() -> Row:
    return Row(
        "Endpoints",
        [
            grid(
                "Endpoints",
                "One row an endpoint, over the chosen range: click a name for all about it. "
                "Busy: 100 % is one worker that does nothing else. "
                "Sent: body bytes to all countries.",
                {"endpoint": "Endpoint"},
                columns.requests("endpoint"),
                columns.server_errors("endpoint"),
                columns.latency("endpoint", 0.5),
                columns.latency("endpoint", 0.95),
                columns.busy(),
                columns.sent(),
                sorted_by="Busy",
                missing="no requests",
                links={"Endpoint": TO_ENDPOINT},
            )
            .span(16)
            .height(10),
            bars(
                "Where the time goes",
                "Seconds of work per second: 100 % is one worker that does nothing else. "
                "The top one is what to optimise first.",
                at_the_end(f"topk(10, {columns.BUSY})", "{{endpoint}}"),
                unit=units.PercentUnit,
                missing="no requests",
            )
            .span(8)
            .height(10),
            grid(
                "Unhandled exceptions",
                "Exceptions that no error handler answered, in the chosen range, of all "
                "countries. Click an endpoint for all about it. A first one ever is not seen by "
                "Prometheus: the records have it.",
                {"endpoint": "Endpoint", "exception": "Exception"},
                Column(
                    "Times",
                    """
                    topk(20,
                      sum by (endpoint, exception) (
                        increase(flask_usage_exceptions_total{ROUTE}[$__range])
                      ) > 0
                    )
                    """,
                    COUNT,
                    decimals=0,
                ),
                sorted_by="Times",
                missing="no unhandled exceptions",
                links={"Endpoint": TO_ENDPOINT},
            )
            .span(12)
            .height(8),
            lines(
                "Slowest endpoints",
                "95 of 100 requests were answered faster: the five endpoints which are slowest "
                "over the chosen range.",
                over_time(slowest(), "{{endpoint}}"),
                unit=units.Seconds,
                missing="no requests",
            )
            .span(12)
            .height(8),
        ],
    )


def slowest() -> str:
    buckets = "flask_usage_request_duration_seconds_bucket{CHOSEN}"
    return busiest(
        5,
        quantile(0.95, f"sum by (endpoint, le) (rate({buckets}[$__rate_interval]))"),
        by="endpoint",
        ranked=quantile(0.95, f"sum by (endpoint, le) (increase({buckets}[$__range] @ end()))"),
    )
