"""What was captured outlives a kill -9: the journal alone, and an app that kills itself."""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers.front_door import Site, samples
from hypothesis import given, settings
from hypothesis import strategies as st

from flask_usage_metrics.pipeline.journal import Journal
from flask_usage_metrics.pipeline.journal_file import JournalFile
from flask_usage_metrics.records.observation import ENVIRON_KEYS, Extras, Observation, Origin
from flask_usage_metrics.storage.sql import SQLStorage

SIZE = 4096
HEADER = 4096
ORIGIN = Origin("shop 0", "host:1", 7, ("CF-IPCountry",))


def seen(number: int, text: str = "x") -> Observation:
    environ = ("GET", *[text] * (len(ENVIRON_KEYS) - 1))
    return Observation(number, 5, environ, "e", "/", None, 200, 1)


def payload(observation: Observation) -> bytes:
    return msgspec.msgpack.encode(observation)


def frames(file: JournalFile) -> list[tuple[int, Observation]]:
    return [(sequence, observation) for sequence, _, observation in file.entries()]


def filled(folder: Path, count: int = 5) -> tuple[Path, list[tuple[int, Observation]]]:
    """Leave a journal as a dead process does; return where, and what is in it."""
    file = JournalFile.create(folder, ORIGIN, SIZE)
    expected = [(number, seen(number, f"t{number}")) for number in range(1, count + 1)]
    for number, observation in expected:
        assert file.append(number, payload(observation))
    file.close(remove=False)
    (path,) = folder.glob("*.journal")
    return path, expected


def run(script: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, **options
    )


def descriptors(folder: Path) -> int:
    """Count what this process has open below a folder: other tests may still let go of theirs."""
    count = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            count += str(descriptor.readlink()).startswith(f"{folder}/")
    return count


# ------------------------------------------------------------------------ kills and owners


def test_frames_survive_a_kill_and_only_one_gets_them(tmp_path: Path) -> None:
    script = """
    import sys
    sys.path[:0] = [sys.argv[2], sys.argv[2] + "/pipeline"]
    from test_journal import *
    journal = Journal(1000)
    journal.file = JournalFile.create(Path(sys.argv[1]), ORIGIN)
    for number in range(1, 301):
        assert journal.append(seen(number, f"t{number}"))
    print("ready", flush=True)
    sys.stdin.read()
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path, Path(__file__).parents[1]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        (path,) = tmp_path.glob("*.journal")
        assert JournalFile.recover(path, ORIGIN.app) is None  # its owner lives
        child.kill()
    assert JournalFile.recover(path, "another 0") is None
    first = JournalFile.recover(path, ORIGIN.app)
    assert first is not None
    assert JournalFile.recover(path, ORIGIN.app) is None
    assert first.origin == ORIGIN
    assert frames(first) == [(number, seen(number, f"t{number}")) for number in range(1, 301)]
    first.close(remove=True)
    assert JournalFile.recover(path, ORIGIN.app) is None


def test_what_is_truncated_or_marked_is_so_for_who_recovers(tmp_path: Path) -> None:
    file = JournalFile.create(tmp_path, ORIGIN, SIZE)
    for number in range(1, 7):
        assert file.append(number, payload(seen(number)))
    file.truncate(2)
    file.mark([3, 4], 1)
    file.mark([5], 2)
    file.committed = 1
    file.close(remove=False)
    (path,) = tmp_path.glob("*.journal")
    recovered = JournalFile.recover(path, ORIGIN.app)
    assert recovered is not None
    assert recovered.committed == 1
    assert [(s, commit) for s, commit, _ in recovered.entries()] == [(3, 1), (4, 1), (5, 2), (6, 0)]
    recovered.truncate(5)
    assert [number for number, _ in frames(recovered)] == [6]
    assert not recovered.is_empty()
    recovered.truncate(6)
    assert recovered.is_empty()
    recovered.close(remove=True)


def test_a_forked_child_neither_unlocks_nor_changes_its_parents_file(tmp_path: Path) -> None:
    journal = Journal(10)
    journal.file = JournalFile.create(tmp_path, ORIGIN, SIZE)
    journal.append(seen(1))
    (path,) = tmp_path.glob("*.journal")
    before = path.read_bytes()
    pid = os.fork()
    if pid == 0:
        journal.reset_after_fork()
        journal.append(seen(2))
        os._exit(0 if len(journal) == 1 and journal.file is None else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert path.read_bytes() == before
    assert JournalFile.recover(path, ORIGIN.app) is None
    assert len(journal) == 1
    journal.close()
    assert path.exists()  # there is something in it that is not durable


def test_the_file_is_unlocked_and_closed_with_the_last_reference(tmp_path: Path) -> None:
    before = descriptors(tmp_path)
    file = JournalFile.create(tmp_path, ORIGIN, SIZE)
    file.append(1, payload(seen(1)))
    assert descriptors(tmp_path) > before
    del file
    gc.collect()
    assert descriptors(tmp_path) == before
    (path,) = tmp_path.glob("*.journal")
    recovered = JournalFile.recover(path, ORIGIN.app)
    assert recovered is not None
    assert len(frames(recovered)) == 1
    recovered.close(remove=True)
    assert descriptors(tmp_path) == before


# ------------------------------------------------------------------------ the ring


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(0, 110)),
            st.tuples(st.just("truncate"), st.integers(0, 8)),
        ),
        max_size=60,
    )
)
def test_entries_are_what_was_appended_and_not_truncated(actions: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = JournalFile.create(Path(folder), ORIGIN, SIZE)
        model: list[tuple[int, Observation]] = []
        sequence = 0
        for action, amount in actions:
            if action == "append":
                sequence += 1
                observation = seen(sequence, "y" * amount)
                if file.append(sequence, payload(observation)):
                    model.append((sequence, observation))
                else:
                    used = sum(len(payload(kept)) for _, kept in model)
                    assert used + 2 * len(payload(observation)) > SIZE // 2
            elif model:
                through = model[min(amount, len(model) - 1)][0]
                model = [kept for kept in model if kept[0] > through]
                file.truncate(through)
            assert frames(file) == model
            assert file.is_empty() == (not model)
        file.close(remove=False)
        (path,) = Path(folder).glob("*.journal")
        recovered = JournalFile.recover(path, ORIGIN.app)
        assert recovered is not None
        assert frames(recovered) == model
        recovered.close(remove=True)


def test_a_full_ring_refuses_and_goes_round_when_there_is_room_again(tmp_path: Path) -> None:
    file = JournalFile.create(tmp_path, ORIGIN, SIZE)
    number = 0
    while file.append(number + 1, payload(seen(number + 1, "z" * 30))):
        number += 1
    assert number > 4
    kept = frames(file)
    assert [sequence for sequence, _ in kept] == list(range(1, number + 1))
    assert not file.append(number + 1, payload(seen(number + 1, "z" * 30)))
    assert frames(file) == kept
    for round_ in range(5 * number):
        file.truncate(round_ + 1)
        assert file.append(number + 1 + round_, payload(seen(number + 1 + round_, "z" * 30)))
        assert [s for s, _ in frames(file)] == list(range(round_ + 2, number + 2 + round_))
    file.close(remove=True)


def test_an_empty_ring_begins_at_its_start_again(tmp_path: Path) -> None:
    # So that only as much of the file is touched, and in memory, as one batch needs.
    file = JournalFile.create(tmp_path, ORIGIN, SIZE)
    (path,) = tmp_path.iterdir()
    start = HEADER
    for number in range(1, 60, 2):
        for sequence in (number, number + 1):
            assert file.append(sequence, payload(seen(sequence)))
        assert path.read_bytes()[start : start + 8] != b"\0" * 8
        assert not any(path.read_bytes()[start + SIZE // 2 :])
        file.truncate(number)
        assert [sequence for sequence, _ in frames(file)] == [number + 1]
        file.truncate(number + 1)
        assert file.is_empty()
    file.close(remove=False)
    recovered = JournalFile.recover(path, ORIGIN.app)
    assert recovered is not None
    assert recovered.is_empty()
    assert frames(recovered) == []
    recovered.close(remove=True)


def test_who_is_killed_while_beginning_anew_leaves_an_empty_file(tmp_path: Path) -> None:
    file = JournalFile.create(tmp_path, ORIGIN, SIZE)
    (path,) = tmp_path.iterdir()
    assert file.append(1, payload(seen(1)))
    head = path.read_bytes()[24:32]
    file.truncate(1)
    file.close(remove=False)
    # The tail is written first.
    with path.open("r+b") as raw:
        raw.seek(24)
        raw.write(head)
    recovered = JournalFile.recover(path, ORIGIN.app)
    assert recovered is not None
    assert frames(recovered) == []
    assert recovered.is_empty()
    recovered.close(remove=True)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_comes_and_goes_nothing_is_written_over(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    file = JournalFile.create(tmp_path, ORIGIN, 4096)
    kept: dict[int, Observation] = {}
    refused = 0
    for number in range(1, 400):
        observation = seen(number, "x" * chance.randrange(60))
        if file.append(number, payload(observation)):
            kept[number] = observation
        else:
            refused += 1
        if kept and chance.random() < 0.3:
            until = chance.choice([*kept])
            file.truncate(until)
            kept = {one: observation for one, observation in kept.items() if one > until}
        if chance.random() < 0.5:
            assert frames(file) == list(kept.items())
    assert refused > 10
    file.close(remove=False)
    (path,) = tmp_path.glob("*.journal")
    recovered = JournalFile.recover(path, ORIGIN.app)
    assert recovered is not None
    assert frames(recovered) == list(kept.items())
    recovered.close(remove=True)


def test_lone_surrogates_are_kept_escaped(tmp_path: Path) -> None:
    journal = Journal(10)
    journal.file = JournalFile.create(tmp_path, ORIGIN, SIZE)
    extras = Extras(username="a\udfff", peer="\udc80")
    odd = msgspec.structs.replace(seen(1, "\ud800"), extras=extras)
    assert journal.append(odd)
    assert journal.append(seen(2))
    first, second = frames(journal.file)
    assert second == (2, seen(2))
    assert first[1].extras == Extras(username="a\\udfff", peer="\\udc80")
    assert first[1].environ[1] == "\\ud800"
    journal.truncate(2)
    journal.close()
    assert not list(tmp_path.iterdir())


def test_an_end_during_an_append_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(10)
    journal.file = JournalFile.create(tmp_path, ORIGIN, SIZE)

    def encode(observation: Observation) -> bytes:
        journal.close()  # as another thread does at exit
        return payload(observation)

    monkeypatch.setattr("flask_usage_metrics.pipeline.journal.encode", encode)
    assert journal.append(seen(1))
    assert len(journal) == 1


# ------------------------------------------------------------------------ damage


def damages(path: Path, seed: int) -> Iterator[str]:
    """Damage a file in one of many ways; yield what was done."""
    rng = random.Random(seed)
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 3, 30])):
        place = rng.choice(
            [rng.randrange(44), rng.randrange(HEADER), rng.randrange(HEADER, HEADER + 900)]
        )
        content[place] = rng.choice([0, 0xFF, rng.randrange(256), content[place] ^ 1])
    if rng.random() < 0.2:
        del content[rng.randrange(len(content)) :]
    if rng.random() < 0.1:
        content += b"\xff" * rng.randrange(1, 9000)
    path.write_bytes(content)
    yield f"seed {seed}"


def test_a_request_after_the_end_opens_it_again(make_site: Callable[..., Site]) -> None:
    site = make_site()
    for number in range(1, 4):
        site.get("/nowhere")
        assert len(site.records()) == number
        assert samples(site.scrape(), "flask_usage_journaled") == {(): 1}
        assert site.faults() == {}
        site.close()


def test_damage_never_raises_nor_invents_an_observation(tmp_path: Path) -> None:
    path, expected = filled(tmp_path, 6)
    whole = path.read_bytes()
    known = [observation for _, observation in expected]
    recovered_whole = recovered = 0
    for seed in range(600):
        path.write_bytes(whole)
        for _ in damages(path, seed):
            file = JournalFile.recover(path, ORIGIN.app)
            if file is None:
                continue
            recovered += 1
            found = [observation for _, observation in frames(file)]
            assert all(observation in known for observation in found), seed
            assert len(found) <= len(known), seed
            recovered_whole += found == known
            file.mark([1, 2], 9)
            file.truncate(3)
            assert file.committed >= 0
            file.close(remove=False)
    assert 600 > recovered > recovered_whole > 50


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * (HEADER + SIZE),
        b"garbage" * 3000,
        b"FUMJRNL1",
        b"FUMJRNL1" + b"\0" * 4088,
        b"FUMJRNL1" + b"\xff" * (HEADER + SIZE - 8),
    ],
)
def test_what_is_no_journal_is_left_alone(tmp_path: Path, content: bytes) -> None:
    before = descriptors(tmp_path)
    path = tmp_path / f"{'a' * 16}.journal"
    path.write_bytes(content)
    assert JournalFile.recover(path, ORIGIN.app) is None
    assert path.read_bytes() == content
    assert descriptors(tmp_path) == before


def test_a_header_of_nested_json_is_no_journal(tmp_path: Path) -> None:
    path, _ = filled(tmp_path)
    content = bytearray(path.read_bytes())
    meta = (b'{"x":' + b"[" * 4000)[: HEADER - 44]
    content[40:44] = len(meta).to_bytes(4, "little")
    content[44 : 44 + len(meta)] = meta
    path.write_bytes(content)
    before = descriptors(tmp_path)
    assert JournalFile.recover(path, ORIGIN.app) is None
    assert descriptors(tmp_path) == before


def test_nothing_is_followed_or_opened_that_is_no_file(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    path, _ = filled(other)
    link, folder, pipe = (tmp_path / f"{name * 16}.journal" for name in "abc")
    link.symlink_to(path)
    folder.mkdir()
    os.mkfifo(pipe)
    before = descriptors(tmp_path)
    for place in (link, folder, pipe, tmp_path / "gone.journal"):
        assert JournalFile.recover(place, ORIGIN.app) is None
    assert descriptors(tmp_path) == before


def test_a_map_that_is_refused_closes_each_descriptor_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = filled(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", refuse)
    before = descriptors(tmp_path)
    assert JournalFile.recover(path, ORIGIN.app) is None
    with pytest.raises(OSError, match="Cannot allocate"):
        JournalFile.create(tmp_path, ORIGIN, SIZE)
    gc.collect()
    assert descriptors(tmp_path) == before
    assert list(tmp_path.iterdir()) == [path]


def test_no_room_on_the_disk_leaves_no_file(tmp_path: Path) -> None:
    script = """
    import resource, signal, sys
    sys.path[:0] = [sys.argv[2], sys.argv[2] + "/pipeline"]
    from test_journal import *
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    before = descriptors(Path(sys.argv[1]))
    try:
        JournalFile.create(Path(sys.argv[1]), ORIGIN)
    except OSError as error:
        print(descriptors(Path(sys.argv[1])) == before)
    """
    done = run(script, tmp_path, Path(__file__).parents[1])
    assert (done.stdout, done.stderr) == ("True\n", "")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------ through the front door

APP = """
import json, os, signal, sys, time
from pathlib import Path
from flask import Flask
from flask_usage_metrics import TrackUsage
from flask_usage_metrics.pipeline import worker_group
from flask_usage_metrics.enrich.enricher import Enricher
from flask_usage_metrics.pipeline.journal_file import JournalFile
from flask_usage_metrics.pipeline.processing import Processor
from flask_usage_metrics.metrics.totals import Totals
from flask_usage_metrics.metrics.shared_totals import SharedTotals

worker_group._SIBLINGS_SECONDS = 0.05
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

def written(text):
    start = 'flask_usage_records_total{sink="metrics",result="written"} '
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

SEAMS = {
    "captured": lambda: None,
    "half": lambda: None,
    "marked": lambda: kill_after(JournalFile, "mark"),
    "counted": lambda: kill_after(Totals, "add", lambda self, records, commits, *_: commits),
    "synced": lambda: kill_after(SharedTotals, "sync", lambda self, new, commits, *_: commits),
    "written": lambda: kill_after(type(usage.storage), "write"),
    "truncated": lambda: kill_after(JournalFile, "truncate"),
    "forgotten": lambda: kill_after(Totals, "forget"),
}

def die_at(seam, names, many=False):
    if seam == "captured":
        Processor.process = lambda self, *_, **__: 0
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
    result = json.dumps([stored(), counted(ask("/metrics", True))])
    (folder / "result").write_text(result)

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
    environment = {**os.environ, **({"AT_ONCE": "1"} if located == "at once" else {})}
    killed = run(APP + ALONE, tmp_path, "die", seam, "a", env=environment)
    assert killed.returncode == -9, killed.stderr
    done = run(APP + ALONE, tmp_path, "live", 21, env=environment)
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
    assert run(APP + ALONE, tmp_path, "die", "marked", "a").returncode == -9
    killed = run(APP + ALONE, tmp_path, "die", second, "b")
    assert killed.returncode == -9, killed.stderr
    done = run(APP + ALONE, tmp_path, "live", 41)
    assert done.returncode == 0, done.stderr
    rows, _ = json.loads(done.stdout)
    names = [f"/{name}{number}" for name in "ab" for number in range(20)]
    assert rows == sorted(["/last", *names])


def test_what_two_left_is_told_apart(tmp_path: Path) -> None:
    environment = {**os.environ, "AT_ONCE": "1"}
    for name in "ab":
        killed = run(APP + ALONE, tmp_path, "die", "captured", name, env=environment)
        assert killed.returncode == -9, killed.stderr
    assert len(list(tmp_path.glob("state/*/g-*/*.journal"))) == 2
    done = run(APP + ALONE, tmp_path, "live", 41, env=environment)
    assert done.returncode == 0, done.stderr
    rows, counted = json.loads(done.stdout)
    assert (len(rows), counted) == (41, 41)
    storage = SQLStorage.from_url(f"sqlite:///{tmp_path}/usage.sqlite3")
    records = list(storage.records())
    storage.close()
    assert len({record.id for record in records}) == 41
    whose = {(record.path[:2], record.process) for record in records}
    assert len(whose) == len({process for _, process in whose}) == 3


@pytest.mark.parametrize("seam", [*SEAMS, "synced"])
def test_a_sibling_counts_and_stores_what_a_killed_one_left_once(tmp_path: Path, seam: str) -> None:
    # The second one recovers what the first one left, and dies of it at the same place.
    done = run(APP + SIBLINGS, tmp_path, seam, seam)
    assert done.returncode == 0, done.stderr
    rows, counted = json.loads(done.stdout)
    names = [f"/{victim}-{number}" for victim in (0, 1) for number in range(20)]
    assert rows == sorted(["/first", *names])
    assert counted == 41


def test_who_dies_while_countries_are_asked_for_leaves_these_uncounted(tmp_path: Path) -> None:
    # The first had marked all for its first commit, which never came; that of the second did.
    done = run(APP + SIBLINGS, tmp_path, "marked", "half")
    assert done.returncode == 0, done.stderr
    rows, counted = json.loads(done.stdout)
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
    assert run(script, tmp_path, "die", whose).returncode == -9
    if whose == "recovered":
        assert run(script, tmp_path, "live", whose).returncode == -9
    done = run(APP + ALONE, tmp_path, "live", 1102)
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
    done = run(APP + textwrap.dedent(script), tmp_path)
    assert done.returncode == 0, done.stderr
    assert samples(done.stdout, "flask_usage_journaled") == {(): 0}
    assert sum(samples(done.stdout, "flask_usage_requests_total").values()) == 20
    assert done.stderr.count("no place for the state directory") == 1
    assert len(done.stderr.splitlines()) == 1
    assert not list((tmp_path / "state").glob("*/*/*.journal"))
