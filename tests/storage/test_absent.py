"""A storage that is read and is not there: an error, unless an app of this process writes to it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from helpers.front_door import Site
from helpers.records import START, make_record

from flask_usage_metrics import StorageUnavailable, open_storage
from flask_usage_metrics.cli import usage
from flask_usage_metrics.storage import Storage


@pytest.mark.parametrize("url", ["sqlite:///{}", "jsonl:///{}"])
def test_reading_what_is_not_there_is_an_error_and_makes_nothing(tmp_path: Path, url: str) -> None:
    storage = open_storage(url.format(tmp_path / "typo" / "usage"))
    assert isinstance(storage, Storage)
    reads: list[Callable[[], object]] = [
        storage.count,
        storage.summarize,
        storage.get_usage,
        lambda: list(storage.records()),
        lambda: storage.get_sum("sumUrl"),
        lambda: storage.prune(START),
        lambda: storage.erase(username="ann"),
    ]
    for read in reads:
        with pytest.raises(StorageUnavailable, match=r"no file|No such file"):
            read()
    assert not list(tmp_path.iterdir())
    storage.write([make_record()])
    assert storage.count() == 1
    storage.close()


def test_a_database_of_others_is_not_one_without_records(tmp_path: Path) -> None:
    file = tmp_path / "orders.sqlite3"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE orders (id INTEGER)")
    with closing(open_storage(f"sqlite:///{file}")) as storage:
        assert isinstance(storage, Storage)
        with pytest.raises(StorageUnavailable, match="there is no table of records"):
            storage.count()


def test_a_command_that_reads_says_that_nothing_is_there(make_site: Callable[..., Site]) -> None:
    runner = make_site().app.test_cli_runner()
    result = runner.invoke(usage, ["replay-spans", "--since", "1h", "--dry-run"])
    assert result.exit_code == 1, result.output
    assert "the storage cannot be read now: sqlite: there is no file" in result.output


def test_an_app_without_a_request_yet_has_no_records(make_site: Callable[..., Site]) -> None:
    assert make_site().usage.storage.count() == 0
