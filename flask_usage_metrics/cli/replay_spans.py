"""`flask usage replay-spans`: exports stored records as OpenTelemetry spans."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import islice

import click
from flask import current_app

from flask_usage_metrics.cli import options
from flask_usage_metrics.cli.group import Interrupted, Refused, amount, readable, usage
from flask_usage_metrics.cli.times import exactly, to_the_minute
from flask_usage_metrics.errors import ConfigError, StorageError
from flask_usage_metrics.extension import settings
from flask_usage_metrics.extension.tracking import package_version
from flask_usage_metrics.traces.replay import NotTaken, Replay


@usage.command(
    "replay-spans",
    short_help="Export stored records as OpenTelemetry spans.",
    epilog="""\b
    Examples:
      flask --app shop usage replay-spans --since 7d --dry-run
      flask --app shop usage replay-spans --since 2026-08-01 --until today --status-class 5xx
    """,
)
@options.since
@options.until
@options.endpoints
@options.status_classes
@click.option("--dry-run", is_flag=True, help="Say how many there are, and export none.")
@click.option(
    "--batch",
    "size",
    metavar="N",
    type=click.IntRange(1, 10_000),
    default=512,
    show_default=True,
    help="Spans to send at a time.",
)
@options.quiet
def replay_spans(
    since: datetime,
    until: datetime,
    endpoints: Sequence[str],
    status_classes: Sequence[str],
    dry_run: bool,
    size: int,
    quiet: bool,
) -> None:
    """Export stored records as OpenTelemetry spans, such as to fill a new tracing backend.

    Each record becomes a span with the record's values, whether or not the request was sampled. Its
    ids are those of the request's span, or derived from the record's id: a second replay sends the
    same spans.

    They go to a collector over OTLP/HTTP, as OpenTelemetry's variables say:
    OTEL_EXPORTER_OTLP_ENDPOINT (default: http://localhost:4318), OTEL_EXPORTER_OTLP_HEADERS,
    OTEL_EXPORTER_OTLP_TIMEOUT (seconds to try, default: 10), OTEL_SERVICE_NAME (default: the
    app's name).

    WHEN is 90m, 24h, 7d or 2w ago, yesterday, today, now, 2026-08-01, 2026-08-01T12:00 or
    2026-08-01T12:00:00+02:00; without an offset it is UTC.
    """
    if since >= until:
        raise click.UsageError(
            f"--since must be before --until, but {exactly(since)} is not before {exactly(until)}"
        )
    storage = readable()
    filters = options.filters(endpoints, status_classes)
    stretch = f"{to_the_minute(since)} to {to_the_minute(until)} UTC"
    has_bar = not (quiet or dry_run) and sys.stderr.isatty()
    exported = unfit = 0
    going_on = since

    def state(why: str) -> str:
        if dry_run:
            return why
        return (
            f"{why}; {amount(exported, 'span')} exported\n"
            f"To go on: the same with --since {exactly(going_on)} --until {exactly(until)}"
        )

    try:
        if dry_run:
            count = storage.count(since, until, **filters)
            if not quiet:
                click.echo(f"{amount(count, 'span')} would be exported, {stretch}")
            return
        with Replay(current_app.name, user=_names_users(), version=package_version()) as replay:
            count = storage.count(since, until, **filters) if has_bar else 0
            records = storage.records(since, until, **filters)
            with _progress(count if has_bar else None) as advance:
                while batch := list(islice(records, size)):
                    going_on = batch[0].started_at
                    sent = replay.send(batch)
                    exported += sent
                    unfit += len(batch) - sent
                    going_on = batch[-1].started_at
                    advance(len(batch))
    except KeyboardInterrupt:
        raise Interrupted(state("interrupted")) from None
    except NotTaken as error:
        raise click.ClickException(
            state(f"the collector did not take the spans: {error}")
        ) from None
    except StorageError as error:
        raise click.ClickException(state(f"the storage cannot be read now: {error}")) from None
    except ConfigError as error:
        raise Refused(str(error)) from None
    except NotImplementedError:
        raise Refused("the app's storage does not offer records()") from None
    if not quiet:
        click.echo(f"{amount(exported, 'span')} exported, {stretch}")
    if unfit:
        raise click.ClickException(
            f"{amount(unfit, 'record')} cannot be spans, such as by their times"
        )


def _names_users() -> bool:
    """Tell whether the app's settings let a span name the user."""
    return settings.read(current_app.config).traces_enduser


@contextmanager
def _progress(length: int | None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr; yields a function that advances it by a number of spans.

    Args:
        length: Spans in all; None: there is no bar.
    """
    if length is None:
        yield lambda steps: None
        return
    with click.progressbar(length=length, label="Spans", show_pos=True, file=sys.stderr) as bar:
        yield bar.update
