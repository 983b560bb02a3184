"""What a call asks for and what it was answered, whatever the way that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Generic, TypeVar

import numpy as np

from deconvd.codec import Envelope
from deconvd.gradients import Wanted
from deconvd.messages import message_from_geometry, message_from_options
from deconvd.options import Options
from deconvd.problem import Problem, TensorSpec
from deconvd.tensor import Array, array_from_message, message_from_spec
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.deadline import Deadline

__all__ = [
    "Answered",
    "Asked",
    "RequestT",
    "ResponseT",
    "argument_of",
    "deconvolution",
    "differentiation",
    "received",
]

RequestT = TypeVar("RequestT", pb.DeconvolveRequest, pb.DeconvolveGradRequest)
ResponseT = TypeVar("ResponseT", pb.DeconvolveResponse, pb.DeconvolveGradResponse)

_REMEMBERED_COUNT: Final = 1024
"""Kinds of calls whose descriptions are kept: most calls are made again and again."""

_ARGUMENTS: Final = {"w": "W", "gw": "gW"}


def argument_of(field: str) -> str:
    """Return the name of the argument that a field of a request stands for."""
    return _ARGUMENTS.get(field, field)


@dataclass(frozen=True, slots=True)
class Asked(Generic[RequestT]):
    """A call to be made.

    Attributes:
        request: Describes the operands, or says where they are. It is not to be changed.
        problem: What is computed.
        operands: Those to be sent, by the names of their fields, in the order of streams.
        results: What is to be returned, likewise.
        deadline: When the caller must have an answer.
        offered: Operands that the request names by their digests. In a stream they are sent if the
            server lacks them.
        is_sure: Whether the server is known to have them.
    """

    request: RequestT
    problem: Problem
    operands: Mapping[str, Array]
    results: Mapping[str, TensorSpec]
    deadline: Deadline
    offered: Mapping[str, Array] = field(default_factory=dict)
    is_sure: bool = True


@dataclass(frozen=True, slots=True)
class Answered(Generic[ResponseT]):
    """A call that was answered.

    Attributes:
        response: Says under which handles tensors are kept; it carries no elements.
        arrays: The results that were returned, by the names of their fields.
    """

    response: ResponseT
    arrays: dict[str, Array]


def received(response: Envelope[ResponseT], field: str) -> Array:
    """Return a result that a response carries, as an array of the caller's own."""
    message: pb.Tensor = getattr(response.message, field)
    return np.array(array_from_message(argument_of(field), message, response.raw.get(field)))


@lru_cache(_REMEMBERED_COUNT)
def deconvolution(problem: Problem, options: Options, *, with_b: bool) -> pb.DeconvolveRequest:
    """Return what describes a call of Deconvolve. It is not to be changed: it serves every such call."""
    return pb.DeconvolveRequest(
        x=message_from_spec(problem.x),
        w=message_from_spec(problem.W),
        b=message_from_spec(problem.b) if with_b else None,
        geometry=message_from_geometry(problem.geometry),
        options=message_from_options(options),
    )


@lru_cache(_REMEMBERED_COUNT)
def differentiation(problem: Problem, options: Options, wanted: Wanted) -> pb.DeconvolveGradRequest:
    """Return what describes a call of DeconvolveGrad, in the manner of `deconvolution`."""
    return pb.DeconvolveGradRequest(
        x=message_from_spec(problem.x),
        w=message_from_spec(problem.W),
        gy=message_from_spec(problem.y),
        geometry=message_from_geometry(problem.geometry),
        options=message_from_options(options),
        wanted=pb.GradientMask(gx=wanted.gx, gw=wanted.gW, gb=wanted.gb),
    )
