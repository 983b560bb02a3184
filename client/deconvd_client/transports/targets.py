"""Targets: the addresses of servers, and what they tell about where a server is."""

from __future__ import annotations

import ipaddress
import re
from typing import Final

from deconvd.errors import InvalidArgumentError
from deconvd.host.system import MAX_UNIX_PATH_BYTES
from deconvd.wire.grpc_options import has_authority, unix_path

__all__ = ["host_of", "is_local", "parse_target", "resolver_of"]

_MAX_PORT: Final = 65535

_LOCAL_NAMES: Final = ("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback")

_TCP: Final = re.compile(
    r"(?:dns://(?P<resolver>[^/\s]*)/|(?:dns|ipv4|ipv6):(?:///)?)?"
    r"(?:\[(?P<v6>[^\[\]\s]+)\]|(?P<host>[^/,:\[\]\s]+)):(?P<port>[0-9]+)"
)


def parse_target(target: object) -> str:
    """Return a target as a plain string if it names exactly one address.

    Raises:
        InvalidArgumentError: It is neither ``host:port`` nor ``unix:path``.
    """
    if not isinstance(target, str):
        raise _error(f"must be host:port or unix:path, got {target!r}")
    try:
        target.encode()
    except UnicodeEncodeError:  # gRPC encodes targets in UTF-8
        raise _error(f"must be a name in UTF-8, got {target!r}") from None
    if has_authority(target):
        raise _error(
            f"must be host:port or unix:path (after unix:// the path begins with /), got {target!r}"
        )
    if "\0" in target:  # gRPC and the system would ignore what follows
        raise _error(f"must not have a null character in it, got {target!r}")
    size_bytes = len(unix_path(target).encode())
    if size_bytes > MAX_UNIX_PATH_BYTES:
        raise _error(
            f"must name a Unix socket by a path of at most {MAX_UNIX_PATH_BYTES} bytes, "
            f"got {size_bytes}: {target!r}"
        )
    if size_bytes:
        return str(target)
    if "," in target:
        raise _error(f"must be one address, host:port or unix:path, got {target!r}")
    match = _TCP.fullmatch(target)
    if match is None:
        raise _error(f"must be host:port or unix:path, got {target!r}")
    port = match["port"]
    if len(port) > len(str(_MAX_PORT)) or not 1 <= int(port) <= _MAX_PORT:
        raise _error(f"must have a port from 1 to {_MAX_PORT}, got {target!r}")
    return str(target)


def host_of(target: str) -> str:
    """Return the host that a target names, without brackets; empty for a Unix socket."""
    match = _TCP.fullmatch(target)
    return "" if match is None else match["v6"] or match["host"]


def resolver_of(target: str) -> str:
    """Return the name server that a target names for its host; empty if it names none."""
    match = _TCP.fullmatch(target)
    return (match and match["resolver"]) or ""


def is_local(target: str) -> bool:
    """Return whether a target can only be on this host: a Unix socket, or a loopback address."""
    if target.startswith("unix:"):
        return True
    host = host_of(target).lower().rstrip(".")
    if host in _LOCAL_NAMES or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or mapped.is_unspecified)


def _error(what: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"target {what}", argument="target")
