"""Times on a command line: read from options, written in messages."""

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
# Checked before `datetime.fromisoformat`, which takes more, depending on Python's version.
_MOMENT = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
    r"([t ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{3}([0-9]{3})?)?)?(z|[+-][0-9]{2}:[0-9]{2})?)?"
)


def when(ctx: click.Context, param: click.Parameter, value: str) -> datetime:
    """Return the time an option names, aware UTC; the callback of such an option.

    All options of one command line have the same now.

    Raises:
        BadParameter: The value is no time.
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
    """Return the time that a text names, aware UTC.

    Args:
        text: A time ago (``90m``, ``24h``, ``7d``, ``2w``); ``now``; ``today`` or ``yesterday``,
            which mean midnight; or ISO 8601, where a date means midnight, and UTC if there is no
            offset.
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
    """Return an aware UTC time for people: ``"2026-08-01 12:00"``."""
    return moment.replace(tzinfo=None).isoformat(" ", "minutes")


def exactly(moment: datetime) -> str:
    """Return an aware UTC time as `parse_when` takes it: ``"2026-08-01T12:00:00.000001Z"``."""
    return moment.replace(tzinfo=None).isoformat() + "Z"
