"""Client addresses: one spelling for each, and the client's address behind trusted proxies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

from flask_usage_metrics.errors import ConfigError

_MAX_TEXT = 64
_MAX_FORWARDED_FOR = 2048
_CACHED = 8192

_WITH_PORT = re.compile(r"(?:\[([^\[\]]+)\]|([0-9.]+))(?::[0-9]{1,5})?")

_MAPPED = IPv6Network("::ffff:0:0/96")  # RFC 4291, 2.5.5.2
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


class TrustedProxies:
    """The proxies whose X-Forwarded-For is believed; true if there are any. For any thread.

    Args:
        ranges: Addresses and CIDR ranges, such as ``["127.0.0.1", "10.0.0.0/8"]``.

    Raises:
        ConfigError: One of them is neither an address nor a range.
    """

    def __init__(self, ranges: Sequence[str]) -> None:
        self._networks = tuple(_network(text) for text in ranges)
        # A cache of the instance: one of the class would keep every instance alive.
        self._trusts = lru_cache(_CACHED)(self._look_up)

    def __bool__(self) -> bool:
        return bool(self._networks)

    def __contains__(self, address: str | None) -> bool:
        """Tell whether a normalised address is that of a trusted proxy; False for None."""
        return address is not None and bool(self._networks) and self._trusts(address)

    def client(self, peer: str | None, forwarded_for: str) -> str | None:
        """Find the address of the client behind the trusted proxies.

        Each proxy appends the address it was called from. So X-Forwarded-For is read from its right
        end, and only as far as trusted proxies wrote it: anybody can make up the rest.

        Args:
            peer: Address of whoever opened the connection, as the server gives it; None: unknown.
            forwarded_for: The X-Forwarded-For header, ``""`` if absent; only its last 2048
                characters are looked at.

        Returns:
            The first address from the right that is not trusted; the left-most if all are; the
            last good one when an entry is no address. The peer when it is not trusted itself. All
            normalised; None when the peer is unknown.
        """
        nearest = normalise(peer) if peer is not None else None
        if nearest not in self:
            return nearest
        kept = forwarded_for[-_MAX_FORWARDED_FOR:]
        if len(forwarded_for) > _MAX_FORWARDED_FOR:
            # The first entry may be cut: "203.0.113.9" to "3.0.113.9", which is another address.
            kept = kept.partition(",")[2]
        for entry in reversed(kept.split(",")):
            address = normalise(entry)
            if address is None:
                break
            nearest = address
            if address not in self:
                break
        return nearest

    def _look_up(self, address: str) -> bool:
        try:
            parsed = ip_address(address)
        except ValueError:
            return False
        return any(parsed in network for network in self._networks)


def _network(text: object) -> IPv4Network | IPv6Network:
    # ip_network() takes numbers too: 10 would be 0.0.0.10.
    if isinstance(text, str):
        try:
            network = ip_network(text.strip(), strict=False)
        except ValueError:
            pass
        else:
            # The addresses it is compared with are normalised, so it has to be.
            if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
                base = int(network.network_address) & 0xFFFFFFFF
                return IPv4Network((base, network.prefixlen - 96))
            return network
    raise ConfigError(
        f"TRACK_USAGE_TRUSTED_PROXIES must hold addresses or CIDR ranges, not {text!r}"
    )
