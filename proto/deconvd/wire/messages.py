"""Geometry and options to messages and back, and the message types of each operation."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Final, NamedTuple

from google.protobuf.message import Message

from deconvd.errors import InvalidArgumentError
from deconvd.model.geometry import Geometry, OutputSize, Pair
from deconvd.model.operation import Operation
from deconvd.model.options import Options, UseCudnn, UseCudnnTensorCore
from deconvd.v1 import deconvd_pb2 as pb

__all__ = [
    "USE_CUDNN_TENSOR_CORE",
    "WIDE_SUMS",
    "OperationMessages",
    "geometry_from_message",
    "message_from_geometry",
    "message_from_options",
    "messages_for",
    "options_from_message",
]

WIDE_SUMS: Final = "wide_sums"
"""The feature of servers that know `DeconvolveGradRequest.wide_sums`."""

USE_CUDNN_TENSOR_CORE: Final = "use_cudnn_tensor_core"
"""The name of the feature in GetServerInfoResponse."""

_ENUM_BY_USE_CUDNN = {use: pb.UseCudnn.Value(f"USE_CUDNN_{use.name}") for use in UseCudnn}
_USE_CUDNN_BY_ENUM = {
    pb.USE_CUDNN_UNSPECIFIED: UseCudnn.AUTO,
    **{number: use for use, number in _ENUM_BY_USE_CUDNN.items()},
}
_ENUM_BY_TENSOR_CORE = {
    UseCudnnTensorCore.AUTO: pb.USE_CUDNN_TENSOR_CORE_UNSPECIFIED,  # so that it takes no bytes
    UseCudnnTensorCore.ALWAYS: pb.USE_CUDNN_TENSOR_CORE_ALWAYS,
    UseCudnnTensorCore.NEVER: pb.USE_CUDNN_TENSOR_CORE_NEVER,
}
_TENSOR_CORE_BY_ENUM = {
    pb.USE_CUDNN_TENSOR_CORE_UNSPECIFIED: UseCudnnTensorCore.AUTO,
    pb.USE_CUDNN_TENSOR_CORE_AUTO: UseCudnnTensorCore.AUTO,
    pb.USE_CUDNN_TENSOR_CORE_ALWAYS: UseCudnnTensorCore.ALWAYS,
    pb.USE_CUDNN_TENSOR_CORE_NEVER: UseCudnnTensorCore.NEVER,
}


class OperationMessages(NamedTuple):
    """The message types of an operation: those of its unary RPC, and those of its streaming RPC."""

    request: type[Message]
    response: type[Message]
    stream_request: type[Message]
    stream_header: type[Message]
    stream_response: type[Message]


@cache
def messages_for(operation: Operation) -> OperationMessages:
    """Return the message types of an operation."""
    kinds = ("Request", "Response", "StreamRequest", "StreamHeader", "StreamResponse")
    return OperationMessages(*(getattr(pb, f"{operation.name}{kind}") for kind in kinds))


def message_from_geometry(geometry: Geometry) -> pb.Geometry:
    """Return a geometry as a message."""
    outsize_h, outsize_w = geometry.outsize
    return pb.Geometry(
        stride=_pair_message(geometry.stride),
        pad=_pair_message(geometry.pad),
        dilate=_pair_message(geometry.dilate),
        groups=geometry.groups,
        outsize=pb.OutputSize(h=outsize_h, w=outsize_w),
    )


def geometry_from_message(message: pb.Geometry) -> Geometry:
    """Return the geometry in a message. Fields that the message does not have get their defaults.

    Raises:
        InvalidArgumentError: A value is out of its range.
    """
    default = Geometry()
    return Geometry(
        stride=_pair(message.stride) if message.HasField("stride") else default.stride,
        pad=_pair(message.pad) if message.HasField("pad") else default.pad,
        outsize=_outsize(message.outsize),
        dilate=_pair(message.dilate) if message.HasField("dilate") else default.dilate,
        groups=message.groups if message.HasField("groups") else default.groups,
    )


def message_from_options(options: Options) -> pb.Options:
    """Return options as a message."""
    return pb.Options(
        cudnn_deterministic=options.cudnn_deterministic,
        autotune=options.autotune,
        use_cudnn=_ENUM_BY_USE_CUDNN[options.use_cudnn],
        allow_tf32=options.allow_tf32,
        use_cudnn_tensor_core=_ENUM_BY_TENSOR_CORE[options.use_cudnn_tensor_core],
    )


def options_from_message(message: pb.Options) -> Options:
    """Return the options in a message.

    Raises:
        InvalidArgumentError: An enumeration is a number that the schema does not define.
    """
    use_cudnn = _USE_CUDNN_BY_ENUM.get(message.use_cudnn)
    if use_cudnn is None:
        names = map(pb.UseCudnn.Name, _USE_CUDNN_BY_ENUM)
        raise _number_error("use_cudnn", names, message.use_cudnn)
    tensor_core = _TENSOR_CORE_BY_ENUM.get(message.use_cudnn_tensor_core)
    if tensor_core is None:
        names = map(pb.UseCudnnTensorCore.Name, _TENSOR_CORE_BY_ENUM)
        raise _number_error("use_cudnn_tensor_core", names, message.use_cudnn_tensor_core)
    return Options(
        cudnn_deterministic=message.cudnn_deterministic,
        autotune=message.autotune,
        use_cudnn=use_cudnn,
        allow_tf32=message.allow_tf32,
        use_cudnn_tensor_core=tensor_core,
    )


def _number_error(name: str, allowed: Iterable[str], number: int) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{name} must be one of {', '.join(allowed)}, got number {number}", argument=name
    )


def _pair_message(pair: Pair) -> pb.Pair:
    return pb.Pair(h=pair[0], w=pair[1])


def _pair(message: pb.Pair) -> Pair:
    return message.h, message.w


def _outsize(message: pb.OutputSize) -> OutputSize:
    h = message.h if message.HasField("h") else None
    w = message.w if message.HasField("w") else None
    return h, w
