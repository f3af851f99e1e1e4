"""A state directory that is of no use at first, or removed while in use: it is made when it can."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from helpers.front_door import samples
from helpers.process import run_python
from helpers.servers import Gunicorn

APP = """
import json, os, shutil, signal, sys, time
from pathlib import Path
from flask import Flask
from flask_usage_metrics import StorageUnavailable, TrackUsage, open_storage
from flask_usage_metrics.storage import Writer

folder, how, waits = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

class Down(Writer):
    name = "down"

    def set_up(self):
        self.storage = open_storage(f"sqlite:///{folder}/usage.sqlite3")

    def write(self, batch):
        if (folder / "down").exists():
            if waits == "in the journal":
                time.sleep(0.5)
                return self.write(batch)
            raise StorageUnavailable("down")
        self.storage.write(batch)

app = Flask("shop")
state = folder / "state"
app.config["TRACK_USAGE_STATE_DIR"] = str(state)
app.config["TRACK_USAGE_FLUSH_SECONDS"] = 0.05
usage = TrackUsage(app, Down())
app.add_url_rule("/<name>", "page", lambda name: name)
client = app.test_client()

def journaled():
    (line,) = [line for line in client.get("/metrics").text.splitlines()
               if line.startswith("flask_usage_journaled ")]
    return float(line.split()[1])

def counted():
    return sum(float(line.split()[1]) for line in client.get("/metrics").text.splitlines()
               if line.startswith("flask_usage_requests_total{"))
"""

DIE = """
(folder / "down").touch()
for number in range(50):
    client.get(f"/{number}")
usage.flush(0.3)
assert journaled() == 1
if how == "removed":
    shutil.rmtree(state)
elif how == "moved":
    state.rename(folder / "moved")
elif how == "cut":
    (journal,) = state.glob("*/g-*/*.journal")
    os.truncate(journal, 0)
deadline = time.monotonic() + 10
while journaled() != 1 and time.monotonic() < deadline:
    time.sleep(0.1)
assert journaled() == 1, state.exists()
for number in range(50, 60):
    client.get(f"/{number}")
assert journaled() == 1
os.kill(os.getpid(), signal.SIGKILL)
"""

GO_ON = """
(folder / "down").unlink(missing_ok=True)
client.get("/last")
storage = open_storage(f"sqlite:///{folder}/usage.sqlite3")
storage.is_of_app = True
deadline = time.monotonic() + 20
while storage.count() < 61 and time.monotonic() < deadline:
    usage.flush()
    time.sleep(0.1)
time.sleep(0.3)
print(json.dumps(sorted(record.path for record in storage.records())))
"""


@pytest.mark.parametrize("waits", ["in the journal", "in the spool"])
@pytest.mark.parametrize("how", ["removed", "moved", "cut"])
def test_what_waits_is_on_disk_again_and_survives_a_kill(
    tmp_path: Path, how: str, waits: str
) -> None:
    done = run_python(APP + DIE, tmp_path, how, waits)
    assert done.returncode == -9, done.stderr
    done = run_python(APP + GO_ON, tmp_path, how, waits)
    assert done.returncode == 0, done.stderr
    expected = sorted(f"/{name}" for name in [*range(60), "last"])
    assert json.loads(done.stdout) == expected
    if how == "moved":  # nobody finds the same there once more
        shutil.rmtree(tmp_path / "state")
        (tmp_path / "moved").rename(tmp_path / "state")
        (tmp_path / "usage.sqlite3").unlink()
        done = run_python(APP + GO_ON.replace("< 61", "< 1"), tmp_path, how, waits)
        assert json.loads(done.stdout) == ["/last"], done.stderr


CUT = """
for number in range(20):
    client.get(f"/{number}")
    if number % 5 == 4:
        assert usage.flush()
        (journal,) = state.glob("*/g-*/*.journal")
        os.truncate(journal, number * 100)
deadline = time.monotonic() + 10
while journaled() != 1 and time.monotonic() < deadline:
    time.sleep(0.1)
assert usage.flush()
assert journaled() == 1
assert counted() == 20
assert open_storage(f"sqlite:///{folder}/usage.sqlite3").count() == 20
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_cut_while_nothing_waits_costs_neither_the_process_nor_a_record(tmp_path: Path) -> None:
    done = run_python(APP + CUT, tmp_path, "cut", "")
    assert (done.returncode, done.stderr) == (-9, "")


LATE = """
import errno
from flask_usage_metrics.pipeline.journal_file import JournalFile

if how == "no folder":
    state.write_text("in its place")
else:
    allocate = os.posix_fallocate
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    os.posix_fallocate = full
for number in range(50):
    client.get(f"/{number}")
(folder / "down").touch()
usage.flush(0.3)
for number in range(50, 60):
    client.get(f"/{number}")
assert journaled() == 0
if how == "no folder":
    state.unlink()
else:
    os.posix_fallocate = allocate
deadline = time.monotonic() + 10
while journaled() != 1 and time.monotonic() < deadline:
    time.sleep(0.1)
assert journaled() == 1
for number in range(60, 70):
    client.get(f"/{number}")
assert counted() == 70
text = client.get("/metrics").text
assert 'flask_usage_faults_total{part="state"} 1.0\\n' in text  # told once, tried more than once
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("waits", ["in the journal", "in the spool"])
@pytest.mark.parametrize("how", ["no folder", "no room"])
def test_what_had_no_place_at_first_is_on_disk_as_soon_as_there_is_one(
    tmp_path: Path, how: str, waits: str
) -> None:
    done = run_python(APP + LATE, tmp_path, how, waits)
    assert done.returncode == -9, done.stderr
    done = run_python(APP + GO_ON.replace("< 61", "< 71"), tmp_path, how, waits)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == sorted(f"/{name}" for name in [*range(70), "last"])


def test_workers_that_had_no_place_at_first_add_up_what_each_counted_alone(tmp_path: Path) -> None:
    """Each answers for itself until then; in the end each record is in the sums exactly once."""

    def scrape() -> tuple[float, float, float, float]:
        text = server.get("/metrics")
        (pid,) = samples(text, "pid").values()
        (shared,) = samples(text, "flask_usage_totals_shared").values()
        (journaled,) = samples(text, "flask_usage_journaled").values()
        return shared, journaled, sum(samples(text, "flask_usage_requests_total").values()), pid

    place = tmp_path / "state"
    place.write_text("in its place")
    with Gunicorn(tmp_path, "-w", "2") as server:
        deadline = time.monotonic() + 30
        pids = [server.get() for _ in range(60)]
        while len(set(pids)) < 2 and time.monotonic() < deadline:  # one may be late at first
            pids.append(server.get())
        alone: dict[float, float] = {}
        while len(alone) < 2 and time.monotonic() < deadline:
            shared, journaled, counted, pid = scrape()
            assert (shared, journaled) == (0, 0)
            alone[pid] = counted
        assert len(set(pids)) == 2
        assert sum(alone.values()) == len(pids)
        place.unlink()
        found: dict[float, tuple[float, float, float]] = {}
        while set(found.values()) != {(1, 1, len(pids))} and time.monotonic() < deadline + 10:
            *state, pid = scrape()
            found[pid] = tuple(state)
            time.sleep(0.05)
        assert list(found.values()) == [(1, 1, len(pids))] * 2
        for _ in range(20):
            server.get()
        time.sleep(1)
        assert {scrape()[:3] for _ in range(20)} == {(1, 1, len(pids) + 20)}
        for pid in server.workers():  # what they counted alone outlives them
            server.kill(pid)
        time.sleep(1)
        assert {scrape()[:3] for _ in range(20)} == {(1, 1, len(pids) + 20)}
    assert server.stored() == len(pids) + 20
