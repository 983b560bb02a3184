"""Targets: the addresses of servers, and what they tell about where a server is."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from deconvd.errors import InvalidArgumentError
from deconvd.host.system import MAX_UNIX_PATH_BYTES
from deconvd.wire.grpc_options import NOT_IN_UNIX_PATHS, has_authority, unix_path

__all__ = [
    "host_of",
    "is_local",
    "is_name_of_several",
    "is_of_one_server",
    "parse_target",
    "parse_targets",
    "port_of",
    "proxy_of",
    "resolver_of",
    "with_port",
]

_MAX_PORT: Final = 65535

_PROXY: Final = "proxy:///"

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
    if "," in target:
        raise _error(f"must be one address, host:port or unix:path, got {target!r}")
    if size_bytes and NOT_IN_UNIX_PATHS.intersection(target):
        raise _error(
            "must name a Unix socket by a path without the letters %, ? and # "
            f"(gRPC takes it for a URI), got {target!r}"
        )
    if size_bytes:
        return str(target)
    match = _TCP.fullmatch(target)
    if match is None:
        raise _error(f"must be host:port or unix:path, got {target!r}")
    port = match["port"]
    if len(port) > len(str(_MAX_PORT)) or not 1 <= int(port) <= _MAX_PORT:
        raise _error(f"must have a port from 1 to {_MAX_PORT}, got {target!r}")
    try:
        (match["host"] or "").encode("idna")
    except UnicodeError as error:  # the resolver would raise it, in a thread of the background
        raise _error(f"must name a host that can exist ({error}), got {target!r}") from None
    return str(target)


def parse_targets(targets: object) -> tuple[str, ...]:
    """Return one or several targets: a string, with commas between them, or a sequence of strings.

    Raises:
        InvalidArgumentError: One of them is none, there is none, or one is there twice.
    """
    if isinstance(targets, str):
        pieces = targets.split(",")
        is_list = len(pieces) > 1 and all(map(_is_target, pieces))
        return _check_distinct([*map(_parse_any, pieces if is_list else [targets])])
    if not isinstance(targets, Sequence) or isinstance(targets, (bytes, bytearray)):
        raise _error(f"must be host:port or unix:path, or a list of those, got {targets!r}")
    return _check_distinct([*map(_parse_any, targets)])


def _check_distinct(targets: list[str]) -> tuple[str, ...]:
    if not targets:
        raise _error("must name at least one server, got an empty list")
    if len(targets) > 1 and any(map(proxy_of, targets)):
        raise _error(f"must name a proxy alone, got {', '.join(targets)}")
    known: dict[str, str] = {}
    for target in targets:
        form = _plain_form(target)
        if form in known:
            raise _error(f"must name each server once, got {known[form]!r} and {target!r}")
        known[form] = target
    return tuple(targets)


def _plain_form(target: str) -> str:
    """Return what is the same for all ways to write one address."""
    if path := unix_path(target):
        return f"unix:{os.path.abspath(path)}"
    if not is_of_one_server(target) or resolver_of(target):
        return target
    host = host_of(target).lower().rstrip(".")
    with suppress(ValueError):
        host = str(ipaddress.ip_address(host))
    return f"{host} {port_of(target)}"


def _parse_any(target: object) -> str:
    """Return a target of one server, of a name, or of a proxy as a plain string. Raises InvalidArgumentError."""
    if not isinstance(target, str) or not proxy_of(target):
        return parse_target(target)
    proxy = parse_target(proxy_of(target))
    if not host_of(proxy):
        raise _error(f"must name a proxy as {_PROXY}host:port, got {target!r}")
    return f"{_PROXY}{proxy}"


def _is_target(text: str) -> bool:
    try:
        _parse_any(text)
    except InvalidArgumentError:
        return False
    return True


def is_name_of_several(target: str) -> bool:
    """Return whether a target is a name of which all addresses count, each a server: ``dns:///name:port``."""
    return target.startswith("dns:") and not resolver_of(target)


def proxy_of(target: str) -> str:
    """Return the target of the proxy that a target names, ``proxy:///host:port``; empty if it names none."""
    return target.removeprefix(_PROXY) if target.startswith(_PROXY) else ""


def is_of_one_server(target: str) -> bool:
    """Return whether a target is the address of one server."""
    return not (is_name_of_several(target) or proxy_of(target))


def host_of(target: str) -> str:
    """Return the host that a target names, without brackets; empty for a Unix socket."""
    match = _TCP.fullmatch(target)
    return "" if match is None else match["v6"] or match["host"]


def port_of(target: str) -> int:
    """Return the port that a target names; 0 for a Unix socket."""
    match = _TCP.fullmatch(target)
    return 0 if match is None else int(match["port"])


def with_port(target: str, port: int) -> str:
    """Return the target with another port. It must name a host."""
    return f"{target.rpartition(':')[0]}:{port}"


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
