"""One server in places that are not as usual, and two servers that are not one."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from helpers.process import free_port, until
from helpers.watched import APP, Watched, total
from soak import filled, small_disk, soak

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="servers are told apart on Linux"),
]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount and unshare")

GUNICORN = (sys.executable, "-m", "gunicorn", "shop:app", "-w", "3")
HERE = (*GUNICORN, "-b", "127.0.0.1:{port}")


def counted(server: Watched) -> float:
    return total(server.scrape() or "")


def test_an_instance_folder_that_is_made_in_between_changes_nothing(tmp_path: Path) -> None:
    # No worker can make it while something else is in its place.
    (tmp_path / "instance").write_text("in the way")
    with Watched(tmp_path, *HERE) as server:
        before = {*server.visit(30)}
        server.assert_one_number(stored=False)
        (tmp_path / "instance").unlink()
        server.kill(min(before))
        server.visit_others({min(before)})
        server.assert_one_number()


@as_root
def test_a_folder_that_cannot_be_written_needs_no_place_in_it(tmp_path: Path) -> None:
    command = " ".join(map(shlex.quote, HERE))
    script = f"mount --bind . . && mount -o remount,ro,bind . && cd $PWD && exec {command}"
    with Watched(tmp_path, "unshare", "--mount", "sh", "-c", script, PWD=str(tmp_path)) as server:
        before = {*server.visit(30)}
        server.kill(min(before))
        server.visit_others({min(before)})
        server.assert_one_number(stored=False)


@as_root
def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "instance", "4m") as disk, Watched(tmp_path, *HERE) as server:
        assert disk is not None
        server.visit(30)
        server.assert_one_number()
        with filled(disk):
            server.visit(60)
        server.visit(30)
        server.assert_one_number(seconds=30)


OWN = (
    APP
    + """
from prometheus_client import Counter

pages = Counter("pages", "Counted by the app itself")
app.before_request_funcs = {None: [lambda: pages.inc() if request.path == "/" else None]}
"""
).replace("from flask import Flask", "from flask import Flask, request")


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Keep workers from joining others, or from writing the shared files, inside the block."""
    (run,) = (folder / "instance").glob("usage-state/*/g-*")
    with ExitStack() as stack:
        if what == "full disk":
            stack.enter_context(filled(folder / "instance"))
        elif what == "locked run":
            file = stack.enter_context((run / "lock").open())
            fcntl.flock(file, fcntl.LOCK_EX)
        else:
            for path in run.glob("*.sqlite3"):
                holder = stack.enter_context(closing(sqlite3.connect(path, isolation_level=None)))
                holder.execute("BEGIN IMMEDIATE")
        yield


@as_root
@pytest.mark.parametrize("what", ["full disk", "locked run", "locked files"])
def test_workers_that_start_when_they_cannot_join_show_no_less(tmp_path: Path, what: str) -> None:
    with small_disk(tmp_path / "instance", "4m"), Watched(tmp_path, *HERE, app=OWN) as server:
        server.visit(60)
        server.assert_one_number()
        until(lambda: total(server.scrape() or "", "pages_total"), 60)
        server.process.send_signal(signal.SIGSTOP)  # it starts no others yet
        for pid in server.workers():
            server.kill(pid)
        with held(tmp_path, what):
            server.process.send_signal(signal.SIGCONT)
            server.visit(10)
            texts = [text for _ in range(9) if (text := server.scrape()) is not None]
            assert min((total(text, "pages_total") for text in texts), default=60) >= 60
        server.visit(10)
        server.assert_one_number(seconds=30)
        until(lambda: total(server.scrape() or "", "pages_total"), 80)


# ------------------------------------------------------------------------ two servers


@pytest.mark.parametrize("server", ["waitress", "gunicorn"])
def test_two_servers_that_one_script_starts_are_two(tmp_path: Path, server: str) -> None:
    other = free_port()
    command = {
        "waitress": f"{sys.executable} -m waitress --listen=127.0.0.1:PORT shop:app",
        "gunicorn": f"{sys.executable} -m gunicorn shop:app -w 2 -b 127.0.0.1:PORT",
    }[server]
    both = (command.replace("PORT", port) for port in (str(other), "{port}"))
    script = " & ".join([*both, "wait"])
    with Watched(tmp_path, "sh", "-c", script) as first:
        second = first.at(other)
        second.wait_until_it_answers()
        first.visit(24)
        second.visit(9)
        until(lambda: (counted(first), counted(second), first.stored()), (24, 9, 33))
        assert {(counted(first), counted(second)) for _ in range(6)} == {(24, 9)}
        assert first.complaints + second.complaints == []


@as_root
def test_two_containers_on_one_volume_are_two(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(APP)
    with ExitStack() as stack:
        servers = []
        for name in ("a", "b"):
            # Each is process 1 of its own, and listens at the same address of its own network.
            command = " ".join(map(shlex.quote, GUNICORN))
            script = f"ip link set lo up; exec {command} -b 127.0.0.1:80 -b unix:{name}.sock"
            apart = ("unshare", "--pid", "--net", "--fork", "--mount-proc", "--kill-child")
            server = Watched(tmp_path, *apart, "sh", "-c", script, where=f"{name}.sock")
            servers.append(stack.enter_context(server))
        first, second = servers
        first.visit(24)
        second.visit(9)
        until(lambda: (counted(first), counted(second), first.stored()), (24, 9, 33))
        assert {(counted(first), counted(second)) for _ in range(6)} == {(24, 9)}
        assert first.complaints + second.complaints == []


# ------------------------------------------------------------------------ at random


def test_faults_at_random_end_in_one_number(tmp_path: Path) -> None:
    assert soak(tmp_path, 15, seed=2026)
