"""Objectives: how much of the error budget is left, and how fast it burns."""

from __future__ import annotations

from typing import Any

from assembly import Row
from grafana_foundation_sdk.models import units
from panels import COUNT, at_the_end, big_number, lines, over_time, steps
from tables import Column, grid

EVENTS = "sum by (job, slo) (increase(flask_usage_slo_events_total{HERE}[$__range]))"
BAD = 'sum by (job, slo) (increase(flask_usage_slo_events_total{HERE,result="bad"}[$__range]))'
GOAL = "max by (job, slo) (flask_usage_slo_objective_ratio{HERE})"
# Without any request nothing is spent and nothing burns, rather than something unknown.
BAD_SHARE = f"({BAD} / ({EVENTS} > 0) or 0 * {GOAL})"
BAD_SHARE_NOW = BAD_SHARE.replace("$__range", "$__rate_interval")

LEFT = steps("text", (-1e9, "red"), (0, "orange"), (0.25, "yellow"), (0.5, "green"))
# What the workbook of Google's SREs alerts at: the budget of 30 days is spent in 30, in 5, in 2.
BURNING = steps("transparent", (1, "yellow"), (6, "orange"), (14.4, "red"))

MISSING = "none declared: see TRACK_USAGE_SLO"


def row() -> Row:
    panels: list[Any] = [
        big_number(
            "Error budget left",
            "What may still go wrong in the chosen range before the objective is missed: 100 %, "
            "nothing did; below 0, it is missed. Choose the range of your objective, such as "
            "30 days, if Prometheus keeps so much.",
            at_the_end(f"1 - {BAD_SHARE} / (1 - {GOAL})", "{{slo}} ({{job}})"),
            unit=units.PercentUnit,
            colors=LEFT,
            missing="none declared",
            named=True,
        )
        .span(5)
        .height(6),
        grid(
            "Objectives",
            "What TRACK_USAGE_SLO declares, and how it went in the chosen range.",
            {"slo": "Objective", "job": "Job"},
            Column("Goal", GOAL, units.PercentUnit),
            Column("Good", f"1 - {BAD_SHARE}", units.PercentUnit, decimals=2),
            Column("Bad requests", BAD, COUNT, decimals=0),
            sorted_by="Bad requests",
            missing=MISSING,
        )
        .span(10)
        .height(6),
        lines(
            "Burn rate",
            "1: the budget is spent just when it renews. 6: of 30 days, in 5. 14.4: in 2. "
            "It is at 0 while nothing goes wrong.",
            over_time(f"{BAD_SHARE_NOW} / (1 - {GOAL})", "{{slo}} ({{job}})"),
            unit=units.Short,
            marks=BURNING,
            missing=MISSING,
        )
        .span(9)
        .height(6),
    ]
    return Row("Objectives", panels)
