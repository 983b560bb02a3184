"""Direct calls: those without gRPC, by a Unix socket or over TCP."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deconvd_client
from deconvd.direct.connection_errors import ConnectionBrokenError
from deconvd.direct.events import (
    ANY_INSTANCE,
    Answer,
    CallFailure,
    CallHead,
    EndOfStream,
    FrameKind,
    Hello,
    MethodCode,
    pack_frame,
)
from deconvd.direct.frame_stream import FrameSource, FrameStream
from deconvd.errors import (
    CallCancelledError,
    DeadlineError,
    ExhaustedError,
    InvalidArgumentError,
    UnavailableError,
)
from deconvd.model.problem import TensorSpec, spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.status import error_from_status, status_from_error
from deconvd.wire.stream_parts import ElementsPart, PartReader, PendingElements, elements_part
from deconvd.wire.tensor import message_from_array, message_from_spec
from deconvd_client import Connection
from deconvd_client.calls.transport import NotServedDirectlyError, StreamAttempt
from deconvd_client.transports.direct import connectors, pool
from deconvd_client.transports.direct.connectors import TcpConnector, UnixConnector, connector_for
from deconvd_client.transports.direct.pool import DirectTransport
from deconvd_server.exit_codes import ExitCode
from tests.deadlines import short_deadline
from tests.direct_calls import (
    REQUEST,
    W,
    X,
    calls_path,
    get_server_info,
    is_serving,
    open_stream,
    open_with_retries,
    receive_answer,
    receive_failure,
    send_call,
    target_of,
    wait_until_idle,
)
from tests.fault_proxy import CLEAN, faulty_proxy
from tests.processes import (
    end_forked_child,
    peak_memory_bytes,
    process_resources,
    processor_s,
    wait_until,
)
from tests.servers import ServerProcess, server_process
from tests.stream_pairs import client_stream, send_raw, server_stream

ONE = np.ones((1, 1, 1, 1), np.float32)
SLOW = np.ones((1, 64, 160, 160), np.float32), np.ones((64, 64, 9, 9), np.float32)
ENDLESS = np.ones((1, 256, 160, 160), np.float32), np.ones((256, 256, 9, 9), np.float32)
"""Longer than a test needs to break it off, and cancelled between steps that are short."""

LARGE = np.random.default_rng(0).integers(-3, 4, (40, 1, 256, 256)).astype(np.float32)
TRANSPORTS = pytest.mark.parametrize("transport", ["unix", "tcp"])


@pytest.fixture
def running(tmp_path: Path) -> Iterator[ServerProcess]:
    with server_process(tmp_path, "--log-level", "debug", listen=("unix", "127.0.0.1:0")) as server:
        yield server


def direct_calls(server: ServerProcess, transport: str) -> set[str]:
    """Return the names of the methods that were called directly."""
    mark = {"unix": " from unix: process", "tcp": " from tcp: 127.0.0.1:"}[transport]
    lines = server.log.read_text().splitlines()
    return {line.split(mark)[0].split()[-1] for line in lines if mark in line and "begun" in line}


def until_direct(F: Connection, server: ServerProcess, transport: str) -> None:
    """Call until a call was made directly: the first may come before there is a line."""

    def is_direct() -> bool:
        F.deconvolution_2d(X, W)
        return bool(direct_calls(server, transport))

    wait_until(is_direct)


@TRANSPORTS
def test_direct_calls_equal_those_by_grpc(running: ServerProcess, transport: str) -> None:
    rng = np.random.default_rng(0)
    b = rng.standard_normal(2)
    with (
        deconvd_client.connect(target_of(running, transport), transport=transport) as F,
        deconvd_client.connect(running.target, transport="grpc") as by_grpc,
    ):
        until_direct(F, running, transport)
        # in a message, in a stream of one slice, in one of several
        for n, size in ((1, 6), (40, 36), (400, 36)):
            for dtype in (np.float16, np.float32, np.float64):
                x, filters = rng.standard_normal((n, 4, size, 7)), rng.standard_normal((4, 2, 3, 2))
                x_, W_, b_ = (array.astype(dtype) for array in (x, filters, b))
                y = F.deconvolution_2d(x_, W_, b_, stride=2)
                assert F.last_ledger["server_us"] > 0
                np.testing.assert_allclose(
                    y, by_grpc.deconvolution_2d(x_, W_, b_, stride=2), rtol=1e-2, atol=1e-2
                )
                gy = (rng.standard_normal(y.shape) / 16).astype(dtype)
                gradients = F.deconvolution_2d_grad(x_, W_, b_, gy, stride=2)
                others = by_grpc.deconvolution_2d_grad(x_, W_, b_, gy, stride=2)
                for gradient, other in zip(gradients, others, strict=True):
                    assert gradient is not None
                    assert other is not None
                    error = np.abs(gradient.astype(float) - other.astype(float)).max()
                    assert error <= 0.02 * np.abs(other.astype(float)).max()
        assert "has ended" not in running.log.read_text()  # each call leaves its line in order

    streams = {"DeconvolveStream", "DeconvolveGradStream"}
    assert direct_calls(running, transport) == {"Deconvolve", "DeconvolveGrad"} | streams


@TRANSPORTS
def test_tensors_are_kept_and_fetched_directly(running: ServerProcess, transport: str) -> None:
    with deconvd_client.connect(target_of(running, transport), transport=transport) as F:
        until_direct(F, running, transport)
        kept = F.put(LARGE)
        for _ in range(3):
            np.testing.assert_array_equal(F.deconvolution_2d(kept, 2 * ONE), 2 * LARGE)
            np.testing.assert_array_equal(kept.numpy(), LARGE)
        assert "has ended" not in running.log.read_text()  # each call leaves its line in order

    assert {"PutTensor", "GetTensor"} <= direct_calls(running, transport)


def test_content_that_the_server_lacks_is_sent_once(running: ServerProcess) -> None:
    wide = np.random.default_rng(0).standard_normal((1, 256, 16, 16)).astype(np.float32)
    x = np.ones((6, 1, 8, 8), np.float32)
    target = target_of(running, "tcp")
    with deconvd_client.connect(target, transport="tcp", tenant_key="k") as F:
        until_direct(F, running, "tcp")
        y = F.deconvolution_2d(x, wide)
        with deconvd_client.connect(target, transport="tcp", tenant_key="k") as other:
            np.testing.assert_array_equal(other.deconvolution_2d(x, wide), y)


def test_calls_whose_tensors_are_in_shared_memory_are_direct(running: ServerProcess) -> None:
    x = np.random.default_rng(0).standard_normal((4, 4, 128, 128), np.float32)
    with deconvd_client.connect(running.target) as F:
        y = F.deconvolution_2d(x, W)
    assert direct_calls(running, "unix") == {"Deconvolve"}
    with deconvd_client.connect(running.target, transport="grpc") as F:
        np.testing.assert_array_equal(y, F.deconvolution_2d(x, W))


def test_a_connection_can_keep_to_grpc(running: ServerProcess) -> None:
    for target in running.targets:
        with deconvd_client.connect(target, transport="grpc") as F:
            for x in (X, np.ones((40, 4, 64, 64), np.float32)):
                F.deconvolution_2d(x, W)

    assert not direct_calls(running, "unix")
    assert not direct_calls(running, "tcp")


def test_a_server_can_keep_to_grpc(tmp_path: Path) -> None:
    with server_process(
        tmp_path, "--no-direct-calls", "--log-level", "debug", listen=("unix", "127.0.0.1:0")
    ) as server:
        for transport in ("unix", "tcp"):
            with deconvd_client.connect(target_of(server, transport), transport=transport) as F:
                F.deconvolution_2d(X, W)
                np.testing.assert_array_equal(F.deconvolution_2d(LARGE, ONE), LARGE)
            assert not direct_calls(server, transport)
        assert get_server_info(server).direct_port == 0


def test_a_server_listens_where_it_is_told_to(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "deconvd_server", "--device", "cpu"]
        command += ["--listen", "127.0.0.1:0", "--direct-port", str(port)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 1
        assert (
            "cannot listen for direct calls (--direct-port): Address already in use: "
            f"'port {port}'" in ended.stderr
        )
    with server_process(
        tmp_path, "--direct-port", str(port), listen=("127.0.0.1:0", "localhost:0")
    ) as server:
        assert get_server_info(server).direct_port == port
        for target in server.targets:
            way = connector_for(target)
            assert way is not None
            assert is_serving(open_with_retries(way, lambda: get_server_info(server)))


@pytest.mark.parametrize(
    ("target", "way"),
    [
        ("host:1", TcpConnector("host")),
        ("127.0.0.1:1", TcpConnector("127.0.0.1")),
        ("[::1]:1", TcpConnector("::1")),
        ("dns:host:1", TcpConnector("host")),
        ("dns:///host.name:1", TcpConnector("host.name")),
        ("ipv4:1.2.3.4:1", TcpConnector("1.2.3.4")),
        ("ipv6:[::1]:1", TcpConnector("::1")),
        ("ipv4:1.2.3.4:1,1.2.3.5:1", None),
        ("dns://8.8.8.8/host:1", None),
        ("unix:a/b", UnixConnector("a/b")),
        ("unix:///a/b", UnixConnector("/a/b")),
    ],
)
def test_the_way_is_that_of_the_target(target: str, way: object) -> None:
    assert connector_for(target) == way


@TRANSPORTS
def test_errors_come_back_as_they_were(running: ServerProcess, transport: str) -> None:
    wrong = pb.DeconvolveRequest(x=REQUEST.x, w=message_from_array(W[:3]))
    way = connector_for(target_of(running, transport))
    assert way is not None
    lines = DirectTransport(way, lambda: get_server_info(running))
    wait_until(lambda: _gets_line(lines))
    for message in (wrong.SerializeToString(), b"\xff" * 40):
        with pytest.raises(InvalidArgumentError) as raised:
            lines.unary("Deconvolve", message, short_deadline())
    assert "not a valid deconvd.v1.DeconvolveRequest" in str(raised.value)
    message, ledger = lines.unary("Deconvolve", REQUEST.SerializeToString(), short_deadline())
    assert pb.DeconvolveResponse.FromString(message).y.shape == [1, 2, 4, 4]
    assert "server_us=" in ledger
    lines.close()


def _gets_line(lines: DirectTransport) -> bool:
    try:
        lines.unary("Deconvolve", REQUEST.SerializeToString(), short_deadline())
    except NotServedDirectlyError:
        return False
    return True


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
    told = error_from_status(status_from_error(error))

    assert type(told) is type(error)
    assert str(told) == str(error)
    assert vars(told) == vars(error)


def test_a_response_too_large_for_a_message_is_refused_and_streams(running: ServerProcess) -> None:
    wide = np.ones((1, 1, 256, 256), np.float32)
    request = pb.DeconvolveRequest(x=message_from_array(ONE), w=message_from_array(ONE))
    request.geometry.stride.h = request.geometry.stride.w = 256
    request.geometry.outsize.h = request.geometry.outsize.w = 256
    line = open_stream(running)
    send_call(line, MethodCode.Deconvolve, request.SerializeToString())
    assert "too many for a message of a direct call" in str(receive_failure(line))
    assert is_serving(line)
    line.close()
    with deconvd_client.connect(running.target, transport="unix") as F:
        assert F.deconvolution_2d(wide, ONE).shape == (1, 1, 256, 256)


@TRANSPORTS
def test_a_deadline_is_kept_and_the_line_still_serves(
    running: ServerProcess, transport: str
) -> None:
    line = open_stream(running, transport)
    send_call(line, MethodCode.Deconvolve, REQUEST.SerializeToString(), timeout_s=0)
    assert isinstance(receive_failure(line), DeadlineError)
    send_call(line, MethodCode.Deconvolve, REQUEST.SerializeToString(), timeout_s=1e12)
    assert isinstance(receive_answer(line), Answer)
    assert is_serving(line)
    line.close()
    with deconvd_client.connect(
        target_of(running, transport), timeout_s=0.2, transport=transport
    ) as F:
        with suppress(DeadlineError):
            until_direct(F, running, transport)
        with pytest.raises(DeadlineError):
            F.deconvolution_2d(*ENDLESS)
    wait_until_idle(running)


FRAMES = st.lists(
    st.tuples(st.sampled_from(FrameKind), st.binary(max_size=300)), min_size=1, max_size=5
)
METHODS = st.sampled_from(MethodCode)


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=200) | FRAMES, method=METHODS, begins=st.booleans())
def test_frames_that_make_no_sense_hurt_nobody(
    running: ServerProcess,
    data: bytes | list[tuple[FrameKind, bytes]],
    method: MethodCode,
    begins: bool,
) -> None:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.fspath(calls_path(running)))
    line = client_stream(connection)
    line.set_deadline(30)
    with suppress(ConnectionBrokenError):
        if begins:
            line.send(Hello(ANY_INSTANCE))
            line.next_event()
            message = data if isinstance(data, bytes) else data[0][1]
            send_call(line, method, message, timeout_s=5)
        if isinstance(data, bytes):
            send_raw(line, data)
        else:
            send_raw(line, b"".join(pack_frame(kind, payload) for kind, payload in data))
        line.half_close_and_drain(30)
    line.close()
    other = open_stream(running)
    assert is_serving(other)
    other.close()
    assert "unforeseen" not in running.log.read_text()


def header(x: TensorSpec, slice_samples_count: int = 1) -> bytes:
    request = pb.DeconvolveRequest(x=message_from_spec(x), w=message_from_array(ONE))
    request.w.ClearField("raw")
    return pb.DeconvolveStreamRequest(
        header=pb.DeconvolveStreamHeader(request=request, slice_samples_count=slice_samples_count)
    ).SerializeToString()


def reader_of(line: FrameStream) -> PartReader[pb.DeconvolveStreamResponse]:
    response_type = pb.DeconvolveStreamResponse
    return PartReader(FrameSource(line, response_type), response_type)


@TRANSPORTS
def test_y_flows_back_while_x_is_still_coming(running: ServerProcess, transport: str) -> None:
    x = LARGE[:4]
    line = open_stream(running, transport)
    line.set_deadline(60)
    send_call(line, MethodCode.DeconvolveStream, header(spec_of(x)))
    line.send_part(elements_part(ONE))
    line.send_part(elements_part(x[:3]))
    reader = reader_of(line)
    reader.read_header()
    np.testing.assert_array_equal(reader.read("y", spec_of(x[:1])), x[:1])
    line.send_part(elements_part(x[3:]))
    line.send(EndOfStream())
    np.testing.assert_array_equal(reader.read("y", spec_of(x[1:])), x[1:])
    reader.expect_end()
    assert is_serving(line)
    line.close()


@TRANSPORTS
def test_a_stream_that_fails_is_said_before_it_is_whole(
    running: ServerProcess, transport: str
) -> None:
    with open_stream(running, transport) as line:
        line.set_deadline(60)
        send_call(line, MethodCode.DeconvolveStream, header(spec_of(X)))  # c_I is not that of W
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(_send_for_ever, line)
            with pytest.raises(InvalidArgumentError, match="as many input channels"):
                reader_of(line).read_header()
            line.shutdown()
            sending.result()
    wait_until_idle(running)


def _send_for_ever(line: FrameStream) -> None:
    with suppress(ConnectionBrokenError):
        while True:
            line.send_part(elements_part(LARGE))


@TRANSPORTS
def test_more_or_less_than_the_tensors_is_refused(running: ServerProcess, transport: str) -> None:
    for surplus, message in ((-4, "4 bytes before x is complete"), (4, "end with its last tensor")):
        with open_stream(running, transport) as line:
            line.set_deadline(60)
            send_call(line, MethodCode.DeconvolveStream, header(spec_of(LARGE[:1])))
            elements = ONE.tobytes() + LARGE[:1].tobytes() + bytes(4)
            line.send_part(ElementsPart(memoryview(elements)[: len(elements) - 4 + surplus]))
            line.send(EndOfStream())
            with pytest.raises(InvalidArgumentError, match=message):
                _read_y(reader_of(line), spec_of(LARGE[:1]))


def _read_y(reader: PartReader[pb.DeconvolveStreamResponse], y: TensorSpec) -> None:
    reader.read_header()
    reader.read("y", y)
    reader.expect_end()


@TRANSPORTS
def test_a_slow_reader_does_not_make_the_servers_memory_grow(
    running: ServerProcess, transport: str
) -> None:
    x = np.zeros((400, 1, 512, 512), np.float32)  # 400 MiB each way
    with open_stream(running, transport) as line:
        line.set_deadline(2)
        with suppress(ConnectionBrokenError):
            send_call(line, MethodCode.DeconvolveStream, header(spec_of(x)))
            line.send_part(elements_part(ONE))
            line.send_part(elements_part(x))
            pytest.fail("all of it was taken, and nothing read")
        peak_bytes = peak_memory_bytes(running.process.pid)

    assert peak_bytes < 300 << 20
    wait_until_idle(running)


@TRANSPORTS
def test_a_client_that_goes_has_its_call_cancelled(running: ServerProcess, transport: str) -> None:
    target, before = target_of(running, transport), len(running.log.read_text())
    command = [sys.executable, "-c", _ENDLESS_CALL, target, transport, str(running.log)]
    with deconvd_client.connect(running.target, transport="grpc") as F:
        with subprocess.Popen(command) as child:
            wait_until(lambda: "DeconvolveStream" in direct_calls(running, transport))
            wait_until(lambda: F.server_info().devices[0].running_calls_count > 0)
            child.kill()
    wait_until_idle(running)
    # what notices it first may compute, or read, or write
    ended = "the caller gave the call up|the caller has gone|the direct connection of .* has ended"
    wait_until(lambda: re.search(ended, running.log.read_text()[before:]) is not None)


_ENDLESS_CALL = """
import sys
from pathlib import Path
import deconvd_client
from tests.servers import ServerProcess
from tests.test_direct import ENDLESS, until_direct

target, transport, log = sys.argv[1:]
with deconvd_client.connect(target, transport=transport) as F:
    until_direct(F, ServerProcess(None, [target], Path(log)), transport)
    F.deconvolution_2d(*ENDLESS)
"""


@TRANSPORTS
def test_a_client_that_goes_in_the_middle_of_a_stream_leaves_nothing(
    running: ServerProcess, transport: str
) -> None:
    for sent in (0, 1, 2):
        with open_stream(running, transport) as line:
            send_call(line, MethodCode.DeconvolveStream, header(spec_of(LARGE)))
            line.send_part(elements_part(ONE))
            line.send_part(elements_part(LARGE[:sent]))
    wait_until_idle(running)
    with open_stream(running, transport) as line:
        assert is_serving(line)


@TRANSPORTS
def test_a_drain_lets_calls_end_and_takes_no_more(running: ServerProcess, transport: str) -> None:
    target = target_of(running, transport)
    with (
        deconvd_client.connect(target, transport=transport) as F,
        deconvd_client.connect(running.target, transport="grpc") as other,
        ThreadPoolExecutor(1) as pool,
    ):
        until_direct(F, running, transport)
        idle = open_stream(running, transport)
        slow = pool.submit(F.deconvolution_2d, *SLOW)
        wait_until(lambda: other.server_info().devices[0].running_calls_count > 0)
        running.process.send_signal(signal.SIGTERM)
        assert slow.result().shape == (1, 64, 168, 168)
        assert running.process.wait(30) == 0
        assert not idle.is_quiet()  # it was closed
        idle.close()
    assert not calls_path(running).exists()


@TRANSPORTS
def test_a_client_that_reads_no_answers_keeps_no_server_from_ending(
    tmp_path: Path, transport: str
) -> None:
    x = np.ones((1, 1, 90, 90), np.float32)
    request = pb.DeconvolveRequest(x=message_from_array(x), w=message_from_array(x[:, :, :1, :1]))
    listen = ("unix", "127.0.0.1:0")
    with server_process(tmp_path, "--drain-timeout-s", "1", listen=listen) as server:
        with open_stream(server, transport) as line:
            line.set_deadline(2)
            with suppress(
                ConnectionBrokenError
            ):  # once the server waits for its answers to be read
                call = CallHead(MethodCode.Deconvolve, 30, request.SerializeToString()).pack()
                while True:
                    send_raw(line, call)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(20) == ExitCode.CUT_SHORT


def test_a_server_that_lets_nobody_in_is_called_in_another_way(tmp_path: Path) -> None:
    path = str(tmp_path / "calls")
    with socket.socket(socket.AF_UNIX) as stopped:
        stopped.bind(path)
        stopped.listen(0)
        with ExitStack() as waiting:
            with suppress(BlockingIOError):
                while True:  # until there is no room to wait in
                    other = socket.socket(socket.AF_UNIX)
                    waiting.enter_context(other).setblocking(False)
                    other.connect(path)
            with pytest.raises(NotServedDirectlyError):
                DirectTransport(UnixConnector(path), pb.GetServerInfoResponse).unary(
                    "Deconvolve", b"", short_deadline()
                )


@pytest.fixture
def hopeful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let clients hope for a minute that a line is opened over TCP."""
    monkeypatch.setattr(connectors, "_TCP_CONNECT_TIMEOUT_S", 60)
    monkeypatch.setattr(pool, "_CONNECT_TIMEOUT_S", 60)


@pytest.mark.usefixtures("hopeful")
def test_calls_do_not_wait_for_a_port_that_nobody_reaches(running: ServerProcess) -> None:
    # the port is told, and the host of the target has it closed, or lets nobody in
    port = get_server_info(running).direct_port
    with faulty_proxy(running.targets[1], CLEAN, host="127.0.0.2") as proxy:
        with deconvd_client.connect(proxy.target, transport="tcp") as F:
            _assert_right_by_grpc(F)
        with socket.socket() as full, ExitStack() as waiting:
            full.bind(("127.0.0.2", port))
            full.listen(0)
            for _ in range(4):
                other = waiting.enter_context(socket.socket())
                other.setblocking(False)
                other.connect_ex(("127.0.0.2", port))
            with deconvd_client.connect(proxy.target, transport="tcp") as F:
                begin_s = time.monotonic()
                _assert_right_by_grpc(F)
                assert time.monotonic() - begin_s < 30
    assert not direct_calls(running, "tcp")


def _assert_right_by_grpc(F: Connection) -> None:
    for x in (X[:, :1], LARGE):
        np.testing.assert_array_equal(F.deconvolution_2d(x, ONE), x)


def test_another_server_at_the_port_is_not_called(tmp_path: Path) -> None:
    with server_process(tmp_path, "--log-level", "debug", listen=("127.0.0.1:0",)) as server:
        told = get_server_info(server)
        told.instance_id = "00112233445566778899aabbccddeeff"
        lines = DirectTransport(TcpConnector("127.0.0.1"), lambda: told)
        for _ in range(10):
            with pytest.raises(NotServedDirectlyError):
                lines.unary("Deconvolve", REQUEST.SerializeToString(), short_deadline())
        wait_until(lambda: "handshake names another server instance" in server.log.read_text())
        lines.close()
        assert not direct_calls(server, "tcp")


@pytest.mark.usefixtures("hopeful")
def test_a_stranger_at_the_port_who_says_nothing_or_nonsense_is_not_called(
    running: ServerProcess,
) -> None:
    port = get_server_info(running).direct_port
    answers = [b"", b"SSH-2.0-OpenSSH_9.2\r\n"]
    with (
        faulty_proxy(running.targets[1], CLEAN, host="127.0.0.2") as proxy,
        socket.create_server(("127.0.0.2", port)) as stranger,
        ExitStack() as stack,
    ):
        for told in answers:
            with deconvd_client.connect(proxy.target, transport="tcp") as F:
                begin_s = time.monotonic()
                _assert_right_by_grpc(F)
                assert time.monotonic() - begin_s < 30
                connection, _ = stranger.accept()
                stack.enter_context(connection).sendall(told)
                _assert_right_by_grpc(F)
    assert not direct_calls(running, "tcp")


@TRANSPORTS
def test_closing_the_connection_ends_calls(running: ServerProcess, transport: str) -> None:
    F = deconvd_client.connect(target_of(running, transport), transport=transport)
    until_direct(F, running, transport)
    with ThreadPoolExecutor(1) as pool:
        endless = pool.submit(F.deconvolution_2d, *ENDLESS)
        wait_until(lambda: F.server_info().devices[0].running_calls_count > 0)
        F.close()
        with pytest.raises(CallCancelledError):
            endless.result()
    with pytest.raises(CallCancelledError):
        F.deconvolution_2d(X, W)


@pytest.mark.parametrize("listen", ["unix", "127.0.0.1:0"])
def test_a_restarted_server_is_called_directly_again(tmp_path: Path, listen: str) -> None:
    transport = "unix" if listen == "unix" else "tcp"
    with server_process(tmp_path, "--log-level", "debug", listen=(listen,)) as server:
        F = deconvd_client.connect(server.target, transport=transport)
        until_direct(F, server, transport)
        again = "unix" if listen == "unix" else server.target
    with F, server_process(tmp_path, "--log-level", "debug", listen=(again,)) as server:
        until_direct(F, server, transport)  # the line to the first is lost


def test_a_forked_child_has_lines_of_its_own(running: ServerProcess) -> None:
    with deconvd_client.connect(running.target) as F:
        way = connector_for(running.target)
        assert way is not None
        told = get_server_info(running)
        lines = DirectTransport(way, lambda: told)
        request = REQUEST.SerializeToString()
        wait_until(lambda: _gets_line(lines))
        child = os.fork()
        if not child:
            replies = [lines.unary("Deconvolve", request, short_deadline()) for _ in range(200)]
            end_forked_child(0 if all(message for message, _ in replies) else 1)
        replies = [lines.unary("Deconvolve", request, short_deadline()) for _ in range(200)]
        _, status = os.waitpid(child, 0)
        lines.close()
        assert F.deconvolution_2d(X, W).shape == (1, 2, 4, 4)
    assert status == 0
    assert all(message for message, _ in replies)


@TRANSPORTS
def test_idle_lines_make_room_for_others(running: ServerProcess, transport: str) -> None:
    with ExitStack() as stack:
        first = open_stream(running, transport)
        told = get_server_info(running)
        way = connector_for(target_of(running, transport))
        assert way is not None
        for _ in range(300):
            line = stack.enter_context(open_with_retries(way, lambda: told))
        assert is_serving(line)
        assert not first.is_quiet()  # it was closed: it had been idle for longest
        first.close()
    with open_stream(running, transport) as line:
        assert is_serving(line)


def test_a_server_that_is_short_of_descriptors_takes_lines_again_later(
    running: ServerProcess,
) -> None:
    pid, port = running.process.pid, get_server_info(running).direct_port
    with deconvd_client.connect(running.targets[1], transport="tcp") as F:
        until_direct(F, running, "tcp")
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        held_count = process_resources(pid).descriptors_count
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (held_count + 2, limits[1]))
        with ExitStack() as stack:
            for _ in range(8):
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            wait_until(lambda: "Too many open files" in running.log.read_text())
            busy_s = processor_s(pid)
            time.sleep(0.5)
            assert processor_s(pid) < busy_s + 0.2
            F.deconvolution_2d(X, W)  # the line that it has goes on
        assert running.log.read_text().count("Too many open files") == 1
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        with deconvd_client.connect(running.target, transport="unix") as other:
            until_direct(other, running, "unix")


def test_what_the_parts_raise_is_the_callers(running: ServerProcess) -> None:
    lines = DirectTransport(
        UnixConnector(running.target.removeprefix("unix:")), lambda: get_server_info(running)
    )

    def parts() -> Iterator[pb.DeconvolveStreamRequest | ElementsPart]:
        yield pb.DeconvolveStreamRequest.FromString(header(spec_of(LARGE)))
        yield elements_part(ONE)
        raise ZeroDivisionError("a fault of the caller's")

    def begin(*, beside: bool) -> StreamAttempt[list[object]]:
        return StreamAttempt(
            MethodCode.DeconvolveStream,
            parts(),
            lambda source: [source.next() for _ in range(2)],
            pb.DeconvolveStreamResponse,
            is_full_duplex=beside,
        )

    for beside in (False, True):
        wait_until(lambda: _gets_line(lines))
        with pytest.raises(ZeroDivisionError):
            lines.stream(partial(begin, beside=beside), short_deadline())
    wait_until_idle(running)
    lines.close()


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_request_is_sent_to_its_end_unless_the_server_refuses_it(is_refused: bool) -> None:
    """A response may begin before the request is whole: that is no refusal."""
    instance = bytes(range(16))
    pieces_count = 20
    taken: list[int] = []

    def parts() -> Iterator[pb.PutTensorRequest | ElementsPart]:
        yield pb.PutTensorRequest()
        for number in range(pieces_count):
            taken.append(number)
            yield ElementsPart(memoryview(bytes(1 << 20)))

    def serve(listener: socket.socket) -> None:
        with server_stream(listener.accept()[0], instance) as line:
            line.set_deadline(30)
            line.next_event()
            line.send(Hello(instance))
            line.next_event()
            if is_refused:
                line.send(CallFailure(status_from_error(ExhaustedError("too much"))))
                line.half_close_and_drain(30)
                return
            line.send_part(pb.PutTensorResponse())
            source = FrameSource(line, pb.PutTensorRequest)
            while isinstance(ahead := source.next(), PendingElements):
                source.read_into(np.empty(ahead.size_bytes, np.uint8))
            line.send(EndOfStream())

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        port = listener.getsockname()[1]
        info = pb.GetServerInfoResponse(direct_port=port, instance_id=instance.hex())
        lines = DirectTransport(TcpConnector("127.0.0.1"), lambda: info)
        serving = pool.submit(serve, listener)
        assert lines.open_idle()  # a call would wait for a tenth of a second alone
        talk = StreamAttempt(
            MethodCode.PutTensor,
            parts(),
            lambda source: [source.next() for _ in range(2)],
            pb.PutTensorResponse,
        )
        if is_refused:
            with pytest.raises(ExhaustedError, match="too much"):
                lines.stream(lambda: talk, short_deadline())
            assert len(taken) < pieces_count
        else:
            assert lines.stream(lambda: talk, short_deadline())[0] == [pb.PutTensorResponse(), None]
            assert len(taken) == pieces_count
        lines.close()
        serving.result(timeout=30)


@TRANSPORTS
def test_many_threads_share_a_connection(running: ServerProcess, transport: str) -> None:
    large = LARGE[:12]

    def calls(seed: int) -> set[float]:
        x = np.full((1, 4, 3, 3), seed, np.float32)
        y = F.deconvolution_2d(seed * large, ONE)
        np.testing.assert_array_equal(y, seed * large)
        return {F.deconvolution_2d(x, W)[0, 0, 1, 1] for _ in range(50)}

    with deconvd_client.connect(target_of(running, transport), transport=transport) as F:
        with ThreadPoolExecutor(20) as pool:
            assert list(pool.map(calls, range(20))) == [{16 * seed} for seed in range(20)]
