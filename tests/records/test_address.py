"""An address has one spelling, and is public or not."""

import ipaddress

import pytest
from helpers.addresses import ODD_TEXTS
from hypothesis import given
from hypothesis import strategies as st

from flask_usage_metrics.records.address import is_global, normalise


@pytest.mark.parametrize(
    ("text", "address"),
    [
        pytest.param("203.0.113.9", "203.0.113.9", id="plain"),
        pytest.param(" 203.0.113.9\t", "203.0.113.9", id="white space"),
        pytest.param("203.0.113.9:51234", "203.0.113.9", id="port"),
        pytest.param('"203.0.113.9:51234"', "203.0.113.9", id="quotes and port"),
        pytest.param("'203.0.113.9'", "203.0.113.9", id="single quotes"),
        pytest.param("[203.0.113.9]:80", "203.0.113.9", id="brackets"),
        pytest.param("2001:DB8:0:0::0001", "2001:db8::1", id="IPv6 compressed"),
        pytest.param("[2001:db8::1]", "2001:db8::1", id="IPv6 brackets"),
        pytest.param('"[2001:db8::1]:443"', "2001:db8::1", id="IPv6 quotes and port"),
        pytest.param("fe80::1%eth0", "fe80::1", id="zone"),
        pytest.param("[fe80::1%eth0]:443", "fe80::1", id="zone and port"),
        pytest.param("::ffff:203.0.113.9", "203.0.113.9", id="IPv4-mapped"),
        pytest.param("[::ffff:cb00:7109]:80", "203.0.113.9", id="IPv4-mapped in hex"),
        pytest.param("::ffff:10.0.0.1", "10.0.0.1", id="internal IPv4-mapped"),
        pytest.param("2002:cb00:7109::1", "203.0.113.9", id="6to4"),
        pytest.param("64:ff9b::203.0.113.9", "203.0.113.9", id="NAT64"),
        pytest.param("::1", "::1", id="loopback"),
    ],
)
def test_an_address_has_one_spelling(text, address):
    assert normalise(text) == address


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param("unknown", id="unknown"),
        pytest.param("_hidden", id="obfuscated"),
        pytest.param("8.8.8", id="three bytes"),
        pytest.param("010.0.0.1", id="perhaps octal"),
        pytest.param("3405803785", id="number"),
        pytest.param("203.0.113.9, 10.0.0.1", id="two"),
        pytest.param("203.0.113.9:http", id="port by name"),
        pytest.param("203.0.113.9%eth0", id="zone on IPv4"),
        pytest.param("10.0.0.0/8", id="range"),
        pytest.param("[2001:db8::1", id="open bracket"),
        pytest.param("unix:/run/app.sock", id="socket"),
        pytest.param("203.0.113.\u0669", id="other digits"),
        pytest.param("203.0.113.9\0", id="NUL"),
        pytest.param("\ud800", id="surrogate"),
        pytest.param(" " * 60 + "8.8.8.8", id="65 and more characters"),
        pytest.param("1" * 5_000_000, id="megabytes"),
    ],
)
def test_what_is_no_address_is_unknown(text):
    assert normalise(text) is None


@given(ODD_TEXTS)
def test_normalising_never_raises_and_gives_a_valid_address_that_stays_as_it_is(text):
    address = normalise(text)
    if address is not None:
        assert str(ipaddress.ip_address(address)) == address
        assert normalise(address) == address
    assert is_global(text) in (True, False)


@given(st.ip_addresses())
def test_every_address_survives_with_port_and_brackets(address):
    text = str(address)
    expected = normalise(text)
    assert expected is not None
    assert normalise(f"[{text}]:443") == normalise(f'"[{text}]"') == expected
    if address.version == 4:
        assert normalise(f"{text}:443") == expected == text


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("10.0.0.1", False),
        ("127.0.0.1", False),
        ("100.64.0.1", False),
        ("224.0.1.1", False),
        ("ff0e::1", False),
        ("::1", False),
        ("fe80::1", False),
        ("", False),
        ("nonsense", False),
    ],
)
def test_only_public_unicast_addresses_are_global(address, expected):
    assert is_global(address) is expected
