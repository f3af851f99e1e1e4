"""Endpoint: all about one of them."""

from __future__ import annotations

import columns
import red
import variables
from assembly import Row, assemble
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard
from links import TO_COUNTRY
from panels import COUNT, at_the_end, big_number, lines, over_time
from tables import Column, grid

OF_ALL = 'HERE,country=~"$country"'


def dashboard() -> Dashboard:
    return assemble(
        "flask-usage-endpoint",
        "Flask usage: endpoint",
        "One endpoint of a Flask app: rate, errors, duration, callers, exceptions, sizes, and "
        "what part it has in the whole.",
        [
            variables.data_source(),
            variables.job(),
            variables.instance(),
            variables.one_endpoint(),
            variables.country(),
        ],
        at_a_glance(),
        rate_errors_duration(),
        who_calls_it(),
        what_goes_wrong(),
        endpoint='endpoint="$endpoint"',
    )


def at_a_glance() -> Row:
    panels = [
        red.request_rate(),
        red.server_errors(),
        red.p95_latency(),
        big_number(
            "Requests in range",
            "Prometheus extrapolates at the ends of the chosen range: for the exact count ask "
            "the records.",
            at_the_end("sum(increase(flask_usage_requests_total{CHOSEN}[$__range]))"),
            unit=COUNT,
            missing="no requests",
        ).decimals(0),
        big_number(
            "Share of all requests",
            "In the chosen range.",
            at_the_end(part_of_the_whole("flask_usage_requests_total")),
            unit=units.PercentUnit,
            missing="no requests",
        ),
        big_number(
            "Share of all time",
            "Of the seconds the app spent on requests in the chosen range. More than its share "
            "of requests: it is slower than the others.",
            at_the_end(part_of_the_whole("flask_usage_request_duration_seconds_sum")),
            unit=units.PercentUnit,
            missing="no requests",
        ),
    ]
    return Row("At a glance", [panel.span(4).height(4) for panel in panels])


def part_of_the_whole(counter: str) -> str:
    whole = f"sum(increase({counter}{{{OF_ALL}}}[$__range]))"
    return f"sum(increase({counter}{{CHOSEN}}[$__range])) / ({whole} > 0)"


def rate_errors_duration() -> Row:
    return Row(
        "Rate, errors, duration",
        [
            red.requests_by_status().span(8).height(8),
            red.error_ratio().span(8).height(8),
            red.latency().span(8).height(8),
            red.latency_heatmap().span(12).height(8),
            lines(
                "Bytes per request",
                "Mean size of bodies: received, as far as they were read, and sent. "
                "Of all countries.",
                over_time(bytes_per_request("response"), "sent"),
                over_time(bytes_per_request("request"), "received"),
                unit=units.BytesIEC,
                missing="no requests",
            )
            .span(12)
            .height(8),
        ],
    )


def bytes_per_request(direction: str) -> str:
    return f"""
        sum(rate(flask_usage_{direction}_bytes_total{{ROUTE}}[$__rate_interval]))
        / (sum(rate(flask_usage_requests_total{{ROUTE}}[$__rate_interval])) > 0)
        """


def who_calls_it() -> Row:
    return Row(
        "Who calls it",
        [
            grid(
                "Countries",
                "In the chosen range. ZZ is unknown. Click one to see how the app is for it.",
                {"country": "Country"},
                columns.requests("country"),
                columns.server_errors("country"),
                columns.latency("country", 0.95),
                sorted_by="Requests",
                missing="no requests",
                links={"Country": TO_COUNTRY},
            )
            .span(12)
            .height(9),
            lines(
                "Methods",
                "Requests by method; _OTHER is none of HTTP's.",
                over_time(
                    "sum by (method) (rate(flask_usage_requests_total{CHOSEN}[$__rate_interval]))",
                    "{{method}}",
                ),
                unit=units.RequestsPerSecond,
                missing="no requests",
                stacked=True,
            )
            .span(12)
            .height(9),
        ],
    )


def what_goes_wrong() -> Row:
    return Row(
        "What goes wrong",
        [
            grid(
                "Answers",
                "Requests in the chosen range by status.",
                {"status": "Status", "method": "Method"},
                Column(
                    "Requests",
                    """
                    sum by (status, method) (
                      increase(flask_usage_requests_total{CHOSEN}[$__range])
                    ) > 0
                    """,
                    COUNT,
                    decimals=0,
                ),
                sorted_by="Requests",
                missing="no requests",
            )
            .span(8)
            .height(8),
            grid(
                "Unhandled exceptions",
                "Exceptions that no error handler answered, in the chosen range, of all "
                "countries. A first one ever is not seen by Prometheus: the records have it.",
                {"exception": "Exception"},
                Column(
                    "Times",
                    """
                    sum by (exception) (
                      increase(flask_usage_exceptions_total{ROUTE}[$__range])
                    ) > 0
                    """,
                    COUNT,
                    decimals=0,
                ),
                sorted_by="Times",
                missing="no unhandled exceptions",
            )
            .span(8)
            .height(8),
            lines(
                "Exceptions over time",
                "Unhandled exceptions per second, of all countries.",
                over_time(
                    """\
sum by (exception) (rate(flask_usage_exceptions_total{ROUTE}[$__rate_interval]))""",
                    "{{exception}}",
                ),
                unit=units.CountsPerSecond,
                missing="no unhandled exceptions",
            )
            .span(8)
            .height(8),
        ],
    )
