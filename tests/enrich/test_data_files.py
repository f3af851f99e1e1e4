"""Data files are read when an app is set up, once a process; and again if there was no room."""

from __future__ import annotations

import errno
import os
import sys

import pytest
from flask import Flask
from helpers.process import run_python
from mmdb_writer import MMDBWriter
from netaddr import IPSet
from prometheus_client import CollectorRegistry

from flask_usage_metrics import TrackUsage
from flask_usage_metrics.enrich.clients import kinds, parser
from flask_usage_metrics.enrich.country import Limits, make_country_lookup, mmdb
from flask_usage_metrics.runtime.faults import Faults


@pytest.fixture
def country_file(tmp_path):
    writer = MMDBWriter(ip_version=4, database_type="Country")
    writer.insert_network(IPSet(["203.0.113.0/24"]), {"country": {"iso_code": "NL"}})
    path = tmp_path / "country.mmdb"
    writer.to_db_file(str(path))
    return path


PROGRAM = """
import os, resource, sys
from flask import Flask
from flask_usage_metrics import TrackUsage
from werkzeug.test import EnvironBuilder, run_wsgi_app

path, state, short = sys.argv[1], sys.argv[2], sys.argv[3] == "short"
app = Flask("shop")
records = []
app.config["TRACK_USAGE_STATE_DIR"] = state
app.config["TRACK_USAGE_COUNTRY"] = ["mmdb:" + path, "iptocc"]
limit = resource.getrlimit(resource.RLIMIT_NOFILE)
if short:
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limit[1]))
usage = TrackUsage(app, records.append)
resource.setrlimit(resource.RLIMIT_NOFILE, limit)
if not short:
    def hook(event, arguments):
        name = str(arguments[0])
        if event == "open" and any(part in name for part in (".mmdb", ".txt", "parser", "iptocc")):
            print("read", name)
    sys.addaudithook(hook)
agent = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"
for address in ("203.0.113.9", "8.8.8.8"):
    environ = EnvironBuilder("/", headers={"User-Agent": agent}).get_environ()
    run_wsgi_app(app, {**environ, "REMOTE_ADDR": address})
assert usage.flush()
from flask_usage_metrics.enrich.clients import parser
print([(r["country"], r["browser"]) for r in records], parser._ua_parser() is not None)
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files as on Linux")
@pytest.mark.parametrize("room", ["enough", "short"])
def test_they_are_read_before_the_first_request_or_as_soon_as_there_is_room(
    tmp_path, country_file, room
):
    program = PROGRAM.replace("os._exit(0)", "sys.stdout.flush(); os._exit(0)")
    done = run_python(program, str(country_file), str(tmp_path / "state"), room)
    assert done.stdout == "[('NL', 'Firefox'), ('US', 'Firefox')] True\n", done.stderr
    assert ("tried again" in done.stderr) is (room == "short")


def test_all_apps_of_a_process_share_what_was_read(tmp_path, country_file, monkeypatch):
    copied = []
    copy = mmdb._open_copy
    monkeypatch.setattr(mmdb, "_open_copy", lambda path: copied.append(path) or copy(path))
    descriptors = []
    for number in range(30):
        app = Flask(f"shop{number}")
        app.config["TRACK_USAGE_COUNTRY"] = f"mmdb:{country_file}"
        app.config["TRACK_USAGE_STATE_DIR"] = tmp_path
        TrackUsage(app, lambda data: None, registry=CollectorRegistry())
        if os.path.exists("/proc/self/fd"):  # noqa: PTH110
            descriptors.append(len(os.listdir("/proc/self/fd")))  # noqa: PTH208
        if number % 2:
            kept = app  # as an app of a test, the one before is dropped
    assert copied == [country_file]
    # Fewer: an app of a test before this one was collected meanwhile.
    assert not descriptors or descriptors[-1] <= descriptors[1]
    assert kinds._names.cache_info().misses == 1
    assert parser._ua_parser.cache_info().misses == 1
    assert kept.name == "shop29"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def lookup(path, clock, faults):
    return make_country_lookup(
        f"mmdb:{path}",
        trusted_proxies=False,
        use_freegeoip=False,
        freegeoip_endpoint=None,
        function=None,
        faults=faults,
        limits=Limits(clock=clock),
    )


def test_a_record_waits_for_room_but_not_for_ever(country_file, monkeypatch):
    def fails(path):
        raise OSError(errno.EMFILE, "too many")

    clock, faults = Clock(), Faults()
    with monkeypatch.context() as patched:
        patched.setattr(mmdb, "_read", fails)
        countries = lookup(country_file, clock, faults)
        assert countries.locate("203.0.113.9", (), False) is None
        assert countries.locate_now("203.0.113.9", (), False) is None
        clock.now += 4.9
        assert countries.locate("203.0.113.9", (), False) is None
        clock.now += 0.1
        assert countries.locate("203.0.113.9", (), False).country is None
        assert faults.counts() == {"country": 3}
    assert countries.locate("203.0.113.9", (), False).country is None
    clock.now += 0.5
    assert countries.locate("203.0.113.9", (), False).country == "NL"


def test_what_is_no_passing_fault_is_set_aside(country_file, monkeypatch):
    errors = [OSError(errno.EMFILE, "too many"), ModuleNotFoundError("maxminddb")]

    def fails(path):
        raise errors.pop(0)

    clock, faults = Clock(), Faults()
    monkeypatch.setattr(mmdb, "_read", fails)
    countries = lookup(country_file, clock, faults)
    for _ in range(3):
        assert countries.locate("203.0.113.9", (), False).country is None
    assert faults.counts() == {"country": 2}


@pytest.mark.parametrize("module", [kinds, parser])
def test_clients_are_told_once_there_is_room(make_site, monkeypatch, module):
    failing = [OSError(errno.EMFILE, "too many")] * 2 + [MemoryError()]
    load = module.load

    def fails():
        if failing:
            raise failing.pop()
        load()

    monkeypatch.setattr(module, "load", fails)
    site = make_site(COUNTRY=None)
    assert site.faults() == {"enrichment": 1}
    site.get(headers={"User-Agent": "Mozilla/5.0 (X11; Linux x86_64) Firefox/140.0"})
    assert site.only_record().browser == "Firefox"
