"""Each server, in an empty folder, with the README's two lines: one number, whatever happens.

Each is started, visited, has a worker killed, is reloaded, and loses the file of totals.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from helpers.damage import break_it
from helpers.process import environment, need, run
from helpers.servers import GUNICORN as PREPARED
from helpers.servers import LIBRARIES
from helpers.watched import Watched

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="servers are told apart on Linux"),
]


@dataclass(frozen=True)
class Case:
    """How a server is started, and what it does.

    Attributes:
        command: Its command line, with ``{port}`` for the port.
        needs: A module that it is of.
        files: Its further files: text by name.
        where: Its Unix socket; None: it listens at the port.
        reload: The signal that has it replace its workers; None: there is none.
        mends: Whether it goes on when a worker is killed.
    """

    command: tuple[str, ...]
    needs: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    where: str | None = None
    reload: signal.Signals | None = None
    mends: bool = True


HUP = signal.SIGHUP
PYTHON = (sys.executable, "-m")
SCRIPT = (sys.executable, "-c")
SCRIPTS = Path(sysconfig.get_path("scripts"))
GUNICORN = (*PYTHON, "gunicorn", "shop:app", "-b", "127.0.0.1:{port}")
RECYCLED = ("--max-requests", "15")


def gunicorn(*options: str) -> Case:
    return Case((*GUNICORN, *options), "gunicorn", reload=HUP)


def prepared_gunicorn(*options: str) -> Case:
    """Return one whose many workers need not import the libraries each."""
    program = PREPARED.format(libraries=LIBRARIES)
    return Case((*SCRIPT, program, *GUNICORN[3:], *options), "gunicorn", reload=HUP)


# Given by systemd as file descriptor 3.
ACTIVATED = """
import os, socket, sys
given = socket.create_server(("127.0.0.1", int(sys.argv[1])))
os.dup2(given.fileno(), 3)
os.set_inheritable(3, True)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
os.execv(sys.executable, [sys.executable, "-m", "gunicorn", "shop:app", "-w", "3"])
"""

UWSGI = (
    *(str(SCRIPTS / "uwsgi"), "--module", "shop:app", "--need-app", "--virtualenv", sys.prefix),
    # That of a wheel is started by Python, and forgets of which virtual environment.
    *(("--binary-path", sys.executable) if importlib.util.find_spec("pyuwsgi") else ()),
)
VASSAL = f"""
[uwsgi]
module = shop:app
virtualenv = {sys.prefix}
need-app = true
http-socket = 127.0.0.1:$(PORT)
master = true
processes = 3
pythonpath = $(PWD)
chdir = $(PWD)
"""


def uwsgi(*options: str, by: str = "--http-socket", **more: object) -> Case:
    return Case((*UWSGI, by, "127.0.0.1:{port}", *options), "uwsgi", **more)  # type: ignore[arg-type]


def granian(*options: str) -> Case:
    where = ("--host", "127.0.0.1", "--port", "{port}", "--respawn-failed-workers")
    return Case(
        (*PYTHON, "granian", "--interface", "wsgi", "shop:app", *where, *options), "granian"
    )


A2WSGI = "from a2wsgi import WSGIMiddleware\nfrom shop import app\napp = WSGIMiddleware(app)\n"
ASGIREF = "from asgiref.wsgi import WsgiToAsgi\nfrom shop import app\napp = WsgiToAsgi(app)\n"


def uvicorn(program: str, workers: int) -> Case:
    options = ("--port", "{port}", "--workers", str(workers))
    return Case(
        (*PYTHON, "uvicorn", "asgi:app", *options),
        "uvicorn",
        {"asgi.py": program},
        reload=HUP if workers > 1 else None,
    )


WERKZEUG = """
import sys
from shop import app
from werkzeug.serving import run_simple
run_simple("127.0.0.1", int(sys.argv[1]), app, **{})
"""

CASES = {
    "gunicorn, sync": gunicorn("-w", "4"),
    "gunicorn, gthread": prepared_gunicorn("-w", "3", "--threads", "2"),
    "gunicorn, gevent": gunicorn("-w", "3", "-k", "gevent"),
    "gunicorn, reuse-port": prepared_gunicorn("-w", "3", "--reuse-port"),
    "gunicorn, preload": gunicorn("-w", "3", "--preload"),
    "gunicorn, one recycled worker": prepared_gunicorn("-w", "1", *RECYCLED),
    "gunicorn, recycled": prepared_gunicorn("-w", "3", *RECYCLED),
    "gunicorn, two addresses": prepared_gunicorn("-w", "3", "-b", "127.0.0.1:0"),
    "gunicorn, Unix socket": Case(
        (*PYTHON, "gunicorn", "shop:app", "-w", "3", "-b", "unix:a.sock"),
        "gunicorn",
        where="a.sock",
        reload=HUP,
    ),
    "gunicorn, socket activation": Case((*SCRIPT, ACTIVATED, "{port}"), "gunicorn", reload=HUP),
    "uWSGI, master": uwsgi("--master", "--processes", "3", reload=HUP),
    "uWSGI, no master": uwsgi("--processes", "2"),
    "uWSGI, lazy": uwsgi("--master", "--processes", "3", "--lazy-apps", reload=HUP),
    "uWSGI, cheaper": uwsgi("--master", "--processes", "4", "--cheaper", "1", reload=HUP),
    "uWSGI, one recycled worker": uwsgi(
        "--master", "--processes", "1", *RECYCLED, "--min-worker-lifetime", "0"
    ),
    "uWSGI, router": uwsgi("--master", "--processes", "3", by="--http", reload=HUP),
    "uWSGI, emperor": Case(
        (
            "env",
            "PORT={port}",
            str(SCRIPTS / "uwsgi"),
            "--emperor",
            "vassals",
            "--binary-path",
            str(SCRIPTS / "uwsgi"),
        ),
        "uwsgi",
        {"vassals/shop.ini": VASSAL},
    ),
    "waitress": Case((*PYTHON, "waitress", "--listen=127.0.0.1:{port}", "shop:app"), "waitress"),
    "cheroot": Case((*PYTHON, "cheroot", "shop:app", "--bind", "127.0.0.1:{port}"), "cheroot"),
    "granian": granian("--workers", "1"),
    "granian, two workers": granian("--workers", "2"),
    "hypercorn": Case(
        (*PYTHON, "hypercorn", "wsgi:shop:app", "--bind", "127.0.0.1:{port}", "-w", "2"),
        "hypercorn",
        mends=False,
    ),
    "uvicorn, a2wsgi": uvicorn(A2WSGI, 2),
    "uvicorn, asgiref": uvicorn(ASGIREF, 2),
    "uvicorn, one process": uvicorn(A2WSGI, 1),
    "Werkzeug, threads": Case((*SCRIPT, WERKZEUG.format({"threaded": True}), "{port}")),
    "Werkzeug, a process a request": Case((*SCRIPT, WERKZEUG.format({"processes": 3}), "{port}")),
}


MODULES = "/usr/lib/apache2/modules"
MOD_WSGI = f"{MODULES}/mod_wsgi.so"


def apache(how: str) -> Case:
    paths = ":".join(
        ["${PWD}", *environment()["PYTHONPATH"].split(":"), sysconfig.get_path("purelib")]
    )
    options = f"processes=3 threads=2 python-home=/usr python-path={paths}"
    daemon = f"WSGIDaemonProcess shop {options}\nWSGIProcessGroup shop"
    config = f"""
        ServerRoot .
        ServerName localhost
        PidFile apache.pid
        ErrorLog error.log
        Mutex file:. default
        LoadModule mpm_prefork_module {MODULES}/mod_mpm_prefork.so
        LoadModule authz_core_module {MODULES}/mod_authz_core.so
        LoadModule wsgi_module {MOD_WSGI}
        StartServers 3
        MinSpareServers 3
        MaxSpareServers 3
        WSGIPythonHome /usr
        WSGIPythonPath {paths}
        WSGISocketPrefix wsgi
        WSGIScriptAlias / ${{PWD}}/shop.py
        <Directory ${{PWD}}>
            Require all granted
        </Directory>
        {daemon if how == "daemon" else ""}
    """
    # Of root it would answer as another user, who may read neither us nor the folder.
    user = () if os.geteuid() else ("unshare", "--user", "--map-user=1000", "--map-group=1000")
    command = (*user, "/usr/sbin/apache2", "-DFOREGROUND", "-f", "apache.conf", "-d", ".")
    return Case(
        (*command, "-c", "Listen 127.0.0.1:{port}"),
        files={"apache.conf": config},
        reload=signal.SIGUSR1,
    )


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_every_scrape_says_what_was_answered_and_stored(tmp_path: Path, case: Case) -> None:
    if case.needs == "uwsgi":
        need(Path(UWSGI[0]).exists(), "uwsgi")
    elif case.needs:
        need(importlib.util.find_spec(case.needs), case.needs)
    try_all(tmp_path, case)


@pytest.mark.servers
@pytest.mark.parametrize("how", ["embedded", "daemon"])
def test_mod_wsgi_says_what_was_answered_and_stored(tmp_path: Path, how: str) -> None:
    need(Path("/usr/sbin/apache2").exists() and Path(MOD_WSGI).exists(), "Apache with mod_wsgi")
    theirs = run("/usr/bin/python3", "-c", "import sys; print(sys.version_info[:2])").stdout
    if theirs.strip() != str(sys.version_info[:2]):
        pytest.skip("mod_wsgi is of another Python, which cannot import what we have installed")
    try_all(tmp_path, apache(how))


def try_all(folder: Path, case: Case) -> None:
    for name, text in case.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    with Watched(folder, *case.command, where=case.where, PWD=str(folder)) as server:
        seen = server.visit(60)
        server.assert_one_number()
        workers = {*seen} & {*server.descendants()}
        if workers and case.mends:
            victim = min(workers)
            server.kill(victim)
            server.visit_others({victim})
            server.visit(20)
        if case.reload:
            server.process.send_signal(case.reload)
            server.visit_others(workers)
        server.visit(20)
        server.assert_one_number()
        for path in server.totals():
            break_it(path, "emptied")
        server.visit(20)
        server.assert_one_number()
        assert server.scrapes > 20
