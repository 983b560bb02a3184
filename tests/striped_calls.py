"""Striped calls frame by frame, and servers for them in this process, whose every limit tests can set."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from deconvd.direct.events import (
    Answer,
    CallFailure,
    EndOfStream,
    MethodCode,
    PieceHead,
    StripedCallHead,
    StripeHead,
)
from deconvd.direct.frame_stream import FrameStream
from deconvd.direct.pieces import PieceSpace
from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd.model.operation import DECONVOLVE_GRAD, Operation, spec_of_field
from deconvd.model.problem import TensorSpec, problem_of, spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd.wire.messages import messages_for
from deconvd.wire.status import error_from_status
from deconvd.wire.stream_parts import PendingElements
from deconvd.wire.tensor import message_from_array, message_from_spec
from deconvd_server.backend import Backend
from deconvd_server.call.context import CallContext
from deconvd_server.daemon import Daemon, DaemonState
from deconvd_server.device import Departing, Device
from deconvd_server.device.arriving import wait_for_all
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.settings import Settings
from tests.devices import OverlappingCpuDevice
from tests.direct_calls import connect_stream_from
from tests.processes import wait_until
from tests.session_clients import array_of

__all__ = [
    "SteppingDevice",
    "StripedClient",
    "StripedServer",
    "arrays_of",
    "compute_by_message",
    "describe",
    "is_closed",
    "striped_server",
]

MIB = 1 << 20


def arrays_of(
    operation: Operation, dtype: Any = np.float32, samples_count: int = 5
) -> dict[str, Array]:
    """Return operands of an operation, in the order in which they are sent."""
    rng = np.random.default_rng(0)
    problem = problem_of(
        TensorSpec((samples_count, 3, 9, 7), np.dtype(dtype)),
        TensorSpec((3, 4, 3, 2), np.dtype(dtype)),
        Geometry(),
    )
    return {
        field: rng.standard_normal(spec_of_field(problem, field).shape).astype(dtype)
        for field in operation.write_order
    }


def describe(operation: Operation, operands: Mapping[str, Array], **fields: Any) -> Any:
    """Return the request of an operation, without elements."""
    tensors = {field: message_from_spec(spec_of(array)) for field, array in operands.items()}
    if operation is DECONVOLVE_GRAD:
        fields.setdefault("wanted", pb.GradientMask(gx=True, gw=True, gb=True))
    return messages_for(operation).request(**{**tensors, **fields})


def compute_by_message(
    address: str, operation: Operation, operands: Mapping[str, Array]
) -> dict[str, Array]:
    """Return the results of a unary call by gRPC."""
    request = describe(operation, operands)
    for field, array in operands.items():
        getattr(request, field).CopyFrom(message_from_array(array))
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.DeconvolutionServiceStub(channel)
        response = getattr(stub, operation.name)(request)
    return {field.name: array_of(tensor) for field, tensor in response.ListFields()}


def is_closed(line: FrameStream) -> bool:
    """Wait until the server closes a connection, whatever it has sent before; False if it waits for the client."""
    try:
        while not isinstance(event := line.next_event(), EndOfStream):
            if isinstance(event, PendingElements):
                line.read_into(np.empty(event.size_bytes, np.uint8))
    except ConnectionError:
        return True
    return False


class StripedClient:
    """One control connection and some stripes, each used by one thread: what tests send fits in the sockets' buffers.

    Attributes:
        control, stripes: The connections.
        transfer: The id of the transfer of the call under way.
    """

    def __init__(
        self,
        port: int,
        stripes_count: int = 2,
        host: str = "127.0.0.1",
        receive_buffer_bytes: int = 0,
    ) -> None:
        self.control = connect_stream_from(host, port)
        self.stripes = [
            connect_stream_from(host, port, receive_buffer_bytes=receive_buffer_bytes)
            for _ in range(stripes_count)
        ]
        self.transfer = secrets.token_bytes(16)

    def begin(self, request: Any, *, stripes_count: int = 0, timeout_s: float = 30) -> None:
        """Send the call, on the control connection."""
        name = request.DESCRIPTOR.name.removesuffix("Request")
        self.control.send(
            StripedCallHead(
                MethodCode[name],
                timeout_s,
                request.SerializeToString(),
                self.transfer,
                stripes_count or len(self.stripes),
            )
        )

    def join(self, *stripes: FrameStream) -> None:
        """Let stripes join the call: all by default."""
        for line in stripes or self.stripes:
            line.send(StripeHead(self.transfer))

    def send(
        self, arrays: Sequence[Array], numbers: Sequence[int] | None = None, *, ends: bool = True
    ) -> None:
        """Send pieces of operands, one after the other over all stripes in turn, and then END."""
        space = PieceSpace(arrays)
        for index, number in enumerate(range(space.pieces_count) if numbers is None else numbers):
            self.stripes[index % len(self.stripes)].send_piece(number, space.buffers(number))
        for line in self.stripes if ends else ():
            line.send(EndOfStream())

    def receive(self, arrays: Sequence[Array]) -> list[list[int]]:
        """Receive results into arrays, until END; return the numbers of the pieces of each stripe."""
        space = PieceSpace(arrays)
        received: list[list[int]] = []
        for line in self.stripes:
            received.append([])
            while not isinstance(event := line.next_event(), EndOfStream):
                assert isinstance(event, PieceHead), event
                elements = line.next_event()
                assert isinstance(elements, PendingElements)
                count = space.count_in_run(event.number, elements.size_bytes)
                assert count
                for buffer in space.buffers(event.number, count):
                    line.read_into_buffer(buffer)
                received[-1] += range(event.number, event.number + count)
        numbers = sorted(number for numbers in received for number in numbers)
        assert numbers == [*range(space.pieces_count)]
        return received

    def take_answer(self, operation: Operation) -> Any:
        """Return the response."""
        event = self.control.next_event()
        assert isinstance(event, Answer), event
        assert "server_us=" in event.ledger
        return messages_for(operation).response.FromString(event.message)

    def take_failure(self) -> Exception:
        """Return the error that the call ends with."""
        event = self.control.next_event()
        assert isinstance(event, CallFailure), event
        return error_from_status(event.status)

    def compute(
        self,
        operation: Operation,
        operands: Mapping[str, Array],
        numbers: Sequence[int] | None = None,
        timeout_s: float = 30,
    ) -> dict[str, Array]:
        """Make a call, and return its results."""
        self.transfer = secrets.token_bytes(16)
        self.begin(describe(operation, operands), timeout_s=timeout_s)
        self.join()
        self.send([*operands.values()], numbers)
        results = empty_results(operation, operands)
        self.receive([*results.values()])
        response = self.take_answer(operation)
        assert [field.name for field, _ in response.ListFields()] == [*results]
        return results

    def close(self) -> None:
        """Close all connections."""
        for line in (self.control, *self.stripes):
            line.close()


def empty_results(operation: Operation, operands: Mapping[str, Array]) -> dict[str, Array]:
    """Return arrays for the results of an operation, in the order in which they are sent."""
    problem = problem_of(spec_of(operands["x"]), spec_of(operands["w"]), Geometry())
    specs = {field: spec_of_field(problem, field) for field in operation.all_results}
    return {field: np.zeros(spec.shape, spec.dtype) for field, spec in specs.items()}


class SteppingDevice(OverlappingCpuDevice):
    """A device that overlaps transfers: it notes some bytes of its results, and waits for the test before the others.

    Attributes:
        has_computed: Set once some bytes are noted.
        let_go: The test sets it.
        fail: Called after that.
        noted_bytes: How many bytes are noted of the first result.
    """

    def __init__(self, noted_bytes: int = 0) -> None:
        super().__init__(1)
        self.has_computed = threading.Event()
        self.let_go = threading.Event()
        self.fail: Callable[[], None] = lambda: None
        self.noted_bytes = noted_bytes

    def run(
        self,
        operation: Operation,
        problem: Any,
        operands: Any,
        places: Any,
        options: Any,
        call: CallContext,
    ) -> None:
        """See `Device`."""
        there = wait_for_all(operands, call)
        super().run(operation, problem, there, places, options, call)
        for place in places.values():
            if isinstance(place, Departing) and self.noted_bytes:
                place.note_written(min(self.noted_bytes, place.array.nbytes))
                break
        self.has_computed.set()
        while not self.let_go.wait(0.01):
            call.check()
        self.fail()


@dataclass(frozen=True)
class StripedServer:
    """A server in this process.

    Attributes:
        address: Where it listens for gRPC.
        port: Where it listens for direct connections.
    """

    daemon: Daemon
    backend: Backend
    address: str
    port: int

    @property
    def load(self) -> tuple[int, int]:
        """Streams that are under way, and the memory that they take."""
        load = self.backend.stream_admission.load
        return load.running_count + load.waiting_count, load.used_bytes

    def wait_until_idle(self) -> None:
        """Wait until no call is under way, and all memory has been given back."""
        wait_until(lambda: self.load == (0, 0))
        wait_until(lambda: self.backend.budgeted_bytes() == 0)


@contextmanager
def striped_server(device: Device | None = None) -> Iterator[StripedServer]:
    """Run a server in this process for the block."""
    daemon = Daemon(Settings(["127.0.0.1:0"], 64 * MIB, 10))
    daemon.serve(lambda: [device or CpuDevice(1)])
    assert daemon.backend is not None
    try:
        with grpc.insecure_channel(daemon.addresses[0]) as channel:
            stub = pb_grpc.DeconvolutionServiceStub(channel)
            port = stub.GetServerInfo(pb.GetServerInfoRequest()).direct_port
        yield StripedServer(daemon, daemon.backend, daemon.addresses[0], port)
    finally:
        if isinstance(device, SteppingDevice):
            device.let_go.set()
        if daemon.state is DaemonState.SERVING:
            daemon.cut_drain()
            daemon.drain()
