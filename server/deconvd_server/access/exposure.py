"""Which hosts that a server listens on are beyond the loopback."""

from __future__ import annotations

import socket
from ipaddress import IPv6Address, ip_address

__all__ = ["is_beyond_loopback", "name_in_certificate"]


def is_beyond_loopback(host: str) -> bool:
    """Return whether other hosts may reach a port on a host: a name, or an address that may be in brackets.

    A name is what it resolves to now.

    Raises:
        OSError: The name cannot be resolved.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(0, f"no host can have that name: {error}") from None
    return not all(_is_loopback(str(where[0])) for *_, where in found)


def name_in_certificate(host: str) -> tuple[str, str]:
    """Return what a certificate should call a host that a server listens on: ``DNS`` or ``IP``, and the name.

    Clients call a server that listens on all addresses of its host by the host's name.
    """
    text = host.strip("[]")
    try:
        ip = ip_address(text.partition("%")[0])
    except ValueError:
        return "DNS", text
    return ("DNS", socket.gethostname()) if ip.is_unspecified else ("IP", str(ip))


def _is_loopback(text: str) -> bool:
    ip = ip_address(text.partition("%")[0])
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        return ip.ipv4_mapped.is_loopback
    return ip.is_loopback
