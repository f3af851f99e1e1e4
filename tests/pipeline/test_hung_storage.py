"""A storage that does not answer: what was answered is on disk before a kill, and is told of."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.front_door import Site
from helpers.process import run_python, until

from flask_usage_metrics import UsageRecord
from flask_usage_metrics.pipeline.delivery.spool import Spool
from flask_usage_metrics.pipeline.journal_file import JournalFile
from flask_usage_metrics.storage import Writer

APP = """
import json, os, signal, sys, time
from pathlib import Path
from flask import Flask
from flask_usage_metrics import TrackUsage, open_storage
from flask_usage_metrics.storage import Writer

folder = Path(sys.argv[1])

class Hung(Writer):
    name = "hung"

    def set_up(self):
        self.storage = open_storage(f"sqlite:///{folder}/usage.sqlite3")

    def write(self, batch):
        while (folder / "hang").exists():
            time.sleep(0.01)
        self.storage.write(batch)

app = Flask("shop")
app.config["TRACK_USAGE_STATE_DIR"] = str(folder / "state")
app.config.from_prefixed_env()
usage = TrackUsage(app, Hung())
app.add_url_rule("/<name>", "page", lambda name: name)
client = app.test_client()

def shown(name, text):
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    return float(line.rpartition(" ")[2])

def told():
    text = client.get("/metrics").text
    return {
        "up": shown('flask_usage_sink_up{sink="hung"}', text),
        "pending": shown('flask_usage_records_pending{sink="hung"}', text),
        "journaled": shown("flask_usage_journaled", text),
        "faults": text.count('flask_usage_faults_total{part="sink hung"}'),
    }
"""

DIE = """
count, size = int(sys.argv[2]), int(sys.argv[3])
(folder / "hang").touch()
for number in range(count):
    assert client.get(f"/{number}", headers={"User-Agent": "x" * size}).status_code == 200
if len(sys.argv) > 4:
    time.sleep(float(sys.argv[4]))
    (folder / "told").write_text(json.dumps(told()))
os.kill(os.getpid(), signal.SIGKILL)
"""

GO_ON = """
(folder / "hang").unlink()
client.get("/last")
storage = open_storage(f"sqlite:///{folder}/usage.sqlite3")
storage.is_of_app = True
deadline = time.monotonic() + 30
while time.monotonic() < deadline:
    usage.flush()
    if {record.path for record in storage.records()} >= {f"/{n}" for n in range(int(sys.argv[2]))}:
        break
    time.sleep(0.1)
paths = [record.path for record in storage.records()]
print(json.dumps([len(paths), len(set(paths))]))
"""


def die(folder: Path, count: int, size: int, *more: object, **settings: str) -> None:
    done = run_python(APP + DIE, folder, count, size, *more, env=settings)
    assert done.returncode == -9, done.stderr


def found(folder: Path, count: int) -> Any:
    done = run_python(APP + GO_ON, folder, count, seconds=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("count", "size", "flush_seconds"),
    [(9_000, 500, "0.5"), (600, 12_000, "2"), (12_000, 10, "600")],
)
def test_a_kill_while_a_storage_hangs_loses_no_record(
    tmp_path: Path, count: int, size: int, flush_seconds: str
) -> None:
    die(tmp_path, count, size, FLASK_TRACK_USAGE_FLUSH_SECONDS=flush_seconds)
    assert found(tmp_path, count) == [count + 1, count + 1]


def test_a_storage_that_does_not_answer_for_seconds_is_not_up(tmp_path: Path) -> None:
    die(tmp_path, 100, 10, 4)
    told = json.loads((tmp_path / "told").read_text())
    assert told == {"up": 0, "pending": 100, "journaled": 1, "faults": 1}
    assert found(tmp_path, 100) == [101, 101]


def test_what_finds_no_room_on_disk_is_not_journaled_until_it_is_written(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    create = JournalFile.create
    monkeypatch.setattr(JournalFile, "create", partial(create, size=16_384))

    def full(self: Spool, records: Sequence[UsageRecord]) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Spool, "append", full)
    answers = threading.Event()
    written: list[UsageRecord] = []

    class Hung(Writer):
        name = "hung"

        def write(self, batch: Sequence[UsageRecord]) -> None:
            assert answers.wait(30)
            written.extend(batch)

    def journaled() -> float:
        return site.samples("flask_usage_journaled")[()]

    site = make_site(Hung(), FLUSH_SECONDS=0.02)
    site.get()
    assert journaled() == 1
    for _ in range(200):
        site.get()
    assert journaled() == 0
    answers.set()
    until(journaled, 1)
    assert len(written) == 201
    assert site.account("hung") == {"written": 201, "dropped": 0, "failed": 0, "pending": 0}
    site.get()
    assert journaled() == 1
