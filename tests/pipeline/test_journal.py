"""The journal and its file: what was captured outlives a kill -9, a full ring and damage."""

from __future__ import annotations

import gc
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from helpers.examples import examples
from helpers.process import run_python, start_python
from helpers.watch import descriptors
from hypothesis import given, settings
from hypothesis import strategies as st

from flask_usage_metrics.pipeline.journal import Journal
from flask_usage_metrics.pipeline.journal_file import JournalFile
from flask_usage_metrics.records.observation import ENVIRON_KEYS, Extras, Observation, Origin

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


# ------------------------------------------------------------------------ kills and owners


def test_frames_survive_a_kill_and_only_one_gets_them(tmp_path: Path) -> None:
    script = """
    import sys
    sys.path.insert(0, sys.argv[2])
    from test_journal import *
    journal = Journal(1000)
    journal.file = JournalFile.create(Path(sys.argv[1]), ORIGIN)
    for number in range(1, 301):
        assert journal.append(seen(number, f"t{number}"))
    print("ready", flush=True)
    sys.stdin.read()
    """
    with start_python(script, tmp_path, Path(__file__).parent) as child:
        assert child.line() == "ready"
        (path,) = tmp_path.glob("*.journal")
        assert JournalFile.recover(path, ORIGIN.app) is None  # its owner lives
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


@settings(max_examples=examples(150), deadline=None)
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


def test_it_takes_no_more_of_the_disk_than_it_has_needed(tmp_path: Path) -> None:
    file = JournalFile.create(tmp_path, ORIGIN)
    (path,) = tmp_path.iterdir()
    kept: list[tuple[int, Observation]] = []
    for number in range(1, 6001):
        kept.append((number, seen(number, "y" * 40)))
        assert file.append(number, payload(kept[-1][1]))
        if number % 50 == 0 and number < 3000:
            file.truncate(number)
            kept.clear()
        if number == 3000:
            assert path.stat().st_blocks * 512 <= 128 * 1024
            assert path.stat().st_size > 4 * 1024 * 1024
    assert path.stat().st_blocks * 512 > 2 * 1024 * 1024
    assert frames(file) == kept
    file.close(remove=False)
    recovered = JournalFile.recover(path, ORIGIN.app)
    assert recovered is not None
    assert frames(recovered) == kept
    recovered.close(remove=True)


def test_a_disk_that_is_full_keeps_it_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = JournalFile.create(tmp_path, ORIGIN)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    number = 0
    while file.append(number + 1, payload(seen(number + 1, "z" * 40))):
        number += 1
    assert number > 60
    (path,) = tmp_path.iterdir()
    assert path.stat().st_blocks * 512 <= 128 * 1024  # no page was touched that has no room
    assert frames(file) == [(one, seen(one, "z" * 40)) for one in range(1, number + 1)]
    for round_ in range(3):  # what it has serves again and again
        file.truncate(number)
        first, number = number + 1, number + 50
        for one in range(first, number + 1):
            assert file.append(one, payload(seen(one, "z" * 40))), round_
    monkeypatch.undo()  # there is room again
    while file.append(number + 1, payload(seen(number + 1, "z" * 40))):
        number += 1
    assert number > 4000
    file.close(remove=True)


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
    sys.path.insert(0, sys.argv[2])
    from test_journal import *
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    before = descriptors(Path(sys.argv[1]))
    try:
        JournalFile.create(Path(sys.argv[1]), ORIGIN)
    except OSError as error:
        print(descriptors(Path(sys.argv[1])) == before)
    """
    done = run_python(script, tmp_path, Path(__file__).parent)
    assert (done.stdout, done.stderr) == ("True\n", "")
    assert not list(tmp_path.iterdir())
