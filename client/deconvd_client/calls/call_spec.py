"""What a call asks for and what it was answered, whatever the way that it takes."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
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

__all__ = [
    "CallResult",
    "CallSpec",
    "LastLedger",
    "Request",
    "Response",
    "make_request",
]

Request: TypeAlias = pb.DeconvolveRequest | pb.DeconvolveGradRequest
Response: TypeAlias = pb.DeconvolveResponse | pb.DeconvolveGradResponse

_REQUEST_CACHE_SIZE: Final = 1024
"""Kinds of calls whose descriptions are kept: most calls are made again and again."""


@dataclass(frozen=True, slots=True)
class CallSpec:
    """A call to be made.

    Attributes:
        operation: What is computed.
        request: Describes the operands, or says where they are. It is not to be changed.
        problem: Of what shapes, types and geometry.
        operands: Those to be sent, by the names of their fields, in the order of streams.
        results: What is to be returned, likewise.
        deadline: When the caller must have an answer.
        offered: Operands that the request names by their digests. In a stream they are sent if the
            server lacks them.
        is_sure: Whether the server is known to have them.
    """

    operation: Operation
    request: Request
    problem: Problem
    operands: Mapping[str, Array]
    results: Mapping[str, TensorSpec]
    deadline: Deadline
    offered: Mapping[str, Array] = field(default_factory=dict)
    are_digests_known: bool = True


@dataclass(frozen=True, slots=True)
class CallResult:
    """A call that was answered.

    Attributes:
        response: Says under which handles tensors are kept; it carries no elements.
        arrays: The results that were returned, by the names of their fields.
        ledger: Where the time went on the server, as `deconvd.wire.ledger` has it.
    """

    response: Response
    arrays: dict[str, Array]
    ledger: str


class LastLedger(threading.local):
    """The ledger of the last call that a thread was answered: each thread has its own.

    Attributes:
        text: As `deconvd.wire.ledger` has it; empty before the first.
    """

    text = ""


@lru_cache(_REQUEST_CACHE_SIZE)
def make_request(
    operation: Operation,
    problem: Problem,
    options: Options,
    results: tuple[str, ...],
    optional: tuple[str, ...] = (),
) -> Request:
    """Return what describes a call. It is not to be changed: it serves every such call.

    Args:
        results: Fields of the results that are wanted.
        optional: Fields of those operands that are given, though they may be left out.
    """
    request: Any = messages_for(operation).request(
        geometry=message_from_geometry(problem.geometry),
        options=message_from_options(options),
    )
    for name in operation.operands:
        if name not in operation.optional or name in optional:
            getattr(request, name).CopyFrom(message_from_spec(spec_of_field(problem, name)))
    if len(operation.all_results) > 1:  # else there is no choice
        request.wanted.CopyFrom(pb.GradientMask(**dict.fromkeys(results, True)))
    return cast("Request", request)
