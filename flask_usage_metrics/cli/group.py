"""The group of the commands, how they end, and the app they are asked of."""

from __future__ import annotations

import click
from flask import current_app
from flask.cli import AppGroup

from flask_usage_metrics.extension.tracking import Tracking, tracking_of
from flask_usage_metrics.storage import Storage

usage = AppGroup("usage", help="What flask_usage_metrics knows of this app's requests.")


class Refused(click.ClickException):
    """A command cannot begin: the app or its environment is not set up for it."""

    exit_code = 2


class Interrupted(click.ClickException):
    """Ctrl-C ended a command; the message says how to go on."""

    exit_code = 130


def tracked() -> Tracking:
    """Return our parts of the current app.

    Raises:
        Refused: There are none.
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
        return tracking.storage
    except RuntimeError:
        raise Refused(
            "none of the app's storages can be read: "
            "add one to TRACK_USAGE_STORAGE, such as sqlite:///usage.sqlite3"
        ) from None


def amount(number: int, noun: str) -> str:
    """Return a number of things in words: ``"1 span"``, ``"12 000 spans"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}".replace(",", " ")
