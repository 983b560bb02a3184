"""A client whose server answers nonsense: it raises an InternalError that says so, and nothing else."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

import deconvd_client
from deconvd.direct.events import (
    Answer,
    CallFailure,
    EndOfStream,
    FrameKind,
    MessagePart,
    PieceHead,
    pack_frame,
)
from deconvd.errors import InternalError, InvalidArgumentError
from deconvd.lending.protocol import LendingReply, ReplyStatus
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.codec import chunk_to_bytes
from deconvd.wire.status import status_from_error
from deconvd.wire.tensor import message_from_array
from deconvd_client import Connection
from deconvd_client.shared_memory.link import Link
from deconvd_client.transports.side_sockets import (
    find_memory_socket,
    instance_of,
    is_trusted_socket,
)
from tests.fuzz.case import Part, Seed
from tests.fuzz.clients import answer_parts
from tests.fuzz.decoders import server_info
from tests.fuzz.hostile_server import SLOTS, HostileServer
from tests.striped_clients import force_stripes

X = np.ones((4, 1, 8, 8), np.float32)
LARGE = np.ones((4, 1, 400, 400), np.float32)
"""A call with it is a stream."""

ELEMENTS = LARGE.tobytes()
W = np.ones((1, 1, 1, 1), np.float32)
GARBAGE = b"\xff\xff\xff"


@pytest.fixture
def hostile(socket_directory: Path) -> Iterator[HostileServer]:
    with HostileServer(socket_directory) as server:
        yield server


def call(
    hostile: HostileServer,
    operate: Callable[[Connection], object],
    transport: str = "grpc",
    /,
    **changes: Part,
) -> None:
    case = Seed("", answer_parts(**changes)).to_case()
    hostile.answers = dict(zip(SLOTS, case.parts, strict=True))
    with deconvd_client.connect(f"unix:{hostile.path}", timeout_s=30, transport=transport) as F:
        operate(F)


def deconvolve(F: Connection) -> object:
    return F.deconvolution_2d(X, W)


def put(F: Connection) -> object:
    return F.put(X)


def test_an_undamaged_answer_is_taken(hostile: HostileServer) -> None:
    call(hostile, lambda F: np.testing.assert_array_equal(F.deconvolution_2d(X, W), X))


@pytest.mark.parametrize(
    ("operate", "changes", "message"),
    [
        (deconvolve, {"Deconvolve": GARBAGE}, "DeconvolveResponse is malformed"),
        (Connection.server_info, {"GetServerInfo": GARBAGE}, "GetServerInfoResponse is malformed"),
        (Connection.health, {"health": GARBAGE}, "HealthCheckResponse is malformed"),
        (
            Connection.health,
            {"health": health_pb2.HealthCheckResponse(status=99)},
            "its status is 99",
        ),
        (put, {"HoldSession": GARBAGE}, "HoldSessionResponse is malformed"),
        (put, {"PutTensor": GARBAGE}, "PutTensorResponse"),
    ],
    ids=["result", "info", "health", "health-status", "session", "put"],
)
def test_a_malformed_answer_is_the_servers_fault(
    hostile: HostileServer,
    operate: Callable[[Connection], object],
    changes: dict[str, Part],
    message: str,
) -> None:
    with pytest.raises(deconvd_client.DeconvdError, match=message):
        call(hostile, operate, **changes)


@pytest.mark.parametrize(
    "y",
    [np.ones((4, 1, 4, 16), np.float32), X.astype(np.float64), np.ones((1,), np.float32)],
    ids=["shape", "element-type", "size"],
)
def test_a_result_must_be_what_was_asked_for(
    hostile: HostileServer, y: np.ndarray[tuple[int, ...], np.dtype[np.floating]]
) -> None:
    response = pb.DeconvolveResponse(y=message_from_array(y))

    with pytest.raises(InternalError, match="y must be float32"):
        call(hostile, deconvolve, Deconvolve=response)


@pytest.mark.parametrize(
    "answer",
    [EndOfStream().pack(), pack_frame(FrameKind.ELEMENTS, b"abcd") + EndOfStream().pack()],
    ids=["nothing", "elements"],
)
def test_a_put_must_be_answered_by_a_message(
    hostile: HostileServer, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    monkeypatch.setattr("deconvd_client.transports.direct.pool._CONNECT_PATIENCE_S", 30.0)

    with pytest.raises(InternalError, match="it must be one message"):
        call(hostile, put, "unix", answer=answer)

    assert hostile.counts["CALL"] == 1


def described(array: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> pb.Tensor:
    return pb.Tensor(element_type=pb.ELEMENT_TYPE_FLOAT32, shape=array.shape)


def large_stream(y: pb.Tensor) -> pb.DeconvolveStreamResponse:
    return pb.DeconvolveStreamResponse(header=pb.DeconvolveResponse(y=y))


def frames(*parts: Message | bytes) -> bytes:
    """Return a streamed response on a direct connection, with elements given as bytes."""
    return b"".join(
        pack_frame(FrameKind.ELEMENTS, part)
        if isinstance(part, bytes)
        else MessagePart(part.SerializeToString()).pack()
        for part in parts
    )


def deconvolve_large(F: Connection) -> object:
    return F.deconvolution_2d(LARGE, W)


def fetch(F: Connection) -> object:
    return F.put(X).numpy()


@pytest.mark.parametrize(
    ("operate", "changes", "message"),
    [
        (deconvolve_large, {"chunk": chunk_to_bytes(ELEMENTS[:-8])}, "8 bytes before y"),
        (deconvolve_large, {"chunk": chunk_to_bytes(ELEMENTS + b"abcd")}, "end with its last"),
        (deconvolve_large, {"DeconvolveStream": b""}, "begin with a header"),
        (deconvolve_large, {"DeconvolveStream": GARBAGE}, "must be a valid"),
        (deconvolve_large, {"DeconvolveStream": large_stream(described(X))}, "y must be float32"),
        (fetch, {"chunk": chunk_to_bytes(b"abcd")}, "1020 bytes before resident"),
        (fetch, {"GetTensor": pb.GetTensorResponse(header=described(W))}, "resident must be"),
    ],
    ids=["short", "long", "headless", "garbage", "other", "short-resident", "other-resident"],
)
def test_a_malformed_stream_is_the_servers_fault_too(
    hostile: HostileServer,
    operate: Callable[[Connection], object],
    changes: dict[str, Part],
    message: str,
) -> None:
    answers: dict[str, Part] = {
        "DeconvolveStream": large_stream(described(LARGE)),
        "chunk": chunk_to_bytes(ELEMENTS),
        **changes,
    }

    with pytest.raises(InternalError, match=f"is malformed.*{message}"):
        call(hostile, operate, **answers)


REFUSAL = status_from_error(InvalidArgumentError("x must be nicer", argument="x"))


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (frames(large_stream(described(LARGE)), b"abcd"), InternalError, "is malformed.*before y"),
        (frames(large_stream(described(X))), InternalError, "is malformed.*y must be float32"),
        (CallFailure(REFUSAL).pack(), InvalidArgumentError, "^x must be nicer$"),
    ],
    ids=["short", "other", "refused"],
)
def test_a_malformed_direct_stream_is_the_servers_fault_and_a_refusal_the_callers(
    hostile: HostileServer,
    monkeypatch: pytest.MonkeyPatch,
    answer: bytes,
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr("deconvd_client.transports.direct.pool._CONNECT_PATIENCE_S", 30.0)

    def operate(F: Connection) -> None:
        with F.using_config("cudnn_deterministic", True):  # a stream, never striped
            deconvolve_large(F)

    with pytest.raises(error, match=message):
        call(hostile, operate, "unix", answer=answer + EndOfStream().pack())

    assert hostile.counts["CALL"] == 1


def test_a_striped_answer_must_describe_what_was_asked_for(
    hostile: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_stripes(monkeypatch, 2)
    whole = np.ones((4, 1, 160, 160), np.float32)
    response = pb.DeconvolveResponse(y=described(X))
    pieces = PieceHead(0).pack() + pack_frame(FrameKind.ELEMENTS, whole.tobytes())

    with pytest.raises(
        InternalError, match=r"is malformed.*y must be float32 of shape \(4, 1, 160"
    ):
        call(
            hostile,
            lambda F: F.deconvolution_2d(whole, W),
            "unix",
            answer=Answer(response.SerializeToString(), "", 4).pack(),
            stripe=pieces + EndOfStream().pack(),
        )

    assert hostile.counts["STRIPED_CALL"] == 1


@pytest.mark.parametrize("lease_s", [0.0, -1.0, 1e-9, float("nan")])
def test_a_lease_must_leave_time_for_heartbeats(hostile: HostileServer, lease_s: float) -> None:
    response = pb.HoldSessionResponse(session=bytes(16), lease_s=lease_s)

    with pytest.raises(InternalError, match="its lease is"):
        call(hostile, put, HoldSession=response)

    assert hostile.counts["heartbeats"] == 0


def test_a_descriptor_that_nobody_asked_for_is_closed(socket_directory: Path) -> None:
    path = str(socket_directory / "memory")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        link = Link(path)
        end, _ = listener.accept()
        with end, Path("/dev/null").open("rb") as file:
            before = len(os.listdir("/proc/self/fd"))
            for _ in range(10):
                socket.send_fds(end, [LendingReply(ReplyStatus.DONE).pack()], [file.fileno()])
                link.give_back(bytes(16))

            assert len(os.listdir("/proc/self/fd")) == before
        link.close()


@pytest.mark.parametrize("path", ["/a\0b", "/" + "x" * 300, "", "/nowhere"])
def test_no_path_of_a_servers_is_too_odd_to_look_for(path: str, tmp_path: Path) -> None:
    info = server_info(shared_memory_socket=path, unix_sockets=[path])

    assert not is_trusted_socket(path)
    assert find_memory_socket(info, str(tmp_path / "deconvd.sock")) == info.shared_memory_socket


def test_an_instance_id_must_be_one() -> None:
    with pytest.raises(InternalError, match="its instance_id is 'no'"):
        instance_of(pb.GetServerInfoResponse(instance_id="no"))
