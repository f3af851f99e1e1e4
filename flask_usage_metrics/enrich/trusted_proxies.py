"""Finds the client's address behind the trusted proxies, in X-Forwarded-For."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from flask_usage_metrics.errors import ConfigError
from flask_usage_metrics.records.address import normalise
from flask_usage_metrics.runtime.shown_values import shown

_MAX_FORWARDED_FOR = 2048
_CACHED = 8192

_MAPPED = IPv6Network("::ffff:0:0/96")  # RFC 4291, 2.5.5.2

SOCKET = "unix:"
"""What nginx calls the address of whoever comes through a Unix socket."""

_SOCKET_PEERS = ("", SOCKET, "<local>", "localhost", "0.0.0.0")
"""What servers have for its address: gunicorn, cheroot, granian and a2wsgi nothing, Werkzeug
``<local>``, waitress ``localhost``, uWSGI ``0.0.0.0``; with the protocols uwsgi and FastCGI it is
what nginx says. No host on a network has one of these."""


class TrustedProxies:
    """The proxies whose X-Forwarded-For is believed; true if there are any. For any thread.

    Args:
        ranges: Addresses and CIDR ranges, such as ``["127.0.0.1", "10.0.0.0/8"]``, and `SOCKET`
            for all that comes through a Unix socket.

    Raises:
        ConfigError: One of them is none of these.
    """

    def __init__(self, ranges: Sequence[str]) -> None:
        self._has_socket = SOCKET in ranges
        self._networks = tuple(_network(text) for text in ranges if text != SOCKET)
        # A cache of the instance: one of the class would keep every instance alive.
        self._trusts = lru_cache(_CACHED)(self._look_up)

    def __bool__(self) -> bool:
        return self._has_socket or bool(self._networks)

    def __contains__(self, address: str | None) -> bool:
        """Tell whether a normalised address is that of a trusted proxy; False for None."""
        return address is not None and bool(self._networks) and self._trusts(address)

    def trusts(self, peer: str) -> bool:
        """Tell whether whoever opened the connection is a trusted proxy.

        Args:
            peer: Its address as the server gives it, which for a Unix socket is none.
        """
        return normalise(peer) in self or (self._has_socket and peer in _SOCKET_PEERS)

    def client(self, peer: str, forwarded_for: str) -> str | None:
        """Find the address of the client behind the trusted proxies.

        Each proxy appends the address it was called from. So X-Forwarded-For is read from its right
        end, and only as far as trusted proxies wrote it: anybody can make up the rest.

        Args:
            peer: Address of whoever opened the connection, as the server gives it.
            forwarded_for: The X-Forwarded-For header, ``""`` if absent; only its last 2048
                characters are looked at.

        Returns:
            The first address from the right that is not trusted; the left-most if all are; the
            last good one when an entry is no address. The peer when it is not trusted itself. All
            normalised; None when that is no address.
        """
        nearest = None if peer in _SOCKET_PEERS else normalise(peer)
        if not self.trusts(peer):
            return nearest
        kept = forwarded_for[-_MAX_FORWARDED_FOR:]
        if len(forwarded_for) > _MAX_FORWARDED_FOR:
            # The first entry may be cut: "203.0.113.9" to "3.0.113.9", which is another address.
            kept = kept.partition(",")[2]
        for entry in reversed(kept.split(",")):
            bare = entry.strip()
            # Nothing between two commas is no entry (RFC 9110, 5.6.1).
            if not bare or (self._has_socket and bare == SOCKET):
                continue
            address = normalise(bare)
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
        "TRACK_USAGE_TRUSTED_PROXIES must hold addresses, CIDR ranges or 'unix:', "
        f"not {shown(text)}"
    )
