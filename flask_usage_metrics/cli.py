"""`flask usage …`: what the owner of an app can ask for in a terminal.

Results go to stdout, all else to stderr. A command ends with 0 if it did all it was asked for, 1 if
not, so that trying again makes sense, 2 if it was asked for wrongly, and 130 after Ctrl-C.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from itertools import islice
from pathlib import Path
from typing import Any

import click
from flask import current_app
from flask.cli import AppGroup

from flask_usage_metrics import settings
from flask_usage_metrics.errors import ConfigError, StorageError
from flask_usage_metrics.extension import EXTENSION, Tracking, own_version
from flask_usage_metrics.monitoring import (
    DEFAULT_TARGET,
    TOKEN_FILE,
    Differs,
    make_files,
    write_files,
)
from flask_usage_metrics.replay import NotTaken, Replay
from flask_usage_metrics.storage import Storage

usage = AppGroup("usage", help="What flask_usage_metrics knows of this app's requests.")


class Refused(click.ClickException):
    """A command cannot begin: the app or its environment is not set up for it."""

    exit_code = 2


class Interrupted(click.ClickException):
    """Ctrl-C ended a command; the message says how to go on."""

    exit_code = 130


# ------------------------------------------------------------------------ times

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


def _to_the_minute(moment: datetime) -> str:
    return moment.replace(tzinfo=None).isoformat(" ", "minutes")


def _exactly(moment: datetime) -> str:
    """Return a moment as `parse_when` takes it."""
    return moment.replace(tzinfo=None).isoformat() + "Z"


# ------------------------------------------------------------------------ the app


def _tracking() -> Tracking:
    """Return our parts of the current app.

    Raises:
        Refused: There are none.
    """
    tracking: Tracking | None = current_app.extensions.get(EXTENSION)
    if tracking is None:
        raise Refused(
            f"the app {current_app.name!r} is not tracked: "
            "call TrackUsage(app), or usage.init_app(app) in its factory"
        )
    return tracking


def _storage() -> Storage:
    """Return the first storage of the current app that can be read.

    Raises:
        Refused: There is none.
    """
    tracking = _tracking()
    try:
        return tracking.owner.storage
    except RuntimeError:
        raise Refused(
            "none of the app's storages can be read: "
            "add one to TRACK_USAGE_STORAGE, such as sqlite:///usage.sqlite3"
        ) from None


def _amount(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}".replace(",", " ")


# ------------------------------------------------------------------------ flask usage replay-spans


@usage.command(
    "replay-spans",
    short_help="Export stored records as OpenTelemetry spans.",
    epilog="""\b
    Examples:
      flask --app shop usage replay-spans --since 7d --dry-run
      flask --app shop usage replay-spans --since 2026-08-01 --until today --status-class 5xx
    """,
)
@click.option(
    "--since", metavar="WHEN", callback=when, required=True, help="Requests from then on."
)
@click.option(
    "--until",
    metavar="WHEN",
    callback=when,
    default="now",
    show_default=True,
    help="Requests before then.",
)
@click.option("--endpoint", "endpoints", multiple=True, help="Only of this one; may be repeated.")
@click.option(
    "--status-class",
    "status_classes",
    multiple=True,
    type=click.Choice(["1xx", "2xx", "3xx", "4xx", "5xx"], case_sensitive=False),
    help="Only of this one; may be repeated.",
)
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
@click.option("-q", "--quiet", is_flag=True, help="Say only what went wrong.")
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

    Each record becomes a span, sampled or not at the time, that says what the record does. Its ids
    are those of the request, or made of the record's: doing it again gives the same spans.

    They go to a collector over OTLP/HTTP, as OpenTelemetry's variables say:
    OTEL_EXPORTER_OTLP_ENDPOINT (default: http://localhost:4318), OTEL_EXPORTER_OTLP_HEADERS,
    OTEL_EXPORTER_OTLP_TIMEOUT (seconds to try, default: 10), OTEL_SERVICE_NAME (default: the
    app's name).

    WHEN is 90m, 24h, 7d or 2w ago, yesterday, today, now, 2026-08-01, 2026-08-01T12:00 or
    2026-08-01T12:00:00+02:00; without an offset it is UTC.
    """
    if since >= until:
        raise click.UsageError(
            f"--since must be before --until, but {_exactly(since)} is not before {_exactly(until)}"
        )
    storage = _storage()
    filters: dict[str, Any] = {}
    if endpoints:
        filters["endpoint"] = list(endpoints)
    if status_classes:
        filters["status_class"] = list(status_classes)
    stretch = f"{_to_the_minute(since)} to {_to_the_minute(until)} UTC"
    has_bar = not (quiet or dry_run) and sys.stderr.isatty()
    exported = unfit = 0
    going_on = since

    def state(why: str) -> str:
        if dry_run:
            return why
        return (
            f"{why}; {_amount(exported, 'span')} exported\n"
            f"To go on: the same with --since {_exactly(going_on)} --until {_exactly(until)}"
        )

    try:
        if dry_run:
            count = storage.count(since, until, **filters)
            if not quiet:
                click.echo(f"{_amount(count, 'span')} would be exported, {stretch}")
            return
        with Replay(current_app.name, user=_names_users(), version=own_version()) as replay:
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
        click.echo(f"{_amount(exported, 'span')} exported, {stretch}")
    if unfit:
        raise click.ClickException(
            f"{_amount(unfit, 'record')} cannot be spans, such as by their times"
        )


def _names_users() -> bool:
    return settings.read(current_app.config).traces_enduser


@contextmanager
def _progress(length: int | None) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr, of a length that is known; yields what makes it longer."""
    if length is None:
        yield lambda steps: None
        return
    with click.progressbar(length=length, label="Spans", show_pos=True, file=sys.stderr) as bar:
        yield bar.update


# ------------------------------------------------------------------------ flask usage grafana


@usage.command(
    "grafana",
    short_help="Write dashboards, rules and configuration for Prometheus and Grafana.",
    epilog="""\b
    Examples:
      flask --app shop usage grafana -o monitoring
      flask --app shop usage grafana -o monitoring --target 10.0.0.5:8000 --target 10.0.0.6:8000
    """,
)
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="The folder to write to; it is made if need be.",
)
@click.option("--job", metavar="NAME", help="Prometheus' name for the app (default: its own).")
@click.option(
    "--target",
    "targets",
    metavar="HOST:PORT",
    multiple=True,
    default=[DEFAULT_TARGET],
    show_default=True,
    help="A server of the app, as Prometheus reaches it; may be repeated.",
)
@click.option(
    "--metrics-path",
    metavar="PATH",
    help="Where its metrics are (default: TRACK_USAGE_METRICS_PATH).",
)
@click.option("--force", is_flag=True, help="Write over files that were changed.")
@click.option("-q", "--quiet", is_flag=True, help="Say only what went wrong.")
def grafana(
    output: Path,
    job: str | None,
    targets: Sequence[str],
    metrics_path: str | None,
    force: bool,
    quiet: bool,
) -> None:
    """Write all that Prometheus and Grafana need to show this app.

    Dashboards, recording and alert rules, Prometheus' configuration with the app's job, path and
    token, files that provision Grafana, and a docker-compose.yml that starts both. Labels have
    the names that TRACK_USAGE_LABEL_NAMES gives them. Done again, it writes what is new.
    """
    _tracking()
    configured = settings.read(current_app.config)
    files = make_files(
        job=job or current_app.name,
        metrics_path=metrics_path or configured.metrics_path or "/metrics",
        targets=targets,
        token=configured.metrics_token,
        label_names=configured.shape.label_names,
    )
    try:
        written = write_files(output, files, replace=force)
    except Differs as error:
        raise Refused(
            f"these files of {output} were changed: {error}\nTo write over them: --force"
        ) from None
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from None
    if quiet:
        return
    click.echo(f"{_amount(len(written), 'file')} written to {output}")
    if TOKEN_FILE in written:
        click.echo(f"{output / TOKEN_FILE} can be read by you only: let Prometheus' user read it")


# ------------------------------------------------------------------------ flask usage migrate


@usage.command("migrate", short_help="Make or upgrade the tables of the SQL storages.")
@click.option("--plan", "only_plan", is_flag=True, help="Say what there is to do, and do nothing.")
def migrate(only_plan: bool) -> None:
    """Make the tables of the app's SQL storages, or upgrade them.

    The first write does the same, unless the database's user may not. All of it is additive:
    columns are added or widened, rows stay. It can be done while the app runs, also by an older
    version; what is written meanwhile waits.
    """
    # Imported here: SQLAlchemy takes 0.2 s, which no other command of the app need wait for.
    from flask_usage_metrics.storage.sql import SQLStorage

    tracking = _tracking()
    storages = [writer for writer in tracking.writers if isinstance(writer, SQLStorage)]
    if not storages:
        raise Refused("none of the app's storages is a SQL database")
    failed = False
    for storage in storages:
        try:
            steps = storage.plan() if only_plan else storage.migrate()
        except StorageError as error:
            click.echo(f"Error: {error}", err=True)
            failed = True
            continue
        changes = [change for step in steps for change in step.changes]
        state = ("to do" if only_plan else "done") if changes else "up to date"
        click.echo(f"{storage.name}: {state}")
        for change in changes:
            click.echo(f"  {change}")
    if failed:
        raise click.exceptions.Exit(1)
