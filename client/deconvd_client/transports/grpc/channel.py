"""Opens gRPC channels, with the options that a client needs."""

from __future__ import annotations

from typing import Any, Final

import grpc

from deconvd.wire.grpc_options import GRPC_OPTIONS
from deconvd_client.credentials import NO_CREDENTIALS, Credentials
from deconvd_client.transports.grpc.proxies import Proxy

__all__ = ["MAX_MESSAGE_BYTES", "open_channel"]

MAX_MESSAGE_BYTES: Final = 2**31 - 1
"""The largest message that gRPC can carry."""

_TCP_USER_TIMEOUT_S: Final = 20
"""How long data that was sent may stay unacknowledged before a TCP connection is closed."""

_DAY_S: Final = 24 * 60 * 60


def open_channel(
    target: str,
    *,
    max_message_bytes: int,
    proxy: Proxy | None,
    credentials: Credentials = NO_CREDENTIALS,
) -> grpc.Channel:
    """Return a channel to `target`. Nothing is sent yet.

    Args:
        target: A target that `parse_target` has checked.
        max_message_bytes: The largest response to accept.
        proxy: The proxy to use; None for none, whatever the environment says.
        credentials: Say how to encrypt.
    """
    options: list[tuple[str, Any]] = [
        *GRPC_OPTIONS,
        ("grpc.enable_http_proxy", int(proxy is not None)),
        # The default, from one second to two minutes, is longer than a call waits for its retries.
        ("grpc.initial_reconnect_backoff_ms", 100),
        # This is also how long an attempt may take: several round trips to the other side of the world.
        ("grpc.min_reconnect_backoff_ms", 2000),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # Not for pings: these make gRPC set TCP_USER_TIMEOUT. Without it a dead connection stays in use until
        # the kernel gives up, a quarter of an hour later.
        ("grpc.keepalive_time_ms", _DAY_S * 1000),
        ("grpc.keepalive_timeout_ms", _TCP_USER_TIMEOUT_S * 1000),
        # The client has its own retries, also for streams; gRPC's cost time even when none is made.
        ("grpc.enable_retries", 0),
        # Otherwise all channels of a process share their connections, also one that is stuck.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    state = credentials.tls_state
    if state is None:
        return grpc.insecure_channel(target, options)
    assert credentials.tls is not None
    if credentials.tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", credentials.tls.server_name))
    return grpc.secure_channel(
        target, grpc.ssl_channel_credentials(state.ca, state.key, state.cert), options
    )
