"""Where the server of a soak is, and what tells one moment from another there."""

from __future__ import annotations

import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from benchmarks.ports import free_port
from deconvd.direct.events import ANY_INSTANCE, Hello
from deconvd.direct.frame_stream import FrameStream
from tests.stream_pairs import client_stream

__all__ = [
    "HOST",
    "NICENESS",
    "Interval",
    "Places",
    "connect_tcp",
    "connect_unix",
    "end_at_sigterm",
    "free_places",
    "open_stream",
]

NICENESS = 5
"""Of clients, whose work would be other machines': what they take is not to be the server's fault."""

_TIMEOUT_S = 5.0

HOST = "127.0.0.1"
"""Where it listens. Honest clients come from there, hostile ones from other addresses of the loopback."""

Interval = tuple[float, float]
"""A begin and an end, in seconds of the monotonic clock, which all processes of a host have in common."""


@dataclass(frozen=True)
class Places:
    """The addresses of a server, which one process after the other has.

    Attributes:
        path: That of its Unix socket for gRPC.
        port: That for gRPC.
        direct_port: That for direct calls.
    """

    path: str
    port: int
    direct_port: int

    @classmethod
    def of(cls, path: str, port: str, direct_port: str) -> Places:
        """Return what `words` were."""
        return cls(path, int(port), int(direct_port))

    @property
    def words(self) -> list[str]:
        """They, as arguments of a command."""
        return [self.path, str(self.port), str(self.direct_port)]

    @property
    def calls_path(self) -> str:
        """That of its Unix socket for direct calls."""
        return f"{self.path}.calls"

    @property
    def memory_path(self) -> str:
        """That of its Unix socket where it lends memory."""
        return f"{self.path}.memory"

    @property
    def unix(self) -> str:
        """What a client on its host connects to."""
        return f"unix:{self.path}"

    @property
    def tcp(self) -> str:
        """What others connect to."""
        return f"{HOST}:{self.port}"


def free_places(directory: Path) -> Places:
    """Return places where nobody listens."""
    return Places(str(directory / "deconvd.sock"), free_port(), free_port())


def connect_tcp(port: int, source: str) -> socket.socket:
    """Return a connection to a port of the server's, from an address."""
    return socket.create_connection((HOST, port), _TIMEOUT_S, (source, 0))


def connect_unix(path: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """Return a connection to a Unix socket of the server's."""
    end = socket.socket(socket.AF_UNIX, kind)
    end.settimeout(_TIMEOUT_S)
    end.connect(path)
    return end


def open_stream(places: Places, *, is_unix: bool, source: str = HOST) -> FrameStream:
    """Return a line to the server, which has greeted. Raises OSError, as ConnectionBrokenError is, if there is none."""
    if is_unix:
        line = client_stream(connect_unix(places.calls_path))
    else:
        line = client_stream(connect_tcp(places.direct_port, source))
    line.set_deadline(_TIMEOUT_S)
    line.send(Hello(ANY_INSTANCE))
    line.next_event()
    return line


def end_at_sigterm() -> Event:
    """Say that this client is ready, and return what is set when it is to end."""
    end = Event()
    signal.signal(signal.SIGTERM, lambda *_: end.set())
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    return end
