"""Who a caller is: the key by which a connection or a call counts as one peer. See `resources.fair_shares`.

A peer is an IPv4 address, an IPv6 network of 64 bits (one host may use all addresses of such a network), or a process
of this host. gRPC does not tell which process is at the other end of a Unix socket, so all of these are one peer.
"""

from __future__ import annotations

import socket
from functools import lru_cache
from ipaddress import IPv4Address, ip_address
from typing import Any, Final
from urllib.parse import unquote

from deconvd_server.resources.unix_listener import peer_credentials

__all__ = ["peer_key_of_connection", "peer_key_of_grpc"]

_GRPC_OVER_UNIX: Final = "gRPC over Unix sockets"
_UNSEEN_PROCESSES: Final = "processes that this one cannot see"
"""Key of processes in another PID namespace: they have no process ids here."""

_NETWORK_BITS: Final = 64
"""Prefix of an IPv6 network that counts as one peer: the smallest that a site is given."""


def peer_key_of_connection(connection: socket.socket, address: Any) -> str:
    """Return the key of the peer at the other end of a connection.

    Args:
        address: The peer's address, as `accept` returned it.
    """
    if connection.family == socket.AF_UNIX:
        process = peer_credentials(connection).process
        return f"process {process}" if process else _UNSEEN_PROCESSES
    return _peer_key_of_host(str(address[0]))


@lru_cache(maxsize=1024)  # a connection's calls all come with the same text
def peer_key_of_grpc(text: str) -> str:
    """Return the key of the peer that makes a gRPC call.

    Args:
        text: The peer as gRPC names it: ``ipv4:127.0.0.1:34567``, ``ipv6:%5B::1%5D:34567``, ``unix:`` or
            ``unix:/path``.
    """
    scheme, _, address = unquote(text).partition(":")
    if scheme in ("ipv4", "ipv6"):
        host = address.rpartition(":")[0]
        return _peer_key_of_host(host.strip("[]"))
    return _GRPC_OVER_UNIX if scheme.startswith("unix") else scheme


def _peer_key_of_host(host: str) -> str:
    try:
        # a link-local address ends with its interface, as in fe80::1%eth0
        ip = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(ip, IPv4Address):
        return str(ip)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    network = int(ip) >> _NETWORK_BITS << _NETWORK_BITS
    return f"{type(ip)(network)}/{_NETWORK_BITS}"
