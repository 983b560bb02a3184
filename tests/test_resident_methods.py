"""Tensors that stay on a server, from the outside: with the generated stubs and real processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest

from deconvd.errors import LostTensorError
from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd.model.problem import spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.messages import message_from_geometry
from deconvd.wire.tensor import elements_of, message_from_spec
from tests.servers import ServerProcess
from tests.session_clients import (
    SessionClient,
    array_of,
    error_of,
    open_session,
    raw_tensor,
    remember_stream,
    tensor_by_digest,
    tensor_by_handle,
)

rng = np.random.default_rng(0)
X = rng.standard_normal((6, 4, 9, 8)).astype(np.float32)
W = rng.standard_normal((4, 3, 3, 2)).astype(np.float32)
B = rng.standard_normal(3).astype(np.float32)
GEOMETRY = message_from_geometry(Geometry(stride=(2, 1), pad=(1, 0)))
STEADY = pb.Options(cudnn_deterministic=True)
MIB = 1 << 20


@pytest.fixture
def held(device_server: ServerProcess) -> Iterator[SessionClient]:
    """A client of a server on each kind of device in turn."""
    with open_session(device_server.target) as held:
        yield held


def deconvolve(
    held: SessionClient, x: pb.Tensor, w: pb.Tensor, **fields: Any
) -> pb.DeconvolveResponse:
    request = pb.DeconvolveRequest(
        x=x, w=w, geometry=GEOMETRY, options=STEADY, session=held.session, **fields
    )
    return held.stub.Deconvolve(request)


def expected_y(held: SessionClient) -> Array:
    return array_of(deconvolve(held, raw_tensor(X), raw_tensor(W), b=raw_tensor(B)).y)


@pytest.mark.parametrize(
    "array",
    [
        X,
        B,
        np.zeros((0, 4, 2, 2), np.float32),
        np.float64(7).reshape(()),
        np.arange(5).astype(ml_dtypes.bfloat16),
        rng.standard_normal((3, 7 * MIB)).astype(np.float32),
    ],
    ids=lambda array: str(array.shape),
)
def test_what_was_put_comes_back_until_it_is_dropped(held: SessionClient, array: Array) -> None:
    handle = held.put(array)

    found = held.get(handle)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(found, array)

    held.drop(handle, b"unknown")
    with pytest.raises(grpc.RpcError) as failure:
        held.get(handle)
    assert isinstance(error_of(failure), LostTensorError)
    assert error_of(failure).argument == "resident"


def test_operands_may_be_residents_and_results_stay(held: SessionClient) -> None:
    x, w, b = (tensor_by_handle(array, held.put(array)) for array in (X, W, B))

    response = deconvolve(held, x, w, b=b, keep_y=True)

    y = expected_y(held)
    assert response.y.WhichOneof("payload") == "resident"
    np.testing.assert_array_equal(held.get(response.y.resident.handle), y)
    np.testing.assert_array_equal(array_of(deconvolve(held, x, w, b=b).y), y)


def test_operands_that_are_sent_may_stay(held: SessionClient) -> None:
    keep = pb.OperandsToKeep(x=True, w=True, b=True)
    first = deconvolve(held, raw_tensor(X), raw_tensor(W), b=raw_tensor(B), keep=keep)
    kept = first.kept
    handles = [kept.x.handle, kept.w.handle, kept.b.handle]

    for handle, array in zip(handles, (X, W, B), strict=True):
        np.testing.assert_array_equal(held.get(handle), array)
    x, w, b = map(tensor_by_handle, (X, W, B), handles)
    again = deconvolve(held, x, w, b=b, keep=keep)

    np.testing.assert_array_equal(array_of(again.y), array_of(first.y))
    assert not again.HasField("kept")  # they are resident already


ALL_GRADIENTS = pb.GradientMask(gx=True, gw=True, gb=True)


def plain_gradients(held: SessionClient, gy: Array) -> pb.DeconvolveGradResponse:
    """Return the gradients of tensors that are sent with the call, and that nobody keeps."""
    return held.stub.DeconvolveGrad(
        pb.DeconvolveGradRequest(
            x=raw_tensor(X),
            w=raw_tensor(W),
            gy=raw_tensor(gy),
            geometry=GEOMETRY,
            options=STEADY,
            wanted=ALL_GRADIENTS,
        )
    )


@pytest.mark.parametrize("keep", [["gx", "gw", "gb"], ["gw"], []], ids="-".join)
def test_gradients_are_made_of_residents_and_stay(held: SessionClient, keep: list[str]) -> None:
    gy = expected_y(held)
    plain = plain_gradients(held, gy)

    response = held.stub.DeconvolveGrad(
        pb.DeconvolveGradRequest(
            x=tensor_by_handle(X, held.put(X)),
            w=tensor_by_handle(W, held.put(W)),
            gy=tensor_by_handle(gy, held.put(gy)),
            geometry=GEOMETRY,
            options=STEADY,
            wanted=ALL_GRADIENTS,
            session=held.session,
            keep=pb.GradientMask(**dict.fromkeys(keep, True)),
        )
    )

    for field in ("gx", "gw", "gb"):
        result = getattr(response, field)
        assert (result.WhichOneof("payload") == "resident") == (field in keep)
        found = held.get(result.resident.handle) if field in keep else array_of(result)
        np.testing.assert_array_equal(found, array_of(getattr(plain, field)))


def stream_header(held: SessionClient, x: pb.Tensor, w: pb.Tensor, **fields: Any) -> Any:
    request = pb.DeconvolveRequest(
        x=x, w=w, geometry=GEOMETRY, options=STEADY, session=held.session, **fields
    )
    return pb.DeconvolveStreamRequest(
        header=pb.DeconvolveStreamHeader(request=request, slice_samples_count=4)
    )


def described(array: Array) -> pb.Tensor:
    return message_from_spec(spec_of(array))


def chunk(array: Array) -> pb.DeconvolveStreamRequest:
    return pb.DeconvolveStreamRequest(chunk=bytes(elements_of(array)))


def elements(parts: list[Any]) -> bytes:
    return b"".join(part.chunk for part in parts)


@pytest.mark.parametrize("resident", [[], ["x"], ["w"], ["b"], ["x", "w", "b"]], ids="-".join)
def test_a_stream_has_some_of_its_operands_here(held: SessionClient, resident: list[str]) -> None:
    operands = {"w": W, "b": B, "x": X}
    messages = {
        field: tensor_by_handle(array, held.put(array)) if field in resident else described(array)
        for field, array in operands.items()
    }
    parts = [stream_header(held, **messages)]
    parts += [chunk(array) for field, array in operands.items() if field not in resident]

    first, *rest = held.stub.DeconvolveStream(iter(parts))

    y = expected_y(held)
    np.testing.assert_allclose(array_of(first.header.y, elements(rest)), y, rtol=1e-5, atol=1e-5)


def test_a_stream_keeps_what_it_brings_and_what_it_makes(held: SessionClient) -> None:
    keep = pb.OperandsToKeep(x=True, w=True, b=True)
    header = stream_header(held, described(X), described(W), b=described(B), keep=keep, keep_y=True)

    first, *rest = held.stub.DeconvolveStream(iter([header, chunk(W), chunk(B), chunk(X)]))

    assert rest == []
    kept = first.header.kept
    for handle, array in zip((kept.x, kept.w, kept.b), (X, W, B), strict=True):
        np.testing.assert_array_equal(held.get(handle.handle), array)
    y = held.get(first.header.y.resident.handle)
    np.testing.assert_allclose(y, expected_y(held), rtol=1e-5, atol=1e-5)


def test_a_stream_that_fails_keeps_nothing(held: SessionClient) -> None:
    before_bytes = held.resident_bytes()
    keep = pb.OperandsToKeep(x=True, w=True)
    header = stream_header(held, described(X), described(W), keep=keep, keep_y=True)

    with pytest.raises(grpc.RpcError, match="before x is complete"):
        list(held.stub.DeconvolveStream(iter([header, chunk(W)])))

    assert held.resident_bytes() == before_bytes


@pytest.mark.parametrize("keep", [["gx", "gw", "gb"], ["gx"], []], ids="-".join)
def test_a_stream_of_gradients_takes_slices_of_residents(
    held: SessionClient, keep: list[str]
) -> None:
    gy = expected_y(held)
    plain = plain_gradients(held, gy)
    request = pb.DeconvolveGradRequest(
        x=tensor_by_handle(X, held.put(X)),
        w=tensor_by_handle(W, held.put(W)),
        gy=described(gy),
        geometry=GEOMETRY,
        options=STEADY,
        wanted=ALL_GRADIENTS,
        session=held.session,
        keep=pb.GradientMask(**dict.fromkeys(keep, True)),
    )
    header = pb.DeconvolveGradStreamHeader(request=request, slice_samples_count=4)
    parts = [
        pb.DeconvolveGradStreamRequest(header=header),
        pb.DeconvolveGradStreamRequest(chunk=bytes(elements_of(gy))),
    ]

    first, *rest = held.stub.DeconvolveGradStream(iter(parts))

    sent = elements(rest)
    for field in ("gx", "gw", "gb"):
        result = getattr(first.header, field)
        expected = array_of(getattr(plain, field))
        if field in keep:
            found = held.get(result.resident.handle)
        else:
            found = array_of(result, sent[: expected.nbytes])
            sent = sent[expected.nbytes :]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert not sent


def new_filter() -> Array:
    """Return a W that nobody has sent before."""
    return rng.standard_normal(W.shape).astype(np.float32)


REMEMBER = pb.OperandsToRemember(w=True)


def test_what_is_remembered_can_be_named_by_its_digest(held: SessionClient) -> None:
    own = new_filter()
    b = B + own[0, 0, 0, 0]
    remember = pb.OperandsToRemember(w=True, b=True)
    before_count = held.resident_count()

    sent = deconvolve(held, raw_tensor(X), raw_tensor(own), b=raw_tensor(b), remember=remember)

    assert held.resident_count() == before_count + 2
    named = deconvolve(held, raw_tensor(X), tensor_by_digest(own), b=tensor_by_digest(b))
    np.testing.assert_array_equal(array_of(named.y), array_of(sent.y))
    deconvolve(held, raw_tensor(X), raw_tensor(own), b=raw_tensor(b), remember=remember)
    assert held.resident_count() == before_count + 2


def test_what_a_stream_sends_is_remembered_too(held: SessionClient) -> None:
    own = new_filter()
    sent, *chunks = held.stub.DeconvolveStream(
        remember_stream(held.session, X, own, geometry=GEOMETRY, options=STEADY)
    )
    y = array_of(sent.header.y, elements(chunks))

    header = stream_header(held, described(X), tensor_by_digest(own))
    again, *chunks = held.stub.DeconvolveStream(iter([header, chunk(X)]))
    unary = deconvolve(held, raw_tensor(X), tensor_by_digest(own))

    np.testing.assert_allclose(array_of(again.header.y, elements(chunks)), y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(array_of(unary.y), y, rtol=1e-5, atol=1e-5)


def test_what_a_call_for_gradients_sends_is_remembered_too(held: SessionClient) -> None:
    own = new_filter()
    gy = array_of(deconvolve(held, raw_tensor(X), raw_tensor(own)).y)
    request = pb.DeconvolveGradRequest(
        x=described(X),
        w=raw_tensor(own),
        gy=raw_tensor(gy),
        geometry=GEOMETRY,
        options=STEADY,
        wanted=pb.GradientMask(gx=True),
        session=held.session,
        remember=REMEMBER,
    )
    gx = array_of(held.stub.DeconvolveGrad(request).gx)

    request.w.CopyFrom(tensor_by_digest(own))
    np.testing.assert_array_equal(array_of(held.stub.DeconvolveGrad(request).gx), gx)


@pytest.mark.parametrize("is_stream", [False, True], ids=["message", "stream"])
def test_what_is_remembered_may_be_kept_under_a_handle_too(
    held: SessionClient, is_stream: bool
) -> None:
    own = new_filter()
    keep = pb.OperandsToKeep(w=True)
    before_count = held.resident_count()

    if is_stream:
        parts = remember_stream(held.session, X, own, geometry=GEOMETRY, keep=keep)
        kept = next(iter([*held.stub.DeconvolveStream(parts)])).header.kept
    else:
        kept = deconvolve(held, raw_tensor(X), raw_tensor(own), keep=keep, remember=REMEMBER).kept
    named = deconvolve(held, raw_tensor(X), tensor_by_digest(own), keep=keep)

    for handle in (kept.w.handle, named.kept.w.handle):
        np.testing.assert_array_equal(held.get(handle), own)
    assert held.resident_count() == before_count + 1  # once for both


def test_what_is_no_operand_with_elements_is_not_remembered(held: SessionClient) -> None:
    handle = held.put(W)
    before_count = held.resident_count()
    remember = pb.OperandsToRemember(w=True, b=True)

    response = deconvolve(held, raw_tensor(X), tensor_by_handle(W, handle), remember=remember)

    assert response.y.shape
    assert held.resident_count() == before_count


def test_to_remember_takes_a_session(held: SessionClient) -> None:
    request = pb.DeconvolveRequest(x=raw_tensor(X), w=raw_tensor(W), remember=REMEMBER)
    with pytest.raises(grpc.RpcError, match="session must be a name of 16 bytes, got 0"):
        held.stub.Deconvolve(request)


@pytest.mark.parametrize("is_stream", [False, True], ids=["message", "stream"])
def test_a_digest_of_what_was_never_sent_is_not_found(held: SessionClient, is_stream: bool) -> None:
    """Also in a stream, where earlier servers asked for the elements: earlier clients then send them all."""
    own = tensor_by_digest(new_filter())

    def call() -> object:
        if is_stream:
            return list(held.stub.DeconvolveStream(iter([stream_header(held, described(X), own)])))
        return deconvolve(held, raw_tensor(X), own)

    with pytest.raises(grpc.RpcError, match="nothing with its digest") as failure:
        call()
    assert isinstance(error_of(failure), LostTensorError)
    assert error_of(failure).argument == "W"


def changed(tensor: pb.Tensor, **fields: Any) -> pb.Tensor:
    result = pb.Tensor()
    result.CopyFrom(tensor)
    result.MergeFrom(pb.Tensor(**fields))
    return result


def test_requests_that_can_never_succeed_are_told_which_argument(held: SessionClient) -> None:
    handle = held.put(W)
    wide = W.astype(np.float64)
    flat = W.reshape(4, 3, 2, 3)
    wrong_size = tensor_by_digest(W)
    wrong_size.digest.size_bytes = 7
    short_digest = tensor_by_digest(W)
    short_digest.digest.blake3 = b"short"
    place = pb.SharedSlice(region=bytes(16))
    cases: list[tuple[str, dict[str, Any]]] = [
        (
            "W must have the shape and element type of the resident tensor",
            {"w": tensor_by_handle(wide, handle)},
        ),
        (
            "W must have the shape and element type of the resident tensor",
            {"w": tensor_by_handle(flat, handle)},
        ),
        ("a size_bytes of 288 for float32", {"w": wrong_size}),
        ("got a digest of 5 bytes", {"w": short_digest}),
        ("y_place must be left out if y is kept", {"y_place": place, "keep_y": True}),
        ("session must be a name of 16 bytes, got 3", {"session": b"abc", "keep_y": True}),
        ("session must be a name of 16 bytes, got 0", {"session": b"", "keep_y": True}),
    ]
    for message, fields in cases:
        request: dict[str, Any] = {"x": raw_tensor(X), "w": raw_tensor(W), "session": held.session}
        request |= fields
        with pytest.raises(grpc.RpcError, match=message) as failure:
            held.stub.Deconvolve(pb.DeconvolveRequest(geometry=GEOMETRY, options=STEADY, **request))
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("payload", ["raw", "shared"])
def test_a_streams_header_has_no_elements(held: SessionClient, payload: str) -> None:
    tensor = raw_tensor(W)
    if payload == "shared":
        tensor.shared.region = bytes(16)
    with pytest.raises(grpc.RpcError, match="W must have its elements behind a stream's header"):
        list(held.stub.DeconvolveStream(iter([stream_header(held, described(X), tensor)])))


def test_a_handle_and_a_digest_are_of_no_use_to_another_tenant(held: SessionClient) -> None:
    own = rng.standard_normal(W.shape).astype(np.float32)
    handle = held.put(own)
    deconvolve(held, raw_tensor(X), raw_tensor(own), remember=REMEMBER)
    deconvolve(held, raw_tensor(X), tensor_by_digest(own))  # its own tenant has it

    other = SessionClient(held.channel)
    texts = set()
    for tensor in (tensor_by_handle(own, handle), tensor_by_handle(own, bytes(16))):
        with pytest.raises(grpc.RpcError) as failure:
            deconvolve(other, raw_tensor(X), tensor)
        assert isinstance(error_of(failure), LostTensorError)
        texts.add(str(error_of(failure)))
    assert len(texts) == 1  # nothing tells a stranger's from what never was
    with pytest.raises(grpc.RpcError) as failure:
        deconvolve(other, raw_tensor(X), tensor_by_digest(own))
    assert isinstance(error_of(failure), LostTensorError)
    other.drop(handle)
    other.close()

    np.testing.assert_array_equal(held.get(handle), own)
