"""Streams, which peers share: idle, slow and unread ones of one client keep no other client from streaming."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest

import deconvd_client
from deconvd.direct.connection_errors import ConnectionBrokenError
from deconvd.direct.events import CallHead, EndOfStream, MethodCode
from deconvd.direct.frame_stream import FrameStream
from deconvd.model.dtypes import Array
from deconvd.model.problem import spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd.wire.stream_parts import elements_part
from deconvd.wire.tensor import message_from_spec
from tests.direct_calls import connect_stream_from, get_server_info, receive_answer
from tests.processes import wait_until
from tests.servers import ServerProcess, server_process

STREAMS_COUNT = 32
"""Those that run and those that wait."""

PATIENCE_S = 15.0
"""More than others wait for a stream, whatever one client does: some eight seconds, on a busy machine."""

SEVERAL = ["127.0.0.1"] * 14 + ["127.0.0.3", "127.0.0.4"]
"""Whence as many streams come as run at once: the last two places are for peers that have none."""

LARGE = np.ones((16, 2, 256, 256), np.float32)  # goes in a stream
TWICE = 2 * np.eye(2, dtype=np.float32)[:, :, None, None]
STALL_S = 1.0

_T = TypeVar("_T")


@pytest.fixture
def running(tmp_path: Path) -> Iterator[ServerProcess]:
    with server_process(tmp_path, listen=("unix", "127.0.0.1:0")) as server:
        yield server


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[ServerProcess]:
    """A server that waits for clients for a second where others wait for half a minute, but to take what has ended."""
    constants = {
        "deconvd_server.call.context:STALL_LIMIT_S": STALL_S,
        "deconvd_server.transports.grpc.server:STALL_LIMIT_S": 600.0,
    }
    with server_process(tmp_path, listen=("unix", "127.0.0.1:0"), constants=constants) as server:
        yield server


def header(x: Array = LARGE, w: Array = TWICE) -> pb.DeconvolveStreamRequest:
    request = pb.DeconvolveRequest(x=message_from_spec(spec_of(x)), w=message_from_spec(spec_of(w)))
    return pb.DeconvolveStreamRequest(
        header=pb.DeconvolveStreamHeader(request=request, slice_samples_count=1)
    )


class GrpcClient:
    """A client by gRPC over TCP whose streams send what it is told to, and no more."""

    def __init__(self, server: ServerProcess) -> None:
        self._ended = threading.Event()
        self._channel = grpc.insecure_channel(server.targets[1])
        self.stub = pb_grpc.DeconvolutionServiceStub(self._channel)
        # gRPC cancels a call that nobody refers to any more, and the session would end with it
        self._holding = self.stub.HoldSession(self._then_wait(pb.HoldSessionRequest()))
        self.session = next(self._holding).session

    def idle_stream(self) -> Any:
        return self.stub.DeconvolveStream(self._then_wait(header()))

    def idle_put(self) -> Any:
        put = pb.PutTensorHeader(session=self.session, tensor=message_from_spec(spec_of(TWICE)))
        return self.stub.PutTensor.future(self._then_wait(pb.PutTensorRequest(header=put)))

    def unread_get(self) -> Any:
        resident = pb.Resident(handle=self.kept)
        return self.stub.GetTensor(pb.GetTensorRequest(session=self.session, resident=resident))

    @property
    def kept(self) -> bytes:
        """The handle of a tensor that is too large for a connection's buffers."""
        if not hasattr(self, "_kept"):
            spec = spec_of(np.ones((64, 1 << 20), np.uint8).view(np.float32))
            put = pb.PutTensorHeader(session=self.session, tensor=message_from_spec(spec))
            chunks = (pb.PutTensorRequest(chunk=bytes(1 << 20)) for _ in range(64))
            answered = self.stub.PutTensor(iter([pb.PutTensorRequest(header=put), *chunks]))
            self._kept = answered.resident.handle
        return self._kept

    def close(self) -> None:
        self._ended.set()
        self._channel.close()

    def _then_wait(self, message: _T) -> Iterator[_T]:
        yield message
        self._ended.wait()


@pytest.fixture
def hostile(running: ServerProcess) -> Iterator[GrpcClient]:
    client = GrpcClient(running)
    yield client
    client.close()


def send_header(line: FrameStream) -> None:
    line.send(CallHead(MethodCode.DeconvolveStream, 1e6, header().SerializeToString()))


def begun_from(hosts: list[str], server: ServerProcess, stack: ExitStack) -> list[FrameStream]:
    """Begin a stream from each host, and return their lines. As many as may run do by then."""
    port = get_server_info(server).direct_port
    lines = [stack.enter_context(connect_stream_from(host, port)) for host in hosts]
    for number, line in enumerate(lines):
        send_header(line)
        if number < 14 or hosts is SEVERAL:
            line.next_event()  # the response's header
    return lines


def assert_streams(line: FrameStream) -> None:
    """Make a call in a stream, and see that it ends well and soon."""
    line.set_deadline(PATIENCE_S)
    send_header(line)
    line.send_part(elements_part(TWICE))
    with ThreadPoolExecutor(1) as pool:
        answered = pool.submit(receive_answer, line)
        line.send_part(elements_part(LARGE))
        line.send(EndOfStream(""))
    assert isinstance(answered.result(), EndOfStream)


def assert_others_stream(server: ServerProcess, calls_count: int = 3) -> None:
    """See that a client at a Unix socket streams, as often as it likes and soon."""
    begin_s = time.monotonic()
    with deconvd_client.connect(server.target, timeout_s=PATIENCE_S, transport="grpc") as F:
        for _ in range(calls_count):
            np.testing.assert_array_equal(F.deconvolution_2d(LARGE, TWICE), 2 * LARGE)
    assert time.monotonic() - begin_s < PATIENCE_S


@pytest.mark.parametrize("attack", ["idle_stream", "idle_put", "unread_get"])
def test_idle_streams_by_grpc_keep_nobody_from_streaming(
    running: ServerProcess, hostile: GrpcClient, attack: str
) -> None:
    begin: Callable[[], Any] = getattr(hostile, attack)
    calls = [begin() for _ in range(STREAMS_COUNT)]
    # so all of them have come
    wait_until(lambda: "no place for more streams" in running.log.read_text())

    assert_others_stream(running)
    del calls


@pytest.mark.parametrize("hosts", [["127.0.0.1"] * 32, SEVERAL], ids=["one", "several"])
def test_idle_direct_streams_keep_nobody_from_streaming(
    running: ServerProcess, hosts: list[str]
) -> None:
    with ExitStack() as stack:
        begun_from(hosts, running, stack)
        with connect_stream_from("127.0.0.2", get_server_info(running).direct_port) as line:
            assert_streams(line)
        assert_others_stream(running)


@pytest.mark.parametrize("hosts", [["127.0.0.1"] * 32, SEVERAL], ids=["one", "several"])
def test_streams_that_send_a_byte_now_and_then_keep_nobody_from_streaming(
    running: ServerProcess, hosts: list[str]
) -> None:
    ended = threading.Event()
    byte = elements_part(np.ones(1, np.uint8))
    port = get_server_info(running).direct_port

    def dribble(lines: list[FrameStream]) -> None:
        while not ended.wait(0.2):
            for line in tuple(lines):
                try:
                    line.send_part(byte)
                except ConnectionBrokenError:
                    lines.remove(line)
                    with suppress(ConnectionBrokenError):  # it comes again at once
                        lines.append(
                            new := stack.enter_context(connect_stream_from(hosts[-1], port))
                        )
                        send_header(new)

    with ExitStack() as stack:
        lines = begun_from(hosts, running, stack)
        dribbling = threading.Thread(target=dribble, args=(lines,))
        dribbling.start()
        try:
            assert_others_stream(running, calls_count=1)
        finally:
            ended.set()
            dribbling.join()


def test_a_client_may_be_slow_while_nobody_else_waits(
    running: ServerProcess, hostile: GrpcClient
) -> None:
    calls = [hostile.idle_stream() for _ in range(20)]  # sixteen run, the others wait
    time.sleep(3)  # more than a stream may pause while others wait

    assert not any(call.done() for call in calls)


@pytest.mark.parametrize("attack", ["idle_stream", "idle_put", "unread_get"])
def test_a_stream_by_grpc_that_makes_no_progress_ends(hasty: ServerProcess, attack: str) -> None:
    client = GrpcClient(hasty)
    begin: Callable[[], Any] = getattr(client, attack)
    call = begin()
    time.sleep(3 * STALL_S)  # nothing is sent, or read, for longer than is allowed

    with pytest.raises(grpc.RpcError) as caught:
        call.result() if attack == "idle_put" else deque(call, maxlen=0)
    client.close()

    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_stream_that_is_slower_than_the_limit_but_goes_on_is_served(hasty: ServerProcess) -> None:
    x = LARGE[:4]

    def parts() -> Iterator[pb.DeconvolveStreamRequest]:
        yield header(x)
        yield pb.DeconvolveStreamRequest(chunk=TWICE.tobytes())
        for sample in x:
            time.sleep(STALL_S / 2)
            yield pb.DeconvolveStreamRequest(chunk=sample.tobytes())

    with grpc.insecure_channel(hasty.targets[1]) as channel:
        responses = list(pb_grpc.DeconvolutionServiceStub(channel).DeconvolveStream(parts()))

    assert b"".join(response.chunk for response in responses) == (2 * x).tobytes()
