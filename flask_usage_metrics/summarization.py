"""flask-track-usage's sums by hour, day and month, made of the records when they are asked for.

So there is nothing to keep up to date, and nothing that parallel workers could overwrite.
"""

# ruff: noqa: N816 - the names are flask-track-usage's

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import msgspec

from flask_usage_metrics.records.query import Every, as_utc, next_start, truncate
from flask_usage_metrics.records.summary import Summary

PERIODS: tuple[Every, ...] = ("hour", "day", "month")


class Summation(msgspec.Struct, frozen=True):
    """Hits and bytes by the values of one field: what flask-track-usage calls a hook.

    Attributes:
        name: Its name there; ``name + "s"``, as in that documentation, means the same.
        field: What of the record is grouped by and can be filtered by, one of `EQUALITY_FILTERS`.
        key: What a row names the value; None: as the field.
    """

    name: str
    field: str
    key: str | None = None


# The singular is in flask-track-usage's code, the plural in its documentation.
sumUrl = sumUrls = Summation("sumUrl", "url")
sumRemote = sumRemotes = Summation("sumRemote", "remote_addr")
sumUserAgent = sumUserAgents = Summation("sumUserAgent", "user_agent", "user_agent_string")
sumLanguage = sumLanguages = sumLanugages = Summation("sumLanguage", "language")
sumServer = sumServers = Summation("sumServer", "app", "server_name")
sumVisitor = sumVisitors = Summation("sumVisitor", "visitor")
sumGeo = sumGeos = Summation("sumGeo", "country")

SUMMATIONS = (sumUrl, sumRemote, sumUserAgent, sumLanguage, sumServer, sumVisitor, sumGeo)
KNOWN = ", ".join(summation.name for summation in SUMMATIONS)
"""Their names, for messages."""

_BY_NAME = {
    **{summation.name: summation for summation in SUMMATIONS},
    **{f"{summation.name}s": summation for summation in SUMMATIONS},
    "sumLanugages": sumLanguage,
}


def find_summation(hook: object) -> Summation:
    """Return the sum that was meant.

    Args:
        hook: One of `SUMMATIONS`, its name or its name in the plural.

    Raises:
        NotImplementedError: It is none of these.
    """
    found = _BY_NAME.get(hook) if isinstance(hook, str) else hook
    if isinstance(found, Summation) and found in SUMMATIONS:
        return found
    raise NotImplementedError(f"there is no sum {hook!r}: expected {KNOWN}")


def sum_up(
    summarize: Callable[..., list[Summary]],
    summation: Summation,
    start_date: datetime | None,
    end_date: datetime | None,
    limit: int,
    page: int,
    target: str | None,
) -> dict[str, list[dict[str, Any]]]:
    """Do the work of `Storage.get_sum`, which see.

    Args:
        summarize: `Storage.summarize`.
        summation: What to sum up.
        start_date: As there.
        end_date: As there.
        limit: As there.
        page: As there.
        target: As there.
    """
    if limit < 0:
        raise ValueError(f"limit must not be negative, but it is {limit}")
    first = (max(page, 1) - 1) * limit
    field, key = summation.field, summation.key or summation.field
    filters = {} if target is None else {field: target}
    sums: dict[str, list[dict[str, Any]]] = {}
    for every in PERIODS:
        since, until = _range(as_utc(start_date), as_utc(end_date), every)
        rows = [
            {
                "date": summary.start.replace(tzinfo=None),
                "hits": summary.requests,
                "transfer": summary.bytes_sent,
                key: summary.group[field],
            }
            for summary in summarize((field,), since, until, every=every, **filters)
            if summary.start is not None and summary.group[field] is not None
        ]
        # What begins at once keeps its order: the busiest first, then by the value.
        rows.sort(key=lambda row: row["date"], reverse=True)
        sums[every] = rows[first : first + limit]
    return sums


def _range(
    start: datetime | None, end: datetime | None, every: Every
) -> tuple[datetime | None, datetime | None]:
    """Return the range, its end not included, of the hours, days or months that are meant."""
    until = None if end is None else next_start(truncate(end, every), every)
    if start is None:
        return None, until
    since = truncate(start, every)
    following = next_start(since, every)
    if end is None:
        return since, following
    if since == start:
        return since, until
    # The one that contains the start began before it. After the last there is, none begins.
    return (start, start) if following is None else (following, until)
