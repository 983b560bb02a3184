"""gRPC's core as grpcio's own channels use it. It is private, and only this module imports it."""

from __future__ import annotations

from typing import Any

import grpc
from grpc import _channel as grpcio_channel
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # its stubs leave private modules out

__all__ = ["core_channel", "cygrpc"]


def core_channel(channel: grpc.Channel) -> Any:
    """Return the core's channel inside one of grpcio's.

    None if it has none that may be used: what instruments a program may wrap its channels, and must see their calls.
    """
    if type(channel) is not grpcio_channel.Channel:
        return None
    inner = getattr(channel, "_channel", None)
    return inner if isinstance(inner, cygrpc.Channel) else None
