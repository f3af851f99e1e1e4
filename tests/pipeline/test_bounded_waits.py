"""Whoever holds a lock for ever, no request waits for ever."""

from __future__ import annotations

import fcntl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.front_door import Site
from helpers.process import until

from flask_usage_metrics import UsageRecord
from flask_usage_metrics.errors import StorageUnavailable
from flask_usage_metrics.pipeline.delivery.spool import Spool
from flask_usage_metrics.pipeline.worker_group import WorkerGroup
from flask_usage_metrics.storage import Writer
from flask_usage_metrics.storage.jsonl import JSONLinesStorage


class Down(Writer):
    name = "down"
    is_down = True

    def write(self, batch: Sequence[UsageRecord]) -> None:
        if self.is_down:
            raise StorageUnavailable("down")


@pytest.fixture
def hang() -> Iterator[threading.Event]:
    """What hangs until the test is over."""
    over = threading.Event()
    yield over
    over.set()


def answer(site: Site, path: str = "/", seconds: float = 10.0) -> int:
    """Return the status of the answer to a request, which must come in time."""
    statuses: list[int] = []
    thread = threading.Thread(
        target=lambda: statuses.append(site.app.test_client().get(path).status_code), daemon=True
    )
    thread.start()
    thread.join(seconds)
    assert statuses, f"no answer in {seconds} seconds"
    return statuses[0]


def test_records_that_are_moved_to_a_disk_that_hangs_delay_no_request(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, hang: threading.Event
) -> None:
    storage = Down()
    entered = threading.Event()
    append = Spool.append

    def hanging(spool: Spool, records: Sequence[UsageRecord]) -> int:
        entered.set()
        hang.wait(60)
        return append(spool, records)

    monkeypatch.setattr(Spool, "append", hanging)
    site = make_site(storage, FLUSH_SECONDS=0.02)
    assert answer(site) == 404
    assert entered.wait(10)
    for _ in range(20):
        assert answer(site) == 404
    assert answer(site, "/metrics") == 200
    started_at = time.monotonic()
    assert not site.usage.flush(0.5)
    assert time.monotonic() - started_at < 5
    storage.is_down = False
    hang.set()
    until(lambda: site.account("down"), {"written": 21, "dropped": 0, "failed": 0, "pending": 0})


def test_totals_that_somebody_holds_are_a_503_in_some_seconds(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_usage_metrics.metrics.totals._LOCK_SECONDS", 0.2)
    site = make_site(FLUSH_SECONDS=60)
    site.get()
    totals = site.app.extensions["track_usage"].exposition._collector.totals
    with totals._lock:
        assert answer(site) == 404
        assert answer(site, "/metrics") == 503
    assert answer(site, "/metrics") == 200
    assert site.faults()["totals"] == 1
    assert len(site.records()) == 2


def test_a_state_directory_that_hangs_for_the_first_request_delays_others_for_seconds(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, hang: threading.Event
) -> None:
    monkeypatch.setattr("flask_usage_metrics.pipeline.pipeline._START_SECONDS", 0.2)
    join = WorkerGroup.join
    entered = threading.Event()

    def hanging(group: WorkerGroup, *arguments: Any) -> Any:
        entered.set()
        hang.wait(60)
        return join(group, *arguments)

    monkeypatch.setattr(WorkerGroup, "join", hanging)
    site = make_site()
    first = threading.Thread(target=site.get)
    first.start()
    assert entered.wait(10)
    for _ in range(3):
        assert answer(site) == 404
    hang.set()
    first.join(10)
    assert len(site.records()) == 4
    site.assert_agrees()


def test_a_file_of_lines_that_somebody_locks_is_down_and_written_to_later(
    make_site: Callable[..., Site], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_usage_metrics.storage.jsonl._LOCK_SECONDS", 0.2)
    path = tmp_path / "usage.jsonl"
    site = make_site(JSONLinesStorage(path), FLUSH_SECONDS=0.02)
    site.get()
    assert len(site.records()) == 1
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert answer(site) == 404
        sink_up = (("sink", "jsonl"),)
        until(lambda: site.samples("flask_usage_sink_up")[sink_up], 0)
        with pytest.raises(StorageUnavailable, match="jsonl: the file is locked"):
            list(site.usage.storage.records())
    until(lambda: site.account("jsonl")["written"], 2)
    assert len(site.records()) == 2
