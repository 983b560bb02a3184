"""What a message may have beside elements is bounded before it is parsed, by whichever way it comes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message

from deconvd.errors import ExhaustedError
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.chunks import ChunkSource
from deconvd.wire.codec import MAX_NON_ELEMENT_BYTES, decode
from deconvd.wire.tensor import message_from_array
from tests.direct_calls import REQUEST, W
from tests.processes import memory_bytes, peak_memory_bytes
from tests.servers import ServerProcess
from tests.wire import varint

FIELD = b"\x40\x01"  # number 8, which tensors do not have: of two bytes
MANY_FIELDS = FIELD * (4 << 20)
MANY_RAWS = b"\x7a\x00" * (4 << 20)
"""Payloads without elements."""


def tensor_of(inner: bytes) -> bytes:
    """Return the bytes of a request whose x has these bytes."""
    return b"\x0a" + varint(len(inner)) + inner


FORMS: dict[str, bytes] = {
    "beside its tensors": MANY_FIELDS,
    "in a tensor": tensor_of(MANY_FIELDS),
    "empty payloads": tensor_of(MANY_RAWS),
    "empty tensors": b"\x0a\x00" * (4 << 20),
    "behind a group": b"\x5b\x5c" + MANY_FIELDS,
    "a long shape": tensor_of(b"\x12" + varint(8 << 20) + bytes(8 << 20)),
}
STREAM = "/deconvd.v1.DeconvolutionService/DeconvolveStream"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["Deconvolve", "DeconvolveGrad", "DropTensors", "stream"])
def test_much_beside_elements_is_refused_before_it_takes_time_or_memory(
    form: str, method: str, server: ServerProcess
) -> None:
    pid = server.process.pid
    with grpc.insecure_channel(
        server.target, options=[("grpc.max_send_message_length", -1)]
    ) as channel:
        send = _sender(channel, method)
        begin_s, held_bytes = time.monotonic(), memory_bytes(pid)
        with pytest.raises(grpc.RpcError) as refused:
            send(FORMS[form])

    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert f"at most {MAX_NON_ELEMENT_BYTES} bytes in addition to" in str(refused.value.details())
    assert time.monotonic() - begin_s < 8  # nine seconds it was, on a machine at rest
    assert peak_memory_bytes(pid) - held_bytes < 300 << 20


def _sender(channel: grpc.Channel, method: str) -> Callable[[bytes], object]:
    if method == "stream":
        stream: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(STREAM)
        return lambda data: list(stream(iter([data]), timeout=30))
    path = f"/deconvd.v1.DeconvolutionService/{method}"
    unary: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
    return lambda data: unary(data, timeout=30)


@pytest.mark.parametrize("message_type", [pb.DeconvolveRequest, pb.DropTensorsRequest])
def test_what_is_sent_beside_elements_fits(message_type: type[Message]) -> None:
    rest = FIELD * (MAX_NON_ELEMENT_BYTES // 2)
    assert decode(message_type, rest).message is not None
    with pytest.raises(ExhaustedError, match="bytes in addition to the elements"):
        decode(message_type, rest + FIELD)


def test_as_many_handles_as_clients_drop_at_once_fit() -> None:
    drops = pb.DropTensorsRequest(
        session=bytes(16), residents=[pb.Resident(handle=bytes(16))] * 4096
    )
    assert decode(pb.DropTensorsRequest, drops.SerializeToString()).message == drops


def test_elements_are_not_counted_in_whatever_order_fields_stand() -> None:
    large = pb.DeconvolveRequest(w=message_from_array(W))
    large.x.raw = bytes(MAX_NON_ELEMENT_BYTES * 2)
    data = large.SerializeToString()
    assert len(decode(pb.DeconvolveRequest, data + FIELD).raw["x"]) == 2 * MAX_NON_ELEMENT_BYTES
    assert len(decode(pb.DeconvolveRequest, FIELD + data).raw["x"]) == 2 * MAX_NON_ELEMENT_BYTES


def test_a_chunk_may_be_long_and_have_a_field_that_is_not_known() -> None:
    chunk = pb.DeconvolveStreamRequest(chunk=bytes(MAX_NON_ELEMENT_BYTES * 2)).SerializeToString()
    source = ChunkSource(iter([FIELD + chunk]), pb.DeconvolveStreamRequest)
    ahead = source.next()
    assert getattr(ahead, "size_bytes", 0) == 2 * MAX_NON_ELEMENT_BYTES


def test_a_tensor_in_pieces_must_not_be_large() -> None:
    pieces = REQUEST.SerializeToString()
    assert decode(pb.DeconvolveRequest, pieces * 100).raw.keys() == {"x", "w"}
    raw = b"\x7a" + varint(8 << 20) + bytes(8 << 20)
    with pytest.raises(
        ExhaustedError, match=r"a tensor in several pieces must have at most 16777216 bytes"
    ):
        decode(pb.DeconvolveRequest, tensor_of(raw) * 2)


def test_a_chunk_that_was_read_is_not_kept() -> None:
    data = bytearray(
        pb.DeconvolveStreamRequest(chunk=bytes(MAX_NON_ELEMENT_BYTES)).SerializeToString()
    )
    # a bytearray, which cannot be cleared while anything refers to it
    source = ChunkSource(iter([cast("bytes", data)]), pb.DeconvolveStreamRequest)
    source.next()
    with pytest.raises(BufferError):
        data.clear()

    source.read_into(np.empty(MAX_NON_ELEMENT_BYTES, np.uint8))

    data.clear()
