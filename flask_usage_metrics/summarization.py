"""flask-track-usage's sums by hour, day and month, computed from the records at every call.

No sum is stored: none can be out of date, or overwritten by a parallel worker.
"""

# ruff: noqa: N816 - the names are flask-track-usage's

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import msgspec

from flask_usage_metrics.records.query import Every, as_utc, next_start, truncate
from flask_usage_metrics.records.summary import Summary
from flask_usage_metrics.runtime.shown_values import shown

PERIODS: tuple[Every, ...] = ("hour", "day", "month")


class Summation(msgspec.Struct, frozen=True):
    """Hits and bytes by the values of one field: what flask-track-usage calls a hook.

    Attributes:
        name: Its name there; ``name + "s"``, as in that documentation, means the same.
        field: Field of the record to group by, one of `EQUALITY_FILTERS`.
        key: Key of the value in a row; None: the same as the field.
    """

    name: str
    field: str
    key: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Summation:
        """Return itself: in flask-track-usage sums are classes, and ``sumUrl()`` is a hook, too."""
        return self


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
"""Names of the sums, for messages."""

_BY_NAME = {
    **{summation.name: summation for summation in SUMMATIONS},
    **{f"{summation.name}s": summation for summation in SUMMATIONS},
    "sumLanugages": sumLanguage,
}


def find_summation(hook: object) -> Summation:
    """Return the sum that a hook names.

    Args:
        hook: One of `SUMMATIONS`, its name, or its name in the plural.

    Raises:
        NotImplementedError: It is none of these.
    """
    found = _BY_NAME.get(hook) if isinstance(hook, str) else hook
    if isinstance(found, Summation) and found in SUMMATIONS:
        return found
    raise NotImplementedError(f"there is no sum {shown(hook)}: expected {KNOWN}")


def sum_up(
    summarize: Callable[..., list[Summary]],
    summation: Summation,
    start_date: datetime | None,
    end_date: datetime | None,
    limit: int,
    page: int,
    target: str | None,
) -> dict[str, list[dict[str, Any]]]:
    """Return what `Storage.get_sum` does.

    Args:
        summarize: `Storage.summarize`.
        summation: Which sum.
        start_date: As in `Storage.get_sum`.
        end_date: Likewise.
        limit: Likewise.
        page: Likewise.
        target: Likewise.

    Raises:
        StorageUnavailable: The storage cannot be read now.
        ValueError: The limit is negative.
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
        # Rows of one period keep their order: the busiest first, then by the value.
        rows.sort(key=lambda row: row["date"], reverse=True)
        sums[every] = rows[first : first + limit]
    return sums


def _range(
    start: datetime | None, end: datetime | None, every: Every
) -> tuple[datetime | None, datetime | None]:
    """Return the range of whole hours, days or months for two dates of `Storage.get_sum`.

    Returns:
        Start, included, and end, not included, both aware UTC; None: without that bound.
    """
    until = None if end is None else next_start(truncate(end, every), every)
    if start is None:
        return None, until
    since = truncate(start, every)
    following = next_start(since, every)
    if end is None:
        return since, following
    if since == start:
        return since, until
    # The period that contains the start began before it. After the last one there is none.
    return (start, start) if following is None else (following, until)
