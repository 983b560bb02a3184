"""What any client can do that has the schema and nothing else of ours, with every RPC."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from random import Random
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd.model.problem import Problem, TensorSpec
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from tests import definition
from tests.servers import ServerProcess
from tests.wire import scramble

SERVICE = pb.DESCRIPTOR.services_by_name["DeconvolutionService"]
Stub = pb_grpc.DeconvolutionServiceStub

# Whole numbers, so that sums in any order are the same; and enough of them that the server frames by hand.
rng = np.random.default_rng(0)
X, W, B, GY = (
    rng.integers(-3, 4, shape).astype(np.float32)
    for shape in ((4, 4, 24, 20), (4, 3, 3, 2), (6,), (4, 6, 48, 21))
)
GEOMETRY = pb.Geometry(
    stride=pb.Pair(h=2, w=1), pad=pb.Pair(h=1), groups=2, outsize=pb.OutputSize(h=48)
)
PROBLEM = Problem(
    TensorSpec(X.shape, X.dtype),
    TensorSpec(W.shape, W.dtype),
    Geometry(stride=(2, 1), pad=(1, 0), groups=2, outsize=(48, None)),
)
SLICE_SAMPLES_COUNT = 3
CHUNK_BYTES = 10_000


def description(array: Array) -> pb.Tensor:
    return pb.Tensor(element_type=pb.ELEMENT_TYPE_FLOAT32, shape=array.shape)


def tensor(array: Array) -> pb.Tensor:
    return pb.Tensor(element_type=pb.ELEMENT_TYPE_FLOAT32, shape=array.shape, raw=array.tobytes())


def forward(as_message: Callable[[Array], pb.Tensor]) -> pb.DeconvolveRequest:
    x, w, b = map(as_message, (X, W, B))
    return pb.DeconvolveRequest(x=x, w=w, b=b, geometry=GEOMETRY)


def backward(as_message: Callable[[Array], pb.Tensor]) -> pb.DeconvolveGradRequest:
    x, w, gy = map(as_message, (X, W, GY))
    wanted = pb.GradientMask(gx=True, gw=True, gb=True)
    return pb.DeconvolveGradRequest(x=x, w=w, gy=gy, geometry=GEOMETRY, wanted=wanted)


def chunks(*arrays: Array) -> Iterator[bytes]:
    elements = b"".join(array.tobytes() for array in arrays)
    for start in range(0, len(elements), CHUNK_BYTES):
        yield elements[start : start + CHUNK_BYTES]


def forward_parts() -> Iterator[pb.DeconvolveStreamRequest]:
    header = pb.DeconvolveStreamHeader(
        request=forward(description), slice_samples_count=SLICE_SAMPLES_COUNT
    )
    yield pb.DeconvolveStreamRequest(header=header)
    for chunk in chunks(W, B, X):
        yield pb.DeconvolveStreamRequest(chunk=chunk)


def backward_parts() -> Iterator[pb.DeconvolveGradStreamRequest]:
    header = pb.DeconvolveGradStreamHeader(
        request=backward(description), slice_samples_count=SLICE_SAMPLES_COUNT
    )
    yield pb.DeconvolveGradStreamRequest(header=header)
    for chunk in chunks(W, X[:3], GY[:3], X[3:], GY[3:]):
        yield pb.DeconvolveGradStreamRequest(chunk=chunk)


def received(message: pb.Tensor, raw: bytes) -> Array:
    assert message.element_type == pb.ELEMENT_TYPE_FLOAT32
    return np.frombuffer(raw, np.float32).reshape(message.shape)


def assert_is_y(response: pb.DeconvolveResponse) -> None:
    y = received(response.y, response.y.raw)
    np.testing.assert_array_equal(y, definition.deconvolve(PROBLEM, X, W, B))


def assert_are_gradients(response: pb.DeconvolveGradResponse) -> None:
    results = [received(t, t.raw) for t in (response.gx, response.gw, response.gb)]
    for result, expected in zip(results, definition.gradients(PROBLEM, X, W, GY), strict=True):
        np.testing.assert_array_equal(result, expected)


def deconvolve(stub: Stub) -> None:
    assert_is_y(stub.Deconvolve(forward(tensor)))


def deconvolve_grad(stub: Stub) -> None:
    assert_are_gradients(stub.DeconvolveGrad(backward(tensor)))


def deconvolve_stream(stub: Stub) -> None:
    first, *rest = stub.DeconvolveStream(forward_parts())

    response = first.header
    response.y.raw = b"".join(part.chunk for part in rest)
    assert_is_y(response)


def deconvolve_grad_stream(stub: Stub) -> None:
    first, *rest = stub.DeconvolveGradStream(backward_parts())

    response = first.header
    raw = b"".join(part.chunk for part in rest)
    for result, array in ((response.gx, X), (response.gw, W), (response.gb, B)):
        result.raw, raw = raw[: array.nbytes], raw[array.nbytes :]
    assert raw == b""
    assert_are_gradients(response)


def get_server_info(stub: Stub) -> None:
    info = stub.GetServerInfo(pb.GetServerInfoRequest())

    assert [device.id for device in info.devices] == ["cpu"]
    assert pb.ELEMENT_TYPE_BFLOAT16 in info.element_types
    assert info.limits.message_bytes > 4 << 20


@contextmanager
def session(stub: Stub) -> Iterator[bytes]:
    """Hold a session for the block."""
    end: SimpleQueue[None] = SimpleQueue()

    def signs() -> Iterator[pb.HoldSessionRequest]:
        yield pb.HoldSessionRequest()
        end.get()

    responses = stub.HoldSession(signs())
    opened = next(responses)
    assert opened.lease_s > 0
    assert opened.quota_bytes > 0
    yield opened.session
    end.put(None)
    assert list(responses) == []


def hold_session(stub: Stub) -> None:
    with session(stub) as name:
        request = forward(tensor)
        request.session, request.keep_y = name, True
        y = stub.Deconvolve(request).y

        assert y.WhichOneof("payload") == "resident"
    with pytest.raises(grpc.RpcError) as raised:
        next(stub.GetTensor(pb.GetTensorRequest(session=name, resident=y.resident)))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


def put_x(stub: Stub, name: bytes) -> pb.Resident:
    header = pb.PutTensorHeader(session=name, tensor=description(X))
    parts = [pb.PutTensorRequest(header=header)]
    parts += [pb.PutTensorRequest(chunk=chunk) for chunk in chunks(X)]
    return stub.PutTensor(iter(parts)).resident


def put_tensor(stub: Stub) -> None:
    with session(stub) as name:
        request = forward(tensor)
        request.session = name
        request.x.resident.CopyFrom(put_x(stub, name))

        assert_is_y(stub.Deconvolve(request))


def get_tensor(stub: Stub) -> None:
    with session(stub) as name:
        request = pb.GetTensorRequest(session=name, resident=put_x(stub, name))

        first, *rest = stub.GetTensor(request)

        elements = b"".join(part.chunk for part in rest)
        np.testing.assert_array_equal(received(first.header, elements), X)


def drop_tensors(stub: Stub) -> None:
    with session(stub) as name:
        resident = put_x(stub, name)

        stub.DropTensors(pb.DropTensorsRequest(session=name, residents=[resident]))

        with pytest.raises(grpc.RpcError) as raised:
            list(stub.GetTensor(pb.GetTensorRequest(session=name, resident=resident)))
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND


CALLS: dict[str, Callable[[Stub], None]] = {
    "Deconvolve": deconvolve,
    "DeconvolveGrad": deconvolve_grad,
    "DeconvolveStream": deconvolve_stream,
    "DeconvolveGradStream": deconvolve_grad_stream,
    "HoldSession": hold_session,
    "PutTensor": put_tensor,
    "GetTensor": get_tensor,
    "DropTensors": drop_tensors,
    "GetServerInfo": get_server_info,
}
"""Whoever adds an RPC adds a call of it here."""


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target) as channel:
        yield channel


@pytest.mark.parametrize("name", CALLS)
def test_the_generated_client_calls(channel: grpc.Channel, name: str) -> None:
    CALLS[name](Stub(channel))


def test_every_rpc_is_called_here() -> None:
    assert set(CALLS) == {method.name for method in SERVICE.methods}


@given(random=st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_fields_may_stand_in_any_order_among_unknown_ones(
    channel: grpc.Channel, random: Random
) -> None:
    y: Any = unary(channel, "Deconvolve", pb.DeconvolveResponse)
    gradients: Any = unary(channel, "DeconvolveGrad", pb.DeconvolveGradResponse)
    info: Any = unary(channel, "GetServerInfo", pb.GetServerInfoResponse)

    assert_is_y(y(scramble(forward(tensor), random)))
    assert_are_gradients(gradients(scramble(backward(tensor), random)))
    assert info(scramble(pb.GetServerInfoRequest(), random)).devices


def unary(channel: grpc.Channel, name: str, response_type: type[Message]) -> Any:
    return channel.unary_unary(
        f"/{SERVICE.full_name}/{name}", response_deserializer=response_type.FromString
    )


@given(random=st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_parts_of_a_stream_may_have_unknown_fields_too(
    channel: grpc.Channel, random: Random
) -> None:
    for name, parts in (
        ("DeconvolveStream", forward_parts),
        ("DeconvolveGradStream", backward_parts),
    ):
        raw: Any = channel.stream_stream(f"/{SERVICE.full_name}/{name}")
        stock: Any = getattr(Stub(channel), name)

        answered = list(raw(iter([scramble(part, random) for part in parts()])))

        assert answered == [part.SerializeToString() for part in stock(parts())]


def test_health_is_told_to_the_stock_client(channel: grpc.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=SERVICE.full_name)

    watch = stub.Watch(request)
    watched = next(watch)
    watch.cancel()

    assert stub.Check(request).status == health_pb2.HealthCheckResponse.SERVING
    assert watched.status == health_pb2.HealthCheckResponse.SERVING


def test_who_has_not_even_the_schema_is_told_it_by_reflection(channel: grpc.Channel) -> None:
    pool = reflected(channel, SERVICE.full_name)
    method = pool.FindMethodByName(f"{SERVICE.full_name}.Deconvolve")
    request_type, response_type = map(
        message_factory.GetMessageClass, (method.input_type, method.output_type)
    )
    call: Any = unary(channel, method.name, response_type)

    response = call(
        request_type.FromString(forward(tensor).SerializeToString()).SerializeToString()
    )

    assert request_type is not pb.DeconvolveRequest
    assert_is_y(pb.DeconvolveResponse.FromString(response.SerializeToString()))


def reflected(channel: grpc.Channel, symbol: str) -> descriptor_pool.DescriptorPool:
    """Return the schema of a service, as the server tells it."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    ask = reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
    (answer,) = stub.ServerReflectionInfo(iter([ask]))
    pool = descriptor_pool.DescriptorPool()
    for data in answer.file_descriptor_response.file_descriptor_proto:
        pool.Add(descriptor_pb2.FileDescriptorProto.FromString(data))
    return pool
