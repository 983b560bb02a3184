"""The gRPC channel to a server: its target and its options."""

from __future__ import annotations

import json
import re
from typing import Final

import grpc

from deconvd.errors import InvalidArgumentError
from deconvd.transport import TRANSPORT_OPTIONS
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.retries import service_config

__all__ = ["MAX_MESSAGE_BYTES", "open_channel"]

MAX_MESSAGE_BYTES: Final = 2**31 - 1
"""The largest message that gRPC can carry."""

_TARGET = re.compile(r"unix:.+|((dns|ipv4|ipv6):)?.*[^:]:\d+")

_SERVICE = pb.DESCRIPTOR.services_by_name["DeconvolutionService"]


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
    unary = [method.name for method in _SERVICE.methods if not method.client_streaming]
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
            # A request larger than this would not be retried; the buffer only holds references.
            ("grpc.per_rpc_retry_buffer_size", MAX_MESSAGE_BYTES),
            ("grpc.service_config", json.dumps(service_config(_SERVICE.full_name, unary))),
        ],
    )
