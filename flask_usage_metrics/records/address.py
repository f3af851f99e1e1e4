"""Client addresses: one spelling for each, and which of them are public."""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

_MAX_TEXT = 64
_CACHED = 8192

_WITH_PORT = re.compile(r"(?:\[([^\[\]]+)\]|([0-9.]+))(?::[0-9]{1,5})?")

_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052, 2.1

_INTERNAL = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.168.0.0/16",
    )
)


def normalise(text: str) -> str | None:
    """Return the one spelling of an address that servers, proxies and headers spell in many ways.

    White space, quotes, brackets, a port and a zone are taken off. An IPv4 address inside an IPv6
    one (IPv4-mapped, 6to4, NAT64 ``64:ff9b::/96``) becomes that IPv4 address.

    Args:
        text: Such as ``"203.0.113.9:51234"``, ``"[2001:DB8::1%eth0]:443"``; may be anything.

    Returns:
        Dotted IPv4 or compressed lower-case IPv6; None when it is no address or longer than 64
        characters.
    """
    # Before the cache, which would keep the text as its key, however long.
    return _normalise(text) if len(text) <= _MAX_TEXT else None


@lru_cache(_CACHED)
def _normalise(text: str) -> str | None:
    bare = text.strip(" \t\r\n\"'")
    if with_port := _WITH_PORT.fullmatch(bare):
        bare = with_port[1] or with_port[2]
    if ":" in bare:
        bare = bare.partition("%")[0]
    try:
        address = ip_address(bare)
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        return str(_embedded(address) or address)
    return str(address)


def _embedded(address: IPv6Address) -> IPv4Address | None:
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    embedded = address.sixtofour
    if embedded is None and address in _NAT64:
        embedded = IPv4Address(int(address) & 0xFFFFFFFF)
    # Neither may carry an internal address (RFC 3056, 2; RFC 6052, 3.1). One that does was made up,
    # perhaps to pass for a trusted proxy.
    if embedded is None or any(embedded in network for network in _INTERNAL):
        return None
    return embedded


@lru_cache(_CACHED)
def is_global(address: str) -> bool:
    """Tell whether an address is that of one host on the public internet, so that it has a country.

    Args:
        address: As `normalise` returns it; anything else is not global.
    """
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    return parsed.is_global and not parsed.is_multicast
