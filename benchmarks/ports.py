"""TCP ports that nobody else takes: for servers that must be told their port, or be found at it again."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Final

__all__ = ["free_port"]

_FIRST_PORT: Final = 10_000
"""Smaller ones are those of well-known services."""

_EPHEMERAL_RANGE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""The ports that the kernel gives to connections, and to listeners that ask for any."""

_given: set[int] = set()


def free_port(count: int = 1) -> int:
    """Return a port that is free on all addresses of this host, and that no other caller gets while this process runs.

    The kernel gives it to nobody: it is none of those for connections. So it stays free until somebody binds it by
    its number, on each of the addresses.

    Args:
        count: How many ports that follow each other are wanted. The first is returned.

    Raises:
        RuntimeError: There is no such port.
    """
    ports = _candidates()
    start = random.SystemRandom().randrange(len(ports))  # tests may have seeded the other generator
    taken: list[int] = []
    for port in ports[start:] + ports[:start]:
        if taken and port != taken[-1] + 1:
            taken = []
        taken = [*taken, port] if _take(port) else []
        if len(taken) == count:
            return taken[0]
    raise RuntimeError(f"no TCP port of {len(ports)} is free")


def _take(port: int) -> bool:
    """Take a port for this process; return whether nobody has it."""
    if port in _given or not _lock(port):
        return False
    _given.add(port)
    return _is_free(port)


def _candidates() -> list[int]:
    low, high = 32768, 60999  # Linux's own, where they cannot be read
    with suppress(OSError):
        low, high = map(int, _EPHEMERAL_RANGE.read_text().split())
    return [port for port in range(_FIRST_PORT, 1 << 16) if not low <= port <= high]


def _lock(port: int) -> bool:
    """Take a port for this process, until its end; return whether no other process has it.

    The lock is that of a byte of one file. Its owner is the process: children do not inherit it.
    """
    try:
        fcntl.lockf(_locks_file(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except BlockingIOError:
        return False
    return True


@cache
def _locks_file() -> int:
    """Return the descriptor of the file, which stays open: closing any would give up all locks."""
    path = f"{tempfile.gettempdir()}/deconvd-ports-{os.getuid()}"
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def _is_free(port: int) -> bool:
    """Return whether no socket has the port, on any address, not even one that waits for late packets."""
    with ExitStack() as stack:
        try:
            stack.enter_context(socket.socket()).bind(("", port))
            if socket.has_dualstack_ipv6():
                other = stack.enter_context(socket.socket(socket.AF_INET6))
                other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                other.bind(("::", port))
        except OSError:
            return False
        return True
