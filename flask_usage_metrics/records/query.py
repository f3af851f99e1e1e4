"""The conditions of a read call: filters, fields to group by, hours, days and months."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta, timezone
from typing import Any, Literal

import msgspec

from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.records.variables import VARIABLE, variable_key, variable_text

Order = Literal["oldest", "newest"]
Every = Literal["hour", "day", "month"]

EQUALITY_FILTERS = (
    "endpoint",
    "method",
    "status",
    "country",
    "client",
    "path",
    "username",
    "blueprint",
    "visitor",
    "trace_id",
    "remote_addr",
    "consumer",
    "url",
    "user_agent",
    "language",
    "app",
    "utm_source",
    "utm_medium",
    "utm_campaign",
    "ref",
)
"""Filters that compare for equality: fields of the record by these names, and `url`. Any key of
``g.track_var`` does as well: ``track_var.<key>``."""

GROUP_FIELDS = (*EQUALITY_FILTERS, "browser", "platform", "exception", "rule")
"""Fields of the record that `summarize` can group by, and `url`; and any ``track_var.<key>``."""


_ANY_VARIABLE = f"{VARIABLE}<key>"
_OTHER_FILTERS = (_ANY_VARIABLE, "status_class", "path_prefix")


class Filter(msgspec.Struct, frozen=True):
    """The records that a read call selects: those for which all conditions hold.

    Attributes:
        since: Aware UTC; included. None: from the first.
        until: Aware UTC; not included. None: to the last.
        any_of: For each field, the values it may have; None among them means unknown. Those of a
            ``track_var.<key>`` are texts, as `variable_text` returns them.
        status_classes: First digits the status may have, such as ``{5}``; None: any.
        path_prefixes: Beginnings the path may have; None: any.
    """

    since: datetime | None = None
    until: datetime | None = None
    any_of: dict[str, tuple[Any, ...]] = {}
    status_classes: frozenset[int] | None = None
    path_prefixes: tuple[str, ...] | None = None

    @classmethod
    def parse(
        cls, since: datetime | None, until: datetime | None, conditions: dict[str, Any]
    ) -> Filter:
        """Check the arguments of a read call.

        Args:
            since: Start of the range, included; naive means UTC.
            until: End of the range, not included; naive means UTC.
            conditions: By name of the filter a value, or a list of values any of which may hold.

        Raises:
            TypeError: A filter of that name is not known.
            ValueError: A status class is not like ``"5xx"``.
        """
        any_of: dict[str, tuple[Any, ...]] = {}
        status_classes: frozenset[int] | None = None
        path_prefixes: tuple[str, ...] | None = None
        for name, given in conditions.items():
            values = as_tuple(given)
            if name in EQUALITY_FILTERS:
                any_of[name] = values
            elif variable_key(name) is not None:
                texts = [(value, variable_text(value)) for value in values]
                # A list, which is no value to count by, is not what is absent.
                any_of[name] = tuple(
                    text for value, text in texts if value is None or text is not None
                )
            elif name == "status_class":
                status_classes = frozenset(_status_class(value) for value in values)
            elif name == "path_prefix":
                path_prefixes = tuple(str(value) for value in values)
            else:
                known = ", ".join((*EQUALITY_FILTERS, *_OTHER_FILTERS))
                raise TypeError(f"unknown filter {name!r}: expected one of {known}")
        return cls(as_utc(since), as_utc(until), any_of, status_classes, path_prefixes)

    def matches(self, record: UsageRecord) -> bool:
        """Tell whether a record is selected."""
        if self.since is not None and record.started_at < self.since:
            return False
        if self.until is not None and record.started_at >= self.until:
            return False
        if self.status_classes is not None and record.status // 100 not in self.status_classes:
            return False
        if self.path_prefixes is not None and not record.path.startswith(self.path_prefixes):
            return False
        return all(value_of(record, field) in values for field, values in self.any_of.items())


def value_of(record: UsageRecord, field: str) -> Any:
    """Return the value of a record that filters and groups compare.

    Args:
        record: The record.
        field: One of `GROUP_FIELDS`, or ``track_var.<key>``.
    """
    if field.startswith(VARIABLE):
        return variable_text(record.track_var.get(field.removeprefix(VARIABLE)))
    return getattr(record, field)


def as_tuple(given: Any) -> tuple[Any, ...]:
    """Return the values given to a filter: those of a list, tuple or set, else the one value."""
    if isinstance(given, list | tuple | set | frozenset):
        return tuple(given)
    return (given,)


def as_utc(moment: datetime | None) -> datetime | None:
    """Return the moment in UTC; a naive one is taken as UTC."""
    if moment is None:
        return None
    if moment.tzinfo is None:
        return moment.replace(tzinfo=timezone.utc)
    return moment.astimezone(timezone.utc)


def truncate(moment: datetime, every: Every) -> datetime:
    """Return the start of the hour, day or month a moment lies in."""
    start = moment.replace(minute=0, second=0, microsecond=0)
    if every == "hour":
        return start
    start = start.replace(hour=0)
    return start if every == "day" else start.replace(day=1)


def next_start(start: datetime, every: Every) -> datetime | None:
    """Return the start of the next hour, day or month.

    Args:
        start: As `truncate` returns it.
        every: ``"hour"``, ``"day"`` or ``"month"``.

    Returns:
        Aware UTC, as `start` is; None if it would be after the year 9999.
    """
    length = {"hour": timedelta(hours=1), "day": timedelta(days=1), "month": timedelta(days=31)}
    try:
        return truncate(start + length[every], every)
    except OverflowError:
        return None


def check_grouping(by: Collection[str], every: str | None) -> tuple[str, ...]:
    """Check the arguments of `summarize` and return the fields to group by.

    Raises:
        ValueError: A field or a period of that name is not known.
    """
    fields = (by,) if isinstance(by, str) else tuple(by)
    for field in fields:
        if field not in GROUP_FIELDS and variable_key(field) is None:
            raise ValueError(
                f"cannot group by {field!r}: expected one of "
                f"{', '.join((*GROUP_FIELDS, _ANY_VARIABLE))}"
            )
    if every not in (None, "hour", "day", "month"):
        raise ValueError(f"every must be 'hour', 'day', 'month' or None, not {every!r}")
    return fields


def _status_class(value: Any) -> int:
    text = str(value)
    if len(text) == 3 and text[0] in "12345" and text[1:].lower() == "xx":
        return int(text[0])
    raise ValueError(f"status_class must be like '5xx', not {value!r}")
