"""`flask usage migrate`: creates or upgrades the tables of the app's SQL storages."""

from __future__ import annotations

import click

from flask_usage_metrics.cli.group import Refused, tracked, usage
from flask_usage_metrics.errors import StorageError


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

    tracking = tracked()
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
