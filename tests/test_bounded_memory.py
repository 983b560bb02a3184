"""What one client can make a server take of memory: no more than its budgets and what is said here."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

import deconvd_client
from deconvd.errors import DeconvdError, ExhaustedError, UnavailableError
from deconvd.geometry import Geometry
from deconvd.grpc_status import error_from_rpc
from deconvd.messages import message_from_geometry
from deconvd.operation import DECONVOLVE_GRAD, spec_of_field
from deconvd.problem import Problem, TensorSpec
from deconvd.tensor import message_from_array, message_from_spec
from deconvd.v1 import deconvd_pb2 as pb
from tests.direct_calls import W, X, failure, open_line
from tests.processes import memory_bytes, peak_memory_bytes, wait_until
from tests.servers import ServerProcess, server_process
from tests.unread import unread_calls

MIB = 1 << 20
BUDGET_BYTES = 200 * MIB
BESIDE_BYTES = 150 * MIB
"""What a server takes beside its budget: pools of freed memory, and messages that are just arriving."""

ONE = np.ones((1, 1, 1, 1), np.float32)


def answered_with(size_bytes: int) -> pb.DeconvolveRequest:
    """Return a request of some 50 bytes whose y has so many."""
    geometry = Geometry(stride=(1 << 20, 1 << 20), outsize=(size_bytes // 4096, 1024))
    return pb.DeconvolveRequest(
        x=message_from_array(ONE),
        w=message_from_array(ONE),
        geometry=message_from_geometry(geometry),
    )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    options = ("--device-memory-bytes", str(BUDGET_BYTES), "--threads", "2")
    with server_process(tmp_path, *options, listen=("unix", "127.0.0.1:0")) as running:
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
def caller(server: ServerProcess, method: str) -> Iterator[Callable[..., bytes]]:
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(server.target, options=options) as channel:
        yield channel.unary_unary(f"/deconvd.v1.DeconvolutionService/{method}")


def error_of(call: Callable[[], object]) -> DeconvdError:
    """Return what a call by gRPC fails with."""
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return error_from_rpc(raised.value)


def used_bytes(server: ServerProcess) -> int:
    with deconvd_client.connect(server.target, transport="grpc") as F:
        return F.server_info().devices[0].used_bytes


# On the way out


def test_answers_that_nobody_reads_count_until_they_have_left(server: ServerProcess) -> None:
    message = answered_with(32 * MIB).SerializeToString()
    with bounded(server):
        with unread_calls(server.target, 24, message):
            wait_until(lambda: used_bytes(server) > BUDGET_BYTES // 2)
            # who comes next waits until the answers are late, and then has what they held
            begin_s = time.monotonic()
            with caller(server, "Deconvolve") as call:
                for _ in range(3):
                    call(answered_with(16 * MIB).SerializeToString(), timeout=60)
            assert time.monotonic() - begin_s < 30
        wait_until(lambda: used_bytes(server) == 0)


def test_an_answer_that_a_line_cannot_carry_is_not_computed(server: ServerProcess) -> None:
    from deconvd.direct_events import Method
    from tests.direct_calls import send_call

    with bounded(server, 20 * MIB), open_line(server) as line:
        send_call(line, Method.Deconvolve, answered_with(32 * MIB).SerializeToString())
        assert "too many for a message of a direct call" in str(failure(line))


# On the way in


def test_what_waits_is_bounded_by_its_bytes(server: ServerProcess) -> None:
    x = np.ones((1, 1, 2048, 2048), np.float32)
    large = pb.DeconvolveRequest(x=message_from_array(x), w=message_from_array(ONE))
    large.geometry.pad.h = large.geometry.pad.w = 1023
    message = large.SerializeToString()
    hog = answered_with(60 * MIB).SerializeToString()
    with (
        bounded(server),
        unread_calls(server.target, 8, hog),
        caller(server, "Deconvolve") as call,
    ):
        wait_until(lambda: used_bytes(server) > BUDGET_BYTES // 2)
        waiting = [call.future(message, timeout=100) for _ in range(20)]
        refused = [
            future for future in waiting if isinstance(error_of(future.result), UnavailableError)
        ]
        assert len(refused) > 10
        assert any("calls that wait have brought" in future.details() for future in refused)
