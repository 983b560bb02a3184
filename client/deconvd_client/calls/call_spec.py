"""The specification and the result of a call, whatever its transport."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, TypeAlias, cast

from deconvd.model.dtypes import Array
from deconvd.model.operation import Operation, spec_of_field
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.messages import message_from_geometry, message_from_options, messages_for
from deconvd.wire.tensor import message_from_spec
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.transfer import Transfer

__all__ = [
    "CallResult",
    "CallSpec",
    "Request",
    "Response",
    "make_request",
]

Request: TypeAlias = pb.DeconvolveRequest | pb.DeconvolveGradRequest
Response: TypeAlias = pb.DeconvolveResponse | pb.DeconvolveGradResponse

_REQUEST_CACHE_SIZE: Final = 1024
"""For how many kinds of calls the request is kept: most calls are made again and again."""


@dataclass(frozen=True, slots=True)
class CallSpec:
    """The specification of a call.

    Attributes:
        operation: The operation to compute.
        request: Describes the operands, or says where they are. It is shared, and must not be changed.
        problem: Shapes, element types and geometry.
        operands: The operands to send, by the names of their fields, in the order of streams.
        results: The results to return, likewise.
        deadline: When the caller must have an answer.
        transfer: Memory for the results, and the count of what travels; None if the results may be anywhere.
    """

    operation: Operation
    request: Request
    problem: Problem
    operands: Mapping[str, Array]
    results: Mapping[str, TensorSpec]
    deadline: Deadline
    transfer: Transfer | None = None


@dataclass(frozen=True, slots=True)
class CallResult:
    """The result of a call.

    Attributes:
        response: Has the handles of results that stay on the server. It carries no elements.
        arrays: The results that were returned, by the names of their fields.
        ledger: Where the time went on the server, in the format of `deconvd.wire.ledger`.
    """

    response: Response
    arrays: dict[str, Array]
    ledger: str


@lru_cache(_REQUEST_CACHE_SIZE)
def make_request(
    operation: Operation,
    problem: Problem,
    options: Options,
    results: tuple[str, ...],
    optional: tuple[str, ...] = (),
) -> Request:
    """Return the request that describes a call. It is cached for all such calls, and must not be changed.

    Args:
        results: Fields of the results that are wanted.
        optional: Fields of the operands that are given. Only those that could be left out matter.
    """
    request: Any = messages_for(operation).request(
        geometry=message_from_geometry(problem.geometry),
        options=message_from_options(options),
        waits=True,
    )
    for name in operation.operands:
        if name not in operation.optional or name in optional:
            getattr(request, name).CopyFrom(message_from_spec(spec_of_field(problem, name)))
    if len(operation.all_results) > 1:  # else there is no choice
        request.wanted.CopyFrom(pb.GradientMask(**dict.fromkeys(results, True)))
    return cast("Request", request)
