"""Countries by asking: HTTP services and functions of the app, neither of which may hold us up."""

import gzip
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from helpers.examples import examples
from helpers.process import run_python
from helpers.watch import alive
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flask_usage_metrics.enrich.country import Answer, Limits, make_country_lookup
from flask_usage_metrics.enrich.country.answer import ISO_CODES
from flask_usage_metrics.runtime.faults import Faults

UNKNOWN = Answer()
GERMANY = Answer("DE", {"country_code": "DE"})


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.server.connections += 1

    def do_GET(self):
        self.server.asked.append((self.path, dict(self.headers)))
        try:
            self.server.behave(self)
        except OSError:  # the client has given up
            self.close_connection = True

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """An HTTP service whose behaviour a test sets; `behave` is called for each request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []
        self.connections = 0
        self.answers({"country_code": "DE"})
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    @property
    def paths(self):
        return [path for path, _ in self.asked]

    def answers(self, body, status=200, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()

        def behave(handler):
            handler.send_response(status)
            for name, value in headers.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content)

        self.behave = behave

    def hangs(self):
        """Answer nothing until the test releases it, then as before."""
        then = self.behave

        def behave(handler):
            self.released.wait(10)
            then(handler)

        self.behave = behave


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def faults():
    return Faults()


@pytest.fixture
def make(clock, faults):
    made = []

    def make(setting=None, *, function=None, freegeoip=None, trusted=True, **limits):
        limits = {"read_seconds": 0.3, "clock": clock} | limits
        countries = make_country_lookup(
            setting,
            trusted_proxies=trusted,
            use_freegeoip=freegeoip is not None,
            freegeoip_endpoint=freegeoip,
            function=function,
            faults=faults,
            limits=Limits(**limits),
        )
        made.append(countries)
        return countries

    yield make
    for countries in made:
        countries.close()


def ask(countries, address="8.8.8.8", headers=(), trusted=False):
    """Call until there is an answer, as the pipeline does."""
    until = time.monotonic() + 5
    while (answer := countries.locate(address, headers, trusted)) is None:
        assert time.monotonic() < until, "no answer"
        countries.wait(0.1)
    return answer


def is_asking(countries):
    """Whether an answer of a blocking source is waited for."""
    with countries._answered:
        return any(lookup.next_deadline() is not None for lookup in countries._lookups)


def until_true(condition):
    until = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.002)


# -------------------------------------------------------------------------------- services


def test_a_service_is_asked_in_the_background_and_fills_country_and_ip_info(server, make):
    countries = make(server.url + "/{ip}")
    assert countries.locate("8.8.8.8", (), False) is None
    assert is_asking(countries)
    assert ask(countries) == GERMANY
    assert not is_asking(countries)
    assert server.paths == ["/8.8.8.8"]


@pytest.mark.parametrize(
    ("url", "address", "asked"),
    [
        ("/json/{ip}?key=a", "8.8.8.8", "/json/8.8.8.8?key=a"),
        ("/json/", "8.8.8.8", "/json/8.8.8.8"),
        ("/json?ip=", "8.8.8.8", "/json?ip=8.8.8.8"),
        ("", "8.8.8.8", "/8.8.8.8"),
        ("/{ip}", "2001:4860::8888", "/2001%3A4860%3A%3A8888"),
    ],
)
def test_the_address_takes_its_place_in_the_url_or_is_appended(server, make, url, address, asked):
    assert ask(make(server.url + url), address) == GERMANY
    assert server.paths == [asked]


@pytest.mark.parametrize(
    ("answered", "country"),
    [
        ({"country_code": "de"}, "DE"),
        ({"countryCode": "DE", "country": "Germany"}, "DE"),
        ({"country_iso": "DE"}, "DE"),
        ({"country": "DE"}, "DE"),
        ({"country": {"iso_code": "DE"}}, "DE"),
        ({"location": {"country_code": "DE"}}, "DE"),
        ({"country_code": None, "countryCode": "EU", "country": "DE"}, "DE"),
        ({"country_code": 49, "country": ["DE"], "location": "DE"}, None),
        ({"bogon": True}, None),
        ({}, None),
    ],
)
def test_the_country_is_found_under_every_name_services_give_it(server, make, answered, country):
    server.answers(answered)
    assert ask(make(server.url)) == Answer(country, answered)


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.1.2.3", "192.168.1.1", "::1", "fe80::1", "fd00::1", "100.64.0.1"]
)
def test_a_private_address_is_never_sent_to_a_service(server, make, address):
    countries = make(server.url)
    assert countries.locate(address, (), False) == UNKNOWN
    assert countries.locate(None, (), False) == UNKNOWN
    assert not is_asking(countries)
    assert server.paths == []


def test_an_address_is_asked_for_once_while_it_is_under_way_and_for_a_day_after(
    server, make, clock
):
    countries = make(server.url)
    server.hangs()
    for _ in range(20):
        assert countries.locate("8.8.8.8", (), False) is None
    until_true(lambda: server.asked)
    server.answers({"country_code": "DE"})
    ask(countries, "9.9.9.9")
    assert server.paths == ["/8.8.8.8", "/9.9.9.9"]
    clock.now += 86_399
    assert ask(countries, "9.9.9.9") == GERMANY
    assert server.paths == ["/8.8.8.8", "/9.9.9.9"]
    clock.now += 2
    assert ask(countries, "9.9.9.9") == GERMANY
    assert server.paths == ["/8.8.8.8", "/9.9.9.9", "/9.9.9.9"]


def test_a_failure_is_kept_for_ten_minutes(server, make, clock, faults):
    countries = make(server.url)
    server.answers({}, status=500)
    assert ask(countries) == UNKNOWN
    server.answers({"country_code": "DE"})
    clock.now += 599
    assert ask(countries) == UNKNOWN
    clock.now += 2
    assert ask(countries) == GERMANY
    assert len(server.asked) == 2
    assert faults.counts() == {"country": 1}


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" " * 65_536)


def trickling(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        time.sleep(0.05)


def cut(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"country_code": "DE"')
    handler.close_connection = True


def no_http(handler):
    handler.wfile.write(b"\x00\xff no HTTP\r\n\r\n")
    handler.close_connection = True


def hung(handler):
    handler.server.released.wait(10)
    handler.close_connection = True


@pytest.mark.alone
@pytest.mark.parametrize("behave", [endless, trickling, cut, no_http, hung])
def test_a_service_that_misbehaves_is_given_up_in_time(server, make, faults, behave):
    server.behave = behave
    countries = make(server.url, clock=time.monotonic, answer_seconds=0.2)
    begun = time.monotonic()
    assert ask(countries) == UNKNOWN
    assert time.monotonic() - begun < 2
    assert faults.counts() == {"country": 1}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"DE",
        b"<html>",
        b'["DE"]',
        b'"DE"',
        b"null",
        b"[" * 60_000,
        b'{"country_code": "DE", "x": NaN}',
        b'{"country_code": "DE", "x": "\\ud800"}',
        b'{"country_code": "DE", "x": "\xff"}',
        json.dumps({"country_code": "DE", "x": "x" * 66_000}).encode(),
    ],
)
def test_an_answer_that_is_no_small_json_object_is_a_failure(server, make, faults, clock, body):
    server.answers(body)
    countries = make(server.url)
    assert ask(countries) == UNKNOWN
    assert faults.counts() == {"country": 1}
    clock.now += 599
    assert ask(countries) == UNKNOWN
    assert len(server.asked) == 1


def test_a_compressed_answer_is_not_blown_up(server, make):
    bomb = gzip.compress(json.dumps({"country_code": "DE", "x": " " * 30_000_000}).encode())
    assert len(bomb) < 65_536
    server.answers(bomb, Content_Encoding="gzip")
    assert ask(make(server.url)) == UNKNOWN
    assert server.asked[0][1]["Accept-Encoding"] == "identity"


def test_a_redirect_is_not_followed(server, make):
    server.answers({}, status=302, Location=server.url + "/elsewhere")
    assert ask(make(server.url)) == UNKNOWN
    assert server.paths == ["/8.8.8.8"]


def free_port():
    with closing(socket.socket()) as nobody:
        nobody.bind(("127.0.0.1", 0))
        return nobody.getsockname()[1]


def test_a_service_that_is_not_there_makes_unknown(make, faults):
    assert ask(make(f"http://127.0.0.1:{free_port()}")) == UNKNOWN
    assert faults.counts() == {"country": 1}


def test_cookies_are_not_sent_back_and_the_connection_is_used_again(server, make):
    server.answers({"country_code": "DE"}, Set_Cookie="id=1")
    countries = make(server.url)
    ask(countries, "8.8.8.8")
    ask(countries, "9.9.9.9")
    assert ["Cookie" in headers for _, headers in server.asked] == [False, False]
    assert server.connections == 1


@pytest.mark.alone
def test_asking_never_blocks_while_a_service_hangs_and_ends_at_the_deadline(
    server, make, clock, faults
):
    server.hangs()
    countries = make(server.url, read_seconds=5)
    begun = time.monotonic()
    assert [countries.locate(f"8.8.8.{n}", (), False) for n in range(100)] == [None] * 100
    assert time.monotonic() - begun < 0.5
    clock.now += 4.9
    assert countries.locate("8.8.8.1", (), False) is None
    assert is_asking(countries)
    clock.now += 0.2
    assert not is_asking(countries)
    assert [countries.locate(f"8.8.8.{n}", (), False) for n in range(100)] == [UNKNOWN] * 100
    assert countries.locate("8.8.8.1", (), False) == UNKNOWN
    assert faults.counts() == {"country": 100}
    server.released.set()


def test_an_answer_that_comes_after_the_deadline_is_kept(server, make, clock):
    server.hangs()
    countries = make(server.url, read_seconds=5)
    assert countries.locate("8.8.8.8", (), False) is None
    until_true(lambda: server.asked)
    clock.now += 6
    assert countries.locate("8.8.8.8", (), False) == UNKNOWN
    server.released.set()
    until_true(lambda: countries._lookups[0].arrived)
    assert countries.locate("8.8.8.8", (), False) == GERMANY


def test_more_questions_than_the_queue_holds_are_unknown_at_once_and_counted(server, make, faults):
    server.hangs()
    countries = make(server.url, questions=10, read_seconds=5)
    answers = [countries.locate(f"8.8.8.{n}", (), False) for n in range(15)]
    assert answers == [None] * 10 + [UNKNOWN] * 5
    assert faults.counts() == {"country": 5}
    server.released.set()


def test_five_failures_in_a_row_pause_a_service_for_a_minute(server, make, clock):
    countries = make(server.url)
    ask(countries, "9.9.9.9")
    server.answers({}, status=429)
    for number in range(5):
        assert ask(countries, f"8.8.8.{number}") == UNKNOWN
    server.answers({"country_code": "DE"})
    assert len(server.asked) == 6

    clock.now += 59
    assert countries.locate("8.8.4.4", (), False) == UNKNOWN
    assert countries.locate("9.9.9.9", (), False) == GERMANY
    assert len(server.asked) == 6
    clock.now += 1
    assert ask(countries, "8.8.4.4") == GERMANY


def test_one_failure_after_a_pause_begins_the_next(server, make, clock):
    server.answers({}, status=500)
    countries = make(server.url)
    for number in range(5):
        ask(countries, f"8.8.8.{number}")
    clock.now += 60
    assert ask(countries, "8.8.4.4") == UNKNOWN
    assert countries.locate("8.8.4.5", (), False) == UNKNOWN
    assert len(server.asked) == 6


def test_failures_that_are_not_in_a_row_pause_nothing(server, make):
    countries = make(server.url)
    for number in range(12):
        server.answers({"country_code": "DE"}, status=200 if number % 5 == 4 else 500)
        assert countries.locate(f"8.8.8.{number}", (), False) is None
        ask(countries, f"8.8.8.{number}")
    assert len(server.asked) == 12


def test_an_address_a_service_does_not_know_is_no_failure_of_it(server, make, faults):
    server.answers({"message": "not found"}, status=404)
    countries = make(server.url)
    for number in range(7):
        assert ask(countries, f"8.8.8.{number}").country is None
    assert len(server.asked) == 7
    assert faults.counts() == {}


def test_what_waits_when_a_pause_begins_is_not_sent(server, make):
    server.answers({}, status=503)
    countries = make(server.url)
    addresses = [f"8.8.8.{number}" for number in range(100)]
    for address in addresses:
        countries.locate(address, (), False)
    assert [ask(countries, address) for address in addresses] == [UNKNOWN] * 100
    assert len(server.asked) == 5


def test_neither_an_address_nor_the_url_is_logged_at_any_level(server, make, caplog):
    caplog.set_level(logging.DEBUG)
    countries = make(server.url + "/secret/{ip}")
    assert ask(countries) == GERMANY
    server.answers(b"", status=500, **{"Odd Header": "1"})
    assert ask(countries, "9.9.9.9") == UNKNOWN
    server.behave = no_http
    assert ask(countries, "9.9.9.10") == UNKNOWN
    port = free_port()
    assert ask(make(f"http://127.0.0.1:{port}/secret/{{ip}}")) == UNKNOWN
    assert "the country service gave no answer (status 500)" in caplog.text
    for word in ("8.8.8.8", "9.9.9", "secret", str(server.server_port), str(port)):
        assert word not in caplog.text


def test_what_the_app_itself_asks_for_is_still_logged(server, make, caplog):
    caplog.set_level(logging.DEBUG)
    ask(make(server.url))
    server.answers({})
    requests.get(server.url + "/of-the-app", timeout=2, headers={"Connection": "close"}).close()
    assert "/of-the-app" in caplog.text


def test_each_answer_has_an_ip_info_of_its_own(server, make):
    countries = make(server.url)
    ask(countries).ip_info["country_code"] = "changed"
    assert ask(countries) == GERMANY


def test_ip_info_has_no_nul_which_postgresql_refuses(server, make):
    server.answers({"a\0": "\0\0b\\u0000\\\0", "c": ["\\", "\\\\u0000"]})
    info = {"a": "b\\u0000\\", "c": ["\\", "\\\\u0000"]}
    assert ask(make(server.url)).ip_info == info


def test_answers_kept_are_bounded_in_number_and_bytes(server, make):
    for limits in ({"answers": 10}, {"answers_bytes": 10 * len(b'{"country_code":"DE"}')}):
        server.asked.clear()
        countries = make(server.url, **limits)
        for number in range(10):
            ask(countries, f"8.8.8.{number}")
        ask(countries, "8.8.8.0")
        ask(countries, "9.9.9.9")
        assert len(server.asked) == 11
        ask(countries, "8.8.8.0")  # used lately
        assert len(server.asked) == 11
        ask(countries, "8.8.8.1")  # had to go
        assert len(server.asked) == 12


def test_an_answer_asked_for_anew_takes_no_more_room_than_before(server, make, clock):
    countries = make(server.url, answers_bytes=10 * len(b'{"country_code":"DE"}'))
    for asked in (10, 20, 30):
        for number in range(10):
            ask(countries, f"8.8.8.{number}")
        for number in range(10):
            ask(countries, f"8.8.8.{number}")
        assert len(server.asked) == asked
        clock.now += 86_401


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
COUNTRY_KEYS = st.sampled_from(
    ["country_code", "countryCode", "country_iso", "country", "location"]
)


def test_whatever_a_service_answers_is_a_country_or_unknown(server, make):
    countries = make(server.url, pause_after=10**9)
    numbers = iter(range(10**6))

    @settings(max_examples=examples(100), deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.binary(max_size=200)
        | st.dictionaries(COUNTRY_KEYS | st.text(), JSON | st.sampled_from(["DE", "xk", "EU"]))
    )
    def fuzz(body):
        number = next(numbers)
        server.answers(body)
        answer = ask(countries, f"8.8.{number >> 8}.{number & 255}")
        assert answer.country in ISO_CODES | {None}
        assert answer.ip_info is None or isinstance(answer.ip_info, dict)

    fuzz()


# -------------------------------------------------------------------------------- several sources


def test_freegeoip_comes_first_and_leaves_out_what_flask_track_usage_did(server, make):
    server.answers({"countryCode": "DE", "businessWebsite": "", "status": "success", "city": "B"})
    countries = make("iptocc", freegeoip=server.url + "/{ip}")
    assert ask(countries) == Answer("DE", {"countryCode": "DE", "city": "B"})
    assert countries.locate("10.0.0.1", (), False) == UNKNOWN


def test_another_service_keeps_those_keys(server, make):
    server.answers({"countryCode": "DE", "businessWebsite": "", "status": "success"})
    assert ask(make(server.url)).ip_info.keys() == {"countryCode", "businessWebsite", "status"}


def test_ip_info_is_kept_though_the_next_source_knows_the_country(server, make):
    server.answers({"city": "Berlin"})
    assert ask(make("iptocc", freegeoip=server.url)) == Answer("US", {"city": "Berlin"})
    assert ask(make([server.url, "header:X"]), headers=("",)) == Answer(None, {"city": "Berlin"})


def test_a_local_source_stands_in_for_a_service_that_fails(server, make):
    server.answers({}, status=500)
    assert ask(make([server.url, "iptocc"])) == Answer("US")


def test_a_service_is_not_asked_when_a_source_before_it_knows(server, make):
    countries = make(["header:X", "iptocc", server.url])
    assert countries.locate("8.8.8.8", ("",), True) == Answer("US")
    assert countries.locate("1.2.3.4", ("FR",), True) == Answer("FR")
    assert server.paths == []


# -------------------------------------------------------------------------------- functions


def test_a_function_takes_the_place_of_the_setting(make):
    countries = make(["header:X", "iptocc", "nonsense"], function=lambda address: "fr")
    assert countries.headers == ()
    assert ask(countries) == Answer("FR")


def test_a_function_is_called_with_any_address_once_on_another_thread(make):
    called = []

    def function(address):
        called.append((address, threading.current_thread() is threading.main_thread()))
        return "CH"

    countries = make(function=function)
    for _ in range(3):
        assert ask(countries, "127.0.0.1") == Answer("CH")
    assert called == [("127.0.0.1", False)]
    assert countries.locate(None, (), False) == UNKNOWN


@pytest.mark.parametrize(
    ("returned", "faulty"),
    [(None, 0), ("XX", 0), ("Germany", 0), ("\xdf", 0), ("", 0), (49, 1), (["DE"], 1), (b"DE", 1)],
)
def test_what_a_function_returns_is_checked(make, faults, returned, faulty):
    assert ask(make(function=lambda address: returned)) == UNKNOWN
    assert faults.counts() == ({"country": 1} if faulty else {})


@pytest.mark.parametrize(
    "error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError, StopIteration]
)
def test_what_a_function_raises_is_counted_and_means_unknown(make, faults, clock, error):
    answers = iter([error("8.8.8.8"), "DE", "FR"])

    def function(address):
        answer = next(answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    countries = make(function=function)
    assert ask(countries) == UNKNOWN
    assert faults.counts() == {"country": 1}
    clock.now += 9
    assert ask(countries) == UNKNOWN
    clock.now += 2
    assert ask(countries) == Answer("DE")
    clock.now += 299
    assert ask(countries) == Answer("DE")
    clock.now += 2
    assert ask(countries) == Answer("FR")


def test_a_function_that_always_raises_is_not_paused(make):
    called = []

    def function(address):
        called.append(address)
        raise ValueError

    countries = make(function=function)
    for number in range(12):
        ask(countries, f"8.8.8.{number}")
    assert len(called) == 12


@pytest.mark.alone
def test_a_function_that_hangs_makes_unknown_after_the_deadline_and_memory_is_bounded(
    make, clock, faults
):
    release = threading.Event()
    countries = make(function=lambda address: release.wait(10) and "DE", questions=50)
    answers = [countries.locate(f"8.8.8.{n}", (), False) for n in range(200)]
    assert answers == [None] * 50 + [UNKNOWN] * 150
    clock.now += 5
    answers = [countries.locate(f"8.8.8.{n}", (), False) for n in range(200)]
    assert answers == [UNKNOWN] * 200
    begun = time.monotonic()
    countries.wait(5)
    countries.wait_local(5)
    assert time.monotonic() - begun < 1
    release.set()
    until_true(lambda: countries._lookups[0].arrived == 50)


def test_a_thread_that_hangs_for_a_minute_is_left_behind_three_times_at_most(make, clock, started):
    release = threading.Event()
    hanging = []

    def function(address):
        if address.startswith("9."):
            hanging.append(address)
            release.wait(10)
        return "DE"

    countries = make(function=function)
    for number in range(6):
        countries.locate(f"9.9.9.{number}", (), False)
        assert len(alive(started)) == min(number + 1, 4)
        until_true(lambda n=number: len(hanging) == min(n + 1, 4))
        clock.now += 61
        if number < 3:
            assert ask(countries, f"8.8.8.{number}") == Answer("DE")
    assert countries.locate("8.8.8.8", (), False) is None
    release.set()
    assert ask(countries) == Answer("DE")
    assert countries._lookups[0]._thread.is_alive()
    until_true(lambda: not any(thread.is_alive() for thread in countries._lookups[0]._left_behind))


# -------------------------------------------------------------------------------- waiting


@pytest.mark.alone
def test_wait_returns_when_an_answer_arrives_even_if_it_came_before(make):
    countries = make(function=lambda address: "DE")
    for number in range(50):
        address = f"8.8.8.{number}"
        assert countries.locate(address, (), False) is None
        if number % 2:
            until_true(lambda n=number: countries._lookups[0].arrived == n + 1)
        begun = time.monotonic()
        countries.wait(5)
        assert time.monotonic() - begun < 1
        assert countries.locate(address, (), False) == Answer("DE")
    begun = time.monotonic()
    countries.wait(5)
    assert time.monotonic() - begun < 1


@pytest.mark.alone
def test_wait_returns_for_an_answer_that_came_before_though_another_is_under_way(make):
    release = threading.Event()
    countries = make(function=lambda address: address == "8.8.8.8" or release.wait(10))
    countries.locate("8.8.8.8", (), False)
    countries.locate("9.9.9.9", (), False)
    until_true(lambda: countries._lookups[0].arrived)
    begun = time.monotonic()
    countries.wait(5)
    assert time.monotonic() - begun < 1
    countries.wait(0.1)
    assert 0.09 < time.monotonic() - begun < 1
    release.set()


@pytest.mark.alone
def test_wait_blocks_no_longer_than_its_timeout_or_the_deadline(server, make):
    server.hangs()
    countries = make(server.url, read_seconds=5, deadline_seconds=0.3, clock=time.monotonic)
    countries.locate("8.8.8.8", (), False)
    begun = time.monotonic()
    countries.wait(0.1)
    assert 0.09 < time.monotonic() - begun < 0.25
    countries.wait(5)
    assert 0.25 < time.monotonic() - begun < 1
    assert countries.locate("8.8.8.8", (), False) == UNKNOWN
    server.released.set()


@pytest.mark.alone
def test_wait_local_waits_for_a_function_but_for_no_service(server, make):
    server.hangs()
    countries = make(freegeoip=server.url, function=lambda address: time.sleep(0.1) or "DE")
    countries.locate("8.8.8.8", (), False)  # the service is under way
    countries.locate("10.0.0.1", (), False)  # the function is: no service is asked for that
    begun = time.monotonic()
    countries.wait_local(5)
    assert 0.05 < time.monotonic() - begun < 1
    assert countries.locate("10.0.0.1", (), False) == Answer("DE")
    assert countries.locate("8.8.8.8", (), False) is None
    begun = time.monotonic()
    countries.wait_local(5)
    make(server.url).wait_local(5)
    assert time.monotonic() - begun < 0.1
    server.released.set()


@pytest.mark.alone
def test_wait_local_ends_at_its_timeout(make):
    release = threading.Event()
    countries = make(function=lambda address: release.wait(10))
    countries.locate("8.8.8.8", (), False)
    begun = time.monotonic()
    countries.wait_local(0.05)
    assert 0.04 < time.monotonic() - begun < 0.5
    release.set()


@pytest.mark.alone
def test_a_lookup_in_local_sources_waits_for_nothing(make):
    countries = make("iptocc")
    begun = time.monotonic()
    countries.wait(5)
    countries.wait_local(5)
    assert time.monotonic() - begun < 0.1
    assert not is_asking(countries)


# -------------------------------------------------------------------------------- threads


def test_no_thread_runs_before_the_first_question_nor_from_close_to_the_next(server, make, started):
    countries = make([server.url, "header:X"], function=None)
    assert alive(started) == []
    ask(countries, headers=("",))
    assert len(alive(started)) == 1
    countries.close()
    countries.close()
    assert alive(started) == []
    assert countries.locate("8.8.8.8", ("",), False) == GERMANY
    assert alive(started) == []
    assert ask(countries, "9.9.9.9", headers=("",)) == GERMANY


def test_close_forgets_what_is_being_asked(make):
    release = threading.Event()
    called = []

    def function(address):
        called.append(address)
        release.wait(10)
        return "DE"

    countries = make(function=function)
    for number in range(10):
        countries.locate(f"8.8.8.{number}", (), False)
    until_true(lambda: called)
    threading.Timer(0.05, release.set).start()
    countries.close()
    assert not is_asking(countries)
    assert called == ["8.8.8.0"]
    assert ask(countries, "8.8.8.9") == Answer("DE")
    assert called == ["8.8.8.0", "8.8.8.9"]


def test_closing_before_anything_was_asked_does_no_harm(make, server):
    make(server.url).close()
    make("iptocc").close()


def test_without_a_thread_countries_are_unknown_and_it_is_counted(make, faults, monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    countries = make(function=lambda address: "DE")
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        assert countries.locate("8.8.8.8", (), False) == UNKNOWN
    assert not is_asking(countries)
    assert faults.counts() == {"country": 1}
    assert ask(countries) == Answer("DE")


FORK = """
import os, threading, time
from flask_usage_metrics.enrich.country import make_country_lookup
from flask_usage_metrics.runtime.faults import Faults

release = threading.Event()
parent = os.getpid()

def function(address):
    if os.getpid() == parent:
        release.wait(10)
        return "FR"
    return "DE"

def ask(address):
    until = time.monotonic() + 5
    while (answer := countries.locate(address, (), False)) is None and time.monotonic() < until:
        countries.wait(0.1)
    return answer.country

countries = make_country_lookup("auto", trusted_proxies=False, use_freegeoip=False,
                       freegeoip_endpoint=None, function=function, faults=Faults())
assert countries.locate("8.8.8.8", (), False) is None   # the parent's thread is in the middle of it
assert countries.locate("9.9.9.9", (), False) is None
held = threading.Event()

def hold():
    with countries._answered:
        held.set()
        release.wait(10)

threading.Thread(target=hold).start()
held.wait()                                           # and a lock is held by another
child = os.fork()
if child == 0:
    countries.reset_after_fork()
    assert countries._lookups[0].next_deadline() is None
    os._exit(0 if ask("8.8.8.8") == ask("9.9.9.9") == "DE" else 1)
release.set()
assert ask("8.8.8.8") == ask("9.9.9.9") == "FR"
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_asks_with_a_thread_of_its_own():
    done = run_python(FORK, warnings=("error", "ignore::DeprecationWarning"))
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_many_addresses_asked_at_once_are_all_answered(server, make):
    countries = make(server.url)
    addresses = [f"8.8.{n >> 8}.{n & 255}" for n in range(400)]
    pending = list(addresses)
    until = time.monotonic() + 10
    while pending and time.monotonic() < until:
        pending = [one for one in pending if countries.locate(one, (), False) is None]
        countries.wait(0.1)
    assert pending == []
    assert sorted(server.paths) == sorted("/" + address for address in addresses)


def test_only_what_is_in_a_package_answers_the_same_for_ever(tmp_path: Path) -> None:
    def is_static(given: object, function: Callable[[str], object] | None = None) -> bool:
        return make_country_lookup(
            given,
            trusted_proxies=True,
            use_freegeoip=False,
            freegeoip_endpoint=None,
            function=function,
            faults=Faults(),
        ).is_static

    assert is_static(None)
    assert is_static("iptocc")
    assert not is_static("header:CF-IPCountry")
    assert not is_static(f"mmdb:{tmp_path}/none.mmdb")
    assert not is_static(["iptocc", "http://127.0.0.1:9/"])
    assert not is_static(None, lambda address: "NL")
