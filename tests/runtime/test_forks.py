import gc
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from queue import SimpleQueue
from time import monotonic
from typing import Any

import pytest
from helpers.front_door import Site
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from flask_usage_metrics.runtime import fork_gate
from flask_usage_metrics.runtime.fork_gate import FORK_GATE
from flask_usage_metrics.runtime.forks import FORKS, ForkRegistry


class Part:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log
        FORKS.register(self)

    def reset_after_fork(self) -> None:
        self.log.append(self.name)


def in_child(look: Callable[[], list[str]]) -> list[str]:
    """Return what a function returns in a forked child."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, "\n".join(look()).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading) as pipe:
        return pipe.read().splitlines()


def test_living_parts_are_made_anew_in_a_child_in_the_order_they_were_made() -> None:
    log: list[str] = []
    kept = [Part(name, log) for name in "abcd"]
    del kept[1]
    gc.collect()
    assert in_child(lambda: log) == ["a", "c", "d"]
    assert log == []


def test_a_part_may_use_sqlite_while_it_is_made_anew() -> None:
    class Reader:
        def __init__(self) -> None:
            self.waited_seconds = -1.0
            FORKS.register(self)

        def reset_after_fork(self) -> None:
            start = monotonic()
            with FORK_GATE.entered():
                self.waited_seconds = monotonic() - start

    reader = Reader()
    patience = fork_gate._PATIENCE_SECONDS
    (waited,) = in_child(lambda: [f"{reader.waited_seconds}"])
    assert 0 <= float(waited) < patience


def test_a_dropped_part_leaves_nothing_behind() -> None:
    registry = ForkRegistry()
    part = Part("x", [])
    registry.register(part)
    assert len(registry._parts) == 1
    del part
    gc.collect()
    assert registry._parts == []


# ------------------------------------------------------------------------ all parts of an app

OF_ONE_PROCESS = (
    type(threading.Lock()),
    type(threading.RLock()),
    threading.Condition,
    threading.Event,
    threading.Thread,
    SimpleQueue,
)


def attributes(part: object) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of an object of ours, slots included."""
    names = [name for kind in type(part).__mro__ for name in getattr(kind, "__slots__", ())]
    for name in names:
        if name != "__weakref__" and hasattr(part, name):
            yield name, getattr(part, name)
    yield from getattr(part, "__dict__", {}).items()


def reached(root: object) -> Iterator[tuple[str, object]]:
    """Yield all objects of ours, and locks and threads, that are reached from here, by path."""
    seen: set[int] = set()
    waiting: list[tuple[str, object]] = [(type(root).__name__, root)]
    while waiting:
        path, value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield path, value
        if type(value).__module__.startswith("flask_usage_metrics"):
            waiting += [(f"{path}.{name}", inner) for name, inner in attributes(value)]
        elif isinstance(value, list | tuple):
            waiting += [(f"{path}[{number}]", inner) for number, inner in enumerate(value)]
        elif isinstance(value, Mapping):
            waiting += [(f"{path}[{key!r}]", inner) for key, inner in value.items()]
        elif hasattr(value, "__self__"):
            waiting.append((path, value.__self__))


def of_one_process(root: object) -> dict[str, object]:
    """Return all that one process has to have to itself."""
    return {path: value for path, value in reached(root) if isinstance(value, OF_ONE_PROCESS)}


@pytest.fixture
def tracking(make_site: Callable[..., Site]) -> Any:
    """All parts of an app that uses every kind of part, and has answered a request."""
    site = make_site(
        country=lambda _: "NL",
        VISITORS="daily",
        COOKIE=True,
        TRACES=InMemorySpanExporter(),
        SECRET_KEY="k",
    )
    site.get("/")
    assert site.usage.flush()
    return site.app.extensions["track_usage"]


def test_no_part_of_an_app_keeps_a_lock_or_a_thread_of_its_parent(tracking: Any) -> None:
    before = of_one_process(tracking)
    assert len(before) > 12

    def inherited() -> list[str]:
        old = set(map(id, before.values()))
        return [path for path, value in of_one_process(tracking).items() if id(value) in old]

    assert set(inherited()) == set(before)  # nothing is made anew but by a fork
    assert in_child(inherited) == []


def test_every_part_of_an_app_is_made_anew(tracking: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {
        path: value
        for path, value in reached(tracking)
        if type(value).__module__.startswith("flask_usage_metrics")
        and hasattr(value, "reset_after_fork")
    }
    assert len(parts) > 15
    made_anew: list[int] = []

    def recorded(reset: Callable[..., None]) -> Callable[..., None]:
        def record(self: object, *arguments: Any) -> None:
            made_anew.append(id(self))
            reset(self, *arguments)

        return record

    for kind in {type(part) for part in parts.values()}:
        monkeypatch.setattr(kind, "reset_after_fork", recorded(kind.reset_after_fork))
    forgotten = in_child(
        lambda: [path for path, part in parts.items() if id(part) not in made_anew]
    )
    assert forgotten == []
