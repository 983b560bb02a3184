"""The link between a supervisor and a worker: packets of one letter and its contents, each way.

| from | letter | contents |
|---|---|---|
| worker | R, it serves | its entry in the table: a `Worker` message |
| worker | A, its threads that all calls need run | its entry in the table, as of now |
| worker | L, what its direct connections are | a `ConnectionLoad`, as two numbers of 8 bytes |
| worker | H, a client needs a home | anything that tells the request from others |
| worker | Q, a tenant's quota needs room | the byte of the worker that is asked, and what that one needs to know |
| worker | S, it is about to end | |
| supervisor | T, the table of all workers | a `GetServerInfoResponse` with `workers` alone |
| supervisor | H, the home of a client | what the request had, and the name of a worker, which may be empty |
| supervisor | Q, another worker needs room in a tenant's quota | what that one has said, without the byte |
| supervisor | D, drain; C, cancel the calls that the drain waits for | |

The end of a link is the end of the process at its other end.
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
from collections.abc import Callable
from enum import Enum
from typing import Final

from deconvd.v1 import deconvd_pb2 as pb
from deconvd_server.exit_reasons import ExitReasons, StopRequest
from deconvd_server.resources.worker_table import WORKERS, ConnectionLoad

__all__ = ["MAX_PACKET_BYTES", "LinkNotifier", "Packet", "parse_load", "start_link_thread"]

MAX_PACKET_BYTES: Final = 160 << 10
"""More than a table of the most workers takes, with the longest paths, and less than the kernel's buffers."""

_LOAD: Final = struct.Struct("<QQ")

_log = logging.getLogger(__name__)


class Packet(bytes, Enum):
    """The letter of a packet."""

    READY = b"R"
    ALIVE = b"A"
    LOAD = b"L"
    HOME = b"H"
    ROOM = b"Q"
    STOPPING = b"S"
    TABLE = b"T"
    DRAIN = b"D"
    CUT = b"C"


_REQUESTS: Final = {Packet.DRAIN: StopRequest.DRAIN, Packet.CUT: StopRequest.CUT}


def start_link_thread(
    link: socket.socket,
    reasons: ExitReasons,
    on_home: Callable[[bytes], None],
    on_room: Callable[[bytes], None],
) -> None:
    """Do what the supervisor says, in a thread of its own; drain if it ends.

    Args:
        on_home: Called with the contents of its answer to a request for a home.
        on_room: Called with the request of another worker for room in a quota.
    """

    def run() -> None:
        while packet := _receive(link):
            letter = Packet(packet[:1])
            if letter is Packet.TABLE:
                WORKERS.workers = pb.GetServerInfoResponse.FromString(packet[1:]).workers
            elif letter is Packet.HOME:
                on_home(packet[1:])
            elif letter is Packet.ROOM:
                on_room(packet[1:])
            else:
                reasons.put(_REQUESTS[letter])
        _log.warning("the supervisor has ended")
        reasons.put(StopRequest.DRAIN)

    threading.Thread(target=run, name="link", daemon=True).start()


def parse_load(contents: bytes) -> ConnectionLoad:
    """Return what a worker has told of its direct connections."""
    return ConnectionLoad(*_LOAD.unpack(contents))


def _receive(link: socket.socket) -> bytes:
    """Return the next packet; nothing once the other process has ended."""
    try:
        return link.recv(MAX_PACKET_BYTES)
    except ConnectionResetError:
        return b""


class LinkNotifier:
    """Tells the supervisor how a worker is. See `deconvd_server.resources.systemd.Notifier`.

    Args:
        link: The worker's end of the link.
        watchdog_s: How long the worker may be silent.
        describe: Returns the worker's entry in the table. Called once it serves, and then whenever it tells that it is
            alive.
        load: Returns what its direct connections are. Called as often, for each client that needs a home, and soon
            after connections have begun or ended.
    """

    def __init__(
        self,
        link: socket.socket,
        watchdog_s: float,
        describe: Callable[[], pb.Worker],
        load: Callable[[], ConnectionLoad],
    ) -> None:
        self.watchdog_s = watchdog_s
        self._link = link
        self._describe = describe
        self._load = load

    def notify_ready(self) -> None:
        """Tell that the worker serves."""
        self._send(Packet.READY, self._describe().SerializeToString())

    def notify_stopping(self) -> None:
        """Tell that it is about to end."""
        self._send(Packet.STOPPING)

    def notify_alive(self) -> None:
        """Tell that the threads run that all calls need. The supervisor wants to know, whether or not systemd does."""
        self.tell_load()
        self._send(Packet.ALIVE, self._describe().SerializeToString())

    def request_home(self, number: bytes) -> None:
        """Ask for the home of a client. Any thread may do so.

        Args:
            number: What the answer will begin with.
        """
        self.tell_load()
        self._send(Packet.HOME, number)

    def request_room(self, request: bytes) -> None:
        """Ask another worker, whose byte comes first, for room in a tenant's quota. Any thread may do so."""
        self._send(Packet.ROOM, request)

    def tell_load(self) -> None:
        """Tell what the direct connections are. Any thread may do so."""
        self._send(Packet.LOAD, _LOAD.pack(*self._load()))

    def _send(self, letter: Packet, contents: bytes = b"") -> None:
        try:
            self._link.send(letter.value + contents, socket.MSG_DONTWAIT)
        except (
            OSError
        ) as error:  # the supervisor has ended, as the thread sees too, or does not read for long
            _log.debug("cannot tell the supervisor %s: %s", letter.name, error.strerror)
