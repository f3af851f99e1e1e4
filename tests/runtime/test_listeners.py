"""Which server a process belongs to is told by where it listens, and by who started it."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.process import run_python

from flask_usage_metrics.runtime.listeners import listeners
from flask_usage_metrics.runtime.servers import this_server


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as one:
        yield one


def addresses() -> set[str]:
    return {listener.address for listener in listeners()}


def test_an_address_is_seen_as_long_as_its_socket_listens() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = "{} {}".format(*one.getsockname())
        assert address not in addresses()  # it does not listen yet
        one.listen()
        assert address in addresses()
        with socket.create_connection(one.getsockname()) as client, one.accept()[0]:
            assert address in addresses()
            assert "{} {}".format(*client.getsockname()) not in addresses()
        one.getsockname()  # nobody closed it
    assert address not in addresses()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6")
def test_addresses_of_ipv6_are_seen() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as one:
        assert f"::1 {one.getsockname()[1]}" in addresses()


def test_unix_sockets_are_seen_by_their_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("app.sock")
        one.listen()
        assert f"{tmp_path}/app.sock" in addresses()


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_sockets_without_a_folder_are_seen() -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(f"\0usage-{os.getpid()}")
        one.listen()
        assert f"\0usage-{os.getpid()}" in addresses()


@pytest.mark.skipif(not hasattr(socket, "SOCK_NONBLOCK"), reason="of Linux")
def test_a_look_changes_no_socket(listening: socket.socket) -> None:
    socket.setdefaulttimeout(5)
    try:
        assert os.get_blocking(listening.fileno())
        assert "{} {}".format(*listening.getsockname()) in addresses()
        assert os.get_blocking(listening.fileno())
    finally:
        socket.setdefaulttimeout(None)


def test_only_sockets_that_share_their_address_say_so(listening: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as shared:
        found = {listener.address: listener.is_one_of_several for listener in listeners()}
        assert not found["{} {}".format(*listening.getsockname())]
        assert found["{} {}".format(*shared.getsockname())]


CHILD = """
import os, socket, sys
from flask_usage_metrics.runtime.servers import this_server

if sys.argv[1:]:
    kept = socket.socket(fileno=int(sys.argv[1]))
server = this_server(multiprocess=False)
of_parent = server.starter == os.getppid()
print(" ".join(server.names), of_parent, server.is_shared, server.has_master, sep="|")
"""


@pytest.mark.parametrize(
    ("inherits", "leads", "is_of_parent"),
    [
        pytest.param(True, False, True, id="worker"),
        pytest.param(True, True, False, id="leader of a group of its own"),
        pytest.param(False, False, False, id="server that a script started"),
    ],
)
def test_a_parent_that_listens_too_would_start_another(
    listening: socket.socket, inherits: bool, leads: bool, is_of_parent: bool
) -> None:
    descriptor = listening.fileno()
    program = CHILD if inherits else f"import socket; own = socket.create_server(('', 0)){CHILD}"
    done = run_python(
        program,
        *([descriptor] if inherits else []),
        pass_fds=[descriptor] if inherits else [],
        start_new_session=leads,
    )
    names, of_parent, is_shared, has_master = done.stdout.strip().split("|")
    assert (names == "{} {}".format(*listening.getsockname())) == inherits
    assert of_parent == str(is_of_parent)
    assert is_shared == "True"
    assert has_master == of_parent


FORKED = """
import os, socket
from pathlib import Path
from flask_usage_metrics.runtime.servers import this_server

def fail(*_):
    raise PermissionError("it is root's")

one = socket.create_server(("127.0.0.1", 0))
listing = Path.iterdir
Path.iterdir = lambda path: fail() if path.parts[:2] == ("/", "proc") else listing(path)
print(this_server(multiprocess=False).has_master, flush=True)
if not os.fork():
    server = this_server(multiprocess=False)
    print(server.has_master, server.starter == os.getppid(), flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_a_copy_of_a_parent_whose_sockets_cannot_be_seen_is_its_worker() -> None:
    # What is prepared is a copy itself.
    done = run_python(FORKED, fresh=True)
    assert done.stdout.split() == ["False", "True", "True"]


def test_without_listeners_a_process_is_alone_unless_the_server_says_otherwise() -> None:
    code = CHILD + "print(len({this_server(multiprocess=False).names for _ in range(9)}))"
    done = run_python(code)
    assert done.stdout.split("|")[2] == "False"
    assert done.stdout.split("|")[3].split() == ["False", "9"]
    code = CHILD.replace("multiprocess=False", "multiprocess=True")
    (first, *_), (second, *_), (other, *_) = (
        run_python(code, start_new_session=leads).stdout.split("|")
        for leads in (False, False, True)
    )
    assert first == second != other


def test_a_process_that_cannot_list_its_descriptors_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: Path) -> None:
        raise OSError("too many open files")

    monkeypatch.setattr(Path, "iterdir", fail)
    assert listeners() == []
    assert not this_server(multiprocess=False).is_shared
