"""File descriptors: as many as the system gives this process, and a guard that keeps some of them free.

Each connection takes one. gRPC's are not ours to refuse or to count, but they are descriptors of this process: the
guard finds all that were accepted, and shuts down those that have been idle for longest of the peer that has most.
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

from deconvd_server.resources.peer_keys import peer_key_of_connection

__all__ = ["DescriptorGuard", "TooFewDescriptorsError", "connections_count", "raise_limit"]

_OWN_COUNT: Final = 32
"""What a server holds itself: its sockets, its log, what its libraries wait with."""

_LEAST_CONNECTIONS_COUNT: Final = 16
"""With fewer it would serve nobody for long."""

_RESERVED_PART: Final = 8
_LEAST_RESERVE_COUNT: Final = 8
"""The reserve is an eighth of what there is for connections, and at least these: new connections come in them while
others are shut down, and lent memory takes one for a moment.
"""

_POLL_PERIOD_S: Final = 0.1
"""How often the guard counts: more often than a client can fill the reserve without being refused by gRPC."""

_PAUSE_FACTOR: Final = 5
"""The guard pauses for so many times as long as it has looked, however many descriptors there are."""

_OPEN_DESCRIPTORS: Final = "/proc/self/fd"

_TCP_INFO_BYTES: Final = 60
_TCP_IDLE: Final = struct.Struct("=44xI4xI4x")
"""Of struct tcp_info: milliseconds since something was last sent, and since something last came."""

_log = logging.getLogger(__name__)


class TooFewDescriptorsError(OSError):
    """This process may not have as many descriptors as a server needs."""


def raise_limit() -> int:
    """Let this process have as many descriptors as it may, and return how many.

    Raises:
        TooFewDescriptorsError: They are too few to serve.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # some systems allow less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit_count = _limit_count()
    if limit_count < _OWN_COUNT + _LEAST_CONNECTIONS_COUNT:
        raise TooFewDescriptorsError(
            errno.EMFILE,
            f"this process may have {limit_count} file descriptors (ulimit -n), and a server needs "
            f"at least {_OWN_COUNT + _LEAST_CONNECTIONS_COUNT}",
        )
    return limit_count


def connections_count() -> int:
    """Return how many connections gRPC may have: so many that it refuses more before it runs out of descriptors.

    When it runs out it accepts nothing for a second; those that it refuses come again.
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

    To be made once the limit is raised.
    """

    def __init__(self) -> None:
        self._null = os.open(os.devnull, os.O_RDONLY)
        self._spare_descriptor = os.dup(self._null)
        self._limit_count, self._reserve_count = _limit_count(), _reserve_count()
        self._most_count = connections_count() - self._reserve_count // 2  # before gRPC refuses any
        self._is_short = False
        self._thread = threading.Thread(target=self._run, name="descriptor-guard", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def _run(self) -> None:
        while True:
            begin_s = time.monotonic()
            try:
                self._keep_reserve()
            except Exception:  # noqa: BLE001 - it may succeed once some descriptors are closed
                _log.exception("descriptors could not be looked after")
            time.sleep(max(_POLL_PERIOD_S, (time.monotonic() - begin_s) * _PAUSE_FACTOR))

    def _keep_reserve(self) -> None:
        """Shut connections down if fewer descriptors are free than the reserve has."""
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
        leavers = _longest_idle(connections, missing_count + self._reserve_count // 2)
        if leavers and not self._is_short:
            _log.warning(
                "there are %d connections, and %d file descriptors are left of %d: connections of %s "
                "are shut down, those first that are idle",
                len(connections),
                free_count,
                self._limit_count,
                leavers[0].peer,
            )
        self._is_short = True
        for connection in leavers:
            self._shut(connection)

    @contextmanager
    def _duplicate(self, descriptor: int) -> Iterator[socket.socket]:
        """Give the block what a descriptor stands for, in a descriptor of our own: nobody can replace it there.

        That takes none of those that there may not be any more. Raises OSError if it is no socket.
        """
        os.dup2(descriptor, self._spare_descriptor, inheritable=False)
        try:
            taken = socket.socket(fileno=self._spare_descriptor)
            try:
                yield taken
            finally:
                taken.detach()
        finally:
            os.dup2(self._null, self._spare_descriptor, inheritable=False)

    def _connections(self) -> list[_AcceptedSocket]:
        """Return what was accepted: this process makes no connection itself, and its own pairs have no name."""
        found = (self._connection(descriptor) for descriptor in _descriptors())
        return [connection for connection in found if connection is not None]

    def _connection(self, descriptor: int) -> _AcceptedSocket | None:
        if descriptor in (self._spare_descriptor, self._null):
            return None
        with suppress(OSError), self._duplicate(descriptor) as taken:
            address = taken.getpeername()  # fails for what listens
            if taken.family != socket.AF_UNIX or taken.getsockname():
                peer = peer_key_of_connection(taken, address)
                return _AcceptedSocket(descriptor, address, peer, _idle_s(taken))
        return None

    def _shut(self, connection: _AcceptedSocket) -> None:
        """Shut a connection down, unless another is behind its number by now. Whoever has it sees its end."""
        with suppress(OSError), self._duplicate(connection.descriptor) as taken:
            if taken.getpeername() == connection.address:
                taken.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True, slots=True)
class _AcceptedSocket:
    """A connection that was accepted.

    Attributes:
        descriptor: Whoever has it may close it at any time: another may be behind its number by then.
        address: That of the other end, as `getpeername` returns it.
        peer: By what the other end is counted.
        idle_s: For how long nothing came and nothing was sent, as far as that is known.
    """

    descriptor: int
    address: object
    peer: str
    idle_s: float


def _open_count() -> int:
    """Return how many descriptors this process has."""
    count = os.stat(_OPEN_DESCRIPTORS).st_size  # since Linux 6.2
    if count:
        return count
    try:
        return len(os.listdir(_OPEN_DESCRIPTORS))
    except OSError:
        return _limit_count()  # not one more can be had


def _descriptors() -> Sequence[int]:
    """Return the descriptors that this process has; all that it may have, if there is none left to look with."""
    try:
        return [int(name) for name in os.listdir(_OPEN_DESCRIPTORS)]
    except OSError:
        return range(_limit_count())


def _idle_s(connection: socket.socket) -> float:
    if connection.family == socket.AF_UNIX:
        return 0.0  # nobody knows
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    sent_ms, received_ms = _TCP_IDLE.unpack(info)
    return float(min(sent_ms, received_ms)) / 1e3


def _longest_idle(connections: list[_AcceptedSocket], count: int) -> list[_AcceptedSocket]:
    """Return that many connections of the peers that have most: of each, those that are idle for longest."""
    by_peer: defaultdict[str, list[_AcceptedSocket]] = defaultdict(list)
    for connection in sorted(connections, key=lambda one: one.idle_s):
        by_peer[connection.peer].append(connection)
    chosen: list[_AcceptedSocket] = []
    for _ in range(min(count, len(connections))):
        biggest = max(by_peer.values(), key=len)
        chosen.append(biggest.pop())
    return chosen
