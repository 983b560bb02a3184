"""File descriptors: the limit of this process, and a guard that keeps some of them free.

Each connection takes a descriptor. gRPC accepts its connections itself, so the server can neither refuse nor count
them. But they are descriptors of this process: the guard finds all accepted connections, and shuts down the ones that
have been idle for longest, of the peers that have most.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from deconvd_server.resources.peer_identity import peer_key_of_connection

__all__ = ["DescriptorGuard", "TooFewDescriptorsError", "connections_count", "raise_limit"]

_OWN_COUNT: Final = 32
"""How many descriptors a server needs for itself: its sockets, its log, and what its libraries wait with."""

_LEAST_CONNECTIONS_COUNT: Final = 16
"""A server refuses to start if it could have fewer connections than this."""

_RESERVED_PART: Final = 8
"""One descriptor for connections in this many is kept free.

New connections use these while others are shut down, and lent memory takes one for a moment.
"""
_LEAST_RESERVE_COUNT: Final = 8
"""At least this many descriptors are kept free."""

_POLL_PERIOD_S: Final = 0.1
"""How often the guard counts: so often that a client that fills the reserve in between is refused by gRPC."""

_PAUSE_FACTOR: Final = 5
"""The guard pauses for this many times as long as its check took: checks take at most a sixth of its thread's time."""

_OPEN_DESCRIPTORS: Final = "/proc/self/fd"

_TCP_INFO_BYTES: Final = 60
_TCP_IDLE: Final = struct.Struct("=44xI4xI4x")
"""The fields of struct tcp_info that are read: milliseconds since data was last sent, and since data last arrived."""

_log = logging.getLogger(__name__)


class TooFewDescriptorsError(OSError):
    """This process may not have as many descriptors as a server needs."""


def raise_limit() -> int:
    """Raise this process's limit of descriptors as far as the system allows, and return it.

    Raises:
        TooFewDescriptorsError: The limit is too low for a server.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # some systems allow less than the hard limit that they report
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit_count = _limit_count()
    if limit_count < _OWN_COUNT + _LEAST_CONNECTIONS_COUNT:
        raise TooFewDescriptorsError(
            errno.EMFILE,
            f"this process may have at most {limit_count} file descriptors (ulimit -n), and a server "
            f"needs at least {_OWN_COUNT + _LEAST_CONNECTIONS_COUNT}",
        )
    return limit_count


def connections_count() -> int:
    """Return how many connections gRPC may have, so that it refuses more before descriptors run out.

    If they ran out, gRPC would accept nothing for a second. Clients that it refuses try again.
    """
    room_count = _limit_count() - _OWN_COUNT
    return max(room_count - _reserve_count() // 2, 1)


def _limit_count() -> int:
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 30 if soft == resource.RLIM_INFINITY else soft


def _reserve_count() -> int:
    return max((_limit_count() - _OWN_COUNT) // _RESERVED_PART, _LEAST_RESERVE_COUNT)


class DescriptorGuard:
    """Keeps a reserve of descriptors free, in a thread of its own, for as long as the process lives.

    To be made after `raise_limit`.
    """

    def __init__(self) -> None:
        self._null = os.open(os.devnull, os.O_RDONLY)
        self._spare_descriptor = os.dup(self._null)
        self._limit_count, self._reserve_count = _limit_count(), _reserve_count()
        # fewer than gRPC's own limit, so that the guard acts before gRPC refuses any
        self._most_count = connections_count() - self._reserve_count // 2
        self._is_short = False
        self._thread = threading.Thread(target=self._run, name="descriptor-guard", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        while True:
            began_s = time.monotonic()
            try:
                self._keep_reserve()
            except Exception:  # noqa: BLE001 - it may succeed once some descriptors are closed
                _log.exception("checking the number of file descriptors failed")
            time.sleep(max(_POLL_PERIOD_S, (time.monotonic() - began_s) * _PAUSE_FACTOR))

    def _keep_reserve(self) -> None:
        """Shut down connections if fewer descriptors are free than the reserve needs."""
        open_count = _open_count()
        if open_count <= min(self._most_count, self._limit_count - self._reserve_count):
            self._is_short = False
            return
        connections = self._connections()
        free_count = self._limit_count - open_count
        missing_count = max(self._reserve_count - free_count, len(connections) - self._most_count)
        if missing_count <= 0:
            self._is_short = False
            return
        victims = _longest_idle(connections, missing_count + self._reserve_count // 2)
        if victims and not self._is_short:
            _log.warning(
                "there are %d connections, and %d of %d file descriptors are free: shutting down "
                "connections of %s, those first that have been idle for longest",
                len(connections),
                free_count,
                self._limit_count,
                victims[0].peer,
            )
        self._is_short = True
        for connection in victims:
            self._shut(connection)

    @contextmanager
    def _duplicate(self, descriptor: int) -> Iterator[socket.socket]:
        """Give the block a duplicate of a descriptor, as a socket: no other thread can close or replace that meanwhile.

        It uses the spare descriptor, so this works even if the process has no descriptors left. Raises OSError if
        the descriptor is not a socket.
        """
        os.dup2(descriptor, self._spare_descriptor, inheritable=False)
        try:
            duplicate = socket.socket(fileno=self._spare_descriptor)
            try:
                yield duplicate
            finally:
                duplicate.detach()
        finally:
            os.dup2(self._null, self._spare_descriptor, inheritable=False)

    def _connections(self) -> list[_AcceptedSocket]:
        """Return all accepted connections.

        This process opens none itself, and its own socket pairs have no name.
        """
        found = (self._connection(descriptor) for descriptor in _descriptors())
        return [connection for connection in found if connection is not None]

    def _connection(self, descriptor: int) -> _AcceptedSocket | None:
        if descriptor in (self._spare_descriptor, self._null):
            return None
        with suppress(OSError), self._duplicate(descriptor) as duplicate:
            address = duplicate.getpeername()  # raises OSError for a listening socket
            if duplicate.family != socket.AF_UNIX or duplicate.getsockname():
                peer = peer_key_of_connection(duplicate, address)
                return _AcceptedSocket(descriptor, address, peer, _idle_s(duplicate))
        return None

    def _shut(self, connection: _AcceptedSocket) -> None:
        """Shut a connection down, unless its descriptor is another connection's by now. Its owner then sees its end."""
        with suppress(OSError), self._duplicate(connection.descriptor) as duplicate:
            if duplicate.getpeername() == connection.address:
                duplicate.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True, slots=True)
class _AcceptedSocket:
    """A connection that was accepted.

    Attributes:
        descriptor: Its number. Its owner may close it at any time, and the number may be another connection's then.
        address: Address of the other end, as `getpeername` returns it.
        peer: Key of the peer that it counts for.
        idle_s: How long no data was sent and none arrived; 0 if that is not known.
    """

    descriptor: int
    address: object
    peer: str
    idle_s: float


def _open_count() -> int:
    """Return how many descriptors this process has open."""
    count = os.stat(_OPEN_DESCRIPTORS).st_size  # since Linux 6.2
    if count:
        return count
    try:
        return len(os.listdir(_OPEN_DESCRIPTORS))
    except OSError:
        return _limit_count()  # listing the folder takes a descriptor, and none is free


def _descriptors() -> Sequence[int]:
    """Return the descriptors of this process, or all possible numbers if no descriptor is free to list them with."""
    try:
        return [int(name) for name in os.listdir(_OPEN_DESCRIPTORS)]
    except OSError:
        return range(_limit_count())


def _idle_s(connection: socket.socket) -> float:
    if connection.family == socket.AF_UNIX:
        return 0.0  # the kernel does not tell
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    sent_ms, received_ms = _TCP_IDLE.unpack(info)
    return float(min(sent_ms, received_ms)) / 1e3


def _longest_idle(connections: list[_AcceptedSocket], count: int) -> list[_AcceptedSocket]:
    """Return that many connections of the peers that have most, each peer's longest idle ones."""
    by_peer: defaultdict[str, list[_AcceptedSocket]] = defaultdict(list)
    for connection in sorted(connections, key=lambda one: one.idle_s):
        by_peer[connection.peer].append(connection)
    chosen: list[_AcceptedSocket] = []
    for _ in range(min(count, len(connections))):
        largest = max(by_peer.values(), key=len)
        chosen.append(largest.pop())
    return chosen
