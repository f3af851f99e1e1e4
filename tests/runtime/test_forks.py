import gc
import os

from flask_usage_metrics.runtime.forks import FORKS, ForkRegistry


class Part:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log
        FORKS.register(self)

    def reset_after_fork(self) -> None:
        self.log.append(self.name)


def in_child(log: list[str]) -> list[str]:
    """Return what was logged in a forked child."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, ",".join(log).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading) as pipe:
        return pipe.read().split(",")


def test_living_parts_are_made_anew_in_a_child_in_the_order_they_were_made() -> None:
    log: list[str] = []
    kept = [Part(name, log) for name in "abcd"]
    del kept[1]
    gc.collect()
    assert in_child(log) == ["a", "c", "d"]
    assert log == []


def test_a_dropped_part_leaves_nothing_behind() -> None:
    registry = ForkRegistry()
    part = Part("x", [])
    registry.register(part)
    assert len(registry._parts) == 1
    del part
    gc.collect()
    assert registry._parts == []
