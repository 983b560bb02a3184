"""Calls whose tensors are too large for a message: striped over several direct connections, or in a stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from itertools import chain
from typing import Any

from deconvd.direct.events import MethodCode
from deconvd.errors import InvalidArgumentError
from deconvd.host.parallel_copy import copy_into
from deconvd.model.dtypes import Array
from deconvd.model.operation import ARGUMENTS
from deconvd.model.problem import TensorSpec, spec_of
from deconvd.wire.messages import messages_for
from deconvd.wire.tensor import check_described, is_raw
from deconvd_client.calls.call_spec import CallResult, CallSpec
from deconvd_client.calls.responses import malformed_response, parse_response
from deconvd_client.calls.transport import NotServedDirectlyError, StripedAttempt
from deconvd_client.transports.direct.striped_transport import StripedTransport
from deconvd_client.transports.direct.striping_policy import STREAM
from deconvd_client.transports.sliced_stream import begin_stream_attempt
from deconvd_client.transports.stub import Stub

__all__ = ["make_large_call"]


def make_large_call(
    stub: Stub, call_spec: CallSpec, empty: Callable[[TensorSpec], Array]
) -> CallResult:
    """Make a call in the way that has been the fastest for calls of its kind: striped, or in a stream.

    With the option ``cudnn_deterministic`` it is always a stream, whose slices depend on the call alone. A striped call
    is computed in one piece, so that sums over samples have other bits, and any call can fail to be striped.

    Args:
        empty: Returns new memory for a result.
    """
    striped = stub.striped
    if striped is None or not striped.may_carry or call_spec.request.options.cudnn_deterministic:
        return _make_stream_call(stub, call_spec, empty)
    kind: Hashable = (
        call_spec.operation.name,
        tuple(call_spec.operands),
        tuple(call_spec.results),
    )
    size_bytes = 0
    tensors: Iterable[Array | TensorSpec] = chain(
        call_spec.operands.values(), call_spec.results.values()
    )
    for tensor in tensors:
        size_bytes += tensor.nbytes
    choice = striped.policy.choose(kind, size_bytes)
    began_s = time.monotonic()
    result = None
    if choice != STREAM:
        result = _make_striped_call(striped, call_spec, empty, choice)
    if result is None:
        result = _make_stream_call(stub, call_spec, empty)
    striped.policy.record(kind, size_bytes, choice, time.monotonic() - began_s)
    return result


def _make_stream_call(
    stub: Stub, call_spec: CallSpec, empty: Callable[[TensorSpec], Array]
) -> CallResult:
    """Make a call in a stream, with packed elements where these pay."""
    packs = stub.packs_elements(call_spec.deadline)
    begin = partial(begin_stream_attempt, call_spec, empty, stub.link_rate)
    try:
        received, ledger = stub.stream(partial(begin, packs=packs), call_spec.deadline)
        return CallResult(*received, ledger)
    except InvalidArgumentError:
        if not packs:
            raise
    # perhaps by an older server than the one that takes packed elements, at the same target
    stub.forget_info()
    received, ledger = stub.stream(begin, call_spec.deadline)
    return CallResult(*received, ledger)


def _make_striped_call(
    striped: StripedTransport,
    call_spec: CallSpec,
    empty: Callable[[TensorSpec], Array],
    stripes_count: int,
) -> CallResult | None:
    """Make a striped call, and return its result. None if the call must be made in another way."""
    arrays: dict[str, Array] = {}

    transfer = call_spec.transfer

    def begin() -> StripedAttempt:
        if transfer is not None:
            transfer.begin_attempt()
        for field in call_spec.operation.all_results:
            if field in call_spec.results:
                arrays[field] = (
                    empty(call_spec.results[field]) if transfer is None else transfer.array(field)
                )
        operands = [
            _in_raw_layout(call_spec.operands[field], empty)
            for field in call_spec.operation.write_order
            if field in call_spec.operands
        ]
        return StripedAttempt(
            MethodCode[call_spec.operation.name],
            call_spec.request.SerializeToString(),
            operands,
            list(arrays.values()),
            transfer,
        )

    try:
        answer = striped.call(begin, call_spec.deadline, stripes_count)
    except NotServedDirectlyError:
        return None
    response_type = messages_for(call_spec.operation).response
    response: Any = parse_response(response_type, answer.message)
    try:
        for field, spec in call_spec.results.items():
            check_described(ARGUMENTS[field], spec, getattr(response, field))
    except InvalidArgumentError as error:
        raise malformed_response(response_type, error) from None
    return CallResult(response, arrays, answer.ledger)


def _in_raw_layout(array: Array, empty: Callable[[TensorSpec], Array]) -> Array:
    """Return an array that has the layout of `Tensor.raw`: the given one, or a copy."""
    if is_raw(array):
        return array
    copy = empty(spec_of(array))
    copy_into(copy, array)
    return copy
