"""What the server checks of every request, without computing or allocating anything."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final

from google.protobuf.message import DecodeError

from deconvd.errors import ExhaustedError, InvalidArgumentError
from deconvd.model.operation import DECONVOLVE, DECONVOLVE_GRAD, Operation
from deconvd.model.problem import TensorSpec
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.codec import decode
from deconvd.wire.messages import messages_for
from deconvd_server.service.parsed_request import (
    ParsedRequest,
    SlicedRequest,
    parse_request,
    parse_stream_header,
)
from tests.fuzz.case import Case, Seed
from tests.fuzz.requests import REQUESTS, W, X, tensor
from tests.fuzz.target import Target

__all__ = ["RequestChecks"]

_OPERATIONS: Final[dict[str, Operation]] = {
    operation.name: operation for operation in (DECONVOLVE, DECONVOLVE_GRAD)
}


def _seeds() -> list[Seed]:
    seeds = []
    for name in _OPERATIONS:
        whole: Any = REQUESTS[name][0]
        named = type(whole)()
        named.CopyFrom(whole)
        named.x.resident.handle = bytes(16)
        named.w.digest.blake3, named.w.digest.size_bytes = bytes(32), W.nbytes
        placed = type(whole)()
        placed.CopyFrom(whole)
        placed.x.shared.region, placed.x.shared.offset_bytes = bytes(16), 64
        placed.options.use_cudnn_tensor_core = pb.USE_CUDNN_TENSOR_CORE_NEVER
        placed.remember.w = True
        for field in ("y_place", "gx_place", "gw_place", "gb_place"):
            if field in placed.DESCRIPTOR.fields_by_name:
                getattr(placed, field).region = bytes(16)
        seeds += [Seed(name, [part], is_list=False) for part in (whole, named, placed)]
        header: Any = REQUESTS[f"{name}Stream"][0]
        seeds.append(Seed(f"{name}Stream", [header.header], is_list=False))
    with_b = pb.DeconvolveRequest(
        x=tensor(X, with_elements=False), w=tensor(W, with_elements=False)
    )
    with_b.b.CopyFrom(tensor(W[0, :, 0, 0], with_elements=False))
    with_b.keep.SetInParent()
    return [*seeds, Seed("Deconvolve", [with_b], is_list=False)]


class RequestChecks(Target):
    """Requests of both operations, as messages and as headers of streams."""

    seeds = tuple(_seeds())

    def feed(self, case: Case) -> None:
        name = case.kind.removesuffix("Stream")
        operation = _OPERATIONS[name]
        messages = messages_for(operation)
        try:
            if case.kind != name:
                header = messages.stream_header.FromString(case.parts[0])
                _use_stream(parse_stream_header(operation, header))
            else:
                envelope = decode(messages.request, case.parts[0])
                _use(parse_request(operation, envelope.message, envelope.data))
        except (InvalidArgumentError, ExhaustedError, DecodeError):
            pass


def _use(parsed: ParsedRequest) -> None:
    """Ask a request all that the server asks before it computes."""
    for tensors in (parsed.operands, parsed.results, parsed.sent_results):
        assert all(isinstance(spec, TensorSpec) and spec.nbytes >= 0 for spec in tensors.values())
    assert parsed.needs_session in (True, False)
    assert parsed.response.IsInitialized()
    assert 0 <= parsed.sent_bytes <= sum(spec.nbytes for spec in parsed.results.values())
    for name, place in parsed.shared_slices.items():
        spec = {**parsed.operands, **parsed.results}[name]
        with suppress(InvalidArgumentError):
            place.check(name, spec, 4096)
    parsed.check_response_size(64 << 20, 128 << 10)


def _use_stream(sliced: SlicedRequest) -> None:
    assert sliced.slices_count >= 0
    assert sliced.footprint_bytes >= 0
    if sliced.slices_count:
        for number in (0, sliced.slices_count - 1):
            samples, parsed = sliced.slice_request(number)
            assert samples.stop - samples.start == parsed.problem.n
            _use(parsed)
    sliced.check_slice_size(64 << 20)
