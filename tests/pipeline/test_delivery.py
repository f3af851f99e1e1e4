"""A storage that raises, blocks or is down: responses unharmed, each loss counted."""

from __future__ import annotations

import logging
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.front_door import Site
from helpers.process import Done, run_python, until
from helpers.watch import alive

from flask_usage_metrics import StorageUnavailable, UsageRecord
from flask_usage_metrics.enrich.enricher import Enricher
from flask_usage_metrics.extension import wiring
from flask_usage_metrics.pipeline import processing, yielding
from flask_usage_metrics.pipeline.delivery.sink import Sink
from flask_usage_metrics.records.observation import Observation
from flask_usage_metrics.storage import Writer


class Kept(Writer):
    """Keeps records, and fails in a way of its own."""

    name = "kept"

    def set_up(self, fail: Callable[[Sequence[UsageRecord]], object] = lambda batch: None) -> None:
        self.records: list[UsageRecord] = []
        self.fail = fail

    def write(self, batch: Sequence[UsageRecord]) -> None:
        self.fail(batch)
        self.records += batch


def visit(site: Site, count: int, path: str = "/nowhere") -> None:
    for _ in range(count):
        assert site.get(path).status_code in (200, 404)


def counts(written: int, failed: int = 0, dropped: int = 0, pending: int = 0) -> dict[str, int]:
    return {"written": written, "failed": failed, "dropped": dropped, "pending": pending}


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_callable_that_raises_is_tried_once_a_record(
    make_site: Callable[..., Site], error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[Any] = []
    kept: list[Any] = []

    def broken(data: dict[str, Any]) -> None:
        calls.append(data)
        raise error("secret-token")

    site = make_site([broken, kept.append])
    visit(site, 20)
    assert site.usage.flush()
    assert (len(calls), len(kept)) == (20, 20)
    assert site.account("broken") == counts(0, failed=20)
    assert site.account("append") == counts(20)
    assert site.account("metrics") == counts(20)
    assert [message for message in caplog.messages if "broken" in message] == [
        f"sink broken: {error.__name__}; records were not written; "
        "look at the storage in TRACK_USAGE_STORAGE: is it up, has it room, who may write"
    ]
    assert "secret-token" not in caplog.text
    assert site.samples("flask_usage_sink_up")[(("sink", "broken"),)] == 0


def test_one_poisonous_record_does_not_sink_its_batch(make_site: Callable[..., Site]) -> None:
    def refuse(batch: Sequence[UsageRecord]) -> None:
        if any(record.path == "/poison" for record in batch):
            raise ValueError

    kept = Kept(refuse)
    site = make_site(kept)
    visit(site, 30)
    visit(site, 1, "/poison")
    visit(site, 30)
    assert site.usage.flush()
    assert len(kept.records) == len({record.id for record in kept.records}) == 60
    assert site.account("kept") == counts(60, failed=1)


def test_an_outage_loses_nothing(make_site: Callable[..., Site]) -> None:
    down = threading.Event()
    down.set()

    def refuse(_batch: Sequence[UsageRecord]) -> None:
        if down.is_set():
            raise StorageUnavailable

    kept = Kept(refuse)
    site = make_site(kept)
    before = random.getstate()
    visit(site, 10)
    assert not site.usage.flush(0.5)
    assert site.account("kept") == counts(0, pending=10)
    # The pauses between attempts are random, but an app may have seeded the generator.
    assert random.getstate() == before
    assert site.account("metrics") == counts(10)
    assert site.samples("flask_usage_sink_up")[(("sink", "kept"),)] == 0
    down.clear()
    assert site.usage.flush()
    assert site.account("kept") == counts(10)
    assert site.samples("flask_usage_sink_up")[(("sink", "kept"),)] == 1


def test_a_failure_that_says_nothing_of_its_kind_is_tried_again(
    make_site: Callable[..., Site],
) -> None:
    failures = iter([RuntimeError, ConnectionError, RuntimeError])

    def refuse(_batch: Sequence[UsageRecord]) -> None:
        for error in failures:
            raise error

    kept = Kept(refuse)
    site = make_site(kept)
    visit(site, 3)
    assert site.usage.flush()
    assert site.account("kept") == counts(3)


@pytest.mark.parametrize("disk", [True, False], ids=["spooled", "no-disk"])
def test_a_blocked_storage_delays_neither_requests_nor_the_others(
    make_site: Callable[..., Site], tmp_path: Path, disk: bool
) -> None:
    (tmp_path / "in-the-way").touch()
    state = tmp_path / ("state" if disk else "in-the-way")
    free = threading.Event()
    blocked = Kept(lambda batch: free.wait(30))
    blocked.name = "blocked"
    kept = Kept()
    site = make_site([blocked, kept], BUFFER_RECORDS=50, STATE_DIR=state)
    started = time.monotonic()
    for _ in range(8):
        visit(site, 20)
        site.scrape()
    assert time.monotonic() - started < 20
    assert not site.usage.flush(0.3)
    assert len(kept.records) == 160
    assert sum(site.counted().values()) == 160
    if disk:
        assert site.account("blocked") == counts(0, pending=160)
    else:
        # 50 records wait in memory; there was no room for the others.
        assert site.account("blocked") == counts(0, dropped=110, pending=50)
    free.set()
    assert site.usage.flush()
    assert site.account("blocked") == (counts(160) if disk else counts(50, dropped=110))
    # One batch was being written when the others went to the disk, and it with them.
    ids = {record.id for record in blocked.records}
    assert len(ids) == (160 if disk else 50)


def test_a_full_journal_drops_and_counts(make_site: Callable[..., Site]) -> None:
    kept = Kept()
    site = make_site(kept, BUFFER_RECORDS=10, FLUSH_SECONDS=60)
    with site.held():
        visit(site, 15)
    assert site.usage.flush()
    assert site.account("kept") == site.account("metrics") == counts(10, dropped=5)
    assert sum(site.counted().values()) == len(kept.records) == 10


def test_an_observation_nobody_thought_of_is_counted_as_failed(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept()
    site = make_site(kept)
    monkeypatch.setattr("flask_usage_metrics.enrich.enricher.UsageRecord", None)
    visit(site, 2)
    site.scrape()
    monkeypatch.undo()
    visit(site, 3)
    assert site.usage.flush()
    assert site.account("kept") == site.account("metrics") == counts(3, failed=2)


def make_site_with_two_sinks(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[Site, Kept, Kept]:
    """Make a site with a sink for all requests, and one that accepts those of /some only."""

    def make(*arguments: Any, **named: Any) -> list[Sink]:
        made = make_sinks(*arguments, **named)
        made[1].accepts = lambda observation: "/some" in observation.environ
        return made

    make_sinks = wiring.make_sinks
    monkeypatch.setattr(wiring, "make_sinks", make)
    every, some = Kept(), Kept()
    every.name, some.name = "every", "some"
    return make_site([every, some], **options), every, some


def test_a_sink_accounts_for_what_it_accepts_and_nothing_else(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = threading.Event()

    def country(_address: str) -> str:
        known.wait(60)
        return "NL"

    site, every, some = make_site_with_two_sinks(
        make_site, monkeypatch, country=country, BUFFER_RECORDS=10, FLUSH_SECONDS=60
    )
    # The worker sleeps, lest it be in the middle of a batch when something is looked at.
    site.app.extensions["track_usage"].pipeline._journal.hurry = lambda: None
    visit(site, 3, "/other")
    visit(site, 2, "/some")
    pending = site.app.extensions["track_usage"].pipeline.pending
    assert pending() == {"metrics": 5, "every": 5, "some": 2}  # in the journal
    assert site.account("every") == counts(0, pending=5)  # and waiting for their country
    assert site.account("some") == counts(0, pending=2)
    with site.held():
        visit(site, 8, "/some")
        visit(site, 5, "/other")  # for three of them there is no room
        visit(site, 4, "/some")  # nor for any of these
        assert pending() == {"metrics": 22, "every": 22, "some": 14}
    known.set()
    assert site.usage.flush()
    assert site.account("every") == site.account("metrics") == counts(15, dropped=7)
    assert site.account("some") == counts(10, dropped=4)
    assert len(every.records) == 15
    assert [record.path for record in some.records] == ["/some"] * 10


def test_a_sink_counts_only_failures_of_what_it_accepts(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, every, some = make_site_with_two_sinks(make_site, monkeypatch)
    for path in ("/some", "/other"):
        with monkeypatch.context() as broken:
            broken.setattr("flask_usage_metrics.enrich.enricher.UsageRecord", None)
            visit(site, 2, path)
            site.scrape()
        with monkeypatch.context() as broken:
            broken.setattr("flask_usage_metrics.capture.exchange.Observation", None)
            visit(site, 1, path)
    visit(site, 3, "/some")
    visit(site, 3, "/other")
    assert site.usage.flush()
    assert site.account("every") == site.account("metrics") == counts(6, failed=6)
    # Of a request that not even an observation was made of nobody knows whether it is accepted.
    assert site.account("some") == counts(3, failed=2)
    assert (len(every.records), len(some.records)) == (6, 3)


def test_a_sink_is_given_what_it_accepts_beside_failures_and_what_waits(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, every, some = make_site_with_two_sinks(make_site, monkeypatch, FLUSH_SECONDS=60)
    enrich = Enricher.enrich

    def enrich_if_known(
        enricher: Enricher, observation: Observation, *arguments: Any
    ) -> UsageRecord | None:
        if "/poison" in observation.environ:
            raise ValueError
        if "/later" in observation.environ:
            return None  # its country is being asked for
        return enrich(enricher, observation, *arguments)

    for path in ("/poison", "/some", "/later", "/other", "/some", "/other"):
        visit(site, 1, path)
    with monkeypatch.context() as asking:
        asking.setattr(Enricher, "enrich", enrich_if_known)
        site.scrape()
    assert site.usage.flush()
    assert site.account("every") == site.account("metrics") == counts(5, failed=1)
    assert site.account("some") == counts(2)
    assert [record.path for record in every.records] == [
        "/some", "/other", "/some", "/other", "/later"
    ]  # fmt: skip
    assert [record.path for record in some.records] == ["/some"] * 2


def test_a_request_whose_country_is_asked_for_is_pending_once(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(FLUSH_SECONDS=60)
    visit(site, 5)
    pending = site.app.extensions["track_usage"].pipeline.pending
    seen: list[int] = []

    def ask(*_: object) -> None:
        seen.append(pending()["metrics"])

    with monkeypatch.context() as asking:
        asking.setattr(Enricher, "enrich", ask)
        site.scrape()
    assert len(seen) >= 5
    assert set(seen) == {5}
    assert site.usage.flush()
    assert site.account("metrics") == counts(5)


def test_a_list_writes_to_all(make_site: Callable[..., Site], tmp_path: Path) -> None:
    kept = Kept()
    site = make_site(
        [f"sqlite:///{tmp_path}/a.sqlite3", f"jsonl:///{tmp_path}/b.jsonl", kept, kept]
    )
    visit(site, 7)
    assert site.usage.flush()
    sinks = ("metrics", "sqlite", "jsonl", "kept", "kept-2")
    assert [site.account(sink)["written"] for sink in sinks] == [7] * 5
    stored = list(site.usage.storage.records())
    assert stored == kept.records[:7]


@pytest.mark.parametrize("damage", ["corrupt", "directory", "no-folder", "locked"])
def test_a_damaged_sqlite_file_stops_neither_set_up_nor_requests(
    make_site: Callable[..., Site], tmp_path: Path, damage: str
) -> None:
    import sqlite3

    path = tmp_path / "folder" / "usage.sqlite3"
    if damage == "no-folder":
        (tmp_path / "folder").write_text("a file in place of the folder")
    else:
        path.parent.mkdir()
    if damage == "corrupt":
        path.write_bytes(b"not a database" * 1000)
    if damage == "directory":
        path.mkdir()
    kept = Kept()
    site = make_site([f"sqlite:///{path}", kept])
    holder = None
    if damage == "locked":
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN EXCLUSIVE")
    visit(site, 5)
    assert not site.usage.flush(0.5)
    assert site.account("sqlite") == counts(0, pending=5)
    assert len(kept.records) == 5
    if holder is not None:
        holder.close()
    elif damage == "directory":
        path.rmdir()
    elif damage == "corrupt":
        path.unlink()
    else:
        path.parent.unlink()
    # What was in the way is gone: nothing was lost.
    assert site.usage.flush(20)
    assert site.usage.storage.count() == 5


def test_a_fault_is_logged_once_per_kind(
    make_site: Callable[..., Site], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_data: dict[str, Any]) -> None:
        raise ValueError

    site = make_site(broken)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            visit(site, 5)
            site.usage.flush()
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    assert site.faults()["sink broken"] >= 5


def test_inline_delivery_has_written_when_the_response_is_there(
    make_site: Callable[..., Site],
) -> None:
    kept = Kept()
    site = make_site(kept, DELIVERY="inline", FLUSH_SECONDS=60)
    for number in range(1, 6):
        visit(site, 1)
        assert len(kept.records) == number


def test_where_threads_starve_the_request_does_their_work(
    make_site: Callable[..., Site],
    monkeypatch: pytest.MonkeyPatch,
    started: list[threading.Thread],
) -> None:
    # What uWSGI before 2.0.24 says of itself without --enable-threads.
    monkeypatch.setitem(sys.modules, "uwsgi", SimpleNamespace(has_threads=False))
    kept = Kept()
    site = make_site(kept, FLUSH_SECONDS=60)
    visit(site, 1)
    assert len(kept.records) == 1
    # It ran while the request waited for it.
    assert [thread.name for thread in started] == ["flask_usage_metrics kept"]


def run(program: str, timeout: float = 60) -> Done:
    with tempfile.TemporaryDirectory() as state:
        return run_python(program, warnings=(), seconds=timeout, env={"TMPDIR": state})


def test_the_end_of_the_process_writes_what_waits(tmp_path: Path) -> None:
    done = run(f"""
        from flask import Flask
        from flask_usage_metrics import TrackUsage
        app = Flask("shop")
        app.config["TRACK_USAGE_FLUSH_SECONDS"] = 60
        TrackUsage(app, "sqlite:///{tmp_path}/usage.sqlite3")
        for _ in range(20):
            app.test_client().get("/nowhere")
    """)
    assert (done.returncode, done.stderr) == (0, "")
    from flask_usage_metrics import open_storage

    storage = open_storage(f"sqlite:///{tmp_path}/usage.sqlite3")
    assert storage.count() == 20
    storage.close()


def test_a_hung_storage_does_not_keep_the_process_alive() -> None:
    started = time.monotonic()
    done = run("""
        import threading
        from flask import Flask
        from flask_usage_metrics import TrackUsage
        app = Flask("shop")
        app.config["TRACK_USAGE_STATE_DIR"] = "/dev/null"
        TrackUsage(app, lambda data: threading.Event().wait())
        app.test_client().get("/nowhere")
    """)
    assert done.returncode == 0
    assert time.monotonic() - started < 20
    assert "exit: 1 record(s) were not written; they are lost" in done.stderr


@pytest.mark.slow
def test_what_a_hung_storage_left_is_written_by_the_next_process(tmp_path: Path) -> None:
    program = f"""
        import sys, threading
        from flask import Flask
        from flask_usage_metrics import TrackUsage
        from flask_usage_metrics.storage import Writer

        class Slow(Writer):
            name = "slow"
            def write(self, batch):
                if "hang" in sys.argv:
                    threading.Event().wait()
                print(*sorted(record.path for record in batch), flush=True)

        app = Flask("shop")
        app.config["TRACK_USAGE_STATE_DIR"] = {str(tmp_path)!r}
        usage = TrackUsage(app, Slow())
        for path in sys.argv[1].split():
            app.test_client().get(path)
        import time
        time.sleep(1.5)
    """
    out = [
        run_python(program, *arguments, warnings=()).stdout
        for arguments in (["/a /b /c", "hang"], ["/d"])
    ]
    assert out[0] == ""
    assert sorted(out[1].split()) == ["/a", "/b", "/c", "/d"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_counts_and_writes_its_own(tmp_path: Path) -> None:
    done = run(f"""
        import os, warnings
        from flask import Flask
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork
        from flask_usage_metrics import TrackUsage
        app = Flask("shop")
        app.config["TRACK_USAGE_FLUSH_SECONDS"] = 0.2
        usage = TrackUsage(app, "sqlite:///{tmp_path}/usage.sqlite3")

        def total():
            text = app.test_client().get("/metrics").text
            lines = [l for l in text.splitlines() if l.startswith("flask_usage_requests_total")]
            return sum(float(l.split()[-1]) for l in lines)

        for number in range(5):
            app.test_client().get("/nowhere")
        children = []
        for child in range(4):
            pid = os.fork()
            if not pid:
                for number in range(10):
                    app.test_client().get("/nowhere")
                ok = total() == 10 and usage.flush()
                os._exit(0 if ok else 1)
            children.append(pid)
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
        assert total() == 5 and usage.flush()
        assert len({{record.id for record in usage.storage.records()}}) == 45
    """)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_while_our_locks_are_held_hangs_no_child() -> None:
    done = run(
        """
        import os, threading, warnings
        from flask import Flask
        from flask_usage_metrics import TrackUsage
        warnings.simplefilter("ignore")
        app = Flask("shop")
        app.config["TRACK_USAGE_FLUSH_SECONDS"] = 0.001
        usage = TrackUsage(app, lambda data: None)
        # A fork while a module is being imported hangs by CPython's own lock: import all first.
        for path in ("/nowhere", "/metrics"):
            app.test_client().get(path)
        usage.flush()
        stop = threading.Event()

        def busy():
            client = app.test_client()
            while not stop.is_set():
                client.get("/nowhere")
                client.get("/metrics")

        threads = [threading.Thread(target=busy) for _ in range(2)]
        for thread in threads:
            thread.start()
        bad = 0
        for _ in range(100):
            pid = os.fork()
            if not pid:
                import signal
                signal.alarm(20)
                app.test_client().get("/nowhere")
                ok = usage.flush() and app.test_client().get("/metrics").status_code == 200
                os._exit(0 if ok else 1)
            bad += os.waitpid(pid, 0)[1] != 0
        stop.set()
        for thread in threads:
            thread.join()
        assert not bad, bad
    """,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_idle_threads_end_and_start_again(
    make_site: Callable[..., Site],
    monkeypatch: pytest.MonkeyPatch,
    started: list[threading.Thread],
) -> None:
    monkeypatch.setattr(wiring, "IDLE_SECONDS", 0.02)
    kept = Kept()
    site = make_site(kept, FLUSH_SECONDS=0.01)
    for number in range(1, 4):
        visit(site, 1)
        until(lambda: alive(started), [])
        assert len(kept.records) == number
        names = [thread.name for thread in started]
        assert names.count("flask_usage_metrics pipeline") >= number
        assert names.count("flask_usage_metrics kept") >= number


# ------------------------------------------------------------------------ the interpreter


@pytest.mark.parametrize(("buffer", "expected"), [(10_000, 9 * 6 + 4), (100, 3 * 6 + 4)])
def test_the_worker_gives_the_interpreter_away_unless_too_much_waits(
    make_site: Callable[..., Site],
    monkeypatch: pytest.MonkeyPatch,
    buffer: int,
    expected: int,
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(yielding, "_STEP_SECONDS", 0.0)
    monkeypatch.setattr(yielding, "_STEP_ITEMS", 4)
    monkeypatch.setattr(processing, "_BATCH_ENTRIES", 10)
    monkeypatch.setattr(yielding, "release_gil", lambda: pauses.append(0.0))
    site = make_site(FLUSH_SECONDS=1000, BUFFER_RECORDS=buffer)
    with site.held():
        visit(site, 95)
    assert len(site.records()) == 95
    # Three times in each ten, both to make records and to count them; but not while more than 25
    # of 100 wait behind them.
    assert len(pauses) == expected
    site.assert_agrees()


def test_a_machine_out_of_descriptors_delays_records_and_fails_none(tmp_path: Path) -> None:
    """What data files are read from with the first records cannot be opened meanwhile."""
    done = run_python(
        """
        import os, resource, sys
        from flask import Flask
        from flask_usage_metrics import TrackUsage
        from flask_usage_metrics.pipeline.processing import Processor

        folder = sys.argv[1]
        app = Flask("shop")
        app.config["TRACK_USAGE_STATE_DIR"] = f"{folder}/state"
        app.config["TRACK_USAGE_FLUSH_SECONDS"] = 0.05
        usage = TrackUsage(app, f"sqlite:///{folder}/usage.sqlite3")
        agent = {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:130.0) Firefox/130.0"}
        process = Processor.process
        Processor.process = lambda self, *_, **__: 0
        for _ in range(20):
            app.test_client().get("/", headers=agent)
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
        held = []
        try:
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        Processor.process = process
        assert not usage.flush(1)
        for descriptor in held:
            os.close(descriptor)
        assert usage.flush()
        text = app.test_client().get("/metrics").text
        for sink in ("sqlite", "metrics"):
            for result, number in (("written", 20), ("failed", 0), ("dropped", 0)):
                line = f'flask_usage_records_total{{sink="{sink}",result="{result}"}} {number}.0'
                assert line in text, text
        records = list(usage.storage.records())
        assert [record.browser for record in records] == ["Firefox"] * 20
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
