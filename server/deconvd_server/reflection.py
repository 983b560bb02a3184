"""Standard gRPC reflection, in the event loop."""

from __future__ import annotations

from typing import Any, Final

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection, reflection_pb2

__all__ = ["reflection_handlers"]

_LARGEST_BYTES: Final = 4096
"""More than any name takes: a larger message is not parsed, as that would hold up the loop."""


def reflection_handlers(service: ServiceDescriptor) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
    """Return what serves reflection about a service, by the method's path; for `grpc.aio`."""
    names = (service.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
    servicer = reflection.aio.ReflectionServicer(service_names=names)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        _parsed,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return {f"/{reflection.SERVICE_NAME}/ServerReflectionInfo": handler}


def _parsed(data: bytes) -> reflection_pb2.ServerReflectionRequest:
    if len(data) > _LARGEST_BYTES:
        raise ValueError(f"a request for reflection has {len(data)} bytes")
    return reflection_pb2.ServerReflectionRequest.FromString(data)
