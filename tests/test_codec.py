"""The codec against the generated classes: each reads what the other writes."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import example, given
from hypothesis import strategies as st

from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire import codec
from deconvd.wire.codec import (
    Envelope,
    chunk_from_bytes,
    chunk_to_bytes,
    decode,
    encode,
    packed_chunk_from_bytes,
    packed_chunk_to_bytes,
)
from tests.wire import UNKNOWN_FIELDS, varint

LARGE = bytes(range(256)) * 257  # past the size from which messages are framed by hand
MESSAGES: list[type[Message]] = [
    pb.DeconvolveRequest,
    pb.DeconvolveResponse,
    pb.DeconvolveGradRequest,
    pb.DeconvolveGradResponse,
]

payloads = st.none() | st.binary(max_size=40) | st.just(LARGE)


@st.composite
def tensors(draw: st.DrawFn) -> pb.Tensor:
    tensor = pb.Tensor(
        element_type=draw(st.sampled_from(pb.ElementType.values())),
        shape=draw(st.lists(st.integers(0, 2**40), max_size=4)),
    )
    raw = draw(payloads)
    if raw is not None:
        tensor.raw = raw
    return tensor


@st.composite
def messages(draw: st.DrawFn) -> Message:
    message = draw(st.sampled_from(MESSAGES))()
    for field in message.DESCRIPTOR.fields:
        if field.message_type is pb.Tensor.DESCRIPTOR and draw(st.booleans()):
            getattr(message, field.name).CopyFrom(draw(tensors()))
    if isinstance(message, pb.DeconvolveRequest | pb.DeconvolveGradRequest):
        message.geometry.groups = draw(st.integers(1, 9))
        message.options.autotune = draw(st.booleans())
    return message


def whole(envelope: Envelope[Any]) -> Message:
    """The message that an envelope stands for, put together by the generated classes."""
    message: Message = type(envelope.message)()
    message.CopyFrom(envelope.message)
    for name, raw in envelope.raw.items():
        getattr(message, name).raw = bytes(raw)
    return message


@given(messages())
def test_what_the_generated_classes_write_is_read(message: Message) -> None:
    envelope = decode(type(message), message.SerializeToString())

    assert whole(envelope) == message
    for field, value in envelope.message.ListFields():
        assert field.message_type is not pb.Tensor.DESCRIPTOR or not value.raw


@given(messages())
def test_what_is_written_the_generated_classes_read(message: Message) -> None:
    envelope = decode(type(message), message.SerializeToString())

    written = encode(envelope)

    assert type(message).FromString(written) == message
    assert len(written) == message.ByteSize()


@given(messages())
def test_what_comes_again_reads_the_same(message: Message) -> None:
    data = message.SerializeToString()
    for _ in range(3):
        assert whole(decode(type(message), bytes(bytearray(data)))) == message


def test_no_more_is_remembered_than_has_room() -> None:
    for size_bytes in range(1, 2000):
        request = pb.DeconvolveRequest(session=bytes(size_bytes))
        assert decode(pb.DeconvolveRequest, request.SerializeToString()).message == request
    sizes_bytes = [len(data) for _, data in codec._envelope_cache]
    assert len(sizes_bytes) <= 1024
    assert max(sizes_bytes) <= 1024


def test_elements_are_not_remembered() -> None:
    request = pb.DeconvolveRequest(x=pb.Tensor(raw=b"secret"))
    data = request.SerializeToString()
    decode(pb.DeconvolveRequest, data)
    assert (pb.DeconvolveRequest, data) not in codec._envelope_cache


def test_the_secrets_of_sessions_are_not_remembered() -> None:
    data = pb.HoldSessionRequest(tenant_key=b"secret").SerializeToString()
    assert decode(pb.HoldSessionRequest, data).message.tenant_key == b"secret"
    assert (pb.HoldSessionRequest, data) not in codec._envelope_cache


def test_a_request_that_names_its_call_is_not_remembered() -> None:
    plain = pb.DeconvolveRequest(session=b"of this test")
    named = pb.DeconvolveRequest(session=b"of this test", telemetry=pb.Telemetry(request_id="1"))
    for message in (plain, named):
        decode(pb.DeconvolveRequest, message.SerializeToString())

    remembered = {data for _, data in codec._envelope_cache}
    assert plain.SerializeToString() in remembered
    assert named.SerializeToString() not in remembered


@given(messages(), st.data())
def test_fields_may_stand_in_any_order(message: Message, data: st.DataObject) -> None:
    parts = [singly(message, field.name) for field, _ in message.ListFields()]
    shuffled = data.draw(st.permutations(parts))

    assert whole(decode(type(message), b"".join(shuffled))) == message


def singly(message: Message, name: str) -> bytes:
    alone = type(message)()
    getattr(alone, name).CopyFrom(getattr(message, name))
    return alone.SerializeToString()


@pytest.mark.parametrize("unknown", UNKNOWN_FIELDS.values(), ids=UNKNOWN_FIELDS)
@pytest.mark.parametrize("inside", [False, True])
def test_unknown_fields_do_no_harm_and_are_kept(unknown: bytes, inside: bool) -> None:
    tensor = pb.Tensor(shape=[3], raw=LARGE).SerializeToString()
    if inside:
        tensor = unknown + tensor + unknown
    data = b"\x0a" + varint(len(tensor)) + tensor + (b"" if inside else unknown)
    expected = pb.DeconvolveRequest.FromString(data)

    envelope = decode(pb.DeconvolveRequest, data)

    assert whole(envelope) == expected
    assert whole(envelope).SerializeToString() == expected.SerializeToString()


def test_a_tensor_in_pieces_is_merged_as_protobuf_does() -> None:
    first = pb.DeconvolveRequest(x=pb.Tensor(shape=[1], raw=LARGE)).SerializeToString()
    second = pb.DeconvolveRequest(x=pb.Tensor(shape=[2])).SerializeToString()

    merged = whole(decode(pb.DeconvolveRequest, first + second))

    assert merged == pb.DeconvolveRequest.FromString(first + second)
    assert merged == pb.DeconvolveRequest(x=pb.Tensor(shape=[1, 2], raw=LARGE))


def test_of_two_payloads_the_last_counts_as_in_protobuf() -> None:
    tensor = pb.Tensor(raw=LARGE).SerializeToString() + pb.Tensor(raw=b"last").SerializeToString()
    data = b"\x0a" + varint(len(tensor)) + tensor

    assert whole(decode(pb.DeconvolveRequest, data)) == pb.DeconvolveRequest.FromString(data)


def test_what_is_called_large_is_framed_by_hand() -> None:
    assert len(LARGE) > codec._MAX_SMALL_BYTES


def test_elements_are_views_and_not_copies() -> None:
    data = pb.DeconvolveRequest(x=pb.Tensor(raw=LARGE)).SerializeToString()

    raw = decode(pb.DeconvolveRequest, data).raw["x"]

    assert isinstance(raw, memoryview)
    assert raw.obj is data


@given(st.binary(max_size=64), st.integers(0, 40), st.sampled_from(MESSAGES))
@example(b"", 0, pb.DeconvolveRequest)
def test_damaged_bytes_are_refused_exactly_where_protobuf_refuses_them(
    noise: bytes, cut: int, message_type: type[Message]
) -> None:
    data = pb.DeconvolveRequest(x=pb.Tensor(shape=[7], raw=LARGE)).SerializeToString()
    damaged = noise + data[: len(data) - cut] + noise

    expected = outcome(message_type.FromString, damaged)

    assert outcome(lambda d: whole(decode(message_type, d)), damaged) == expected


@given(st.data())
def test_a_flipped_byte_reads_as_protobuf_reads_it(data: st.DataObject) -> None:
    whole_bytes = bytearray(
        pb.DeconvolveGradRequest(
            x=pb.Tensor(shape=[1, 2], raw=LARGE), gy=pb.Tensor(shape=[3], raw=LARGE[:4096])
        ).SerializeToString()
    )
    at = data.draw(st.integers(0, 24) | st.integers(len(LARGE), len(LARGE) + 40))
    whole_bytes[at] = data.draw(st.integers(0, 255))
    damaged = bytes(whole_bytes)

    expected = outcome(pb.DeconvolveGradRequest.FromString, damaged)

    assert outcome(lambda d: whole(decode(pb.DeconvolveGradRequest, d)), damaged) == expected


def outcome(read: Any, data: bytes) -> Any:
    try:
        return read(data)
    except DecodeError:
        return DecodeError


@given(st.binary(min_size=1, max_size=300) | st.just(LARGE))
def test_a_chunk_is_a_part_of_each_stream(chunk: bytes) -> None:
    written = chunk_to_bytes(memoryview(chunk))

    for part in (pb.DeconvolveStreamRequest, pb.DeconvolveGradStreamResponse):
        assert part.FromString(written).chunk == chunk
        assert part(chunk=chunk).SerializeToString() == written
    assert bytes(chunk_from_bytes(written) or b"") == chunk


def test_a_packed_chunk_is_no_other_chunk() -> None:
    written = packed_chunk_to_bytes(b"1234")

    for part in (pb.DeconvolveStreamRequest, pb.DeconvolveGradStreamResponse):
        assert part.FromString(written).packed_chunk == b"1234"
        assert part(packed_chunk=b"1234").SerializeToString() == written
    assert bytes(packed_chunk_from_bytes(written) or b"") == b"1234"
    assert chunk_from_bytes(written) is None
    assert packed_chunk_from_bytes(chunk_to_bytes(b"1234")) is None


@given(st.binary(max_size=40))
def test_what_is_not_only_a_chunk_is_left_to_the_generated_class(data: bytes) -> None:
    chunk = chunk_from_bytes(data)

    if chunk is not None:
        assert pb.DeconvolveStreamRequest.FromString(data) == pb.DeconvolveStreamRequest(
            chunk=bytes(chunk)
        )


def test_every_large_field_of_the_schema_is_known_to_the_codec() -> None:
    parts = [m for m in pb.DESCRIPTOR.message_types_by_name.values() if "part" in m.oneofs_by_name]

    assert len(parts) == 6
    assert {part.fields_by_name["chunk"].number for part in parts} == {codec._CHUNK_NUMBER}
    packed = [p.fields_by_name["packed_chunk"] for p in parts if "Deconvolve" in p.name]
    assert {field.number for field in packed} == {codec._PACKED_CHUNK_NUMBER}
    assert all(m.DESCRIPTOR.full_name.startswith("deconvd.v1") for m in MESSAGES)
