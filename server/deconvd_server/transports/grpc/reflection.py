"""The standard gRPC reflection service, which tells clients the schema. It runs in gRPC's thread."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection, reflection_pb2

from deconvd_server.transports.grpc.rpc import Rpc

__all__ = ["reflection_handlers"]

_LARGEST_BYTES: Final = 4096
"""More than any name takes. A larger message is not parsed: that would hold up gRPC's thread."""

_NO_CONTEXT: Final[Any] = None
"""The servicer does not use its context."""


def reflection_handlers(service: ServiceDescriptor) -> dict[str, Callable[[Rpc], None]]:
    """Return the handlers that describe a service, by the methods' paths. See `Handlers`."""
    names = (service.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
    servicer = reflection.ReflectionServicer(names)

    def answer(rpc: Rpc, data: bytes | None) -> None:
        if data is None:
            rpc.finish(())
            return
        request = _parse(data)
        if request is None:
            rpc.fail_with(grpc.StatusCode.INVALID_ARGUMENT, "the request is not valid")
            return
        (response,) = servicer.ServerReflectionInfo(iter([request]), _NO_CONTEXT)
        rpc.send(response.SerializeToString(), partial(rpc.receive, partial(answer, rpc)))

    path = f"/{reflection.SERVICE_NAME}/ServerReflectionInfo"
    return {path: lambda rpc: rpc.receive(partial(answer, rpc))}


def _parse(data: bytes) -> reflection_pb2.ServerReflectionRequest | None:
    if len(data) > _LARGEST_BYTES:
        return None
    try:
        return reflection_pb2.ServerReflectionRequest.FromString(data)
    except DecodeError:
        return None
