"""`flask usage grafana`: writes the files with which Prometheus and Grafana show the app."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from flask import current_app

from flask_usage_metrics.cli import options
from flask_usage_metrics.cli.group import Refused, amount, tracked, usage
from flask_usage_metrics.cli.monitoring_files import (
    DEFAULT_TARGET,
    TOKEN_FILE,
    Differs,
    make_files,
    write_files,
)
from flask_usage_metrics.extension import settings


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
@options.quiet
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
    tracked()
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
    click.echo(f"{amount(len(written), 'file')} written to {output}")
    if TOKEN_FILE in written:
        click.echo(f"{output / TOKEN_FILE} can be read by you only: let Prometheus' user read it")
