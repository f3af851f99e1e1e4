"""X-Forwarded-For counts as far as trusted proxies wrote it."""

import ipaddress
import socket
import threading

import pytest
from helpers.addresses import ODD_TEXTS
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.serving import make_server
from werkzeug.test import EnvironBuilder, run_wsgi_app

from flask_usage_metrics.enrich.trusted_proxies import TrustedProxies
from flask_usage_metrics.errors import ConfigError
from flask_usage_metrics.records.address import normalise


@pytest.mark.parametrize("given_", ["x", "", "*", "10.0.0.0/33", "10.0.0.1:80", 10, None])
def test_a_range_that_is_none_is_refused_by_name(given_):
    with pytest.raises(ConfigError) as refusal:
        TrustedProxies(["10.0.0.0/8", given_])
    assert str(refusal.value) == (
        f"TRACK_USAGE_TRUSTED_PROXIES must hold addresses, CIDR ranges or 'unix:', not {given_!r}"
    )


@pytest.mark.parametrize(
    ("ranges", "address", "expected"),
    [
        pytest.param(["10.0.0.0/8"], "10.1.2.3", True, id="in range"),
        pytest.param(["10.0.0.0/8"], "11.0.0.1", False, id="outside"),
        pytest.param(["10.0.0.7/8"], "10.1.2.3", True, id="host bits"),
        pytest.param([" 192.0.2.1 "], "192.0.2.1", True, id="one address"),
        pytest.param(["192.0.2.1"], "192.0.2.2", False, id="another address"),
        pytest.param(["2001:db8::/32"], "2001:db8::5", True, id="IPv6"),
        pytest.param(["2001:db8::/32"], "10.0.0.1", False, id="other family"),
        pytest.param(["::ffff:10.0.0.0/104"], "10.0.0.1", True, id="IPv4-mapped range"),
        pytest.param(["0.0.0.0/0", "::/0"], "2001:db8::1", True, id="everybody"),
        pytest.param(["0.0.0.0/0", "::/0"], None, False, id="nobody"),
        pytest.param(["10.0.0.0/8"], "garbage", False, id="garbage"),
        pytest.param([], "10.0.0.1", False, id="no range"),
    ],
)
def test_trust_is_by_range(ranges, address, expected):
    proxies = TrustedProxies(ranges)
    assert (address in proxies) is expected
    assert (address in proxies) is expected, "from the cache"
    assert bool(proxies) is bool(ranges)


def test_two_instances_do_not_share_what_they_trust():
    assert "10.0.0.1" in TrustedProxies(["10.0.0.0/8"])
    assert "10.0.0.1" not in TrustedProxies(["192.0.2.0/24"])


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "client"),
    [
        pytest.param("203.0.113.9", "", "203.0.113.9", id="no proxy"),
        pytest.param("203.0.113.9:99", "8.8.8.8", "203.0.113.9", id="an untrusted peer's header"),
        pytest.param("10.0.0.1", "", "10.0.0.1", id="proxy without header"),
        pytest.param("10.0.0.1", "203.0.113.9", "203.0.113.9", id="one proxy"),
        pytest.param("10.0.0.1", "8.8.8.8, 203.0.113.9", "203.0.113.9", id="client prepends"),
        pytest.param("10.0.0.1", "203.0.113.9,10.0.0.2", "203.0.113.9", id="two proxies"),
        pytest.param(
            "10.0.0.1", "8.8.8.8, 203.0.113.9, 10.0.0.2", "203.0.113.9", id="two, client prepends"
        ),
        pytest.param("10.0.0.1", "203.0.113.9:51234", "203.0.113.9", id="port"),
        pytest.param("::ffff:10.0.0.1", '"[2001:db8::1]:443"', "2001:db8::1", id="mapped peer"),
        pytest.param("10.0.0.1", "unknown", "10.0.0.1", id="unknown"),
        pytest.param("10.0.0.1", "8.8.8.8, x, 10.0.0.2", "10.0.0.2", id="garbage ends the walk"),
        pytest.param("10.0.0.1", "8.8.8.8,", "8.8.8.8", id="empty entry"),
        pytest.param("10.0.0.1", ", 8.8.8.8 ,, ,10.0.0.2 , ", "8.8.8.8", id="empty entries"),
        pytest.param("10.0.0.1", " , ", "10.0.0.1", id="nothing but empty entries"),
        pytest.param("10.0.0.1", "8.8.8.8, unix:", "10.0.0.1", id="socket that is not trusted"),
        pytest.param("10.0.0.1", "10.0.0.9, 10.0.0.2", "10.0.0.9", id="all trusted"),
        pytest.param("10.0.0.1", "2002:a00:2::1", "2002:a00:2::1", id="made-up internal 6to4"),
        pytest.param("", "203.0.113.9", None, id="unknown peer"),
        pytest.param("unix:", "203.0.113.9", None, id="socket"),
        pytest.param("0.0.0.0", "203.0.113.9", None, id="socket of uWSGI"),
    ],
)
def test_the_client_is_the_first_from_the_right_that_is_not_trusted(peer, forwarded_for, client):
    assert TrustedProxies(["10.0.0.0/8"]).client(peer, forwarded_for) == client


# What each server has for the address of a client that came through a Unix socket.
SOCKET_PEERS = {
    "gunicorn, cheroot, granian": {"REMOTE_ADDR": ""},
    "a2wsgi": {"REMOTE_ADDR": None},
    "none at all": {},
    "Werkzeug": {"REMOTE_ADDR": "<local>"},
    "waitress": {"REMOTE_ADDR": "localhost"},
    "uWSGI": {"REMOTE_ADDR": "0.0.0.0"},
    "nginx by the protocol uwsgi": {"REMOTE_ADDR": "unix:"},
}


@pytest.mark.parametrize("peer", SOCKET_PEERS.values(), ids=SOCKET_PEERS)
@pytest.mark.parametrize("fixed", [False, True], ids=["alone", "behind ProxyFix"])
def test_a_proxy_at_a_unix_socket_is_trusted_by_that_word(make_site, peer, fixed):
    answers = {}
    for proxies in ([], ["10.0.0.0/8"], ["10.0.0.0/8", "unix:"]):
        site = make_site(
            COUNTRY="header:CF-IPCountry" if proxies else None, TRUSTED_PROXIES=proxies
        )
        if fixed:
            site.app.wsgi_app = ProxyFix(site.app.wsgi_app, x_for=1)
        headers = {"X-Forwarded-For": "8.8.8.8, 203.0.113.9", "CF-IPCountry": "NL"}
        environ = EnvironBuilder(headers=headers).get_environ()
        environ.pop("REMOTE_ADDR", None)
        run_wsgi_app(site.app, {**environ, **peer})
        record = site.only_record()
        answers[len(proxies)] = (record.remote_addr, record.country)
    unnamed = "203.0.113.9" if fixed else None
    assert answers == {0: (unnamed, None), 1: (unnamed, None), 2: ("203.0.113.9", "NL")}


def test_two_proxies_at_unix_sockets_are_walked_through():
    proxies = TrustedProxies(["unix:"])
    assert proxies.client("", "8.8.8.8, 203.0.113.9, unix:,") == "203.0.113.9"
    assert proxies.client("", "") is None
    assert proxies.client("198.51.100.1", "203.0.113.9") == "198.51.100.1"


def test_a_real_socket_is_known(make_site, tmp_path, monkeypatch):
    site = make_site(COUNTRY=None, TRUSTED_PROXIES=["unix:"])
    monkeypatch.chdir(tmp_path)
    with make_server("unix://a.sock", 0, site.app) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect("a.sock")
            client.sendall(b"GET / HTTP/1.0\r\nX-Forwarded-For: 203.0.113.9\r\n\r\n")
            assert client.recv(7) == b"HTTP/1."
            while client.recv(4096):
                pass
        thread.join()
    assert site.only_record().remote_addr == "203.0.113.9"


def test_without_trusted_proxies_the_header_is_never_read():
    assert TrustedProxies([]).client("10.0.0.1", "203.0.113.9") == "10.0.0.1"


def test_the_right_end_of_a_long_header_counts():
    proxies = TrustedProxies(["10.0.0.0/8"])
    assert proxies.client("10.0.0.1", "x" * 1_000_000 + ", 203.0.113.9") == "203.0.113.9"
    assert proxies.client("10.0.0.1", "x" * 1_000_000) == "10.0.0.1"


def test_an_address_cut_by_the_bound_is_not_believed():
    trusted = ",10.0.0.2" * 226 + " " * 7  # leaves 7 of 2048 characters for what is before
    proxies = TrustedProxies(["10.0.0.0/8"])
    assert proxies.client("10.0.0.1", "8.8.8.8" + trusted) == "8.8.8.8"
    assert proxies.client("10.0.0.1", "198.8.8.8" + trusted) == "10.0.0.2"


@given(
    peer=st.one_of(st.just("10.0.0.1"), ODD_TEXTS),
    forwarded_for=st.lists(ODD_TEXTS, max_size=5).map(",".join),
)
def test_finding_the_client_never_raises_and_gives_an_address(peer, forwarded_for):
    client = TrustedProxies(["10.0.0.0/8", "::/1", "unix:"]).client(peer, forwarded_for)
    if client is not None:
        assert normalise(client) == client


@pytest.mark.parametrize("text", ["2002:0a00:0001::1", "64:ff9b::10.0.0.1", "2002:7f00:1::"])
def test_a_tunnelled_internal_address_does_not_pass_for_an_internal_one(text):
    assert normalise(text) == str(ipaddress.ip_address(text))
    assert normalise(text) not in TrustedProxies(["10.0.0.0/8", "127.0.0.0/8"])
