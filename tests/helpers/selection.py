"""Which tests run, side by side or alone: a plugin of pytest, loaded by conftest.py.

    pytest                    # all that pip installed enough for, and that is not slow
    pytest --everything       # all; so does CI=1
    pytest -m servers         # what needs a program that pip does not install
    pytest tests/storage      # one room, likewise without servers and slow ones
    pytest tests/storage/test_sql.py    # a file, or a test: whatever it needs

Of a whole run or a folder, several processes share the files (pytest-xdist; its groups of tests
have no effect with pytest 9.2). A test marked `alone` has the machine to itself: the other
processes wait.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

MARKED = ("servers", "slow")
"""Left out, unless they are asked for."""

UNTRACED = ("slow", "alone", "hypothesis")
"""Marks of tests whose coverage is not measured, as that doubles what they take: it has to be
reached without them. Hypothesis marks its own."""

DATABASES = frozenset({"postgresql", "mariadb"})
"""Fixtures that start a server; tests also ask for them by a parameter of this name."""

LONG = (
    "test_server_matrix",
    "test_benchmarks",
    "test_sql",
    "test_rules",
    "test_workers",
    "test_shared_app_metrics",
    "test_sqlite",
    "test_servers",
    "test_lifetime",
    "test_server_faults",
    "test_rollups",
    "test_dashboards_live",
    "test_replay_spans",
    "test_recovery",
    "test_redaction",
)
"""Files that take longest, the longest first."""

# A machine with many cores would start as many servers at once.
MOST_PROCESSES = 4

_left_out: dict[str, int] = dict.fromkeys(MARKED, 0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--everything",
        action="store_true",
        default=bool(os.environ.get("CI")),
        help="run what needs servers, and what is slow, too (as with CI=1)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Processes of xdist are given the option as it is here.
    config.option.everything |= bool(config.option.markexpr) or are_files(config)


def are_files(config: pytest.Config) -> bool:
    """Return whether files or tests are named, rather than nothing or folders."""
    return bool(config.args) and all(
        (config.invocation_params.dir / name.partition("::")[0]).is_file() for name in config.args
    )


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return how many processes `-n auto` means; none for single files, which start sooner so."""
    if are_files(config):
        return 0
    # One more than cores: tests wait for servers and threads a fourth of the time.
    return min((os.cpu_count() or 1) + 1, MOST_PROCESSES)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, left_out = [], []
    is_measured = config.pluginmanager.hasplugin("_cov")
    for item in items:
        names = asked_for(item)
        if names & DATABASES:
            item.add_marker("servers")
        reason = next((name for name in MARKED if item.get_closest_marker(name)), None)
        if is_measured and any(map(item.get_closest_marker, UNTRACED)):
            item.add_marker("no_cover")
        if reason is None or config.option.everything:
            kept.append(item)
        else:
            _left_out[reason] += 1
            left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    items[:] = sorted(kept, key=start_first)


def asked_for(item: pytest.Item) -> set[str]:
    """Return the names of an item's fixtures, and what of its parameters may be such a name."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return {*getattr(item, "fixturenames", ()), *(it for it in parameters if isinstance(it, str))}


def start_first(item: pytest.Item) -> int:
    """Return where a test belongs: long files first, lest one process is at work long after all."""
    return LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG)


# ------------------------------------------------------------------------ alone


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with quiet(is_alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextmanager
def quiet(*, is_alone: bool) -> Iterator[None]:
    """Let tests run at once, or one without any other, of all processes on this machine."""
    with ExitStack() as stack:
        # Who waits for quiet keeps the door: else the others would never all be out.
        door = stack.enter_context((Path(__file__).parents[1] / "conftest.py").open())
        room = stack.enter_context(Path(__file__).open())
        kind = fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH
        fcntl.flock(door, kind)
        fcntl.flock(room, kind)
        fcntl.flock(door, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)  # children that a test forked may hold the file


# ------------------------------------------------------------------------ what is said


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = _left_out


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if any(_left_out.values()):
        servers, slow = _left_out.values()
        terminalreporter.write_line(
            f"Left out: {servers} tests that need servers, {slow} slow ones; "
            "run everything with: pytest --everything"
        )


def pytest_testnodedown(node: object) -> None:
    """Note what a process of xdist left out: the same as each other one."""
    _left_out.update(getattr(node, "workeroutput", {}).get("left_out", {}))
