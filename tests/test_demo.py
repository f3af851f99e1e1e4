"""The demo, run as the README says."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import pytest
from helpers.process import Done, Process, run, until
from helpers.servers import Gunicorn

from flask_usage_metrics import UsageRecord
from flask_usage_metrics.demo import __main__ as command
from flask_usage_metrics.demo.comparison import differences, read_counted
from flask_usage_metrics.demo.shop import make_app
from flask_usage_metrics.demo.visitors import HOST, PLACES
from flask_usage_metrics.storage import open_storage
from flask_usage_metrics.storage.jsonl import JSONLinesStorage

COMMAND = [sys.executable, "-W", "error", "-m", "flask_usage_metrics.demo"]
ROW = re.compile(r"([\w.]+) +(\d{3}) +([A-Z]{2}) +([\d,]+) +([\d,]+)")
TOTAL = re.compile(r"^total +([\d,]+) +([\d,]+)$", re.MULTILINE)


def run_demo(*arguments: str) -> Done:
    return run(*COMMAND, *arguments)


def test_exactly_so_many_requests_and_storage_and_metrics_agree(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/kept.sqlite3"
    done = run_demo("--requests", "300", "--seed", "1", "--storage", url)
    assert (done.returncode, done.stderr) == (0, "")
    last = "Storage and /metrics agree: 300 requests sent, stored and counted."
    assert done.stdout.splitlines()[-1] == last
    assert TOTAL.findall(done.stdout) == [("300", "300")]
    rows = ROW.findall(done.stdout)
    assert len(rows) == 25
    assert all(stored == counted for *_, stored, counted in rows)
    more = re.search(r"\.\.\. and \d+ more +(\d+) +(\d+)", done.stdout)
    assert more is not None
    assert more[1] == more[2]
    assert sum(int(stored) for *_, stored, _ in rows) + int(more[1]) == 300

    records = list(open_storage(url).records())
    assert len(records) == 300
    assert len({record.country for record in records}) >= 15
    assert {record.status for record in records} >= {200, 201, 303, 304, 401, 402, 404}
    assert {record.exception for record in records} == {None, "ZeroDivisionError"}
    assert len({record.client for record in records}) >= 6
    assert {"HEAD", "GET", "POST"} == {record.method for record in records}

    # A storage that is kept: older records are not this run's.
    again = run_demo("--requests", "40", "--storage", url)
    assert TOTAL.findall(again.stdout) == [("40", "40")]
    assert again.returncode == 0
    assert open_storage(url).count() == 340


def test_the_same_seed_sends_the_same_requests(capsys: pytest.CaptureFixture[str]) -> None:
    tables = []
    for seed in "778":
        assert command.main(["--requests", "60", "--seed", seed]) == 0
        tables.append(ROW.findall(capsys.readouterr().out))
    assert tables[0] == tables[1] != tables[2]


@pytest.fixture
def _ctrl_c_works() -> Iterator[None]:
    """A shell lets what it runs in the background ignore Ctrl-C, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_works")
@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_without_requests_it_runs_until_ctrl_c(terminal: bool) -> None:
    reading, writing = os.openpty() if terminal else os.pipe()
    with Process(*COMMAND, "--seed", "1", stdout=writing, stderr=subprocess.STDOUT) as process:
        os.close(writing)
        shown = read_until(reading, "rows, ")
        found = re.search(r"metrics: (http://\S+/metrics)", shown)
        assert found is not None
        # Not through a proxy that the environment may name.
        with build_opener(ProxyHandler({})).open(found[1], timeout=10) as answer:
            assert b"flask_usage_requests_total{" in answer.read()
        file = re.search(r"records: (\S+)", shown)
        assert file is not None
        assert Path(file[1]).exists()
        process.send_signal(signal.SIGINT)
        shown += read_until(reading, "sent, stored and counted.")
        assert process.wait(20) == 0
    os.close(reading)
    assert "Traceback" not in shown
    assert "endpoint" in shown
    ((stored, counted),) = TOTAL.findall(shown.replace("\r\n", "\n"))
    assert stored == counted
    assert not Path(file[1]).parent.exists()


def read_until(descriptor: int, text: str) -> str:
    shown = ""
    until = time.monotonic() + 30
    while text not in shown:
        assert time.monotonic() < until, shown
        try:
            data = os.read(descriptor, 65536)
        except OSError:  # as Linux says that a terminal was closed
            data = b""
        assert data, f"it ended: {shown}"
        shown += data.decode()
    return shown


def test_a_port_in_use_is_one_clear_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_demo("--requests", "5", "--port", str(port))
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == f"demo: port {port}: {os.strerror(errno.EADDRINUSE)}; choose another --port\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--requests", "0"], "--requests: must be 1 or more, not 0"),
        (["--requests", "many"], "--requests: invalid int value: 'many'"),
        (["--port", "65536"], "--port: must be from 0 to 65535, not 65536"),
    ],
)
def test_a_wrong_argument_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("print:", "demo: none of the app's storages can be read\n"),
        ("nosql://me:secret@host", "demo: storage of kind 'nosql' is not supported"),
    ],
)
def test_a_storage_that_does_not_do_is_refused(
    url: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--requests", "5", "--storage", url]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(message)
    assert "secret" not in shown.out + shown.err


class Forgetful(JSONLinesStorage):
    """Says that it wrote a record that it did not."""

    forgotten = False

    def write(self, batch: Sequence[UsageRecord]) -> None:
        super().write(batch if self.forgotten else batch[1:])
        self.forgotten = True


def test_a_storage_that_loses_a_record_is_found_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app, usage = make_app(Forgetful(tmp_path / "records.jsonl"))
    with (
        socket.create_server((HOST, 0)) as listener,
        command.serving(app, listener) as port,
    ):
        assert command.run(port, usage, requests=20, seed=1) == 1
    usage.storage.close()
    shown = capsys.readouterr().out
    assert "Storage and /metrics differ:\n" in shown
    assert re.search(r"\n  \S+ \d{3} [A-Z]{2}: \d stored, \d counted\n", shown)
    assert shown.endswith("  in all: 20 sent, 19 stored, 20 counted\n")


@pytest.mark.parametrize(
    ("stored", "counted", "sent", "expected"),
    [
        ({"a": 2}, {"a": 2}, 2, []),
        ({"a": 2}, {"a": 2}, 3, ["in all: 3 sent, 2 stored, 2 counted"]),
        (
            {"a": 1, "b": 1},
            {"a": 2},
            2,
            ["a 200 NL: 1 stored, 2 counted", "b 200 NL: 1 stored, 0 counted"],
        ),
        ({}, {"a": 1}, 1, ["a 200 NL: 0 stored, 1 counted", "in all: 1 sent, 0 stored, 1 counted"]),
    ],
)
def test_differences_are_named(
    stored: dict[str, int], counted: dict[str, int], sent: int, expected: list[str]
) -> None:
    def sums(given: dict[str, int]) -> Counter[tuple[str, str, str]]:
        return Counter({(endpoint, "200", "NL"): n for endpoint, n in given.items()})

    assert differences(sums(stored), sums(counted), sent) == expected


def test_the_addresses_are_of_the_countries_they_stand_for() -> None:
    iptocc = pytest.importorskip("iptocc")
    places = re.findall(r"(..) (\d+) (\S+) (..)", PLACES)
    right = [place for place in places if iptocc.country_code(f"{place[2]}1") == place[0]]
    assert len(places) == 40
    # Networks change hands: a few may be somebody else's by the next release of the lists.
    assert len(right) >= 36


def test_without_iptocc_it_says_that_countries_stay_unknown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "iptocc", None)
    monkeypatch.delitem(sys.modules, "flask_usage_metrics.enrich.country.offline", raising=False)
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert command.main(["--requests", "5"]) == 0
    shown = capsys.readouterr().out
    assert "Countries stay unknown: pip install 'flask-usage-metrics[country]'\n" in shown
    assert {country for _, _, country, _, _ in ROW.findall(shown)} == {"ZZ"}


def test_visitors_can_be_sent_to_a_shop_that_gunicorn_serves(tmp_path: Path) -> None:
    app = "from flask_usage_metrics.demo import create_app\n\napp = create_app()\n"
    with Gunicorn(tmp_path, "-w", "2", app=app, FLASK_TRACK_USAGE_STATE_DIR="state") as server:
        done = run_demo("--visit", str(server.port), "--requests", "60")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith("\n61 requests sent.\n")
        until(lambda: read_counted(server.port).total(), 61)
        slo = [line for line in server.get("/metrics").splitlines() if "slo_events_total{" in line]
        assert len(slo) == 4
        assert sum(float(line.split()[-1]) for line in slo) == 2 * 61


def test_visitors_of_a_shop_that_nobody_serves_are_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    assert command.main(["--visit", str(port)]) == 2
    assert capsys.readouterr().err.startswith(f"demo: port {port}: ")
