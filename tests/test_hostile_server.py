"""A client whose server answers nonsense: it raises an InternalError that says so, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from grpc_health.v1 import health_pb2

import deconvd_client
from deconvd.direct.events import EndOfStream, FrameKind, pack_frame
from deconvd.errors import InternalError
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.tensor import message_from_array
from deconvd_client import Connection
from deconvd_client.transports.side_sockets import (
    find_memory_socket,
    instance_of,
    is_trusted_socket,
)
from tests.fuzz.case import Part, Seed
from tests.fuzz.clients import answer_parts
from tests.fuzz.decoders import server_info
from tests.fuzz.hostile_server import SLOTS, HostileServer

X = np.ones((4, 1, 8, 8), np.float32)
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


@pytest.mark.parametrize("lease_s", [0.0, -1.0, 1e-9, float("nan")])
def test_a_lease_must_leave_time_for_heartbeats(hostile: HostileServer, lease_s: float) -> None:
    response = pb.HoldSessionResponse(session=bytes(16), lease_s=lease_s)

    with pytest.raises(InternalError, match="its lease is"):
        call(hostile, put, HoldSession=response)

    assert hostile.counts["heartbeats"] == 0


@pytest.mark.parametrize("path", ["/a\0b", "/" + "x" * 300, "", "/nowhere"])
def test_no_path_of_a_servers_is_too_odd_to_look_for(path: str, tmp_path: Path) -> None:
    info = server_info(shared_memory_socket=path, unix_sockets=[path])

    assert not is_trusted_socket(path)
    assert find_memory_socket(info, str(tmp_path / "deconvd.sock")) == info.shared_memory_socket


def test_an_instance_id_must_be_one() -> None:
    with pytest.raises(InternalError, match="its instance_id is 'no'"):
        instance_of(pb.GetServerInfoResponse(instance_id="no"))
