"""Options that several commands have, each with one meaning: decorators for a command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from flask_usage_metrics.cli.times import when

since = click.option(
    "--since", metavar="WHEN", callback=when, required=True, help="Requests from then on."
)
"""Start of a range, included: a required argument ``since``, aware UTC."""

until = click.option(
    "--until",
    metavar="WHEN",
    callback=when,
    default="now",
    show_default=True,
    help="Requests before then.",
)
"""End of a range, not included: an argument ``until``, aware UTC."""

endpoints = click.option(
    "--endpoint", "endpoints", multiple=True, help="Only of this one; may be repeated."
)
"""A filter, see `filters`: an argument ``endpoints``, a tuple of texts."""

status_classes = click.option(
    "--status-class",
    "status_classes",
    multiple=True,
    type=click.Choice(["1xx", "2xx", "3xx", "4xx", "5xx"], case_sensitive=False),
    help="Only of this one; may be repeated.",
)
"""A filter, see `filters`: an argument ``status_classes``, a tuple of texts."""

quiet = click.option("-q", "--quiet", is_flag=True, help="Say only what went wrong.")
"""A flag ``quiet``: nothing goes to stdout."""


def filters(endpoints: Sequence[str], status_classes: Sequence[str]) -> dict[str, Any]:
    """Return the filters of `Storage.records` for the options of the same names."""
    given = {"endpoint": endpoints, "status_class": status_classes}
    return {field: list(values) for field, values in given.items() if values}
