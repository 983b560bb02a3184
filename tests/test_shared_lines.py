"""Direct lines, which peers share: what one client does with all that it can get takes none from another."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from deconvd.direct.connection_errors import ConnectionBrokenError
from deconvd.direct.events import Answer, CallHead, EndOfStream, MethodCode
from deconvd.direct.frame_stream import FrameStream, report_progress
from deconvd.errors import UnavailableError
from deconvd.model.dtypes import Array
from deconvd.model.problem import spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.stream_parts import elements_part
from deconvd.wire.tensor import message_from_array, message_from_spec
from deconvd_client.shared_memory import Borrower
from tests.deadlines import short_deadline
from tests.direct_calls import (
    REQUEST,
    W,
    X,
    calls_path,
    connect_from,
    connect_stream_from,
    get_server_info,
    is_serving,
    open_stream,
    receive_answer,
    receive_failure,
)
from tests.processes import process_resources, wait_until
from tests.servers import ServerProcess, server_process
from tests.stream_pairs import send_raw

OTHER_HOST = "127.0.0.2"
LINES_COUNT = 256
TIMEOUT_PLACE = slice(16, 24)
"""Where a call's frame has its timeout: 64 bits."""

STALL_S = 1.0


@pytest.fixture
def running(tmp_path: Path) -> Iterator[ServerProcess]:
    with server_process(tmp_path, listen=("unix", "127.0.0.1:0")) as server:
        yield server


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[ServerProcess]:
    """A server that waits for clients for a second where others wait for half a minute."""
    constants = {
        "deconvd_server.call.context:STALL_LIMIT_S": STALL_S,
        "deconvd_server.transports.direct.greeter:_HANDSHAKE_S": STALL_S,
    }
    with server_process(tmp_path, listen=("unix", "127.0.0.1:0"), constants=constants) as server:
        yield server


def send_for_ever(
    line: FrameStream, method: MethodCode, message: bytes, *, is_early: bool = False
) -> None:
    """Make a call with the longest timeout that can be written."""
    data = bytearray(line.protocol.send(CallHead(method, 1, message, is_early)))
    data[TIMEOUT_PLACE] = b"\xff" * 8
    send_raw(line, bytes(data))


def early_call(line: FrameStream, region: bytes = bytes(16)) -> None:
    """Begin a call whose operands never come."""
    x = message_from_spec(spec_of(X))
    x.shared.region = region
    request = pb.DeconvolveRequest(x=x, w=message_from_array(W))
    send_for_ever(line, MethodCode.Deconvolve, request.SerializeToString(), is_early=True)


def test_connections_without_a_handshake_throw_out_nobody_who_is_idle(
    running: ServerProcess,
) -> None:
    port = get_server_info(running).direct_port
    with connect_stream_from(OTHER_HOST, port) as honest, ExitStack() as stack:
        assert is_serving(honest)
        for _ in range(300):
            stack.enter_context(connect_from("127.0.0.1", port))
        with connect_stream_from("127.0.0.3", port) as newcomer:
            assert is_serving(newcomer)
        assert honest.is_quiet()
        assert is_serving(honest)


def test_a_connection_without_a_handshake_goes_before_a_line_of_the_same_peer(
    running: ServerProcess,
) -> None:
    port = get_server_info(running).direct_port
    with connect_stream_from("127.0.0.1", port) as honest, ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connect_from("127.0.0.1", port))
        assert is_serving(honest)


@pytest.mark.parametrize("sent", [b"", b"\x02", b"\x01\x00\x00\x00"])
def test_a_handshake_has_a_time_limit(hasty: ServerProcess, sent: bytes) -> None:
    before = process_resources(hasty.process.pid).threads_count
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(calls_path(hasty)))
        connection.send(sent)
        connection.settimeout(10)
        assert connection.recv(1) == b""
    wait_until(lambda: process_resources(hasty.process.pid).threads_count <= before)


def test_a_greeted_line_may_be_idle_for_as_long_as_it_likes(hasty: ServerProcess) -> None:
    with open_stream(hasty) as line:
        time.sleep(3 * STALL_S)
        assert is_serving(line)


@contextmanager
def borrowed(server: ServerProcess) -> Iterator[bytes]:
    """Give the name of a region of shared memory for the block."""
    borrower = Borrower(lambda _: f"{server.target.removeprefix('unix:')}.memory")
    block = borrower.allocate(1 << 16, short_deadline())
    assert block is not None
    try:
        yield block.shared_slice.region
    finally:
        borrower.close()


def test_early_calls_that_never_go_on_leave_lines_to_others(running: ServerProcess) -> None:
    port = get_server_info(running).direct_port
    with borrowed(running) as region, ExitStack() as stack:
        for _ in range(LINES_COUNT):
            try:
                line = stack.enter_context(connect_stream_from("127.0.0.1", port))
            except ConnectionBrokenError:
                continue  # there are no more for this peer
            early_call(line, region)
        for host in (OTHER_HOST, "127.0.0.3"):
            for _ in range(40):
                line = stack.enter_context(connect_stream_from(host, port))
                assert is_serving(line)


def test_an_early_call_that_does_not_go_on_ends(hasty: ServerProcess) -> None:
    with borrowed(hasty) as region, open_stream(hasty) as line:
        early_call(line, region)
        error = receive_failure(line)

        assert isinstance(error, UnavailableError)
        assert error.retry_after_s is not None
        assert "written nothing of the call's operands for 1 s" in str(error)
        assert is_serving(line)


def test_to_say_the_same_again_is_no_progress(hasty: ServerProcess) -> None:
    with borrowed(hasty) as region, open_stream(hasty) as line:
        early_call(line, region)
        while line.is_quiet():
            report_progress(line, 8)
            time.sleep(STALL_S / 10)  # as often as a client that copies says how far it is

        assert isinstance(receive_failure(line), UnavailableError)


def stream_header(x: Array, w: Array) -> bytes:
    request = pb.DeconvolveRequest(x=message_from_spec(spec_of(x)), w=message_from_spec(spec_of(w)))
    header = pb.DeconvolveStreamHeader(request=request, slice_samples_count=1)
    return pb.DeconvolveStreamRequest(header=header).SerializeToString()


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_an_answer_that_nobody_reads_ends_its_line(hasty: ServerProcess, transport: str) -> None:
    with open_stream(hasty, transport) as line:
        line.set_deadline(10)
        x, w = np.ones((128, 1, 256, 256), np.float32), np.ones((1, 1, 1, 1), np.float32)
        with suppress(ConnectionBrokenError):  # the server does not wait for the rest
            send_for_ever(line, MethodCode.DeconvolveStream, stream_header(x, w))
            line.send_part(elements_part(w))
            line.send_part(elements_part(x))
        wait_until(
            lambda: "has ended: the peer has sent and accepted nothing" in hasty.log.read_text()
        )
    assert "Traceback" not in hasty.log.read_text()


def test_a_stream_that_stops_coming_ends_its_line(hasty: ServerProcess) -> None:
    with open_stream(hasty) as line:
        send_for_ever(line, MethodCode.DeconvolveStream, stream_header(X, W))
        with pytest.raises(ConnectionBrokenError):
            receive_answer(line)


def test_the_longest_deadline_is_like_any_other(running: ServerProcess) -> None:
    with open_stream(running) as line:
        send_for_ever(line, MethodCode.Deconvolve, REQUEST.SerializeToString())
        assert isinstance(receive_answer(line), Answer)
        send_for_ever(line, MethodCode.DeconvolveStream, stream_header(X, W))
        line.send_part(elements_part(W))
        line.send_part(elements_part(X))
        line.send(EndOfStream(""))
        assert isinstance(receive_answer(line), EndOfStream)
    with deconvd_client.connect(running.target, timeout_s=1e18) as F:
        assert F.deconvolution_2d(X, W).shape == (1, 2, 4, 4)
    assert "Traceback" not in running.log.read_text()


def test_a_client_whose_line_gave_way_makes_its_calls_all_the_same(running: ServerProcess) -> None:
    port = get_server_info(running).direct_port
    with deconvd_client.connect(running.targets[1], transport="tcp") as F, ExitStack() as stack:
        for number in range(300):
            stack.enter_context(connect_from("127.0.0.1", port))
            if number % 60 == 0:
                assert F.deconvolution_2d(X, W).shape == (1, 2, 4, 4)
