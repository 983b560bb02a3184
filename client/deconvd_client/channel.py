"""The gRPC channel to a server: its target and its options."""

from __future__ import annotations

import re
from typing import Final

import grpc

from deconvd.errors import InvalidArgumentError
from deconvd.transport import TRANSPORT_OPTIONS

__all__ = ["MAX_MESSAGE_BYTES", "open_channel"]

MAX_MESSAGE_BYTES: Final = 2**31 - 1
"""The largest message that gRPC can carry."""

_TARGET = re.compile(r"unix:.+|((dns|ipv4|ipv6):)?.*[^:]:\d+")


def open_channel(target: str, *, max_message_bytes: int) -> grpc.Channel:
    """Return a channel to `target`. Nothing is sent yet.

    Args:
        target: ``host:port`` or ``unix:path``, or another of gRPC's names.
        max_message_bytes: The largest response to accept.

    Raises:
        InvalidArgumentError: `target` is no such name.
    """
    if not isinstance(target, str) or not _TARGET.fullmatch(target):
        raise InvalidArgumentError(
            f"target must be host:port or unix:path, got {target!r}", argument="target"
        )
    return grpc.insecure_channel(
        target,
        options=[
            *TRANSPORT_OPTIONS,
            # By default a second, then ever more, up to two minutes: longer than any retry.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            # The client tries again itself, streams too; only to be ready for it costs gRPC time.
            ("grpc.enable_retries", 0),
        ],
    )
