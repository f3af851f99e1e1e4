"""The group of the commands; the app they run for, and the exceptions that end them."""

from __future__ import annotations

import click
from flask import current_app
from flask.cli import AppGroup

from flask_usage_metrics.extension.tracking import Tracking, tracking_of
from flask_usage_metrics.storage import Storage

usage = AppGroup("usage", help="Usage records and metrics of this app: dashboards, tables, spans.")


class Refused(click.ClickException):
    """The app or its environment is not set up for the command; nothing was done."""

    exit_code = 2


class Interrupted(click.ClickException):
    """Ctrl-C ended the command; the message says how to go on."""

    exit_code = 130


def tracked() -> Tracking:
    """Return what tracks the current app.

    Raises:
        Refused: It is not tracked.
    """
    tracking = tracking_of(current_app)
    if tracking is None:
        raise Refused(
            f"the app {current_app.name!r} is not tracked: "
            "call TrackUsage(app), or usage.init_app(app) in its factory"
        )
    return tracking


def readable() -> Storage:
    """Return the first storage of the current app that can be read.

    Raises:
        Refused: There is none.
    """
    tracking = tracked()
    try:
        storage = tracking.storage
        # It is another process that writes: what is not there may be looked for in a wrong place.
        storage.is_of_app = False
        return storage
    except RuntimeError:
        raise Refused(
            "none of the app's storages can be read: "
            "add one to TRACK_USAGE_STORAGE, such as sqlite:///usage.sqlite3"
        ) from None


def amount(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural if need be: ``"1 span"``, ``"12 000 spans"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}".replace(",", " ")
