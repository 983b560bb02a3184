"""Whole RPCs with damaged requests: each ends well or with a status of the contract, and the server lives on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from deconvd.model.dtypes import Array
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from tests.packed import pack_by_definition
from tests.servers import ServerProcess, server_process

SERVICE = pb.DESCRIPTOR.services_by_name["DeconvolutionService"]

OF_THE_CONTRACT = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
ENOUGH_RESPONSES = 4
"""After which a stream is cancelled: what is asked for may be very large."""

X, W, GY = (np.ones(s, np.float32) for s in ((2, 2, 3, 3), (2, 2, 2, 2), (2, 2, 4, 4)))

SESSION, HANDLE = bytes(range(16)), bytes(range(16, 32))
"""What stands in requests for a session of the server, and for a tensor that it keeps."""


def tensor(array: Array, *, with_elements: bool) -> pb.Tensor:
    described = pb.Tensor(element_type=pb.ELEMENT_TYPE_FLOAT32, shape=array.shape)
    if with_elements:
        described.raw = array.tobytes()
    return described


def forward(*, with_elements: bool) -> pb.DeconvolveRequest:
    x, w = (tensor(array, with_elements=with_elements) for array in (X, W))
    return pb.DeconvolveRequest(x=x, w=w, geometry=geometry(), session=SESSION)


def backward(*, with_elements: bool) -> pb.DeconvolveGradRequest:
    x, w, gy = (tensor(array, with_elements=with_elements) for array in (X, W, GY))
    wanted = pb.GradientMask(gx=True, gw=True, gb=True)
    return pb.DeconvolveGradRequest(
        x=x, w=w, gy=gy, geometry=geometry(), wanted=wanted, session=SESSION
    )


def geometry() -> pb.Geometry:
    one = pb.Pair(h=1, w=1)
    return pb.Geometry(stride=one, pad=pb.Pair(), dilate=one, groups=1, outsize=pb.OutputSize(h=4))


REQUESTS: dict[str, list[Message]] = {
    "Deconvolve": [forward(with_elements=True)],
    "DeconvolveGrad": [backward(with_elements=True)],
    "DeconvolveStream": [
        pb.DeconvolveStreamRequest(
            header=pb.DeconvolveStreamHeader(
                request=forward(with_elements=False), slice_samples_count=1
            )
        ),
        pb.DeconvolveStreamRequest(chunk=W.tobytes()),
        pb.DeconvolveStreamRequest(chunk=X.tobytes()),
    ],
    "DeconvolveGradStream": [
        pb.DeconvolveGradStreamRequest(
            header=pb.DeconvolveGradStreamHeader(
                request=backward(with_elements=False), slice_samples_count=2
            )
        ),
        pb.DeconvolveGradStreamRequest(chunk=W.tobytes()),
        pb.DeconvolveGradStreamRequest(packed_chunk=pack_by_definition(X.reshape(-1).view("u4"))),
        pb.DeconvolveGradStreamRequest(chunk=GY.tobytes()),
    ],
    "HoldSession": [pb.HoldSessionRequest(tenant_key=b"key"), pb.HoldSessionRequest()],
    "PutTensor": [
        pb.PutTensorRequest(
            header=pb.PutTensorHeader(session=SESSION, tensor=tensor(X, with_elements=False))
        ),
        pb.PutTensorRequest(chunk=X.tobytes()),
    ],
    "GetTensor": [pb.GetTensorRequest(session=SESSION, resident=pb.Resident(handle=HANDLE))],
    "DropTensors": [pb.DropTensorsRequest(session=SESSION, residents=[pb.Resident(handle=HANDLE)])],
    "GetServerInfo": [pb.GetServerInfoRequest()],
}


@pytest.fixture(scope="module")
def fuzzed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    little = ("--max-message-bytes", str(4 << 20), "--device-memory-bytes", str(64 << 20))
    with server_process(tmp_path_factory.mktemp("server"), *little) as server:
        yield server
        assert "unforeseen" not in server.log.read_text()


@pytest.fixture(scope="module")
def channel(fuzzed_server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(fuzzed_server.target) as channel:
        yield channel


@pytest.fixture(scope="module")
def secrets(channel: grpc.Channel) -> Iterator[tuple[bytes, bytes]]:
    """The names of a session that is held, and of a tensor that is kept for it."""
    stub = pb_grpc.DeconvolutionServiceStub(channel)
    ended = threading.Event()

    def signs_of_life() -> Iterator[pb.HoldSessionRequest]:
        yield pb.HoldSessionRequest()
        while not ended.wait(0.5):
            yield pb.HoldSessionRequest()

    held = stub.HoldSession(signs_of_life())
    session = next(held).session
    header = pb.PutTensorHeader(session=session, tensor=tensor(X, with_elements=False))
    parts = [pb.PutTensorRequest(header=header), pb.PutTensorRequest(chunk=X.tobytes())]
    yield session, stub.PutTensor(iter(parts)).resident.handle
    ended.set()
    assert list(held) == []


def test_every_rpc_is_fuzzed() -> None:
    assert set(REQUESTS) == {method.name for method in SERVICE.methods}


@pytest.mark.parametrize("name", REQUESTS)
@given(random=st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_a_damaged_request_ends_with_a_status_of_the_contract(
    channel: grpc.Channel, secrets: tuple[bytes, bytes], name: str, random: Random
) -> None:
    session, handle = secrets
    parts = [
        part.replace(SESSION, session).replace(HANDLE, handle)
        for part in damaged_parts(REQUESTS[name], random)
    ]

    assert status_of(channel, name, parts) in OF_THE_CONTRACT
    assert status_of(channel, "GetServerInfo", [b""]) is grpc.StatusCode.OK


def status_of(channel: grpc.Channel, name: str, parts: list[bytes]) -> grpc.StatusCode:
    """Return how a call ends, or OK where it is cut because it answers at length."""
    # on the wire a call of one message is a stream of one
    rpc: Any = channel.stream_stream(f"/{SERVICE.full_name}/{name}")
    responses = rpc(iter(parts), timeout=30)
    try:
        for count, _ in enumerate(responses, 1):
            if count == ENOUGH_RESPONSES:
                responses.cancel()
                return grpc.StatusCode.OK
    except grpc.RpcError:
        pass
    code: grpc.StatusCode = responses.code()
    return code


def damaged_parts(parts: list[Message], random: Random) -> list[bytes]:
    """Return a request of which some fields, bytes or parts are not as they should be."""
    written = [part.SerializeToString() for part in parts]
    at = random.randrange(len(parts) + 1) % len(parts)  # the header most often
    written[at] = damaged_fields(parts[at], random).SerializeToString()
    if random.random() < 0.3:
        at = random.randrange(len(written))
        written[at] = damaged_bytes(written[at], random)
    if len(written) > 1 and random.random() < 0.3:
        at, other = random.randrange(len(written)), random.randrange(len(written))
        written[at : at + 1] = random.choice([[], [written[at]] * 2, [written[other]]])
    return written


def damaged_bytes(data: bytes, random: Random) -> bytes:
    at = random.randint(0, len(data))
    some = random.randbytes(random.randint(1, 4))
    return random.choice(
        [data[:at], data[:at] + some + data[at:], data[:at] + some + data[at + len(some) :]]
    )


def damaged_fields(message: Message, random: Random) -> Message:
    damaged = type(message)()
    damaged.CopyFrom(message)
    for _ in range(random.randint(0, 2)):
        damage_a_field(damaged, random)
    return damaged


def damage_a_field(message: Message, random: Random) -> None:
    """Change a field of a message, or of one inside it."""
    field = random.choice(message.DESCRIPTOR.fields or [None])
    if field is None:
        return
    if random.random() < 0.1:
        message.ClearField(field.name)
    elif field.is_repeated:
        damage_a_list(getattr(message, field.name), field, random)
    elif field.message_type is not None:
        damage_a_field(getattr(message, field.name), random)
    else:
        setattr(message, field.name, any_value(field, random))


def damage_a_list(values: Any, field: Any, random: Random) -> None:
    if len(values) and random.random() < 0.5:
        del values[random.randrange(len(values))]
    elif field.message_type is not None:
        damage_a_field(values.add(), random)
    elif len(values) and random.random() < 0.7:
        values[random.randrange(len(values))] = any_value(field, random)
    else:
        values.append(any_value(field, random))


_NUMBERS = [0, 1, 2, 3, 5, 64, 1 << 12, 1 << 20, 2**31 - 1, 2**31, 2**62, 2**63 - 1]

_VALUES: dict[int, Callable[[Random], object]] = {
    FieldDescriptor.CPPTYPE_INT64: lambda random: random.choice([1, -1]) * random.choice(_NUMBERS),
    FieldDescriptor.CPPTYPE_BOOL: lambda random: random.random() < 0.5,
    FieldDescriptor.CPPTYPE_ENUM: lambda random: random.choice([0, 1, 2, 3, 4, 5, 99, -1]),
    FieldDescriptor.CPPTYPE_STRING: lambda random: random.randbytes(random.choice([0, 1, 16, 72])),
}


def any_value(field: Any, random: Random) -> Any:
    """Return a value of a field's type: of strings the requests have those of bytes only."""
    return _VALUES[field.cpp_type](random)
