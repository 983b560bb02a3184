"""What one client can make a server take of memory: no more than its budgets and what is said here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

import deconvd_client
from deconvd.direct.events import MethodCode
from deconvd.errors import DeconvdError, ExhaustedError, UnavailableError
from deconvd.model.geometry import Geometry
from deconvd.model.problem import Problem, TensorSpec
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.grpc_status import error_from_rpc
from deconvd.wire.messages import message_from_geometry
from deconvd.wire.tensor import message_from_array, message_from_spec
from deconvd_client.server_info import DeviceDescription
from tests.direct_calls import open_stream, receive_failure, send_call
from tests.processes import limit_address_space, memory_bytes, peak_memory_bytes, wait_until
from tests.servers import ServerProcess, server_process
from tests.soak.hostile.http2 import Http2
from tests.soak.places import connect_tcp
from tests.unread import leave_calls_unread

MIB = 1 << 20
BUDGET_BYTES = 200 * MIB
BESIDE_BYTES = 150 * MIB
"""What a server takes beside its budget: pools of freed memory, and messages that are just arriving."""

DECONVOLVE = "/deconvd.v1.DeconvolutionService/Deconvolve"
ONE = np.ones((1, 1, 1, 1), np.float32)


def answered_with(size_bytes: int, *, waits: bool = False) -> pb.DeconvolveRequest:
    """Return a request of some 50 bytes whose y has so many. `waits`: whether it would wait for others for long."""
    geometry = Geometry(stride=(1 << 20, 1 << 20), outsize=(size_bytes // 4096, 1024))
    return pb.DeconvolveRequest(
        x=message_from_array(ONE),
        w=message_from_array(ONE),
        geometry=message_from_geometry(geometry),
        waits=waits,
    )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    options = ("--device-memory-bytes", str(BUDGET_BYTES), "--threads", "2")
    # so that no answer is cut before a test on a busy machine has seen it
    constants = {"deconvd_server.transports.grpc.server:STALL_LIMIT_S": 300.0}
    listen = ("unix", "127.0.0.1:0")
    with server_process(tmp_path, *options, listen=listen, constants=constants) as running:
        yield running


@contextmanager
def bounded(
    server: ServerProcess, limit_bytes: int = BUDGET_BYTES + BESIDE_BYTES
) -> Iterator[None]:
    """Fail if a server ever takes much more in the block than before."""
    first_bytes = memory_bytes(server.process.pid)
    yield
    grown_bytes = peak_memory_bytes(server.process.pid) - first_bytes
    assert grown_bytes < limit_bytes, f"{grown_bytes >> 20} MiB"


@contextmanager
def caller(target: str, method: str) -> Iterator[grpc.UnaryUnaryMultiCallable[bytes, bytes]]:
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(target, options=options) as channel:
        yield channel.unary_unary(f"/deconvd.v1.DeconvolutionService/{method}")


def error_of(call: Callable[[], object]) -> DeconvdError:
    """Return what a call by gRPC fails with."""
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return error_from_rpc(raised.value)


def device_of(server: ServerProcess) -> DeviceDescription:
    with deconvd_client.connect(server.target, transport="grpc") as F:
        return F.server_info().devices[0]


def used_bytes(server: ServerProcess) -> int:
    return device_of(server).used_bytes


# On the way out


def test_answers_that_nobody_reads_count_until_they_have_left(server: ServerProcess) -> None:
    message = answered_with(32 * MIB).SerializeToString()
    with bounded(server):
        with leave_calls_unread(server.target, 24, message):
            wait_until(lambda: used_bytes(server) >= 2 * 32 * MIB)
            # another peer is served meanwhile
            with caller(server.targets[1], "Deconvolve") as call:
                for _ in range(6):
                    call(answered_with(16 * MIB, waits=True).SerializeToString(), timeout=20)
            assert used_bytes(server) >= 2 * 32 * MIB
        wait_until(lambda: used_bytes(server) == 0)


def test_small_answers_that_nobody_reads_keep_nobody_waiting(server: ServerProcess) -> None:
    message = answered_with(100 << 10).SerializeToString()
    _, port = server.targets[1].rsplit(":")
    with bounded(server), ExitStack() as held:
        for _ in range(6):
            connection = held.enter_context(
                Http2(connect_tcp(int(port), "127.0.0.2"), answer_bytes=0)
            )
            for _ in range(500):
                connection.call(DECONVOLVE, message)
        wait_until(lambda: used_bytes(server) > BUDGET_BYTES // 4)
        with caller(server.targets[1], "Deconvolve") as call:
            until_s = time.monotonic() + 4
            while time.monotonic() < until_s:
                call(answered_with(16 * MIB, waits=True).SerializeToString(), timeout=20)
        assert used_bytes(server) > BUDGET_BYTES // 4
    wait_until(lambda: used_bytes(server) == 0)


def test_an_answer_that_nobody_reads_is_cut_in_the_end(tmp_path: Path) -> None:
    constants = {
        "deconvd_server.transports.grpc.server:STALL_LIMIT_S": 1.0,
        "deconvd_server.transports.grpc.server:_SLOWEST_BYTES_PER_S": 1e9,
    }
    message = answered_with(64 * MIB).SerializeToString()
    with (
        server_process(tmp_path, constants=constants) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        first_bytes = memory_bytes(server.process.pid)
        call: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(DECONVOLVE)
        unread = [
            call(message) for _ in range(6)
        ]  # as long as nobody asks for a message, none comes
        wait_until(lambda: memory_bytes(server.process.pid) > first_bytes + 400 * MIB)
        wait_until(lambda: used_bytes(server) == 0)
        wait_until(lambda: memory_bytes(server.process.pid) < first_bytes + 300 * MIB)
        for answers in unread:
            answers.cancel()


def test_a_peer_that_reads_its_answers_gets_all_of_them(server: ServerProcess) -> None:
    message = answered_with(32 * MIB, waits=True).SerializeToString()
    with bounded(server), caller(server.target, "Deconvolve") as call:
        answers = [call.future(message, timeout=60) for _ in range(12)]
        for answer in answers:
            assert len(answer.result()) > 32 * MIB
    wait_until(lambda: used_bytes(server) == 0)


def test_an_answer_that_a_line_cannot_carry_is_not_computed(server: ServerProcess) -> None:
    with bounded(server, 20 * MIB), open_stream(server) as line:
        send_call(line, MethodCode.Deconvolve, answered_with(32 * MIB).SerializeToString())
        assert "too many for a message of a direct call" in str(receive_failure(line))


# On the way in


def test_what_waits_is_bounded_by_its_bytes(server: ServerProcess) -> None:
    large = pb.DeconvolveRequest(
        x=message_from_array(np.ones((1, 1, 1408, 2048), np.float32)),  # 11 MiB
        w=message_from_array(ONE),
        geometry=message_from_geometry(Geometry(pad=(703, 1023))),
        waits=True,
    )
    message = large.SerializeToString()
    hog = answered_with(32 * MIB).SerializeToString()
    with (
        bounded(server, BUDGET_BYTES + BUDGET_BYTES // 4 + BESIDE_BYTES),
        leave_calls_unread(server.target, 1, hog),
        caller(server.target, "Deconvolve") as call,
    ):
        wait_until(lambda: used_bytes(server) >= 2 * 32 * MIB)
        # Of the peer that has its share already: they wait for ever. With a third, the peer would have more than half.
        waiting = [call.future(message, timeout=30) for _ in range(2)]
        wait_until(lambda: device_of(server).waiting_calls_count == 2)
        for _ in range(6):
            error = error_of(lambda: call(message, timeout=20))
            assert isinstance(error, UnavailableError)
            assert "calls that wait have sent" in str(error)
        for future in waiting:
            future.cancel()


# Tensors


HUGE = Problem(
    TensorSpec((0, 0, 1, 1), np.dtype(np.float32)),
    TensorSpec((0, 1 << 26, 1, 1), np.dtype(np.float32)),
    Geometry(),
)
"""Without an element, but for a bias of 256 MiB."""


def test_results_count_where_nothing_else_has_elements(server: ServerProcess) -> None:
    request = pb.DeconvolveGradRequest(
        x=message_from_spec(HUGE.x),
        w=message_from_spec(HUGE.W),
        gy=message_from_array(np.empty(HUGE.y.shape, np.float32)),
        wanted=pb.GradientMask(gb=True),
    )
    with bounded(server, BESIDE_BYTES), caller(server.target, "DeconvolveGrad") as call:
        error = error_of(lambda: call(request.SerializeToString(), timeout=20))
    assert isinstance(error, ExhaustedError)
    assert f"of which calls may take {BUDGET_BYTES}" in str(error)


@pytest.mark.parametrize("spare_bytes", [50 * MIB, 200 * MIB], ids=["for y", "to encode it"])
def test_a_shortage_is_told_to_the_caller_that_meets_it(tmp_path: Path, spare_bytes: int) -> None:
    nothing = np.ones(
        (1, 0, 8192, 4096), np.float32
    )  # and so nothing is computed, but y has 128 MiB
    request = pb.DeconvolveRequest(
        x=message_from_array(nothing),
        w=message_from_array(np.ones((0, 1, 1, 1), np.float32)),
    )
    with server_process(tmp_path) as server, caller(server.target, "Deconvolve") as call:
        call(answered_with(1 * MIB).SerializeToString(), timeout=20)
        limit_address_space(server.process.pid, spare_bytes)
        error = error_of(lambda: call(request.SerializeToString(), timeout=20))
        assert isinstance(error, ExhaustedError), error
        assert "memory" in str(error)
        call(answered_with(1 * MIB).SerializeToString(), timeout=20)
        assert "Traceback" not in server.log.read_text()
