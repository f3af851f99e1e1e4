"""Many workers: any of them answers for all, and one that is killed takes nothing away."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest
import requests
from helpers.front_door import samples
from helpers.process import run, until
from helpers.servers import APP, Gunicorn

from flask_usage_metrics import open_storage
from flask_usage_metrics.storage import Storage

THREE = ("-w", "3", "--threads", "2", "--graceful-timeout", "10")


def total(server: Gunicorn, name: str = "flask_usage_requests_total") -> float:
    return sum(samples(server.get("/metrics"), name).values())


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(THREE, id="threads"),
        pytest.param((*THREE, "--preload"), id="preload"),
        pytest.param(("-w", "3"), id="sync"),
        pytest.param((*THREE, "--max-requests", "25"), id="recycled"),
    ],
)
def test_any_worker_answers_for_all(tmp_path: Path, options: tuple[str, ...]) -> None:
    with Gunicorn(tmp_path, *options) as server:
        answered = [server.get() for _ in range(80)]
        while len(set(answered)) < 2:
            answered.append(server.get())
        for _ in range(60):
            server.get("/stream")
        expected = {
            (("country", "NL"), ("endpoint", name), ("method", "GET"), ("status", "200")): count
            for name, count in (("pid", len(answered)), ("stream", 60))
        }
        until(lambda: samples(server.get("/metrics"), "flask_usage_requests_total"), expected)
        for _ in range(12):  # whoever answers
            text = server.get("/metrics")
            assert samples(text, "flask_usage_requests_total") == expected
            name = "flask_usage_request_duration_seconds_count"
            assert samples(text, name) == expected
            assert samples(text, "flask_usage_totals_shared") == {(): 1}
            assert samples(text, "flask_usage_journaled") == {(): 1}
        until(server.stored, sum(expected.values()))


def test_a_killed_worker_takes_nothing_away(tmp_path: Path) -> None:
    # So long that nothing is processed or written before the kill.
    slow = {"FLASK_TRACK_USAGE_FLUSH_SECONDS": "2"}
    with Gunicorn(tmp_path, "-w", "2", **slow) as server:
        for _ in range(50):
            server.get()
        for pid in server.workers():
            server.kill(pid)
        until(lambda: len(server.workers()), 2)
        time.sleep(0.5)
        for _ in range(10):
            server.get()
        until(lambda: total(server), 60)
        until(server.stored, 60)
    assert "lost" not in server.log()


def test_workers_without_requests_recover_what_a_killed_one_left(tmp_path: Path) -> None:
    slow = {"FLASK_TRACK_USAGE_FLUSH_SECONDS": "3"}
    with Gunicorn(tmp_path, "-w", "2", **slow) as server:
        answered = [server.get() for _ in range(30)]
        while len(set(answered)) < 2:
            answered.append(server.get())
        server.kill(int(answered[-1]))
        until(server.stored, len(answered))


def test_a_server_that_is_killed_as_a_whole_leaves_its_records_to_the_next(tmp_path: Path) -> None:
    slow = {"FLASK_TRACK_USAGE_FLUSH_SECONDS": "5"}
    first = Gunicorn(tmp_path, "-w", "2", **slow)
    for _ in range(40):
        first.get()
    workers = first.workers()
    first.process.kill()
    first.process.wait()
    for pid in workers:
        first.kill(pid)
    first.stop()
    with Gunicorn(tmp_path, "-w", "2") as second:
        second.get()
        until(second.stored, 41)
        # Nobody has seen them counted, so they are counted now; and once.
        until(lambda: total(second), 41)
        until(lambda: len(list((tmp_path / "state").glob("*/g-*"))), 1)


def test_counters_never_fall_while_workers_are_killed(tmp_path: Path) -> None:
    with Gunicorn(tmp_path, *THREE) as server:
        stop = threading.Event()
        answered, failed = [0], [0]

        def visit() -> None:
            session = requests.Session()
            while not stop.is_set():
                try:
                    ok = session.get(server.address + "/pid", timeout=10).ok
                except requests.RequestException:
                    ok = False
                (answered if ok else failed)[0] += 1

        threads = [threading.Thread(target=visit) for _ in range(3)]
        for thread in threads:
            thread.start()
        seen = [0.0]
        for round_ in range(6):
            time.sleep(0.4)
            server.kill(server.workers()[round_ % 2])
            for _ in range(3):
                try:
                    text = requests.get(server.address + "/metrics", timeout=10).text
                except requests.RequestException:
                    continue  # it was the killed one that answered
                seen.append(sum(samples(text, "flask_usage_requests_total").values()))
        stop.set()
        for thread in threads:
            thread.join()
        assert seen == sorted(seen)
        time.sleep(1.5)
        counted = total(server)
        assert answered[0] <= counted <= answered[0] + failed[0]
        until(server.stored, counted)


@pytest.mark.parametrize("how", [signal.SIGHUP, signal.SIGTERM])
def test_a_reload_keeps_the_counts_and_an_end_loses_none(
    tmp_path: Path, how: signal.Signals
) -> None:
    with Gunicorn(tmp_path, *THREE) as server:
        for _ in range(100):
            server.get()
        if how is signal.SIGHUP:
            before = set(server.workers())
            os.kill(server.process.pid, signal.SIGHUP)
            until(lambda: bool(before & set(server.workers())), False, 30)
            until(lambda: len(server.workers()), 3)
            server.wait_until_it_answers()
            assert total(server) == 100
    assert server.stored() == 100


def test_in_progress_is_everybodys_and_heals(tmp_path: Path) -> None:
    def in_progress() -> float:
        return samples(server.get("/metrics"), "flask_usage_requests_in_progress")[()]

    # Threads to spare: a worker of gunicorn accepts connections that its threads are too busy for.
    with Gunicorn(tmp_path, "-w", "3", "--threads", "8") as server:
        for _ in range(40):
            server.get()
        threads = [threading.Thread(target=lambda: _ignore(server)) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(in_progress, 2, 2.8)
        for pid in server.workers():
            server.kill(pid)
        for thread in threads:
            thread.join()
        until(in_progress, 0)
        text = server.get("/metrics")
        assert samples(text, "flask_usage_workers")[()] <= 3


def _ignore(server: Gunicorn) -> None:
    with suppress(requests.RequestException):
        requests.get(server.address + "/slow", timeout=10)


def test_separate_servers_stay_separate(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    options = {"FLASK_TRACK_USAGE_STATE_DIR": state}
    with (
        Gunicorn(places[0], *THREE, **options) as one,
        Gunicorn(places[1], *THREE, **options) as two,
    ):
        for _ in range(30):
            one.get()
        for _ in range(20):
            two.get()
        until(lambda: (total(one), total(two)), (30, 20))


@pytest.mark.slow
def test_nothing_grows_with_the_number_of_workers_there_were(tmp_path: Path) -> None:
    with Gunicorn(tmp_path, "-w", "2", "--max-requests", "10") as server:
        for _ in range(200):
            server.get()
        until(lambda: total(server), 200)
        time.sleep(1)
        (run,) = (tmp_path / "state").glob("*/g-*")
        journals = list(run.glob("*.journal"))
        assert len(journals) <= 4
        assert len(server.workers()) == 2
        kinds = {
            path.name.partition(".")[2].rpartition("-")[0] or path.name for path in run.iterdir()
        }
        assert len(kinds) <= 6


@pytest.mark.parametrize("damage", ["gone", "garbage", "emptied", "folder-gone"])
def test_a_damaged_totals_file_fails_no_scrape_and_loses_no_count(
    tmp_path: Path, damage: str
) -> None:
    with Gunicorn(tmp_path, "-w", "3") as server:
        answered = [server.get() for _ in range(60)]
        while len(set(answered)) < 3:  # one that has not begun remembers nothing
            answered.append(server.get())
        shown: dict[float, float] = {}

        def shown_by_each() -> dict[float, float]:
            text = server.get("/metrics")
            (pid,) = samples(text, "pid").values()
            shown[pid] = sum(samples(text, "flask_usage_requests_total").values())
            return shown

        until(shown_by_each, dict.fromkeys(map(float, server.workers()), len(answered)))
        (file,) = (tmp_path / "state").glob("*/g-*/totals.sqlite3")
        if damage == "gone":
            file.unlink()
        elif damage == "garbage":
            file.write_bytes(b"garbage" * 5000)
        elif damage == "emptied":
            file.write_bytes(b"")
        else:
            _remove(file.parent)
        seen = []
        for _ in range(40):
            seen.append(total(server))
            server.get()
        assert min(seen) >= len(answered)
        until(lambda: total(server), len(answered) + 40, 10)
        for _ in range(10):
            assert total(server) == len(answered) + 40


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_nothing_waits_when_no_state_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file in place of the folder")
    with Gunicorn(tmp_path, "-w", "2") as server:
        for _ in range(30):
            server.get()
        text = server.get("/metrics")
        assert samples(text, "flask_usage_totals_shared") == {(): 0}
        assert samples(text, "flask_usage_journaled") == {(): 0}
        until(server.stored, 30)
    assert server.log().count("no place for the state directory") in (1, 2)  # one a worker


def test_a_lock_that_somebody_keeps_delays_new_workers_for_a_second_at_most(
    tmp_path: Path,
) -> None:
    with Gunicorn(tmp_path, "-w", "2") as server:
        for _ in range(20):
            server.get()
        until(server.stored, 20)
        (lock,) = tmp_path.glob("state/*/*/lock")
        with lock.open() as held:
            for pid in server.workers():
                server.kill(pid)
            until(lambda: _try_lock(held), True)  # before any new worker was asked
            for _ in range(20):
                started_at = time.monotonic()
                server.get()
                assert time.monotonic() - started_at < 8  # a worker starts meanwhile, too
            assert samples(server.get("/metrics"), "flask_usage_totals_shared") == {(): 0}
        until(server.stored, 40)


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB: room for no journal."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]
    if shutil.which("mount") is None or run(*mount).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield folder
    assert run("umount", "-l", folder).returncode == 0


def test_a_full_tmpfs_kills_no_worker_and_loses_no_record(
    tmp_path: Path, small_tmpfs: Path
) -> None:
    state = {"FLASK_TRACK_USAGE_STATE_DIR": str(small_tmpfs / "state")}
    with Gunicorn(tmp_path, "-w", "2", **state) as server:
        for _ in range(60):
            server.get()
        until(lambda: len(server.workers()), 2)
        workers = set(server.workers())
        (small_tmpfs / "rest").write_bytes(b"x" * _free(small_tmpfs))
        for _ in range(60):
            server.get()
        answers = [requests.get(f"{server.address}/metrics", timeout=20) for _ in range(9)]
        # A worker that came when no room was left for its view of the totals shows none.
        texts = [answer.text for answer in answers if answer.status_code != 503]
        assert all(samples(text, "flask_usage_journaled") == {(): 0} for text in texts)
        until(server.stored, 120)
        assert set(server.workers()) == workers


def _free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_bsize


def test_visitors_are_the_same_in_all_workers_and_after_a_restart(tmp_path: Path) -> None:
    visitors = 30
    daily = {
        "FLASK_TRACK_USAGE_VISITORS": "daily",
        "FLASK_TRACK_USAGE_TRUSTED_PROXIES": "127.0.0.1",
    }

    asked = 0

    def visit(server: Gunicorn) -> int:
        nonlocal asked
        answered = set()
        for number in range(1_000):
            # One worker may be quick enough to answer many in a row.
            if number >= 4 * visitors and len(answered) > 1:
                break
            address = f"203.0.113.{number % visitors}"
            headers = {
                "X-Forwarded-For": address,
                "User-Agent": "Firefox/139.0",
                "Host": "shop.example",  # else each server's own port is in it
            }
            answered.add(requests.get(server.address + "/pid", headers=headers, timeout=20).text)
            asked += 1
        return len(answered)

    def counted() -> dict[object, float]:
        return samples(server.get("/metrics"), "flask_usage_visitors")

    with Gunicorn(tmp_path, "-w", "3", **daily) as server:
        assert visit(server) >= 2
        server.kill(server.workers()[0])
        assert visit(server) >= 2
        until(counted, {(("window", "1d"),): visitors})
        assert [counted() for _ in range(9)] == [{(("window", "1d"),): visitors}] * 9
    with Gunicorn(tmp_path, "-w", "2", **daily) as server:
        visit(server)
        until(counted, {(("window", "1d"),): visitors})
        until(server.stored, asked)
    storage = open_storage(f"sqlite:///{tmp_path}/usage.sqlite3")
    assert isinstance(storage, Storage)
    assert [summary.visitors for summary in storage.summarize((), visitors=True)] == [visitors]
    storage.close()


def test_what_workers_left_is_recovered_by_those_with_other_settings(tmp_path: Path) -> None:
    """Their totals are others by then, and the parent of both lives on."""
    source = APP.replace("app.config.from_prefixed_env()", SETTINGS)
    (tmp_path / "settings.json").write_text('{"TRACK_USAGE_FLUSH_SECONDS": 60}')
    with Gunicorn(tmp_path, "-w", "2", app=source) as server:
        for _ in range(20):
            server.get()
        before = server.workers()
        server.process.send_signal(signal.SIGSTOP)  # it starts no others yet
        for pid in before:
            server.kill(pid)
        (tmp_path / "settings.json").write_text('{"TRACK_USAGE_BUCKETS": [0.5]}')
        server.process.send_signal(signal.SIGCONT)
        until(lambda: total(server) + server.stored(), 40, 30)


SETTINGS = """
app.config.from_file("settings.json", load=__import__("json").load)
app.config.from_prefixed_env()
"""
