"""Calls whose large tensors lie in shared memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from deconvd.codec import Buffer, Envelope
from deconvd.errors import StaleRegionError
from deconvd.problem import TensorSpec
from deconvd.tensor import Array, array_from_message, elements_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.shared_memory.borrower import Borrower, SharedCall, SharedResult

__all__ = ["call_with_shared_memory"]

_Request = TypeVar("_Request", pb.DeconvolveRequest, pb.DeconvolveGradRequest)
_Response = TypeVar("_Response", pb.DeconvolveResponse, pb.DeconvolveGradResponse)


def call_with_shared_memory(
    borrower: Borrower,
    rpc: Callable[[Envelope[_Request]], Envelope[_Response]],
    request: _Request,
    operands: Mapping[str, Array],
    results: Mapping[str, TensorSpec],
) -> dict[str, Array] | None:
    """Make a call, and return its results by the names of their fields.

    None if it is to be made in another way: none of its tensors is large, or there is no room for
    one that is, or the server does not know the memory.

    Args:
        request: Describes the operands; it is left as it is.
        operands: Those to be sent, by the names of their fields.
        results: What the results will be, likewise.
    """
    tensors: list[Array | TensorSpec] = [*operands.values(), *results.values()]
    if not any(map(SharedCall.is_large, tensors)):
        return None
    asked = type(request)()
    asked.CopyFrom(request)
    try:
        with borrower.call() as call:
            places = _want(call, asked, results)
            if places is None:
                return None
            raw = _put(call, asked, operands)
            if raw is None:
                return None
            response = rpc(Envelope(asked, raw))
            return {field: _received(response, field, places.get(field)) for field in results}
    except StaleRegionError:
        return None


def _want(
    call: SharedCall, asked: _Request, results: Mapping[str, TensorSpec]
) -> dict[str, SharedResult] | None:
    """Ask for the large results in shared memory; return where they will be."""
    places: dict[str, SharedResult] = {}
    for field, spec in results.items():
        if not call.is_large(spec):
            continue
        result = call.result(spec)
        if result is None:
            return None
        getattr(asked, f"{field}_place").CopyFrom(result.place)
        places[field] = result
    return places


def _put(
    call: SharedCall, asked: _Request, operands: Mapping[str, Array]
) -> dict[str, Buffer] | None:
    """Put the large operands into shared memory; return the others' elements."""
    raw: dict[str, Buffer] = {}
    for field, array in operands.items():
        if not call.is_large(array):
            raw[field] = elements_of(array)
            continue
        message = call.tensor(array)
        if message is None:
            return None
        getattr(asked, field).CopyFrom(message)
    return raw


def _received(response: Envelope[_Response], field: str, result: SharedResult | None) -> Array:
    message: pb.Tensor = getattr(response.message, field)
    if result is not None and message.WhichOneof("payload") == "shared":
        return result.array
    return np.array(array_from_message(field, message, response.raw.get(field)))
