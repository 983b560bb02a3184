"""Deconvolutions whose x is copied into shared memory in two halves: the server works on one while the other is copied.

Each half of the samples is a call of its own, so y may differ in its last bits from that of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import wait
from typing import Final

import numpy as np

from deconvd.codec import Envelope
from deconvd.lazy_pool import LazyPool
from deconvd.system import processors_count
from deconvd.tensor import Array, message_from_spec, spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.asked import Asked, RequestT, ResponseT, received
from deconvd_client.shared_memory.borrower import SharedCall, SharedResult
from deconvd_client.stub import Stub

__all__ = ["deconvolved_in_halves", "to_be_halved"]

_LEAST_BYTES: Final = 16 << 20
"""Of x: below, what the copy would save is less than what another call costs."""

_LEAST_PROCESSORS_COUNT: Final = 4
"""Fewer are busy copying: nothing would be done meanwhile."""

_ALIGNMENT_BYTES: Final = 256
"""Where halves must begin, so that cards read and write them in place."""

_RESULT: Final = "y"
"""The field of the result."""

_pool = LazyPool(8, "half")


def to_be_halved(
    call: SharedCall, asked: Asked[RequestT], places: Mapping[str, SharedResult]
) -> Array | None:
    """Return x, if it is worth copying in halves; None if not.

    Args:
        places: Of results, by the names of their fields.
    """
    x, y = asked.operands.get("x"), places.get(_RESULT)
    request = asked.request
    if x is None or y is None or not isinstance(request, pb.DeconvolveRequest):
        return None
    if x.nbytes < _LEAST_BYTES or len(x) < 2 or processors_count() < _LEAST_PROCESSORS_COUNT:
        return None
    if not isinstance(x, np.ndarray) or request.HasField("keep") or not call.is_to_be_copied(x):
        return None
    half = slice(len(x) // 2)
    offset_bytes = x[half].nbytes | y.array[half].nbytes
    return x if offset_bytes % _ALIGNMENT_BYTES == 0 else None


def deconvolved_in_halves(
    call: SharedCall,
    stub: Stub,
    rpc: Callable[[Envelope[RequestT]], Envelope[ResponseT]],
    request: Envelope[RequestT],
    x: Array,
    y: SharedResult,
) -> Envelope[ResponseT] | None:
    """Make a call in halves, and return the response to the second; None if x has no room.

    Raises as `rpc` does, once neither half is under way.

    Args:
        stub: What `rpc` is a method of.
        request: Has everything but x.
    """
    room = call.room(spec_of(x))
    if room is None:
        return None
    middle = len(x) // 2
    first, second = slice(middle), slice(middle, None)

    def half(samples: slice) -> Envelope[ResponseT]:
        response = rpc(_part_of(request, samples, room, y))
        if getattr(response.message, _RESULT).WhichOneof("payload") != "shared":
            y.array[samples] = received(response, _RESULT)
        return response

    call.copy(room.array[first], x[first])
    begun = _pool.get().submit(lambda: (half(first), stub.last_ledger))
    try:
        call.copy(room.array[second], x[second])
        response = half(second)
    finally:
        wait([begun])  # the server reads and writes what the call has taken
    _, ledger = begun.result()
    stub.add_to_last_ledger(ledger)
    return response


def _part_of(
    request: Envelope[RequestT], samples: slice, x: SharedResult, y: SharedResult
) -> Envelope[RequestT]:
    """Return the request for some of the samples."""
    part = type(request.message)()
    part.CopyFrom(request.message)
    part.x.CopyFrom(message_from_spec(spec_of(x.array[samples])))
    for place, room in ((part.x.shared, x), (getattr(part, f"{_RESULT}_place"), y)):
        place.CopyFrom(room.place)
        place.offset_bytes += room.array[: samples.start or 0].nbytes
    return Envelope(part, request.raw)
