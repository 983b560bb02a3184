"""Everything that turns bytes into values, without a server: messages, chunks, statuses, ledgers, packets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
from google.protobuf.message import DecodeError, Message
from google.rpc import status_pb2

from deconvd.errors import (
    DeconvdError,
    ExhaustedError,
    InvalidArgumentError,
    LostTensorError,
    UnavailableError,
)
from deconvd.lending.protocol import (
    LendingOperation,
    LendingReply,
    LendingRequest,
    ReplyStatus,
)
from deconvd.model.problem import TensorSpec
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire import codec
from deconvd.wire.chunks import ChunkSource
from deconvd.wire.digest import digest_of
from deconvd.wire.grpc_status import error_from_rpc
from deconvd.wire.messages import geometry_from_message, options_from_message
from deconvd.wire.packed_elements import MAX_UNPACKED_BYTES, unpack
from deconvd.wire.shared_slice import SharedSlice
from deconvd.wire.status import error_from_status, status_from_error
from deconvd.wire.stream_parts import PartReader
from deconvd.wire.tensor import array_from_message
from deconvd_client.calls.ledgers import LedgerRecorder
from deconvd_client.server_info import ServerInfo
from deconvd_client.transports.grpc.stream_rpc import StreamRpcError
from deconvd_client.transports.side_sockets import find_call_sockets, find_memory_socket
from tests.fuzz.case import Case, Seed
from tests.fuzz.requests import GY, REQUESTS, W, X, tensor
from tests.fuzz.target import Target
from tests.packed import pack_by_definition

__all__ = ["Decoders", "server_info"]

_Decoder = Callable[[Case, Path], None]

F32: Final = np.dtype(np.float32)
_CODED: Final[Sequence[Message]] = [
    REQUESTS["Deconvolve"][0],
    REQUESTS["DeconvolveGrad"][0],
    pb.DeconvolveResponse(y=tensor(GY, with_elements=True)),
    pb.DeconvolveGradResponse(gx=tensor(X, with_elements=True), gw=tensor(W, with_elements=True)),
    pb.GetServerInfoRequest(session=bytes(16)),
    REQUESTS["DropTensors"][0],
]
_STREAMS: Final = {
    "DeconvolveStream": [TensorSpec(W.shape, F32), TensorSpec(X.shape, F32)],
    "DeconvolveGradStream": [TensorSpec(a.shape, F32) for a in (W, X, GY)],
    "PutTensor": [TensorSpec(X.shape, F32)],
}


def server_info(**changes: Any) -> pb.GetServerInfoResponse:
    """Return what a server may say about itself."""
    cache = pb.Cache(name="residents", count=1, size_bytes=2560, limit_bytes=1 << 20)
    device = pb.Device(id="cpu", name="a processor", memory_bytes=1 << 30, caches=[cache])
    said = pb.GetServerInfoResponse(
        version="0.1.0",
        devices=[device],
        element_types=[pb.ELEMENT_TYPE_FLOAT32, pb.ELEMENT_TYPE_FLOAT64],
        limits=pb.Limits(message_bytes=64 << 20),
        features=["packed_elements", "use_cudnn_tensor_core"],
        instance_id=bytes(range(16)).hex(),
        unix_sockets=["/nowhere/deconvd.sock"],
        side_sockets=[pb.SideSockets(calls="deconvd.sock.calls", memory="deconvd.sock.memory")],
        shared_memory_socket="/nowhere/deconvd.sock.memory",
        direct_port=1234,
    )
    said.MergeFrom(pb.GetServerInfoResponse(**changes))
    return said


def _name(case: Case) -> str:
    """Return the name of the message or of the RPC that an input is for."""
    return case.kind.split()[1]


def _decode_message(case: Case, directory: Path) -> None:
    """Compare both decoders of messages with protobuf's own."""
    (data,) = case.parts
    message_type: type[Message] = getattr(pb, _name(case))
    try:
        expected = message_type.FromString(data)
    except DecodeError:
        expected = None
    # large messages are taken apart by hand; here small ones are, since most of what can be wrong is in their fields
    for decode in (codec.decode, codec._decode_large):
        try:
            envelope: codec.Envelope[Any] = decode(message_type, data)
        except ExhaustedError:
            assert len(data) > codec.MAX_NON_ELEMENT_BYTES, "a small message was too large"
            continue
        except DecodeError:
            assert expected is None, "a valid message was refused"
            continue
        assert expected is not None, "an invalid message was taken"
        encoded = codec.encode(envelope)
        assert message_type.FromString(encoded) == expected, "a message has changed"


def _read_chunks(case: Case, directory: Path) -> None:
    """Read a stream as the server does, and see that elements come as they were sent."""
    name = _name(case)
    part_type: type[Any] = getattr(pb, f"{name}Request")
    reader: PartReader[Any] = PartReader(ChunkSource(iter(case.parts), part_type), part_type)
    try:
        reader.read_header()
        for spec in _STREAMS[name]:
            assert reader.read("x", spec).shape == spec.shape
        reader.expect_end()
    except (InvalidArgumentError, ExhaustedError):
        pass


def _unpack(case: Case, directory: Path) -> None:
    try:
        elements = unpack(memoryview(case.parts[0]))
    except InvalidArgumentError:
        return
    assert 0 < len(elements) <= MAX_UNPACKED_BYTES


def _read_status(case: Case, directory: Path) -> None:
    try:
        status = status_pb2.Status.FromString(case.parts[0])
    except DecodeError:
        return
    _check_error(error_from_status(status))


def _check_error(error: DeconvdError) -> None:
    """See that an error is usable, and can be told again."""
    assert isinstance(error, DeconvdError)
    assert str(error)
    if isinstance(error, UnavailableError) and error.retry_after_s is not None:
        assert 0 <= error.retry_after_s < math.inf, "no pause may be negative"
    again = error_from_status(status_from_error(error))
    assert type(again) is type(error)


def _read_rpc_error(case: Case, directory: Path) -> None:
    code, text, details = case.parts
    codes = [*grpc.StatusCode]
    metadata = (("other", "text"), ("grpc-status-details-bin", details))
    failed = StreamRpcError(codes[sum(code) % len(codes)], text.decode(errors="replace"), metadata)
    _check_error(error_from_rpc(failed))


def _read_ledger(case: Case, directory: Path) -> None:
    recorder = LedgerRecorder()
    for text in (case.parts[0].decode("latin1"), case.parts[0].decode(errors="replace")):
        with recorder.collect() as ledgers:
            recorder.record("Deconvolve", text, 0.0)
        (ledger,) = ledgers
        assert str(ledger)
        assert ledger.server_ms >= 0


def _parse_packets(case: Case, directory: Path) -> None:
    for packet in case.parts:
        for kind in (LendingRequest, LendingReply):
            try:
                parsed = kind.parse(packet)
            except ValueError:
                continue
            assert kind.parse(parsed.pack()).size_bytes == parsed.size_bytes


def _read_server_info(case: Case, directory: Path) -> None:
    try:
        info = pb.GetServerInfoResponse.FromString(case.parts[0])
    except DecodeError:
        return
    described = ServerInfo.from_message(info)
    assert repr(described)
    for path in ("", f"{directory}/deconvd.sock"):
        assert not find_call_sockets(info, path)
        with suppress(DeconvdError):
            find_memory_socket(info, path)


def _read_tensor(case: Case, directory: Path) -> None:
    try:
        message = pb.Tensor.FromString(case.parts[0])
    except DecodeError:
        return
    try:
        array = array_from_message("x", message)
    except InvalidArgumentError:
        pass
    else:
        assert digest_of(array).size_bytes == array.nbytes == len(message.raw)
    with suppress(InvalidArgumentError):
        SharedSlice.from_message(message.shared).check("x", TensorSpec((2, 3), F32), 4096)


def _read_arguments(case: Case, directory: Path) -> None:
    for message_type, parse in (
        (pb.Geometry, geometry_from_message),
        (pb.Options, options_from_message),
    ):
        try:
            message: Any = message_type.FromString(case.parts[0])
        except DecodeError:
            continue
        with suppress(InvalidArgumentError):
            assert parse(message) == parse(message)


_DECODERS: Final[dict[str, _Decoder]] = {
    "message": _decode_message,
    "chunks": _read_chunks,
    "packed": _unpack,
    "status": _read_status,
    "rpc_error": _read_rpc_error,
    "ledger": _read_ledger,
    "packets": _parse_packets,
    "server_info": _read_server_info,
    "tensor": _read_tensor,
    "arguments": _read_arguments,
}
"""By the first word of a kind; the second says which message or RPC it is for."""


def _seeds() -> Iterator[Seed]:
    for message in _CODED:
        yield Seed(f"message {type(message).DESCRIPTOR.name}", [message], is_list=False)
    for name in _STREAMS:
        yield Seed(f"chunks {name}", REQUESTS[name])
    for type_code in ("u2", "u4", "u8"):
        array = np.arange(100).astype(type_code) * (np.arange(100) % 3 == 0)
        yield Seed("packed", [pack_by_definition(array.astype(type_code))], is_list=False)
    for error in (
        LostTensorError("x is lost", argument="x"),
        InvalidArgumentError("stride must be positive", argument="stride"),
        UnavailableError("busy", retry_after_s=1.5),
    ):
        status = status_from_error(error)
        yield Seed("status", [status], is_list=False)
        yield Seed("rpc_error", [b"\x0e", b"busy", status], is_list=False)
    yield Seed("ledger", [b"queue_us=1;follow_us=2;compute_us=31;server_us=64"], is_list=False)
    yield Seed(
        "packets",
        [
            LendingRequest(LendingOperation.LEND, 1 << 20).pack(),
            LendingReply(ReplyStatus.DONE, 1 << 20, bytes(range(16)), "of the host").pack(),
        ],
    )
    yield Seed("server_info", [server_info()], is_list=False)
    placed = tensor(X, with_elements=False)
    placed.shared.CopyFrom(pb.SharedSlice(region=bytes(16), offset_bytes=64))
    yield Seed("tensor", [tensor(X, with_elements=True)], is_list=False)
    yield Seed("tensor", [placed], is_list=False)
    yield Seed(
        "arguments", [pb.Geometry(stride=pb.Pair(h=1, w=1), pad=pb.Pair(), groups=1)], is_list=False
    )
    yield Seed(
        "arguments", [pb.Options(use_cudnn=pb.USE_CUDNN_ALWAYS, autotune=True)], is_list=False
    )


class Decoders(Target):
    """All decoders. Each input is parsed at once, and must be refused by the error that its decoder documents."""

    seeds = (*_seeds(),)

    def feed(self, case: Case) -> None:
        _DECODERS[case.kind.split()[0]](case, self.directory)
