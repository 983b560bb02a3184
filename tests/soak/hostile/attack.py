"""What hostile clients have in common."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from random import Random

import grpc

from deconvd.direct.frame_stream import FrameStream
from tests.fault_proxy import CLEAN, faulty_proxy
from tests.session_clients import SessionClient
from tests.soak.hostile.http2 import Http2
from tests.soak.places import Places, connect_tcp, open_stream

__all__ = ["FOR_EVER_S", "HELD_S", "KINDS", "Attacker", "hostile"]

HELD_S = 6.0
"""How long an attack holds what it has before it goes."""

FOR_EVER_S = 2**44
"""About the longest timeout that a call can have."""


@dataclass
class Attacker:
    """A hostile client.

    Attributes:
        source: The address that it comes from.
        held: What it opens: that stays open for a while after it has attacked.
    """

    places: Places
    source: str
    random: Random
    held: ExitStack

    def http2(self, **options: int) -> Http2:
        """Return a connection to gRPC's port that sends what it likes. See `Http2` for the options."""
        connection = connect_tcp(self.places.port, self.source)
        return self.held.enter_context(Http2(connection, **options))

    def channel(self) -> grpc.Channel:
        """Return a stock channel, for what is too large for `http2`."""
        proxy = self.held.enter_context(faulty_proxy(self.places.tcp, CLEAN, source=self.source))
        return self.held.enter_context(grpc.insecure_channel(proxy.target))

    def session(self) -> SessionClient:
        """Return a session. Raises ConnectionError if the server opens none."""
        try:
            holder = SessionClient(self.channel())
        except grpc.RpcError as failure:
            raise ConnectionRefusedError("the server opens no session") from failure
        self.held.callback(holder.cancel)
        return holder

    def line(self) -> FrameStream:
        """Return a line, by TCP or a Unix socket."""
        is_unix = self.random.random() < 0.5
        return self.held.enter_context(
            open_stream(self.places, is_unix=is_unix, source=self.source)
        )


KINDS: dict[str, Callable[[Attacker], None]] = {}
"""How each kind attacks, by its name. What the server does to it is an OSError to it, and no matter."""


def hostile(attack: Callable[[Attacker], None]) -> Callable[[Attacker], None]:
    """Make a function a kind of hostile client."""
    KINDS[attack.__name__] = attack
    return attack
