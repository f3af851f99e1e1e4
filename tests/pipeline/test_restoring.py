"""A state directory that is removed, moved or cut while in use: what waits is on disk again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.process import run_python

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
