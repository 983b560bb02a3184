"""Direct calls: those of processes on the server's host, without gRPC."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deconvd_client
from deconvd.direct import MAX_PACKET_BYTES, Method, Outcome, Reply, Request, calls_beside
from deconvd.errors import CallCancelledError, DeadlineError, InvalidArgumentError, UnavailableError
from deconvd.status import error_from_status, told_as_status
from deconvd.tensor import message_from_array
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client import Connection
from deconvd_client.direct import DirectLines
from tests.servers import ServerProcess, server_process

X = np.arange(36, dtype=np.float32).reshape(1, 4, 3, 3)
W = np.ones((4, 2, 2, 2), np.float32)
REQUEST = pb.DeconvolveRequest(x=message_from_array(X), w=message_from_array(W))
SLOW = np.ones((1, 64, 160, 160), np.float32), np.ones((64, 64, 9, 9), np.float32)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[ServerProcess]:
    with server_process(tmp_path, "--log-level", "debug") as server:
        yield server


@pytest.fixture
def path(running: ServerProcess) -> str:
    return calls_beside(running.target.removeprefix("unix:"))


def is_direct(server: ServerProcess) -> bool:
    """Return whether a call was made directly; gRPC's peers have no process id."""
    return "Deconvolve from unix: process" in server.log.read_text()


def open_line(path: str) -> socket.socket:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line.settimeout(30)
    line.connect(path)
    return line


def answer(line: socket.socket, request: Request) -> Reply:
    line.send(request.pack())
    return Reply.parse(line.recv(MAX_PACKET_BYTES))


def test_small_calls_are_direct_and_equal_to_those_by_grpc(running: ServerProcess) -> None:
    rng = np.random.default_rng(0)
    b = rng.standard_normal(2)
    for dtype in (np.float16, np.float32, np.float64):
        x, filters = rng.standard_normal((2, 4, 5, 6)), rng.standard_normal((4, 2, 3, 2))
        x_, W_, b_ = (array.astype(dtype) for array in (x, filters, b))
        with deconvd_client.connect(running.target) as F:
            y = F.deconvolution_2d(x_, W_, b_, stride=2)
            gradients = F.deconvolution_2d_grad(x_, W_, b_, y, stride=2)
            assert F.last_ledger["server_us"] > 0
        with deconvd_client.connect(running.target, max_message_bytes=MAX_PACKET_BYTES - 1) as F:
            np.testing.assert_array_equal(y, F.deconvolution_2d(x_, W_, b_, stride=2))
            others = F.deconvolution_2d_grad(x_, W_, b_, y, stride=2)
        for gradient, other in zip(gradients, others, strict=True):
            assert gradient is not None
            assert other is not None
            np.testing.assert_array_equal(gradient, other)

    assert is_direct(running)
    assert "DeconvolveGrad from unix: process" in running.log.read_text()


def test_calls_whose_tensors_are_in_shared_memory_are_direct(running: ServerProcess) -> None:
    x = np.random.default_rng(0).standard_normal((4, 4, 128, 128), np.float32)
    with deconvd_client.connect(running.target) as F:
        y = F.deconvolution_2d(x, W)
    with deconvd_client.connect(running.target, transport="unix") as F:
        np.testing.assert_array_equal(y, F.deconvolution_2d(x, W))

    assert is_direct(running)


def test_a_server_on_tcp_alone_is_called_by_grpc(tmp_path: Path) -> None:
    with server_process(tmp_path, "--log-level", "debug", listen=("127.0.0.1:0",)) as server:
        with deconvd_client.connect(server.target) as F:
            F.deconvolution_2d(X, W)

        assert not is_direct(server)


def test_errors_come_back_as_they_were(running: ServerProcess, path: str) -> None:
    wrong = pb.DeconvolveRequest(x=REQUEST.x, w=message_from_array(W[:3]))
    lines = DirectLines(path)
    for message in (wrong.SerializeToString(), b"\xff" * 40):
        with pytest.raises(InvalidArgumentError) as raised:
            lines.call(Method.DECONVOLVE, message, 30)
    assert "not a valid deconvd.v1.DeconvolveRequest" in str(raised.value)
    reply = lines.call(Method.DECONVOLVE, REQUEST.SerializeToString(), 30)
    assert reply is not None
    assert pb.DeconvolveResponse.FromString(reply.message).y.shape == [1, 2, 4, 4]
    lines.close()


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgumentError("x is wrong", argument="x"),
        UnavailableError("full", retry_after_s=0.25),
        CallCancelledError("gone"),
        DeadlineError("late"),
    ],
)
def test_an_error_survives_its_status(error: deconvd_client.DeconvdError) -> None:
    told = error_from_status(told_as_status(error))

    assert type(told) is type(error)
    assert str(told) == str(error)
    assert vars(told) == vars(error)


def test_a_response_too_large_for_a_packet_is_refused_and_made_by_grpc(
    running: ServerProcess, path: str
) -> None:
    one, wide = np.ones((1, 1, 1, 1), np.float32), np.ones((1, 1, 256, 256), np.float32)
    request = pb.DeconvolveRequest(x=message_from_array(one), w=message_from_array(one))
    request.geometry.stride.h = request.geometry.stride.w = 256
    request.geometry.outsize.h = request.geometry.outsize.w = 256
    lines = DirectLines(path)
    with pytest.raises(deconvd_client.ExhaustedError, match="too many for a direct call"):
        lines.call(Method.DECONVOLVE, request.SerializeToString(), 30)
    lines.close()
    with deconvd_client.connect(running.target, transport="unix") as F:
        assert F.deconvolution_2d(wide, one).shape == (1, 1, 256, 256)


def test_a_deadline_is_kept_and_the_line_still_serves(running: ServerProcess, path: str) -> None:
    slow = pb.DeconvolveRequest(x=REQUEST.x, w=REQUEST.w)
    with open_line(path) as line:
        reply = answer(line, Request(Method.DECONVOLVE, 0.0, slow.SerializeToString()))
        assert reply.outcome is Outcome.FAILED
        assert b"DeadlineError" in reply.message
        reply = answer(line, Request(Method.DECONVOLVE, 30.0, slow.SerializeToString()))
        assert reply.outcome is Outcome.ANSWERED
    with deconvd_client.connect(running.target, timeout_s=0.2) as F:
        with pytest.raises(DeadlineError):
            F.deconvolution_2d(*SLOW)
    _wait_until_idle(running)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(min_size=1, max_size=200), as_request=st.booleans())
def test_packets_that_make_no_sense_hurt_nobody(
    running: ServerProcess, path: str, data: bytes, as_request: bool
) -> None:
    packet = Request(Method.DECONVOLVE_GRAD, 5.0, data).pack() if as_request else data
    with open_line(path) as line:
        line.send(packet)
        try:
            reply = line.recv(MAX_PACKET_BYTES)
        except ConnectionResetError:
            reply = b""
    assert not reply or Reply.parse(reply).outcome is Outcome.FAILED
    with open_line(path) as line:
        good = Request(Method.DECONVOLVE, 30.0, REQUEST.SerializeToString())
        assert answer(line, good).outcome is Outcome.ANSWERED


def test_a_client_that_goes_has_its_call_cancelled(running: ServerProcess) -> None:
    child = os.fork()
    if not child:
        with deconvd_client.connect(running.target) as F:
            F.deconvolution_2d(*SLOW)
        os._exit(0)
    with deconvd_client.connect(running.target) as F:
        while not F.server_info().devices[0].running_calls_count:
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    _wait_until_idle(running)
    assert "the caller gave the call up" in running.log.read_text()


def test_a_drain_lets_calls_end_and_takes_no_more(running: ServerProcess) -> None:
    with deconvd_client.connect(running.target) as F, ThreadPoolExecutor(1) as pool:
        F.deconvolution_2d(X, W)
        slow = pool.submit(F.deconvolution_2d, *SLOW)
        while not F.server_info().devices[0].running_calls_count:
            time.sleep(0.01)
        running.process.send_signal(signal.SIGTERM)
        assert slow.result().shape == (1, 64, 168, 168)
        assert running.process.wait(30) == 0
    assert not Path(calls_beside(running.target.removeprefix("unix:"))).exists()


def test_a_client_that_reads_no_answers_keeps_no_server_from_ending(tmp_path: Path) -> None:
    x = np.ones((1, 1, 120, 120), np.float32)
    request = pb.DeconvolveRequest(x=message_from_array(x), w=message_from_array(x[:, :, :1, :1]))
    packet = Request(Method.DECONVOLVE, 60.0, request.SerializeToString()).pack()
    with server_process(tmp_path, "--drain-timeout-s", "1") as server:
        with open_line(calls_beside(server.target.removeprefix("unix:"))) as line:
            line.settimeout(2)
            with suppress(TimeoutError):  # once the server waits for its answers to be read
                while True:
                    line.send(packet)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(20) == 0


def test_a_server_that_lets_nobody_in_is_called_in_another_way(tmp_path: Path) -> None:
    path = str(tmp_path / "calls")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stopped:
        stopped.bind(path)
        stopped.listen(0)
        with ExitStack() as waiting:
            with suppress(BlockingIOError):
                while True:  # until there is no room to wait in
                    other = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                    waiting.enter_context(other).setblocking(False)
                    other.connect(path)
            assert DirectLines(path).call(Method.DECONVOLVE, b"", 30.0) is None


def test_closing_the_connection_ends_calls(running: ServerProcess) -> None:
    F = deconvd_client.connect(running.target)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(F.deconvolution_2d, *SLOW)
        while not F.server_info().devices[0].running_calls_count:
            time.sleep(0.01)
        F.close()
        with pytest.raises(CallCancelledError):
            slow.result()
    with pytest.raises(CallCancelledError):
        F.deconvolution_2d(X, W)


def test_a_restarted_server_is_called_directly_again(tmp_path: Path) -> None:
    with server_process(tmp_path) as server:
        F = deconvd_client.connect(server.target)
        F.deconvolution_2d(X, W)
    with F, server_process(tmp_path, "--log-level", "debug") as server:
        F.deconvolution_2d(X, W)  # whose line has been lost
        F.deconvolution_2d(X, W)

        assert is_direct(server)


def test_a_forked_child_has_lines_of_its_own(running: ServerProcess) -> None:
    with deconvd_client.connect(running.target) as F:
        lines = DirectLines(calls_beside(running.target.removeprefix("unix:")))
        request = REQUEST.SerializeToString()
        assert lines.call(Method.DECONVOLVE, request, 30) is not None
        child = os.fork()
        if not child:
            replies = [lines.call(Method.DECONVOLVE, request, 30) for _ in range(200)]
            os._exit(0 if all(replies) else 1)
        replies = [lines.call(Method.DECONVOLVE, request, 30) for _ in range(200)]
        _, status = os.waitpid(child, 0)
        lines.close()
        assert F.deconvolution_2d(X, W).shape == (1, 2, 4, 4)
    assert status == 0
    assert all(reply is not None and reply.outcome is Outcome.ANSWERED for reply in replies)


def test_many_threads_share_a_connection(F: Connection) -> None:
    def calls(seed: int) -> set[float]:
        x = np.full((1, 4, 3, 3), seed, np.float32)
        return {F.deconvolution_2d(x, W)[0, 0, 1, 1] for _ in range(50)}

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(calls, range(20))) == [{16 * seed} for seed in range(20)]


def _wait_until_idle(server: ServerProcess) -> None:
    with deconvd_client.connect(server.target) as F:
        give_up_s = time.monotonic() + 30
        while (load := F.server_info().devices[0]).running_calls_count or load.used_bytes:
            assert time.monotonic() < give_up_s
            time.sleep(0.02)
