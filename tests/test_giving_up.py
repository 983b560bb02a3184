"""Calls that their callers give up, at every stage: their places and their memory are the next caller's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import numpy as np
import pytest

from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd.model.problem import Problem, spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd.wire.chunks import chunk_messages
from deconvd.wire.tensor import message_from_array, message_from_spec
from deconvd_client.shared_memory import Borrower
from deconvd_server.backend import STREAMS_COUNT, Backend
from deconvd_server.daemon import Daemon
from deconvd_server.settings import Settings
from tests.deadlines import short_deadline
from tests.devices import HoldingDevice
from tests.processes import wait_until

MIB = 1 << 20
X = np.ones((2, 1, 64, 128), np.float32)
LARGE = np.ones((64, 1, 1024, 1024), np.float32)  # more than streams have under way
ONE = np.ones((1, 1, 1, 1), np.float32)
TIMEOUT_S = 30.0


class Served:
    """A server of a device, and a stock client of it."""

    def __init__(
        self, address: str, backend: Backend, device: HoldingDevice, channel: grpc.Channel
    ) -> None:
        self.address = address
        self.backend = backend
        self.device = device
        self.stub = pb_grpc.DeconvolutionServiceStub(channel)

    @property
    def load(self) -> tuple[int, int, int]:
        """Calls that run, calls that wait, and the memory that they take."""
        (device,) = self.stub.GetServerInfo(pb.GetServerInfoRequest()).devices
        return device.running_calls_count, device.waiting_calls_count, device.used_bytes

    @property
    def streams(self) -> tuple[int, int]:
        """Streams that are under way, and the memory that they take."""
        load = self.backend.stream_admission.load
        return load.running_count, load.used_bytes


@pytest.fixture
def served() -> Iterator[Served]:
    device = HoldingDevice()
    daemon = Daemon(Settings(["127.0.0.1:0"], 8 * MIB, 10, shared_memory_bytes=64 * MIB))
    daemon.serve(lambda: [device])
    assert daemon.backend is not None
    try:
        with grpc.insecure_channel(daemon.addresses[0]) as channel:
            yield Served(daemon.addresses[0], daemon.backend, device, channel)
    finally:
        device.let_go.set()
        daemon.drain()


@pytest.fixture(params=["cancelled", "late"])
def timeout_s(request: pytest.FixtureRequest) -> float | None:
    """How long calls may take: None where they are cancelled instead."""
    return 2.0 if request.param == "late" else None


def give_up(call: Any, timeout_s: float | None) -> None:
    """Cancel a call, or wait until its deadline has passed."""
    if timeout_s is None:
        call.cancel()
    wait_until(call.done)
    code = grpc.StatusCode.CANCELLED if timeout_s is None else grpc.StatusCode.DEADLINE_EXCEEDED
    assert call.code() is code


def request(x: Array = X) -> pb.DeconvolveRequest:
    return pb.DeconvolveRequest(x=message_from_array(x), w=message_from_array(ONE), waits=True)


def test_a_call_that_runs(served: Served, timeout_s: float | None) -> None:
    call = served.stub.Deconvolve.future(request(), timeout=timeout_s)
    wait_until(lambda: served.load[0] == 1)
    assert served.load[2] > 0

    give_up(call, timeout_s)

    wait_until(lambda: served.load == (0, 0, 0))


def test_a_call_that_waits_for_its_turn(served: Served, timeout_s: float | None) -> None:
    running = served.stub.Deconvolve.future(request())
    wait_until(lambda: served.load[:2] == (1, 0))
    used_bytes = served.load[2]
    waiting = served.stub.Deconvolve.future(request(), timeout=timeout_s)
    wait_until(lambda: served.load[:2] == (1, 1))

    give_up(waiting, timeout_s)

    wait_until(lambda: served.load == (1, 0, used_bytes))
    served.device.let_go.set()
    assert running.result(TIMEOUT_S).y.raw == X.tobytes()


@pytest.mark.parametrize("stage", ["runs", "waits"])
def test_a_call_whose_tensors_lie_in_shared_memory(
    served: Served, timeout_s: float | None, stage: str
) -> None:
    lender = served.backend.lender
    assert lender is not None
    info = served.stub.GetServerInfo(pb.GetServerInfoRequest())
    borrower = Borrower(lambda _: info.shared_memory_socket)
    x, y = (
        borrower.empty(X.shape, X.dtype, short_deadline()),
        borrower.empty(X.shape, X.dtype, short_deadline()),
    )
    asked = request()
    place, y_place = borrower.locate(x), borrower.locate(y)
    assert place is not None
    assert y_place is not None
    place.write_to(asked.x.shared)
    y_place.write_to(asked.y_place)
    before = None if stage == "runs" else served.stub.Deconvolve.future(request())
    wait_until(lambda: served.load[0] == (stage == "waits"))
    call = served.stub.Deconvolve.future(asked, timeout=timeout_s)
    wait_until(lambda: served.load[:2] == (1, stage == "waits"))

    borrower.close()
    assert not lender.wait_until_unused(0.1)  # the call uses it, though its client has gone
    give_up(call, timeout_s)

    assert lender.wait_until_unused(TIMEOUT_S)
    if before is not None:
        before.cancel()
    wait_until(lambda: served.load == (0, 0, 0))


class Parts:
    """What a client sends in a stream: some of it, and the end never."""

    def __init__(self, x: Array, sent_bytes: int) -> None:
        self._x = x
        self._sent_bytes = sent_bytes
        self._is_over = threading.Event()

    def __iter__(self) -> Iterator[bytes]:
        problem = Problem(spec_of(self._x), spec_of(ONE), Geometry())
        described = pb.DeconvolveRequest(
            x=message_from_spec(problem.x), w=message_from_spec(problem.W)
        )
        header = pb.DeconvolveStreamHeader(request=described, slice_samples_count=1)
        yield pb.DeconvolveStreamRequest(header=header).SerializeToString()
        yield from chunk_messages(ONE)
        for chunk in chunk_messages(self._x):
            if self._sent_bytes <= 0:
                break
            self._sent_bytes -= len(chunk)
            yield chunk
        self._is_over.wait(TIMEOUT_S)

    def end(self) -> None:
        """Let the thread that takes them go."""
        self._is_over.set()


@contextmanager
def streaming(served: Served, sent_bytes: int, timeout_s: float | None) -> Iterator[Any]:
    """Give the block a stream that has sent so much of `LARGE`."""
    parts = Parts(LARGE, sent_bytes)
    address = served.address
    with grpc.insecure_channel(address) as channel:
        rpc: Any = channel.stream_stream("/deconvd.v1.DeconvolutionService/DeconvolveStream")
        yield rpc(iter(parts), timeout=timeout_s)
        parts.end()


STAGES: dict[str, tuple[int, Callable[[Served], bool]]] = {
    "arrives": (0, lambda served: served.streams[0] == 1),
    "arrives in part": (6 * MIB, lambda served: served.load[0] == 1),
    "is computed": (LARGE.nbytes, lambda served: served.load[0] == 1),
}


@pytest.mark.parametrize(("sent_bytes", "is_there"), STAGES.values(), ids=STAGES)
def test_a_stream_that(
    served: Served, timeout_s: float | None, sent_bytes: int, is_there: Callable[[Served], bool]
) -> None:
    with streaming(served, sent_bytes, timeout_s) as call:
        wait_until(lambda: is_there(served))
        assert served.streams[1] > 0

        give_up(call, timeout_s)

        wait_until(lambda: served.streams == (0, 0))
        wait_until(lambda: served.load == (0, 0, 0))


def test_a_stream_that_nobody_reads(served: Served, timeout_s: float | None) -> None:
    served.device.let_go.set()
    with streaming(served, LARGE.nbytes, timeout_s) as call:
        next(call)
        wait_until(lambda: served.streams[0] == 1)

        give_up(call, timeout_s)

        wait_until(lambda: served.streams == (0, 0))
        wait_until(lambda: served.load == (0, 0, 0))


def test_a_stream_that_waits_for_its_turn(served: Served, timeout_s: float | None) -> None:
    admission = served.backend.stream_admission
    with ExitStack() as stack:
        running = [
            stack.enter_context(streaming(served, 0, None)) for _ in range(STREAMS_COUNT * 7 // 8)
        ]
        wait_until(lambda: admission.load.running_count == len(running))
        waiting = stack.enter_context(streaming(served, 0, timeout_s))
        wait_until(lambda: admission.load.waiting_count == 1)

        give_up(waiting, timeout_s)

        wait_until(lambda: admission.load.waiting_count == 0)
        assert admission.load.running_count == len(running)
        for call in running:
            call.cancel()
        wait_until(lambda: served.streams == (0, 0))
