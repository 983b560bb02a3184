"""The gRPC boundary, asked with what no client of ours would send, and an engine that fails."""

from __future__ import annotations

import logging
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, cast

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_status import rpc_status

import deconvd_client
from deconvd import errors
from deconvd.errors import DeconvdError
from deconvd.model.geometry import Geometry
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd.wire.grpc_status import error_from_rpc
from deconvd.wire.messages import message_from_geometry
from deconvd.wire.tensor import message_from_array
from deconvd_server.daemon import Daemon
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.resources.socket_file import AddressInUseError
from deconvd_server.settings import Settings
from tests.devices import FailingDevice
from tests.servers import ServerProcess

X = np.ones((1, 2, 3, 3), np.float32)
W = np.ones((2, 2, 2, 2), np.float32)
METHODS = ("Deconvolve", "DeconvolveGrad", "GetServerInfo")


class ClosingDevice(CpuDevice):
    """A device that says whether it was closed."""

    is_closed = False

    def close(self) -> None:
        super().close()
        self.is_closed = True


@contextmanager
def served_by(
    device: CpuDevice,
    max_message_bytes: int = 2 << 20,
    transport: str = "auto",
    timeout_s: float = 30,
) -> Iterator[deconvd_client.Connection]:
    daemon = Daemon(Settings(["127.0.0.1:0"], max_message_bytes, drain_timeout_s=10))
    daemon.serve(lambda: [device])
    try:
        with deconvd_client.connect(
            daemon.addresses[0], timeout_s=timeout_s, transport=transport
        ) as connection:
            yield connection
    finally:
        daemon.drain()


@pytest.fixture
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> pb_grpc.DeconvolutionServiceStub:
    return pb_grpc.DeconvolutionServiceStub(channel)


@pytest.mark.parametrize("cls", DeconvdError.__subclasses__())
def test_client_raises_what_the_device_raised(cls: type[DeconvdError]) -> None:
    with (
        served_by(FailingDevice(cls("the filter is wider than the image")), timeout_s=2) as F,
        pytest.raises(cls, match="the filter is wider than the image") as raised,
    ):
        F.deconvolution_2d(X, W)

    assert type(raised.value) is cls


class FlakyDevice(CpuDevice):
    """A device that is unavailable for the first calls."""

    def __init__(self, failures_count: int) -> None:
        super().__init__(1)
        self.failures_count = failures_count
        self.calls_count = 0

    def run(self, *args: Any) -> None:
        self.calls_count += 1
        if self.calls_count <= self.failures_count:
            raise errors.UnavailableError("the device is busy")
        super().run(*args)


@pytest.mark.parametrize("x", [X, np.ones((60, 2, 128, 128), np.float32)], ids=["small", "stream"])
def test_a_call_that_finds_the_server_unavailable_is_tried_again(x: Any) -> None:
    device = FlakyDevice(failures_count=2)

    with served_by(device) as F:
        y = F.deconvolution_2d(x, W)

    assert y.shape == (len(x), 2, x.shape[2] + 1, x.shape[3] + 1)
    assert device.calls_count > 2


def test_a_server_that_stays_unavailable_is_given_up() -> None:
    device = FlakyDevice(failures_count=100)

    with served_by(device, timeout_s=2) as F:
        with pytest.raises(errors.UnavailableError, match="busy"):
            F.deconvolution_2d(X, W)

    assert device.calls_count > 2


def test_an_oversized_request_is_told_the_option_to_raise() -> None:
    large = np.zeros((1, 2, 100, 160), np.float32)

    with served_by(CpuDevice(1), max_message_bytes=100_000, transport="grpc") as F:
        with pytest.raises(
            errors.ExhaustedError, match=r"request has 12\d+ bytes.*--max-message-bytes"
        ):
            F.deconvolution_2d(large, W)
        assert F.deconvolution_2d(X, W).shape == (1, 2, 4, 4)


class BlockedDevice(CpuDevice):
    """A device whose calls wait until they are let go."""

    def __init__(self) -> None:
        super().__init__(2)
        self.let_go = threading.Event()

    def run(self, *args: Any) -> None:
        assert self.let_go.wait(60)
        super().run(*args)


def test_health_is_answered_while_every_place_is_taken_on_every_device() -> None:
    devices = [BlockedDevice() for _ in range(3)]
    daemon = Daemon(Settings(["127.0.0.1:0"], 1 << 20, drain_timeout_s=60))
    daemon.serve(lambda: devices)
    request = pb.DeconvolveRequest(x=message_from_array(X), w=message_from_array(W))
    with (
        grpc.insecure_channel(daemon.addresses[0]) as channel,
        deconvd_client.connect(daemon.addresses[0], timeout_s=30) as F,
    ):
        rpc = pb_grpc.DeconvolutionServiceStub(channel).Deconvolve
        calls = [rpc.future(request) for _ in range(300)]
        ended = SimpleQueue[Any]()
        for call in calls:
            call.add_done_callback(ended.put)
        for _ in range(300 - 3 * (2 + 24)):
            assert ended.get(timeout=60).code() is grpc.StatusCode.UNAVAILABLE
        loads = [(d.running_calls_count, d.waiting_calls_count) for d in F.server_info().devices]
        health = F.health()
        for device in devices:
            device.let_go.set()
        codes = Counter(call.code() for call in calls)
    daemon.drain()

    # 2 run and 24 wait on each device, where 8 more might for others: whoever comes after is refused
    assert loads == [(2, 24)] * 3
    assert health == "SERVING"
    assert codes[grpc.StatusCode.OK] == 3 * (2 + 24)


def test_details_of_an_error_arrive_with_it() -> None:
    with served_by(FailingDevice(errors.InvalidArgumentError("no", argument="stride"))) as F:
        with pytest.raises(errors.InvalidArgumentError) as invalid:
            F.deconvolution_2d(X, W)
    with served_by(
        FailingDevice(errors.UnavailableError("later", retry_after_s=0.25)), timeout_s=2
    ) as F:
        with pytest.raises(errors.UnavailableError) as unavailable:
            F.deconvolution_2d(X, W)

    assert invalid.value.argument == "stride"
    assert unavailable.value.retry_after_s == 0.25


def test_the_text_of_an_unforeseen_error_stays_on_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        served_by(FailingDevice(ZeroDivisionError("the password is swordfish"))) as F,
        caplog.at_level(logging.ERROR),
        pytest.raises(errors.InternalError, match="see the server's log") as raised,
    ):
        F.deconvolution_2d(X, W)

    assert "swordfish" not in str(raised.value)
    assert "swordfish" in caplog.text
    assert "Deconvolve from " in caplog.text


def test_calls_are_unavailable_and_health_not_serving_until_the_device_is_ready() -> None:
    daemon = Daemon(Settings(["127.0.0.1:0"], max_message_bytes=1 << 20, drain_timeout_s=10))
    try:
        with deconvd_client.connect(daemon.addresses[0], timeout_s=2) as F:
            before = F.health()
            with pytest.raises(errors.UnavailableError, match="device is not ready"):
                F.deconvolution_2d(X, W)
            daemon.serve(lambda: [CpuDevice(1)])
            assert (before, F.health()) == ("NOT_SERVING", "SERVING")
            assert F.deconvolution_2d(X, W).shape == (1, 2, 4, 4)
    finally:
        daemon.drain()


def test_a_device_is_closed_where_what_serves_calls_cannot_be_made() -> None:
    device = ClosingDevice(1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        settings = Settings(["127.0.0.1:0"], 1 << 20, 10, direct_port=other.getsockname()[1])
        daemon = Daemon(settings)
        try:
            with pytest.raises(AddressInUseError, match="cannot listen for direct calls"):
                daemon.serve(lambda: [device])
        finally:
            daemon.drain()

    assert device.is_closed


def test_every_method_is_unavailable_until_the_device_is_ready() -> None:
    methods = pb.DESCRIPTOR.services_by_name["DeconvolutionService"].methods
    daemon = Daemon(Settings(["127.0.0.1:0"], max_message_bytes=1 << 20, drain_timeout_s=10))
    try:
        with grpc.insecure_channel(daemon.addresses[0]) as channel:
            stub: Any = pb_grpc.DeconvolutionServiceStub(channel)
            failures = {method.name: _failure(stub, method) for method in methods}
            convolve: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
                "/deconvd.v1.DeconvolutionService/Convolve"
            )
            with pytest.raises(grpc.RpcError) as unknown:
                convolve(b"")
    finally:
        daemon.drain()

    assert len(failures) == 9
    for error in failures.values():
        assert isinstance(error, errors.UnavailableError)
        assert error.retry_after_s == 0.2
    assert as_call(unknown).code() is grpc.StatusCode.UNIMPLEMENTED


def _failure(stub: Any, method: MethodDescriptor) -> DeconvdError:
    """Return what a call of a method with a message that says nothing ends with."""
    request = GetMessageClass(method.input_type)()
    call = getattr(stub, method.name)
    with pytest.raises(grpc.RpcError) as raised:
        list(call(iter([request]) if method.client_streaming else request, timeout=30))
    return error_from_rpc(raised.value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("garbage", [b"\xff", b"\x0a\x7f", bytes(range(256)) * 4])
def test_garbage_is_an_invalid_argument(channel: grpc.Channel, method: str, garbage: bytes) -> None:
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
        f"/deconvd.v1.DeconvolutionService/{method}"
    )
    assert_refused(lambda: call(garbage), "not a valid deconvd.v1", argument="")


def test_an_unknown_method_is_unimplemented(channel: grpc.Channel) -> None:
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
        "/deconvd.v1.DeconvolutionService/Convolve"
    )
    with pytest.raises(grpc.RpcError) as raised:
        call(b"")
    assert as_call(raised).code() is grpc.StatusCode.UNIMPLEMENTED


def tensor(**changes: Any) -> pb.Tensor:
    message = message_from_array(X)
    for name, value in changes.items():
        message.ClearField(cast("Any", name))
        if value is not None:
            message.MergeFrom(pb.Tensor(**{name: value}))
    return message


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (pb.Tensor(), "x must have one of the element types .* got number 0"),
        (tensor(element_type=99), "x must have one of the element types .* got number 99"),
        (tensor(raw=None), "x must have its elements as raw bytes"),
        (tensor(raw=b"123"), "x must have 72 bytes of elements for float32 .* got 3"),
        (tensor(raw=bytes(73)), "x must have 72 bytes of elements for float32 .* got 73"),
        (tensor(shape=[1, 2, 3]), "x must have 4 dimensions, got 3"),
        (tensor(shape=[1, 2, -3, -3]), "x: each dimension must be from 0 to"),
        (tensor(shape=[1] * 1000), "x must have at most 8 dimensions"),
        (tensor(shape=[2**62] * 4), "x: each dimension must be from 0 to"),
        (tensor(shape=[2**29, 2, 2, 2]), r"x must have 17179869184 bytes of elements"),
        (tensor(shape=[2**40, 0, 2**40, 2**40], raw=b""), "x: each dimension must be from 0 to"),
    ],
)
def test_a_tensor_that_is_none_is_refused(
    stub: pb_grpc.DeconvolutionServiceStub, x: pb.Tensor, message: str
) -> None:
    request = pb.DeconvolveRequest(x=x, w=message_from_array(W))

    assert_refused(lambda: stub.Deconvolve(request), message, argument="x")


@pytest.mark.parametrize(
    ("geometry", "argument"),
    [
        (pb.Geometry(stride=pb.Pair(h=0, w=1)), "stride"),
        (pb.Geometry(stride=pb.Pair(h=1, w=2**62)), "stride"),
        (pb.Geometry(pad=pb.Pair(h=-1)), "pad"),
        (pb.Geometry(dilate=pb.Pair(h=1)), "dilate"),
        (pb.Geometry(groups=0), "groups"),
        (pb.Geometry(groups=-(2**63)), "groups"),
        (pb.Geometry(outsize=pb.OutputSize(h=0)), "outsize"),
        (pb.Geometry(outsize=pb.OutputSize(w=2**40)), "outsize"),
    ],
)
def test_a_geometry_out_of_range_is_refused(
    stub: pb_grpc.DeconvolutionServiceStub, geometry: pb.Geometry, argument: str
) -> None:
    request = pb.DeconvolveRequest(
        x=message_from_array(X), w=message_from_array(W), geometry=geometry
    )

    assert_refused(lambda: stub.Deconvolve(request), "", argument=argument)


def test_an_unknown_option_value_is_refused(stub: pb_grpc.DeconvolutionServiceStub) -> None:
    request = pb.DeconvolveRequest(x=message_from_array(X), w=message_from_array(W))
    request.options.MergeFromString(b"\x18\x63")  # use_cudnn = 99

    assert_refused(
        lambda: stub.Deconvolve(request),
        "use_cudnn must be one of USE_CUDNN_UNSPECIFIED.* got number 99",
        argument="use_cudnn",
    )


def test_gradients_must_be_wanted(stub: pb_grpc.DeconvolutionServiceStub) -> None:
    request = pb.DeconvolveGradRequest(x=tensor(), w=message_from_array(W), gy=tensor())

    assert_refused(
        lambda: stub.DeconvolveGrad(request), "wanted must name at least one", argument="wanted"
    )


@pytest.mark.parametrize(("wanted", "missing"), [("gx", "W"), ("gw", "x")])
def test_a_description_is_refused_where_elements_are_needed(
    stub: pb_grpc.DeconvolutionServiceStub, wanted: str, missing: str
) -> None:
    described = pb.Tensor(element_type=pb.ELEMENT_TYPE_FLOAT32, shape=W.shape)
    request = pb.DeconvolveGradRequest(
        x=tensor(raw=None) if missing == "x" else tensor(),
        w=described if missing == "W" else message_from_array(W),
        gy=message_from_array(np.ones((1, 2, 4, 4), np.float32)),
        wanted=pb.GradientMask(**{wanted: True}),
    )

    assert_refused(
        lambda: stub.DeconvolveGrad(request), f"{missing} must have its elements", argument=missing
    )


def test_a_huge_declared_gradient_is_refused_before_it_is_made(
    stub: pb_grpc.DeconvolutionServiceStub,
) -> None:
    shape = [1, 1, 2**16, 2**16]
    request = pb.DeconvolveGradRequest(
        x=message_from_array(np.ones((1, 1, 1, 1), np.float32)),
        w=pb.Tensor(element_type=pb.ELEMENT_TYPE_FLOAT64, shape=shape),
        gy=message_from_array(np.ones((1, 1, 2, 2), np.float32)),
        geometry=message_from_geometry(Geometry(pad=(2**15 - 1, 2**15 - 1))),
        wanted=pb.GradientMask(gw=True),
    )

    with pytest.raises(grpc.RpcError) as raised:
        stub.DeconvolveGrad(request)

    assert as_call(raised).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "--max-message-bytes" in str(as_call(raised).details())


def test_an_oversized_result_is_refused_before_it_is_computed(
    stub: pb_grpc.DeconvolutionServiceStub,
) -> None:
    one = message_from_array(np.ones((1, 1, 2, 2), np.float32))
    geometry = message_from_geometry(Geometry(stride=(2**20, 2**20)))

    with pytest.raises(grpc.RpcError) as raised:
        stub.Deconvolve(pb.DeconvolveRequest(x=one, w=one, geometry=geometry))

    assert as_call(raised).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "--max-message-bytes" in str(as_call(raised).details())


def test_left_out_geometry_has_its_defaults(stub: pb_grpc.DeconvolutionServiceStub) -> None:
    bare = pb.DeconvolveRequest(x=message_from_array(X), w=message_from_array(W))
    whole = pb.DeconvolveRequest(geometry=message_from_geometry(Geometry()))
    whole.MergeFrom(bare)

    assert stub.Deconvolve(bare) == stub.Deconvolve(whole)


def assert_refused(rpc: Callable[[], Any], message: str, *, argument: str) -> None:
    """The call ends with INVALID_ARGUMENT, a matching message and the argument in BadRequest."""
    with pytest.raises(grpc.RpcError) as raised:
        rpc()
    call = as_call(raised)
    assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert re.search(message, str(call.details()))
    violations = [
        violation.field
        for detail in rpc_status.from_call(call).details
        if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR)
        for violation in unpacked(detail).field_violations
    ]
    assert violations == ([argument] if argument else [])


def unpacked(detail: Any) -> Any:
    bad_request = error_details_pb2.BadRequest()
    assert detail.Unpack(bad_request)
    return bad_request


def as_call(raised: pytest.ExceptionInfo[grpc.RpcError]) -> grpc.Call:
    return cast("grpc.Call", raised.value)
