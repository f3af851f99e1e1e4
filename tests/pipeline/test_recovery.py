"""An app that kills itself at each seam of the pipeline: the next counts and stores the rest."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.front_door import Site, samples
from helpers.process import run_python

from flask_usage_metrics.storage.sql import SQLStorage

APP = """
import json, os, signal, sys, threading, time
from pathlib import Path
from flask import Flask
from flask_usage_metrics import TrackUsage
from flask_usage_metrics.pipeline import worker_group
from flask_usage_metrics.enrich.enricher import Enricher
from flask_usage_metrics.pipeline.delivery.queue import SinkQueue
from flask_usage_metrics.pipeline.journal_file import JournalFile
from flask_usage_metrics.pipeline.processing import Processor
from flask_usage_metrics.metrics.totals import Totals
from flask_usage_metrics.metrics.shared_totals import SharedTotals

worker_group._GROUP_SECONDS = 0.05
folder = Path(sys.argv[1])
app = Flask("shop")
app.config["TRACK_USAGE_STATE_DIR"] = str(folder / "state")
app.config["TRACK_USAGE_FLUSH_SECONDS"] = 0.05
# Asked by another thread, whose answer may come in the middle of a batch.
country = None if "AT_ONCE" in os.environ else lambda address: "NL"
usage = TrackUsage(app, f"sqlite:///{folder}/usage.sqlite3", country=country)
app.add_url_rule("/<name>", "page", lambda name: name)

def ask(path, many=False):
    client = app.test_client()
    response = client.get(path, environ_overrides={"wsgi.multiprocess": many})
    assert response.status_code == 200
    return response.text

def counted(text):
    lines = [line for line in text.splitlines() if line.startswith("flask_usage_requests_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)

def written(text, sink="metrics"):
    start = f'flask_usage_records_total{{sink="{sink}",result="written"}} '
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return float(line.removeprefix(start))

def kill_after(owner, name, when=lambda *args: True):
    original = getattr(owner, name)
    def patched(*args, **options):
        result = original(*args, **options)
        if when(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, patched)

def write_behind_a_sync():
    # Rows are written when the totals were synced, and before the journal is looked at.
    synced, acked = threading.Event(), threading.Event()
    storage, sync, ack = type(usage.storage), SharedTotals.sync, SinkQueue.ack
    write = storage.write
    def write_late(self, batch):
        synced.wait(5)
        write(self, batch)
    def sync_first(self, new, commits, *rest):
        result = sync(self, new, commits, *rest)
        if commits:
            synced.set()
            acked.wait(5)
        return result
    def ack_then_tell(self, *numbers):
        ack(self, *numbers)
        acked.set()
    storage.write, SharedTotals.sync, SinkQueue.ack = write_late, sync_first, ack_then_tell
    kill_after(JournalFile, "truncate")

SEAMS = {
    "captured": lambda: None,
    "released": write_behind_a_sync,
    "half": lambda: None,
    "marked": lambda: kill_after(JournalFile, "mark"),
    "counted": lambda: kill_after(Totals, "add", lambda self, records, commits, *_: commits),
    "synced": lambda: kill_after(SharedTotals, "sync", lambda self, new, commits, *_: commits),
    "written": lambda: kill_after(type(usage.storage), "write"),
    "truncated": lambda: kill_after(JournalFile, "truncate"),
    "forgotten": lambda: kill_after(Totals, "forget"),
}

def die_at(seam, names, many=False):
    # Nothing is processed before the seam is there.
    process, Processor.process = Processor.process, lambda self, *_, **__: 0
    if seam == "half":  # the countries of some that others left are asked for, and never found
        enrich = Enricher.enrich
        def ask_on(self, seen, *rest):
            waits = any(text.startswith("/0-1") for text in seen.environ)
            return None if waits else enrich(self, seen, *rest)
        Enricher.enrich = ask_on
    for name in names:
        ask("/" + name, many)
    SEAMS[seam]()
    if seam != "captured":
        Processor.process = process
        usage.flush(1.0)
    os.kill(os.getpid(), signal.SIGKILL)

def stored():
    assert usage.flush()
    return sorted(record.path for record in usage.storage.records())
"""

ALONE = """
if sys.argv[2] == "die":
    die_at(sys.argv[3], [f"{sys.argv[4]}{number}" for number in range(20)])
ask("/last")
deadline = time.monotonic() + 8
while len(stored()) < int(sys.argv[3]) and time.monotonic() < deadline:
    time.sleep(0.02)
time.sleep(0.1)
text = ask("/metrics")
usage.flush()
print(json.dumps([stored(), counted(text)]))
assert written(text) == counted(text)  # what was counted before is neither
left = [path.name for path in folder.glob("state/*/g-*/*.journal")]
assert len(left) == 1, left
"""

SIBLINGS = """
def child(function):
    pid = os.fork()
    if pid:
        return pid
    try:
        function()
    finally:
        os._exit(0)

def survive(expected):
    ask("/first", True)
    ask("/metrics", True)
    (folder / "ready").touch()
    while not (folder / "dead").exists():
        time.sleep(0.01)
    deadline = time.monotonic() + 8
    seen = 0
    while seen < expected and time.monotonic() < deadline:
        seen = counted(ask("/metrics", True))
        time.sleep(0.05)
    time.sleep(0.2)
    rows, text = stored(), ask("/metrics", True)
    (folder / "result").write_text(json.dumps([rows, counted(text), written(text, "sqlite")]))

seams = sys.argv[2:]
survivor = child(lambda: survive(1 + 20 * len(seams)))
while not (folder / "ready").exists():
    time.sleep(0.01)
for number, seam in enumerate(seams):
    names = [f"{number}-{i}" for i in range(20)]
    _, status = os.waitpid(child(lambda: die_at(seam, names, True)), 0)
    assert os.WTERMSIG(status) == 9, (seam, status)
(folder / "dead").touch()
os.waitpid(survivor, 0)
print((folder / "result").read_text())
"""

SEAMS = ["captured", "marked", "counted", "written", "truncated"]


@pytest.mark.parametrize("located", ["at once", "later"])
@pytest.mark.parametrize("seam", SEAMS)
def test_a_killed_process_leaves_each_record_once_to_the_next(
    tmp_path: Path, seam: str, located: str
) -> None:
    environment = {"AT_ONCE": "1"} if located == "at once" else {}
    killed = run_python(APP + ALONE, tmp_path, "die", seam, "a", env=environment)
    assert killed.returncode == -9, killed.stderr
    done = run_python(APP + ALONE, tmp_path, "live", 21, env=environment)
    assert done.returncode == 0, done.stderr
    rows, counted = json.loads(done.stdout)
    assert rows == sorted(["/last", *[f"/a{number}" for number in range(20)]])
    # What the dead process had counted is not counted again: its counters were seen, or not. It had
    # counted those whose country was known: all of them, or all but some that were asked for.
    if seam == "captured":
        assert counted == 21
    elif located == "at once":
        assert counted in (1, 21)
    else:
        assert 1 <= counted <= 21


@pytest.mark.parametrize("second", ["marked", "forgotten"])
def test_who_recovers_and_is_killed_too_changes_nothing(tmp_path: Path, second: str) -> None:
    assert run_python(APP + ALONE, tmp_path, "die", "marked", "a").returncode == -9
    killed = run_python(APP + ALONE, tmp_path, "die", second, "b")
    assert killed.returncode == -9, killed.stderr
    done = run_python(APP + ALONE, tmp_path, "live", 41)
    assert done.returncode == 0, done.stderr
    rows, _ = json.loads(done.stdout)
    names = [f"/{name}{number}" for name in "ab" for number in range(20)]
    assert rows == sorted(["/last", *names])


def test_what_two_left_is_told_apart(tmp_path: Path) -> None:
    environment = {"AT_ONCE": "1"}
    for name in "ab":
        killed = run_python(APP + ALONE, tmp_path, "die", "captured", name, env=environment)
        assert killed.returncode == -9, killed.stderr
    assert len(list(tmp_path.glob("state/*/g-*/*.journal"))) == 2
    done = run_python(APP + ALONE, tmp_path, "live", 41, env=environment)
    assert done.returncode == 0, done.stderr
    rows, counted = json.loads(done.stdout)
    assert (len(rows), counted) == (41, 41)
    storage = SQLStorage.from_url(f"sqlite:///{tmp_path}/usage.sqlite3")
    records = list(storage.records())
    storage.close()
    assert len({record.id for record in records}) == 41
    whose = {(record.path[:2], record.process) for record in records}
    assert len(whose) == len({process for _, process in whose}) == 3


@pytest.mark.parametrize("seam", [*SEAMS, "synced", "released"])
def test_another_worker_counts_and_stores_what_a_killed_one_left(tmp_path: Path, seam: str) -> None:
    # The second one recovers what the first one left, and dies of it at the same place.
    environment = {"AT_ONCE": "1"} if seam == "released" else {}  # in one batch
    done = run_python(APP + SIBLINGS, tmp_path, seam, seam, env=environment)
    assert done.returncode == 0, done.stderr
    rows, counted, written = json.loads(done.stdout)
    names = [f"/{victim}-{number}" for victim in (0, 1) for number in range(20)]
    assert rows == sorted(["/first", *names])
    assert counted == 41
    # What is recovered comes on top; what is let go of is in it.
    assert written >= 41


def test_who_dies_while_countries_are_asked_for_leaves_these_uncounted(tmp_path: Path) -> None:
    # The first had marked all for its first commit, which never came; that of the second did.
    done = run_python(APP + SIBLINGS, tmp_path, "marked", "half")
    assert done.returncode == 0, done.stderr
    rows, counted, _ = json.loads(done.stdout)
    assert len(rows) == 41
    assert counted == 41


DIE_AT_SECOND_WRITE = """
def die_at_second_write():
    storage, writes = type(usage.storage), []
    write = storage.write
    def patched(self, batch):
        writes.append(len(batch))
        if len(writes) == 2:
            time.sleep(0.3)  # the pipeline goes on meanwhile, and must truncate none of these
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, batch)
    storage.write = patched
"""


@pytest.mark.parametrize("whose", ["recovered", "own"])
def test_of_many_batches_each_is_kept_until_it_is_written(tmp_path: Path, whose: str) -> None:
    script = """
names = [str(number) for number in range(1100)]
if sys.argv[2:] == ["die", "recovered"]:
    die_at("captured", names)
if sys.argv[2:] == ["die", "own"]:  # and the countries of most are found late
    enrich = Enricher.enrich
    Enricher.enrich = lambda self, seen, *rest: (
        enrich(self, seen, *rest) if "/z" in seen.environ else None
    )
    for name in [*names, "z"]:
        ask("/" + name)
    usage.flush(0.5)
    Enricher.enrich = enrich
else:
    ask("/z")
die_at_second_write()
usage.flush()
"""
    script = APP + DIE_AT_SECOND_WRITE + script
    assert run_python(script, tmp_path, "die", whose).returncode == -9
    if whose == "recovered":
        assert run_python(script, tmp_path, "live", whose).returncode == -9
    done = run_python(APP + ALONE, tmp_path, "live", 1102)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)[0]) == 1102


def test_a_full_disk_harms_no_request_and_is_told_once(tmp_path: Path) -> None:
    script = """
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    for number in range(20):
        ask(f"/{number}")
    assert len(stored()) == 20
    print(ask("/metrics"))
    """
    done = run_python(APP + textwrap.dedent(script), tmp_path)
    assert done.returncode == 0, done.stderr
    assert samples(done.stdout, "flask_usage_journaled") == {(): 0}
    assert sum(samples(done.stdout, "flask_usage_requests_total").values()) == 20
    assert done.stderr.count("no place for the state directory") == 1
    assert len(done.stderr.splitlines()) == 1
    assert not list((tmp_path / "state").glob("*/*/*.journal"))


def test_a_request_after_the_end_opens_it_again(make_site: Callable[..., Site]) -> None:
    site = make_site()
    for number in range(1, 4):
        site.get("/nowhere")
        assert len(site.records()) == number
        assert samples(site.scrape(), "flask_usage_journaled") == {(): 1}
        assert site.faults() == {}
        site.close()


@pytest.mark.parametrize("gone", ["home", "run"])
def test_what_another_process_removes_while_it_is_looked_for_harms_nothing(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    site = make_site()
    site.get("/nowhere")
    looked: list[Path] = []

    def removed(folder: Path, *_: str) -> list[Path]:
        looked.append(folder)
        raise FileNotFoundError(folder)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir" if gone == "home" else "glob", removed)
        assert site.usage.flush()
    assert looked
    assert len(site.records()) == 1
    assert site.samples("flask_usage_faults_total") == {}
