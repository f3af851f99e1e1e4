"""flask usage migrate: what it says, what it does, and how it ends."""

from __future__ import annotations

from pathlib import Path

from click.testing import Result
from flask import Flask
from helpers.front_door import Site
from helpers.old_tables import OLD_TABLE, plain
from helpers.records import make_record

from flask_usage_metrics.cli import usage


def migrate(app: Flask, *options: str) -> Result:
    """Run the command as the app's owner would; a traceback fails the test."""
    result = app.test_cli_runner().invoke(usage, ["migrate", *options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def make_old(file: Path) -> None:
    with plain(file) as connection:
        connection.execute(OLD_TABLE)
        connection.execute("INSERT INTO flask_usage (path, datetime) VALUES ('/', '2018-01-01')")


def tables(file: Path) -> list[str]:
    with plain(file) as connection:
        rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        return sorted(name for (name,) in rows)


def test_a_plan_is_said_and_nothing_is_done(tmp_path: Path) -> None:
    make_old(tmp_path / "usage.sqlite3")
    site = Site(tmp_path)
    result = migrate(site.app, "--plan")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "sqlite: to do"
    assert "  add the column flask_usage.country as TEXT" in lines
    assert "  create the index ix_flask_usage_datetime" in lines
    assert tables(tmp_path / "usage.sqlite3") == ["flask_usage"]
    assert migrate(site.app, "--plan").stdout == result.stdout


def test_a_plan_for_a_new_file_does_not_make_it(tmp_path: Path) -> None:
    site = Site(tmp_path)
    assert "  create the table flask_usage\n" in migrate(site.app, "--plan").stdout
    assert not (tmp_path / "usage.sqlite3").exists()


def test_what_was_planned_is_done_once(tmp_path: Path) -> None:
    make_old(tmp_path / "usage.sqlite3")
    site = Site(tmp_path)
    planned = migrate(site.app, "--plan").stdout
    assert migrate(site.app).stdout == planned.replace("to do", "done")
    assert migrate(site.app).stdout == migrate(site.app, "--plan").stdout == "sqlite: up to date\n"
    assert site.usage.storage.count() == 1
    site.usage.storage.write([make_record()])
    assert site.usage.storage.count() == 2


def test_rows_of_flask_track_usage_are_respelled_when_told_to(tmp_path: Path) -> None:
    make_old(tmp_path / "usage.sqlite3")
    with plain(tmp_path / "usage.sqlite3") as connection:
        for browser in ("chrome", "firefox", "google"):
            connection.execute("INSERT INTO flask_usage (ua_browser) VALUES (?)", [browser])
    site = Site(tmp_path)
    planned = migrate(site.app, "--plan", "--respell").stdout.splitlines()
    assert planned[-1] == "  respell the rows of flask-track-usage"
    assert tables(tmp_path / "usage.sqlite3") == ["flask_usage"]
    migrate(site.app)
    change = "  respell 2 row(s) of flask-track-usage\n"
    assert migrate(site.app).stdout == "sqlite: up to date\n"
    assert migrate(site.app, "--plan", "--respell").stdout == f"sqlite: to do\n{change}"
    assert migrate(site.app, "--respell").stdout == f"sqlite: done\n{change}"
    assert migrate(site.app, "--respell").stdout == "sqlite: up to date\n"
    with plain(tmp_path / "usage.sqlite3") as connection:
        rows = connection.execute("SELECT ua_browser FROM flask_usage ORDER BY id").fetchall()
    assert rows == [(None,), ("Chrome",), ("Firefox",), ("google",)]


def test_each_sql_storage_is_upgraded_and_one_that_fails_is_told(tmp_path: Path) -> None:
    first, second = tmp_path / "first.sqlite3", tmp_path / "second.sqlite3"
    with plain(first) as connection:
        connection.execute("CREATE VIEW flask_usage AS SELECT 1 AS id")
    site = Site(tmp_path, ["print:", f"sqlite:///{first}", f"sqlite:///{second}"])
    result = migrate(site.app)
    assert result.exit_code == 1
    assert result.stderr == "Error: sqlite: flask_usage is a view, but must be a table\n"
    assert result.stdout.startswith("sqlite: done\n")
    assert {"flask_usage", "flask_usage_schema"} <= set(tables(second))


def test_a_locked_database_is_told(tmp_path: Path) -> None:
    make_old(tmp_path / "usage.sqlite3")
    site = Site(tmp_path, f"sqlite:///{tmp_path}/usage.sqlite3?timeout=0.1")
    with plain(tmp_path / "usage.sqlite3") as other:
        other.execute("BEGIN EXCLUSIVE")
        result = migrate(site.app)
    assert result.exit_code == 1
    assert result.stderr == "Error: sqlite: database is locked\n"


def test_an_app_without_a_sql_storage_is_refused(tmp_path: Path) -> None:
    result = migrate(Site(tmp_path, "print:").app)
    assert result.exit_code == 2
    assert "none of the app's storages is a SQL database" in result.stderr


def test_an_app_that_is_not_tracked_is_refused() -> None:
    result = migrate(Flask("other"))
    assert result.exit_code == 2
    assert "is not tracked" in result.stderr


def test_a_plan_needs_no_write_access(tmp_path: Path) -> None:
    file = tmp_path / "usage.sqlite3"
    make_old(file)
    before = file.read_bytes()
    migrate(Site(tmp_path).app, "--plan")
    assert file.read_bytes() == before
    with plain(file) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
