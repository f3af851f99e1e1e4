"""`flask usage migrate`: creates or upgrades the tables of the app's SQL storages."""

from __future__ import annotations

import click

from flask_usage_metrics.cli.group import Refused, tracked, usage
from flask_usage_metrics.errors import StorageError


@usage.command("migrate", short_help="Make or upgrade the tables of the SQL storages.")
@click.option("--plan", "only_plan", is_flag=True, help="Say what there is to do, and do nothing.")
@click.option(
    "--respell",
    "respells",
    is_flag=True,
    help="Also spell what flask-track-usage wrote as now: chrome 139.0 as Chrome 139.",
)
def migrate(only_plan: bool, respells: bool) -> None:
    """Make the tables of the app's SQL storages, or upgrade them.

    The first write does the same, unless the database's user may not. All of it is additive:
    columns are added or widened, rows stay. It can be done while the app runs, also by an older
    version; what is written meanwhile waits.

    With --respell the rows of flask-track-usage change: names and major versions of browsers,
    platforms, JSON without blanks, addresses. Then old and new rows are of the same groups.
    """
    # Imported here: SQLAlchemy takes 0.2 s, which no other command of the app need wait for.
    from flask_usage_metrics.storage.sql import SQLStorage
    from flask_usage_metrics.storage.sql.old_rows import respell

    tracking = tracked()
    storages = [writer for writer in tracking.writers if isinstance(writer, SQLStorage)]
    if not storages:
        raise Refused("none of the app's storages is a SQL database")
    failed = False
    for storage in storages:
        try:
            steps = storage.plan() if only_plan else storage.migrate()
            changes = [change for step in steps for change in step.changes]
            if respells and not (only_plan and changes):
                rows = respell(storage.database, storage.track_table, only_count=only_plan)
                changes += [f"respell {rows} row(s) of flask-track-usage"] if rows else []
            elif respells:  # a table that is not upgraded yet cannot be read
                changes.append("respell the rows of flask-track-usage")
        except StorageError as error:
            click.echo(f"Error: {error}", err=True)
            failed = True
            continue
        state = ("to do" if only_plan else "done") if changes else "up to date"
        click.echo(f"{storage.name}: {state}")
        for change in changes:
            click.echo(f"  {change}")
    if failed:
        raise click.exceptions.Exit(1)
