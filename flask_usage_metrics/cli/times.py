"""Times as they are written on a command line."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone

import click

_UNITS = {
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
    "w": timedelta(weeks=1),
}
_AGO = re.compile(r"([0-9]{1,9})([mhdw])")
# Not all that fromisoformat takes: that depends on Python's version.
_MOMENT = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
    r"([t ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{3}([0-9]{3})?)?)?(z|[+-][0-9]{2}:[0-9]{2})?)?"
)


def when(ctx: click.Context, param: click.Parameter, value: str) -> datetime:
    """Return the moment that was meant; for the callback of an option.

    All options of one command line have the same now.

    Raises:
        BadParameter: It is not a time.
    """
    now = ctx.meta.setdefault("flask_usage_metrics.now", datetime.now(timezone.utc))
    try:
        return parse_when(value, now)
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is not a time: expected such as 7d, 24h, 90m, yesterday, today, now, "
            "2026-08-01, 2026-08-01T12:00 (UTC) or 2026-08-01T12:00:00+02:00",
            ctx,
            param,
        ) from None


def parse_when(text: str, now: datetime) -> datetime:
    """Return the moment that was meant, in UTC.

    Args:
        text: So long ago (``90m``, ``24h``, ``7d``, ``2w``); ``now``; ``today`` or ``yesterday``,
            which mean their midnight; or ISO 8601, where a date is its midnight and what has no
            offset is UTC.
        now: Aware UTC.

    Raises:
        ValueError: It is none of these, or before the year 1 or after 9999.
    """
    text = text.strip().lower()
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    try:
        if text == "now":
            return now
        if text == "today":
            return midnight
        if text == "yesterday":
            return midnight - timedelta(days=1)
        if ago := _AGO.fullmatch(text):
            return now - int(ago[1]) * _UNITS[ago[2]]
        if _MOMENT.fullmatch(text):
            moment = datetime.fromisoformat(text.replace("z", "+00:00"))
            if moment.tzinfo is None:
                return moment.replace(tzinfo=timezone.utc)
            return moment.astimezone(timezone.utc)
    except OverflowError:
        pass
    raise ValueError("not a time")


def to_the_minute(moment: datetime) -> str:
    """Return a moment in UTC for people."""
    return moment.replace(tzinfo=None).isoformat(" ", "minutes")


def exactly(moment: datetime) -> str:
    """Return a moment as `parse_when` takes it."""
    return moment.replace(tzinfo=None).isoformat() + "Z"
