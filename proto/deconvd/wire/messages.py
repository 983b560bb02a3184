"""Geometry and options to messages and back, and the message types of each operation."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from google.protobuf.message import Message

from deconvd.errors import InvalidArgumentError
from deconvd.model.geometry import Geometry, OutputSize, Pair
from deconvd.model.operation import Operation
from deconvd.model.options import Options, UseCudnn
from deconvd.v1 import deconvd_pb2 as pb

__all__ = [
    "OperationMessages",
    "geometry_from_message",
    "message_from_geometry",
    "message_from_options",
    "messages_for",
    "options_from_message",
]

_ENUM_BY_USE_CUDNN = {use: pb.UseCudnn.Value(f"USE_CUDNN_{use.name}") for use in UseCudnn}
_USE_CUDNN_BY_ENUM = {
    pb.USE_CUDNN_UNSPECIFIED: UseCudnn.AUTO,
    **{number: use for use, number in _ENUM_BY_USE_CUDNN.items()},
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
    )


def options_from_message(message: pb.Options) -> Options:
    """Return the options in a message.

    Raises:
        InvalidArgumentError: `use_cudnn` is a number that the schema does not define.
    """
    use_cudnn = _USE_CUDNN_BY_ENUM.get(message.use_cudnn)
    if use_cudnn is None:
        allowed = ", ".join(pb.UseCudnn.Name(number) for number in _USE_CUDNN_BY_ENUM)
        raise InvalidArgumentError(
            f"use_cudnn must be one of {allowed}, got number {message.use_cudnn}",
            argument="use_cudnn",
        )
    return Options(
        cudnn_deterministic=message.cudnn_deterministic,
        autotune=message.autotune,
        use_cudnn=use_cudnn,
        allow_tf32=message.allow_tf32,
    )


def _pair_message(pair: Pair) -> pb.Pair:
    return pb.Pair(h=pair[0], w=pair[1])


def _pair(message: pb.Pair) -> Pair:
    return message.h, message.w


def _outsize(message: pb.OutputSize) -> OutputSize:
    h = message.h if message.HasField("h") else None
    w = message.w if message.HasField("w") else None
    return h, w
