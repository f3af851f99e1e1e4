"""Audience: who uses the app, from where, and by what kind of program."""

from __future__ import annotations

import columns
import variables
from assembly import Row, assemble
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard
from links import TO_COUNTRY, TO_ENDPOINT
from maps import world
from panels import COUNT, at_the_end, big_number, lines, over_time, steps
from promql import busiest, share
from tables import Column, grid, matrix

REQUESTS = "sum(increase(flask_usage_requests_total{CHOSEN}[$__range]))"
CLIENTS = "sum(increase(flask_usage_client_requests_total{HERE}[$__range]))"
BY_CONSUMER = """\
sum by (consumer) (increase(flask_usage_consumer_requests_total{HERE}[$__range]))"""

SOMEWHERE = 'country!~"ZZ|__other__"'
WRONG = steps("text", (0, "green"), (0.05, "yellow"), (0.2, "red"))
UNKNOWN = steps("text", (0, "green"), (0.2, "yellow"), (0.5, "red"))


def dashboard() -> Dashboard:
    return assemble(
        "flask-usage-audience",
        "Flask usage: audience",
        "Where a Flask app's requests come from, and who sends them: people, crawlers, "
        "programs, API clients.",
        [
            variables.data_source(),
            variables.job(),
            variables.instance(),
            variables.endpoint(),
            variables.country(),
        ],
        who(),
        where_from(),
        what_they_are(),
    )


def who() -> Row:
    panels = [
        big_number(
            "Requests",
            "In the chosen range, without the first one of each new country, endpoint and status, "
            "which Prometheus cannot see: for the exact count ask the records.",
            at_the_end(REQUESTS),
            unit=COUNT,
        ).decimals(0),
        big_number(
            "Visitors today",
            "Different visitors since midnight UTC; of several servers, the one that saw most. "
            "Counted with TRACK_USAGE_VISITORS or TRACK_USAGE_COOKIE.",
            over_time('sum(max by (job) (flask_usage_visitors{HERE,window="1d"}))'),
            unit=COUNT,
            missing="not counted",
        ).decimals(0),
        big_number(
            "Countries seen",
            "Countries with at least one request in the chosen range.",
            at_the_end(
                f"""
                count(
                  sum by (country) (
                    increase(flask_usage_requests_total{{CHOSEN,{SOMEWHERE}}}[$__range])
                  ) > 0
                ) or vector(0)
                """
            ),
            unit=units.Short,
        ),
        big_number(
            "Unknown country",
            "Private or unlisted address, no database, left out for privacy, or no room in the "
            "table of series (__other__). High behind a proxy: set ProxyFix, or "
            "TRACK_USAGE_TRUSTED_PROXIES.",
            at_the_end(share('country=~"ZZ|__other__"', of=REQUESTS)),
            unit=units.PercentUnit,
            colors=UNKNOWN,
            missing="no requests",
        ),
        big_number(
            "Bots",
            "Share of requests by declared bots, AI crawlers, monitors and scripts, told by "
            "their User-Agent. Of all endpoints and countries.",
            at_the_end(share('client!~"human|prefetch"', of=CLIENTS)),
            unit=units.PercentUnit,
            missing="no requests",
        ),
        big_number(
            "AI crawlers",
            "Requests in the chosen range by AI training, AI search, and agents that act for a "
            "user. Of all endpoints and countries.",
            at_the_end(
                """
                sum(increase(
                  flask_usage_client_requests_total{HERE,client=~"ai-.*"}[$__range]
                )) or vector(0)
                """
            ),
            unit=COUNT,
        ).decimals(0),
    ]
    return Row("Who uses it", [panel.span(4).height(4) for panel in panels])


def where_from() -> Row:
    return Row(
        "Where from",
        [
            world(
                "Requests by country",
                "In the chosen range, without those whose country is unknown. The table beside "
                "it has all of them.",
                f"""
                sum by (country) (
                  increase(flask_usage_requests_total{{CHOSEN,{SOMEWHERE}}}[$__range])
                ) > 0
                """,
                label="country",
                missing="no requests",
            )
            .span(14)
            .height(14),
            grid(
                "Countries",
                "In the chosen range. ZZ is unknown, __other__ had no room in the table of "
                "series. Click one to see how it is served. p95 needs country among the "
                "TRACK_USAGE_HISTOGRAM_LABELS.",
                {"country": "Country"},
                columns.requests("country"),
                columns.server_errors("country"),
                columns.latency("country", 0.95),
                sorted_by="Requests",
                missing="no requests",
                links={"Country": TO_COUNTRY},
            )
            .span(10)
            .height(14),
            lines(
                "Countries over time",
                "The eight countries with most requests in the chosen range.",
                over_time(
                    busiest(
                        8,
                        """\
sum by (country) (rate(flask_usage_requests_total{CHOSEN}[$__rate_interval]))""",
                        by="country",
                        ranked="""\
sum by (country) (increase(flask_usage_requests_total{CHOSEN}[$__range] @ end()))""",
                    ),
                    "{{country}}",
                ),
                unit=units.RequestsPerSecond,
                missing="no requests",
            )
            .span(12)
            .height(9),
            matrix(
                "Endpoints by country",
                "Requests in the chosen range: the hundred largest numbers. Click an endpoint "
                "for all about it.",
                """
                topk(100,
                  sum by (endpoint, country) (
                    increase(flask_usage_requests_total{CHOSEN}[$__range])
                  ) > 0
                )
                """,
                down=("endpoint", "Endpoint"),
                across=("country", "Country"),
                missing="-",
                link=TO_ENDPOINT,
            )
            .span(12)
            .height(9),
        ],
    )


def what_they_are() -> Row:
    kinds = "sum by (client) (rate(flask_usage_client_requests_total{%s}[$__rate_interval]))"
    return Row(
        "What they are",
        [
            lines(
                "Kinds of client",
                "human, prefetch, search-bot, ai-training, ai-search, ai-agent, preview, feed, "
                "monitor, script, other-bot: told by the User-Agent. Of all endpoints and "
                "countries.",
                over_time(kinds % "HERE", "{{client}}"),
                unit=units.RequestsPerSecond,
                stacked=True,
            )
            .span(12)
            .height(8),
            lines(
                "AI crawlers by kind",
                "Who reads to train a model, who to answer from, who for a user who asked. "
                "Of all endpoints and countries.",
                over_time(kinds % 'HERE,client=~"ai-.*"', "{{client}}"),
                unit=units.RequestsPerSecond,
                missing="no AI crawlers",
            )
            .span(12)
            .height(8),
            grid(
                "API clients",
                "Requests in the chosen range by whoever they are made for. Many 4xx: a client "
                "that integrates wrongly. Of all endpoints and countries.",
                {"consumer": "API client"},
                Column("Requests", f"{BY_CONSUMER} > 0", COUNT, decimals=0),
                Column("4xx", share('status=~"4.."', of=BY_CONSUMER), units.PercentUnit, WRONG, 2),
                Column("5xx", share('status=~"5.."', of=BY_CONSUMER), units.PercentUnit, WRONG, 2),
                sorted_by="Requests",
                missing="none are named: TrackUsage(app, consumer=...) names them",
            )
            .span(24)
            .height(8),
        ],
    )
