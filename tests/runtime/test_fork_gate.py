"""Forks beside SQLite: no child hangs, and no fork waits for long."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import pytest
from helpers.process import run_python

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")

PRELUDE = """
import itertools, logging, os, signal, sqlite3, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork beside threads

def child_of(work):
    pid = os.fork()
    if not pid:
        signal.alarm(20)  # which ends it, if it hangs
        os._exit(0 if work() else 1)
    return pid

def ended_well(pid):
    return os.waitpid(pid, 0)[1] == 0

class Inside(threading.Thread):
    '''Is inside of a gate for some time.'''
    def __init__(self, gate, seconds):
        super().__init__(daemon=True)
        self.is_done = False
        self.gate, self.seconds, self.is_inside = gate, seconds, threading.Event()
        self.start()
    def run(self):
        with self.gate.entered():
            self.is_inside.set()
            time.sleep(self.seconds)
            self.is_done = True

def enters(gate):
    '''Tell whether one can enter at once; even a loaded machine starts a thread in 5 seconds.'''
    fork_gate._PATIENCE_SECONDS = 40
    thread = Inside(gate, 0)
    thread.join(5)
    return not thread.is_alive()
"""


def run(program: str, folder: Path, timeout: float = 60) -> None:
    """Run a program in a process of its own, which nothing else has threads in."""
    done = run_python(
        PRELUDE + textwrap.dedent(program),
        folder=folder,
        env={"TMPDIR": str(folder)},
        seconds=timeout,
    )
    assert done == (0, "", "")


GATE = """
from flask_usage_metrics.runtime import fork_gate
"""


def test_a_fork_waits_until_nobody_is_inside(tmp_path: Path) -> None:
    program = """
        fork_gate._PATIENCE_SECONDS = 20
        gate = fork_gate.ForkGate()
        threads = [Inside(gate, seconds) for seconds in (0.3, 0.1)]
        for thread in threads:
            thread.is_inside.wait()
        pid = child_of(lambda: enters(gate))
        assert all(thread.is_done for thread in threads)
        assert ended_well(pid) and enters(gate)
    """
    run(GATE + textwrap.dedent(program), tmp_path)


def test_a_fork_does_not_wait_for_ever(tmp_path: Path) -> None:
    program = """
        fork_gate._PATIENCE_SECONDS = 0.2
        gate = fork_gate.ForkGate()
        Inside(gate, 1_000).is_inside.wait()
        start = time.monotonic()
        pid = child_of(lambda: enters(gate) and ended_well(child_of(lambda: enters(gate))))
        assert 0.2 <= time.monotonic() - start < 10
        assert ended_well(pid)
        # Those that are still inside keep nobody else out, neither here nor there.
        assert enters(gate)
    """
    run(GATE + textwrap.dedent(program), tmp_path)


def test_who_comes_while_a_fork_waits_lets_it_go_first(tmp_path: Path) -> None:
    program = """
        fork_gate._PATIENCE_SECONDS = 20
        late = []
        # The last of these functions to be registered is the first to be called.
        os.register_at_fork(before=lambda: late.append(Inside(gate, 0)))
        gate = fork_gate.ForkGate()
        os.register_at_fork(after_in_parent=lambda: late[0].is_inside.wait(0.1))
        pid = child_of(lambda: not late[0].is_inside.is_set() and enters(gate))
        assert ended_well(pid)
        assert late[0].is_inside.wait(10)
    """
    run(GATE + textwrap.dedent(program), tmp_path)


def test_who_is_inside_may_enter_again_while_a_fork_waits(tmp_path: Path) -> None:
    program = """
        fork_gate._PATIENCE_SECONDS = 40
        gate = fork_gate.ForkGate()
        start = time.monotonic()
        with gate.entered():
            forking = threading.Thread(target=lambda: ended_well(child_of(lambda: True)))
            forking.start()
            while not gate._forking:
                time.sleep(0.001)
            with gate.entered():
                pass
            time.sleep(0.01)
            assert forking.is_alive()  # it is inside still
        forking.join()
        assert time.monotonic() - start < 20
        assert enters(gate)
    """
    run(GATE + textwrap.dedent(program), tmp_path)


def test_a_child_that_was_forked_from_inside_goes_on(tmp_path: Path) -> None:
    program = """
        fork_gate._PATIENCE_SECONDS = 0.2
        gate = fork_gate.ForkGate()

        def goes_on():
            fork_gate._PATIENCE_SECONDS = 40
            start = time.monotonic()
            return enters(gate) and ended_well(child_of(lambda: True)) and (
                time.monotonic() - start < 20
            )

        with gate.entered():
            pid = os.fork()
        if not pid:
            os._exit(0 if goes_on() else 1)
        assert ended_well(pid) and goes_on()
    """
    run(GATE + textwrap.dedent(program), tmp_path)


def test_a_signal_that_forks_in_the_middle(tmp_path: Path) -> None:
    program = """
        fork_gate._PATIENCE_SECONDS = 0.001
        gate = fork_gate.ForkGate()
        bad, forks = [], []

        def fork(*_):
            forks.append(1)
            if not ended_well(child_of(lambda: enters(gate))):
                bad.append(1)
            signal.setitimer(signal.ITIMER_PROF, 0.001)

        signal.signal(signal.SIGPROF, fork)
        signal.setitimer(signal.ITIMER_PROF, 0.001)
        deadline = time.monotonic() + 30
        while len(forks) < 100 and time.monotonic() < deadline:
            with gate.entered():
                pass
        signal.setitimer(signal.ITIMER_PROF, 0)
        assert len(forks) >= 100 and not bad and enters(gate)
    """
    run(GATE + textwrap.dedent(program), tmp_path)


def test_an_interrupt_before_a_fork_is_counted_keeps_nobody_out(tmp_path: Path) -> None:
    program = """
        gate = fork_gate.ForkGate()

        class Interrupted(threading.Condition):
            def __enter__(self):
                self.__class__ = threading.Condition
                raise KeyboardInterrupt

        gate._changed = Interrupted()
        sys.unraisablehook = lambda _: None
        pid = child_of(lambda: enters(gate))
        assert ended_well(pid) and enters(gate)
    """
    run(GATE + textwrap.dedent(program), tmp_path)


def test_forks_of_several_threads_at_once(tmp_path: Path) -> None:
    program = """
        fork_gate._PATIENCE_SECONDS = 40
        gate = fork_gate.ForkGate()
        start = time.monotonic()
        bad = []

        def fork():
            for _ in range(20):
                if not ended_well(child_of(lambda: enters(gate))):
                    bad.append(1)

        def come_and_go():
            while any(thread.is_alive() for thread in forking):
                with gate.entered():
                    time.sleep(0.001)

        forking = [threading.Thread(target=fork) for _ in range(3)]
        for thread in forking:
            thread.start()
        others = [threading.Thread(target=come_and_go) for _ in range(3)]
        for thread in others:
            thread.start()
        for thread in forking + others:
            thread.join(30)
            assert not thread.is_alive()
        assert not bad and enters(gate)
        assert time.monotonic() - start < 20  # nobody waited until there was no more patience
    """
    run(GATE + textwrap.dedent(program), tmp_path)


def test_a_child_of_a_process_that_is_being_scraped_can_be_scraped(tmp_path: Path) -> None:
    program = """
        from flask import Flask
        from flask_usage_metrics import TrackUsage
        from prometheus_client import CollectorRegistry

        reading = threading.Event()

        class Slow(CollectorRegistry):
            def collect(self):
                with self._lock:
                    reading.set()
                    time.sleep(0.1)
                yield from super().collect()

        app = Flask("shop")
        usage = TrackUsage(app, lambda data: None, registry=Slow())
        scrape = lambda: app.test_client().get("/metrics").status_code == 200
        scrape()
        reading.clear()
        thread = threading.Thread(target=scrape)
        thread.start()
        assert reading.wait(20)
        assert ended_well(child_of(scrape))
        thread.join()
    """
    run(GATE + textwrap.dedent(program), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "shared", "forks"),
    [("sqlite:///usage.sqlite3", False, 60), ("sqlite://", False, 60), (None, True, 200)],
    ids=["file", "memory", "totals and visitors"],
)
def test_no_child_of_a_process_that_writes_hangs(
    tmp_path: Path, storage: str | None, shared: bool, forks: int
) -> None:
    program = f"""
        from flask import Flask
        from flask_usage_metrics import TrackUsage

        app = Flask("shop")
        app.config["TRACK_USAGE_FLUSH_SECONDS"] = 0.001
        app.config["TRACK_USAGE_VISITORS"] = "daily" if {shared} else None
        usage = TrackUsage(app, {storage!r})
        numbers = itertools.count()

        def sync():
            client = app.test_client()
            environ = {{
                "wsgi.multiprocess": {shared},
                "HTTP_USER_AGENT": f"{{os.getpid()}} {{next(numbers)}}",
            }}
            client.get("/nowhere", environ_overrides=environ)

        # Nobody gets a turn at the visitors' file within a second, at times: they are added later.
        # Without the gate it was damaged, too, which would be another error.
        logging.getLogger("flask_usage_metrics").addFilter(
            lambda said: "OperationalError" not in said.getMessage()
        )
        sync()
        usage.flush()
        is_over = threading.Event()

        def busy():
            while not is_over.wait(0.001):
                sync()

        def goes_on():
            own = sqlite3.connect(f"{{os.getpid()}}.sqlite3")
            own.execute("CREATE TABLE orders (id INTEGER)")
            own.execute("INSERT INTO orders VALUES (1)")
            own.commit()
            own.close()
            sync()
            return usage.flush()

        threads = [threading.Thread(target=busy) for _ in range(2)]
        for thread in threads:
            thread.start()
        hung = sum(not ended_well(child_of(goes_on)) for _ in range({forks}))
        is_over.set()
        for thread in threads:
            thread.join()
        assert usage.flush()
        assert not hung, hung
    """
    run(program, tmp_path, timeout=300)


def test_nothing_is_open_when_a_process_forks(tmp_path: Path) -> None:
    program = """
        from datetime import datetime, timezone
        import sqlalchemy as sa
        now = datetime.now(timezone.utc)
        in_use = set()
        found = []
        # Registered before the gate, and so called after it.
        os.register_at_fork(before=lambda: found.append(len(in_use)))

        from helpers.records import make_record
        from flask_usage_metrics.storage.sql import SQLStorage
        storage = SQLStorage.from_url("sqlite:///usage.sqlite3")
        storage.migrate()

        def use(connection, *_):
            in_use.add(connection)
            time.sleep(0.002)

        def leave(connection, *_):
            in_use.discard(connection)

        engine = storage.database.reach().engine
        sa.event.listen(engine, "checkout", use)
        sa.event.listen(engine, "checkin", leave)
        sa.event.listen(engine, "close", use)  # while it is being closed
        sa.event.listen(engine, "close", leave)

        def forks_beside(work):
            is_over = threading.Event()

            def busy():
                while not is_over.is_set():
                    storage.count()
                    work()

            found.clear()
            thread = threading.Thread(target=busy)
            thread.start()
            for _ in range(30):
                time.sleep(0.001)
                assert ended_well(child_of(lambda: True))
            is_over.set()
            thread.join()
            return list(found)

        works = {
            "write": lambda: storage.write([make_record() for _ in range(10)]),
            "count": storage.count,
            "summarize": storage.summarize,
            "prune": lambda: storage.prune(now),
            "migrate": storage.migrate,
            "close": storage.close,
        }
        open_at_forks = {name: forks_beside(work) for name, work in works.items()}
        assert open_at_forks == dict.fromkeys(works, [0] * 30), open_at_forks
    """
    run(program, tmp_path)
