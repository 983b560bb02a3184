"""The gRPC channel to a server: its options."""

from __future__ import annotations

from typing import Final

import grpc

from deconvd.wire.grpc_options import GRPC_OPTIONS
from deconvd_client.transports.grpc.proxies import Proxy

__all__ = ["MAX_MESSAGE_BYTES", "open_channel"]

MAX_MESSAGE_BYTES: Final = 2**31 - 1
"""The largest message that gRPC can carry."""

_TCP_USER_TIMEOUT_S: Final = 20
"""How long data may wait for the other end to take it before a TCP connection is given up."""

_DAY_S: Final = 24 * 60 * 60


def open_channel(target: str, *, max_message_bytes: int, proxy: Proxy | None) -> grpc.Channel:
    """Return a channel to `target`. Nothing is sent yet.

    Args:
        target: As `parse_target` has checked it.
        max_message_bytes: The largest response to accept.
        proxy: By which it goes; None for none, whatever the environment says.
    """
    return grpc.insecure_channel(
        target,
        options=[
            *GRPC_OPTIONS,
            ("grpc.enable_http_proxy", int(proxy is not None)),
            # By default a second, then ever more, up to two minutes: longer than any retry.
            ("grpc.initial_reconnect_backoff_ms", 100),
            # Also how long an attempt may take: several round trips to the other side of the world.
            ("grpc.min_reconnect_backoff_ms", 2000),
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            # Not for pings: with these gRPC sets TCP_USER_TIMEOUT. Else a dead connection is used for as
            # long as the kernel hopes, a quarter of an hour.
            ("grpc.keepalive_time_ms", _DAY_S * 1000),
            ("grpc.keepalive_timeout_ms", _TCP_USER_TIMEOUT_S * 1000),
            # The client tries again itself, streams too; only to be ready for it costs gRPC time.
            ("grpc.enable_retries", 0),
            # Else channels of a process share connections, those with a connection that is stuck, too.
            ("grpc.use_local_subchannel_pool", 1),
        ],
    )
