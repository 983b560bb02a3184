"""Clients whose large calls are striped, whatever pays on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import pytest

import deconvd_client
from deconvd.direct import pieces
from deconvd.direct.events import CallHead, Event, StripedCallHead
from deconvd.direct.frame_stream import FrameStream
from deconvd.model.dtypes import Array
from deconvd_client import Connection
from deconvd_client.transports.direct.striping_policy import StripingPolicy
from tests.fault_proxy import CLEAN, faulty_proxy
from tests.servers import ServerProcess
from tests.stripe_proxy import Disturbance, StripeProxy, stripe_proxy

__all__ = [
    "LARGE",
    "PROXY_HOST",
    "SMALL_PIECES",
    "TWICE",
    "Heads",
    "connect_by_proxy",
    "force_stripes",
    "shrink_pieces",
    "wait_until_direct",
    "watch_heads",
]

LARGE: Array = np.random.default_rng(0).integers(-3, 4, (36, 2, 256, 256)).astype(np.float32)
"""Five pieces there, and as many back: more than the system keeps for an end that reads nothing."""

TWICE: Array = 2 * np.eye(2, dtype=np.float32)[:, :, None, None]
"""A filter that doubles `LARGE`."""

_SMALL_PIECE_BYTES = 1 << 18

SMALL_PIECES = {"deconvd.direct.pieces:PIECE_BYTES": _SMALL_PIECE_BYTES}
"""Constants of a server, for calls that have several pieces and take little time."""

Heads: TypeAlias = list[CallHead | StripedCallHead]
"""The first frames of calls."""

PROXY_HOST = "127.0.0.2"
"""Where a server's ports are free for proxies."""


def shrink_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process cut calls into pieces as small as those of a server with the constants `SMALL_PIECES`."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", _SMALL_PIECE_BYTES)


def force_stripes(monkeypatch: pytest.MonkeyPatch, stripes_count: int) -> None:
    """Have all large direct calls of this process striped, from the first on; 0 for streams of slices."""
    monkeypatch.setattr(StripingPolicy, "choose", lambda *_, **__: stripes_count)
    for constant in (
        "server._DISCOVERY_PATIENCE_S",
        "transports.direct.pool._CONNECT_PATIENCE_S",
        "transports.direct.striped_transport._PATIENCE_S",
    ):
        monkeypatch.setattr(f"deconvd_client.{constant}", 30.0)


def watch_heads(monkeypatch: pytest.MonkeyPatch) -> Heads:
    """Return a list that gets the heads of the calls that this process makes by direct connections from now on."""
    heads: Heads = []
    send = FrameStream.send

    def note_and_send(frames: FrameStream, event: Event) -> None:
        if isinstance(event, (CallHead, StripedCallHead)):
            heads.append(event)
        send(frames, event)

    monkeypatch.setattr(FrameStream, "send", note_and_send)
    return heads


def wait_until_direct(F: Connection, heads: Heads) -> None:
    """Call until there is a direct connection, and forget those calls: the first ones may not wait for it."""
    one = np.ones((1, 1, 1, 1), np.float32)
    heads.clear()
    while not heads:
        F.deconvolution_2d(one, one)
    heads.clear()


@contextmanager
def connect_by_proxy(
    server: ServerProcess, *disturbances: Disturbance, timeout_s: float = 60.0
) -> Iterator[tuple[StripeProxy, Connection]]:
    """Give a connection whose direct calls go through a proxy that disturbs them, and what goes by gRPC does not."""
    host, _, _ = server.targets[-1].rpartition(":")
    with deconvd_client.connect(server.targets[-1], transport="grpc") as F:
        direct_port = F.server_info().direct_port
    with (
        faulty_proxy(server.targets[-1], CLEAN, host=PROXY_HOST) as clean,
        stripe_proxy(
            f"{host}:{direct_port}", *disturbances, host=PROXY_HOST, own_port=direct_port
        ) as proxy,
        deconvd_client.connect(clean.target, timeout_s=timeout_s, transport="tcp") as F,
    ):
        yield proxy, F
