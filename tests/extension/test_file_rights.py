"""Every file that is made is its owner's only; one that exists keeps its rights."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from helpers.front_door import Site

from flask_usage_metrics import UsageRecord
from flask_usage_metrics.errors import StorageUnavailable
from flask_usage_metrics.storage import Writer
from flask_usage_metrics.storage.jsonl import JSONLinesStorage
from flask_usage_metrics.storage.sql import SQLStorage


class Down(Writer):
    """A storage that is down, so that its records wait on disk."""

    def write(self, batch: Sequence[UsageRecord]) -> None:
        raise StorageUnavailable


@pytest.fixture(params=[0o000, 0o022], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def rights(folder: Path) -> dict[str, int]:
    return {
        path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.usefixtures("umask")
def test_of_what_is_made_nobody_else_reads_anything(
    make_site: Callable[..., Site], tmp_path: Path
) -> None:
    (tmp_path / "link.sqlite3").symlink_to(tmp_path / "behind.sqlite3")
    storages = [
        SQLStorage.from_url(f"sqlite:///{tmp_path}/made/usage.sqlite3"),
        SQLStorage.from_url(f"sqlite:///{tmp_path}/link.sqlite3"),
        JSONLinesStorage(tmp_path / "made" / "usage.jsonl"),
        Down(),
    ]
    site = make_site(storages, STATE_DIR=tmp_path / "state", VISITORS="daily", SECRET_KEY="k")
    site.get("/ann")
    site.usage.flush(1.0)
    found = rights(tmp_path)
    expected = {"usage.sqlite3", "usage.sqlite3-wal", "usage.sqlite3-shm", "behind.sqlite3"}
    assert found.keys() >= expected | {"usage.jsonl"}
    assert any(name.endswith(".spool") for name in found)
    assert any("journal" in name for name in found)
    assert {name: oct(mode) for name, mode in found.items() if mode & 0o077} == {}
    site.close(1.0)
    assert {name: oct(mode) for name, mode in rights(tmp_path).items() if mode & 0o077} == {}


@pytest.mark.usefixtures("umask")
def test_what_exists_keeps_its_rights(make_site: Callable[..., Site], tmp_path: Path) -> None:
    for name in ("usage.sqlite3", "usage.jsonl"):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(0o640)
    jsonl = JSONLinesStorage(tmp_path / "usage.jsonl")
    site = make_site([SQLStorage.from_url(f"sqlite:///{tmp_path}/usage.sqlite3"), jsonl])
    site.get("/ann")
    assert len(site.records()) == 1
    assert jsonl.erase(remote_addr="203.0.113.9") == 1
    found = rights(tmp_path)
    assert [found[name] for name in ("usage.sqlite3", "usage.sqlite3-wal", "usage.jsonl")] == [
        0o640
    ] * 3
