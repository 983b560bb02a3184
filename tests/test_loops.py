"""Loops whose count a client chooses: each ends with its call, and takes what its bytes take."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from deconvd.direct.events import EndOfStream, FrameKind, MethodCode, pack_frame
from deconvd.direct.frame_stream import FrameStream
from deconvd.errors import DeadlineError, InvalidArgumentError
from deconvd.model.geometry import MAX_EXTENT
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from tests.direct_calls import (
    open_stream,
    receive_answer,
    receive_failure,
    send_call,
    wait_until_idle,
)
from tests.processes import is_idle, wait_until
from tests.servers import ServerProcess, server_process
from tests.session_clients import tensor_header
from tests.stream_pairs import send_raw

TIMEOUT_S = 10
CHUNKS_COUNT = 80_000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    """A server of the test's own: what is tried may take it away."""
    with server_process(tmp_path, "--drain-timeout-s", "0.5") as running:
        yield running


@pytest.fixture
def stub(server: ServerProcess) -> Iterator[pb_grpc.DeconvolutionServiceStub]:
    with grpc.insecure_channel(server.target) as channel:
        yield pb_grpc.DeconvolutionServiceStub(channel)


@pytest.fixture
def line(server: ServerProcess) -> Iterator[FrameStream]:
    with open_stream(server) as line:
        yield line


def forward_header(*, channels: int = 0) -> pb.DeconvolveStreamHeader:
    """Ask for as many slices as there can be, of x without elements and y with so many channels."""
    x, W = tensor_header(MAX_EXTENT, 0, 1, 1), tensor_header(0, channels, 1, 1)
    request = pb.DeconvolveRequest(x=x, w=W)
    return pb.DeconvolveStreamHeader(request=request, slice_samples_count=1)


def gradients_header() -> pb.DeconvolveGradStreamHeader:
    """Ask for the gradients of as many slices as there can be, without elements."""
    request = pb.DeconvolveGradRequest(
        x=tensor_header(MAX_EXTENT, 0, 1, 1),
        w=tensor_header(0, 0, 1, 1),
        gy=tensor_header(MAX_EXTENT, 0, 1, 1),
        wanted=pb.GradientMask(gx=True, gw=True, gb=True),
    )
    return pb.DeconvolveGradStreamHeader(request=request, slice_samples_count=1)


@contextmanager
def session(stub: pb_grpc.DeconvolutionServiceStub) -> Iterator[bytes]:
    """Hold a session for the block; give its name."""
    is_over = threading.Event()

    def signs() -> Iterator[pb.HoldSessionRequest]:
        yield pb.HoldSessionRequest()
        is_over.wait()

    call = stub.HoldSession(signs())
    try:
        yield next(call).session
    finally:
        is_over.set()
        call.cancel()


class TestEmptySlices:
    """Slices without elements are one: there is nothing to loop over."""

    def test_a_stream_of_them_by_grpc_is_over_at_once(
        self, stub: pb_grpc.DeconvolutionServiceStub
    ) -> None:
        request = pb.DeconvolveStreamRequest(header=forward_header())

        (response,) = stub.DeconvolveStream(iter([request]), timeout=TIMEOUT_S)

        assert list(response.header.y.shape) == [MAX_EXTENT, 0, 1, 1]

    def test_a_stream_of_their_gradients_by_grpc_is_over_at_once(
        self, stub: pb_grpc.DeconvolutionServiceStub
    ) -> None:
        request = pb.DeconvolveGradStreamRequest(header=gradients_header())

        (response,) = stub.DeconvolveGradStream(iter([request]), timeout=TIMEOUT_S)

        assert list(response.header.gb.shape) == [0]

    @pytest.mark.parametrize(
        ("method", "part"),
        [
            (MethodCode.DeconvolveStream, pb.DeconvolveStreamRequest(header=forward_header())),
            (
                MethodCode.DeconvolveGradStream,
                pb.DeconvolveGradStreamRequest(header=gradients_header()),
            ),
        ],
        ids=["forward", "gradients"],
    )
    def test_a_direct_stream_of_them_is_over_at_once(
        self,
        line: FrameStream,
        method: MethodCode,
        part: pb.DeconvolveStreamRequest | pb.DeconvolveGradStreamRequest,
    ) -> None:
        line.set_deadline(TIMEOUT_S)
        send_call(line, method, part.SerializeToString(), timeout_s=TIMEOUT_S)
        line.send(EndOfStream(""))

        assert isinstance(receive_answer(line), EndOfStream)


class TestEndlessSlices:
    """Slices with elements are as many as their client asks for, and end with its call."""

    def test_a_direct_stream_of_them_ends_at_its_deadline(
        self, server: ServerProcess, line: FrameStream
    ) -> None:
        part = pb.DeconvolveStreamRequest(header=forward_header(channels=1))
        send_call(line, MethodCode.DeconvolveStream, part.SerializeToString(), timeout_s=1)
        line.send(EndOfStream(""))

        assert isinstance(receive_failure(line), DeadlineError)
        wait_until_idle(server)

    def test_a_stream_of_them_whose_results_stay_ends_when_it_is_cancelled_or_the_server_is(
        self, server: ServerProcess, stub: pb_grpc.DeconvolutionServiceStub
    ) -> None:
        # gx of nothing from gy that is there: 30 million slices, of which nothing is sent
        n = 30_000_000
        with session(stub) as name:
            header = pb.PutTensorHeader(session=name, tensor=tensor_header(n, 1, 1, 1))
            chunk = pb.PutTensorRequest(chunk=bytes(n * 4 // 40))
            kept = stub.PutTensor(iter([pb.PutTensorRequest(header=header), *[chunk] * 40]))
            gy = tensor_header(n, 1, 1, 1)
            gy.resident.CopyFrom(kept.resident)
            request = pb.DeconvolveGradRequest(
                x=tensor_header(n, 0, 1, 1),
                w=tensor_header(0, 1, 1, 1),
                gy=gy,
                wanted=pb.GradientMask(gx=True),
                session=name,
            )
            part = pb.DeconvolveGradStreamRequest(
                header=pb.DeconvolveGradStreamHeader(request=request, slice_samples_count=1)
            )

            call = stub.DeconvolveGradStream(iter([part]), timeout=TIMEOUT_S)
            assert next(call).header.gx.shape[0] == n
            call.cancel()
            wait_until(lambda: is_idle(server.process.pid))
            call = stub.DeconvolveGradStream(iter([part]), timeout=TIMEOUT_S * 6)
            assert next(call).header.gx.shape[0] == n
            begin_s = time.monotonic()
            server.end(signal.SIGTERM)

            assert time.monotonic() - begin_s < 20
            call.cancel()


class TestManyChunks:
    """Elements take what their bytes take, however they are cut."""

    @pytest.fixture
    def header(self) -> pb.DeconvolveStreamRequest:
        """The header of a call whose W has 4 bytes, and whose x has a byte for each chunk."""
        x, w = tensor_header(1, 1, 1, CHUNKS_COUNT // 4), tensor_header(1, 1, 1, 1)
        request = pb.DeconvolveRequest(x=x, w=w)
        return pb.DeconvolveStreamRequest(
            header=pb.DeconvolveStreamHeader(request=request, slice_samples_count=1)
        )

    def test_chunks_of_one_byte_are_taken_in_linear_time(
        self, stub: pb_grpc.DeconvolutionServiceStub, header: pb.DeconvolveStreamRequest
    ) -> None:
        chunk = pb.DeconvolveStreamRequest(chunk=b"\0")
        requests = [header, *[chunk] * (4 + CHUNKS_COUNT)]

        begin_s = time.monotonic()
        responses = list(stub.DeconvolveStream(iter(requests), timeout=50))

        assert sum(len(response.chunk) for response in responses) == CHUNKS_COUNT
        assert time.monotonic() - begin_s < 40

    def test_direct_chunks_of_one_byte_are_taken_in_linear_time(
        self, line: FrameStream, header: pb.DeconvolveStreamRequest
    ) -> None:
        begin_s = time.monotonic()
        send_call(line, MethodCode.DeconvolveStream, header.SerializeToString(), timeout_s=50)
        send_raw(line, pack_frame(FrameKind.ELEMENTS, b"\0") * (4 + CHUNKS_COUNT))
        line.send(EndOfStream(""))

        assert isinstance(receive_answer(line), EndOfStream)
        assert time.monotonic() - begin_s < 20

    def test_an_empty_chunk_is_refused(
        self, stub: pb_grpc.DeconvolutionServiceStub, header: pb.DeconvolveStreamRequest
    ) -> None:
        requests = [header, pb.DeconvolveStreamRequest(chunk=b"")]

        with pytest.raises(grpc.RpcError, match="each chunk must have at least one byte") as raised:
            list(stub.DeconvolveStream(iter(requests), timeout=TIMEOUT_S))

        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT

    def test_a_direct_chunk_that_is_empty_is_refused(
        self, line: FrameStream, header: pb.DeconvolveStreamRequest
    ) -> None:
        send_call(line, MethodCode.DeconvolveStream, header.SerializeToString())
        send_raw(line, pack_frame(FrameKind.ELEMENTS, b""))

        error = receive_failure(line)

        assert isinstance(error, InvalidArgumentError)
        assert "each chunk must have at least one byte" in str(error)
