"""Elements travel packed where the link is slow, they have many zeros and both ends know how; results stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
from google.protobuf.message import Message

import deconvd_client
from deconvd.direct.connection_errors import ConnectionBrokenError
from deconvd.direct.events import FrameKind, MethodCode, pack_frame
from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import Array
from deconvd.model.problem import spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd.wire.packed_elements import PACKED_ELEMENTS
from deconvd.wire.stream_parts import ElementsPart, Part, PartSource, PendingElements, Uint8Array
from deconvd.wire.tensor import message_from_spec
from deconvd_client import Connection
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.transport import StreamAttempt
from deconvd_client.transports.link_rate import LinkRate, MeteredSource
from deconvd_client.transports.stub import Stub
from tests.direct_calls import is_serving, open_stream, receive_failure, send_call
from tests.packed import pack_by_definition
from tests.servers import ServerProcess, server_process
from tests.session_clients import open_session
from tests.slow_links import slow_link_to_server
from tests.stream_pairs import send_raw

MIB = 1 << 20
MAX_CALLS_COUNT = 20
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
TRANSPORTS = pytest.mark.parametrize("transport", ["tcp", "grpc"])
IDENTITY = np.eye(2, dtype=np.float32)[:, :, None, None]


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that is reached over TCP."""
    directory = tmp_path_factory.mktemp("far")
    with server_process(directory, listen=("unix", "127.0.0.1:0")) as running:
        yield running


def set_rate(monkeypatch: pytest.MonkeyPatch, bytes_per_s: float | None) -> None:
    """Have all links seem to have a rate."""
    monkeypatch.setattr(LinkRate, "bytes_per_s", property(lambda _: bytes_per_s))


@dataclass
class Traffic:
    """The elements that streams sent and received.

    Attributes:
        sent_bytes: As they are on the wire.
    """

    sent_bytes: int = 0
    sent_packed: list[bool] = field(default_factory=list)
    received_packed: list[bool] = field(default_factory=list)

    def watch(self, attempt: StreamAttempt[Any]) -> StreamAttempt[Any]:
        """Return the same attempt, whose elements are counted."""
        return replace(
            attempt,
            parts=map(self._note_sent, attempt.parts),
            receive=lambda source: attempt.receive(_WatchedSource(source, self.received_packed)),
        )

    def _note_sent(self, part: Part) -> Part:
        if isinstance(part, ElementsPart):
            self.sent_bytes += len(part.data)
            self.sent_packed.append(part.is_packed)
        return part


class _WatchedSource:
    """The parts of a response, and whether each came packed."""

    def __init__(self, source: PartSource, are_packed: list[bool]) -> None:
        self.is_buffered: bool = source.is_buffered
        self.read_into: Callable[[Uint8Array], None] = source.read_into
        self._source = source
        self._are_packed = are_packed

    def next(self) -> Message | PendingElements | None:
        part = self._source.next()
        if isinstance(part, PendingElements):
            self._are_packed.append(part.is_packed)
        return part


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    watched = Traffic()
    stream = Stub.stream

    def watch(
        stub: Stub, begin: Callable[[], StreamAttempt[Any]], deadline: Deadline
    ) -> tuple[Any, str]:
        return stream(stub, lambda: watched.watch(begin()), deadline)

    monkeypatch.setattr(Stub, "stream", watch)
    return watched


def rectified(shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
    """Return what a ReLU gives: half of it zeros, some of them negative."""
    x = np.random.default_rng(0).standard_normal(shape)
    x[x < 0] = 0
    x[..., ::7] *= -1
    return x.astype(dtype)


@contextmanager
def far_connection(server: ServerProcess, transport: str) -> Iterator[Connection]:
    with deconvd_client.connect(server.targets[-1], transport=transport) as F:
        yield F


@TRANSPORTS
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_packed_operands_and_results_have_the_bits_of_plain_ones(
    far: ServerProcess,
    transport: str,
    dtype: Any,
    traffic: Traffic,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = rectified((48 // np.dtype(dtype).itemsize, 2, 256, 300), dtype)
    with far_connection(far, transport) as F:
        set_rate(monkeypatch, 2e9)
        plain = F.deconvolution_2d(x, IDENTITY.astype(dtype))
        assert not any(traffic.sent_packed + traffic.received_packed)
        set_rate(monkeypatch, 1e8)
        traffic.sent_bytes = 0

        packed = F.deconvolution_2d(x, IDENTITY.astype(dtype))

    assert traffic.sent_bytes < 0.65 * x.nbytes
    assert any(traffic.received_packed)
    assert packed.tobytes() == plain.tobytes()
    np.testing.assert_array_equal(packed, x)


@TRANSPORTS
def test_packed_gradients_are_those_of_plain_ones(
    far: ServerProcess, transport: str, traffic: Traffic, monkeypatch: pytest.MonkeyPatch
) -> None:
    # whole numbers, so that sums in any order are the same
    x = np.random.default_rng(0).integers(-3, 4, (12, 2, 256, 300)).clip(0).astype(np.float32)
    gy = np.random.default_rng(1).integers(-3, 4, x.shape).astype(np.float32)
    with far_connection(far, transport) as F:
        set_rate(monkeypatch, 2e9)
        plain = F.deconvolution_2d_grad(x, IDENTITY, None, gy, wanted=["gx", "gW"])
        set_rate(monkeypatch, 1e8)
        packed = F.deconvolution_2d_grad(x, IDENTITY, None, gy, wanted=["gx", "gW"])

    assert {True, False} == set(traffic.sent_packed)  # x and gy
    for one, other in zip(packed[:2], plain[:2], strict=True):
        np.testing.assert_array_equal(one, other)


@TRANSPORTS
@pytest.mark.parametrize("bytes_per_s", [None, 2.6e8])
def test_nothing_is_packed_unless_the_link_is_known_to_be_slow(
    far: ServerProcess,
    transport: str,
    bytes_per_s: float | None,
    traffic: Traffic,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = rectified((12, 2, 256, 300))
    set_rate(monkeypatch, bytes_per_s)
    with far_connection(far, transport) as F:
        np.testing.assert_array_equal(F.deconvolution_2d(x, IDENTITY), x)

    assert traffic.sent_packed
    assert not any(traffic.sent_packed + traffic.received_packed)


@TRANSPORTS
def test_elements_are_packed_once_a_real_link_turns_out_to_be_slow(
    transport: str, tmp_path: Path, traffic: Traffic
) -> None:
    """A machine that is busy with other work can seem slower than the link, or faster, so there are several calls."""
    x = rectified((128, 2, 96, 100))
    with slow_link_to_server(tmp_path, transport, 0.5) as F:
        np.testing.assert_array_equal(F.deconvolution_2d(x, IDENTITY), x)
        assert not any(traffic.sent_packed + traffic.received_packed)
        for _ in range(MAX_CALLS_COUNT):
            np.testing.assert_array_equal(F.deconvolution_2d(x, IDENTITY), x)
            if any(traffic.sent_packed) and any(traffic.received_packed):
                return

    pytest.fail(f"nothing was packed in {MAX_CALLS_COUNT} calls")


@TRANSPORTS
def test_elements_without_zeros_stay_plain_on_a_slow_link(
    far: ServerProcess, transport: str, traffic: Traffic, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.random.default_rng(0).standard_normal((12, 2, 256, 300), np.float32)
    set_rate(monkeypatch, 1e8)
    with far_connection(far, transport) as F:
        np.testing.assert_array_equal(F.deconvolution_2d(x, IDENTITY), x)

    assert traffic.sent_packed
    assert not any(traffic.sent_packed + traffic.received_packed)


@TRANSPORTS
def test_a_server_that_does_not_say_that_it_takes_them_gets_none(
    far: ServerProcess, transport: str, traffic: Traffic, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rectified((12, 2, 256, 300))
    set_rate(monkeypatch, 1e8)
    parse = pb.GetServerInfoResponse.FromString

    def parse_old(data: bytes) -> pb.GetServerInfoResponse:
        info = parse(data)
        info.features.remove(PACKED_ELEMENTS)
        return info

    monkeypatch.setattr(pb.GetServerInfoResponse, "FromString", parse_old)
    with far_connection(far, transport) as F:
        np.testing.assert_array_equal(F.deconvolution_2d(x, IDENTITY), x)

    assert traffic.sent_packed
    assert not any(traffic.sent_packed + traffic.received_packed)


def test_an_older_server_at_the_same_target_gets_the_call_again_as_it_knows_it(
    traffic: Traffic, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rectified((12, 2, 256, 300))
    set_rate(monkeypatch, 1e8)
    with older_server() as target, deconvd_client.connect(target, transport="grpc") as F:
        np.testing.assert_array_equal(F.deconvolution_2d(x, IDENTITY), x)

    assert {True, False} == set(traffic.sent_packed)


@contextmanager
def older_server() -> Iterator[str]:
    """Run a server that takes no packed chunks, behind one that does: that one answers GetServerInfo. y is x."""

    def get_server_info(_request: Any, _context: Any) -> pb.GetServerInfoResponse:
        return pb.GetServerInfoResponse(features=[PACKED_ELEMENTS])

    def deconvolve_stream(
        parts: Iterator[pb.DeconvolveStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.DeconvolveStreamResponse]:
        header = next(parts).header.request
        chunks: list[bytes] = []
        for part in parts:
            if part.WhichOneof("part") != "chunk":
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a stream must have only chunks")
            chunks.append(part.chunk)
        yield pb.DeconvolveStreamResponse(header=pb.DeconvolveResponse(y=header.x))
        elements = b"".join(chunks)[IDENTITY.nbytes :]
        for begin in range(0, len(elements), MIB):
            yield pb.DeconvolveStreamResponse(chunk=elements[begin : begin + MIB])

    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "GetServerInfo": grpc.unary_unary_rpc_method_handler(
            get_server_info,
            pb.GetServerInfoRequest.FromString,
            pb.GetServerInfoResponse.SerializeToString,
        ),
        "DeconvolveStream": grpc.stream_stream_rpc_method_handler(
            deconvolve_stream,
            pb.DeconvolveStreamRequest.FromString,
            pb.DeconvolveStreamResponse.SerializeToString,
        ),
    }
    with ThreadPoolExecutor(4) as handlers:
        server = grpc.server(handlers)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("deconvd.v1.DeconvolutionService", methods),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


def test_an_argument_that_is_wrong_is_said_to_be_so_on_a_slow_link_too(
    far: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client makes the call twice, since an older server might refuse the first."""
    set_rate(monkeypatch, 1e8)
    refusals: list[str] = []

    def refuse(*_: Any, **__: Any) -> Any:
        refusals.append("refused")
        raise InvalidArgumentError("x must not be so")

    monkeypatch.setattr(Stub, "stream", refuse)
    with (
        far_connection(far, "tcp") as F,
        pytest.raises(InvalidArgumentError, match="x must not be so"),
    ):
        F.deconvolution_2d(rectified((12, 2, 256, 300)), IDENTITY)

    assert len(refusals) == 2


X = rectified((4, 2, 16, 16))


def header(*, takes_packed: bool) -> pb.DeconvolveStreamRequest:
    x, w = (message_from_spec(spec_of(array)) for array in (X, IDENTITY))
    request = pb.DeconvolveRequest(x=x, w=w)
    return pb.DeconvolveStreamRequest(
        header=pb.DeconvolveStreamHeader(
            request=request, slice_samples_count=3, takes_packed=takes_packed
        )
    )


def words(array: Array) -> Any:
    return array.reshape(-1).view(np.uint32)


def unpacked(chunk: bytes) -> bytes:
    """Return the elements of a packed chunk by the definition in the schema, without our code."""
    size, count = chunk[0], int.from_bytes(chunk[4:8], "little")
    mask_end = 8 + (count + 7) // 8
    bits = np.unpackbits(np.frombuffer(chunk[8:mask_end], np.uint8), bitorder="little")
    elements = np.zeros(count, f"<u{size}")
    elements[bits[:count] == 1] = np.frombuffer(chunk[mask_end:], f"<u{size}")
    return elements.tobytes()


@pytest.mark.parametrize("takes_packed", [False, True])
def test_any_client_can_send_packed_chunks_and_gets_them_only_if_it_takes_them(
    server: ServerProcess, takes_packed: bool
) -> None:
    whole = pack_by_definition(np.concatenate([words(IDENTITY), words(X)[:1000]]))
    parts = [
        header(takes_packed=takes_packed),
        pb.DeconvolveStreamRequest(packed_chunk=whole),
        pb.DeconvolveStreamRequest(chunk=words(X)[1000:1001].tobytes()),
        pb.DeconvolveStreamRequest(packed_chunk=pack_by_definition(words(X)[1001:])),
    ]
    with grpc.insecure_channel(server.target) as channel:
        stub = pb_grpc.DeconvolutionServiceStub(channel)
        first, *rest = stub.DeconvolveStream(iter(parts))

    assert first.header.y.shape == list(X.shape)
    assert {part.WhichOneof("part") for part in rest} == {
        "packed_chunk" if takes_packed else "chunk"
    }
    y = b"".join(part.chunk or unpacked(part.packed_chunk) for part in rest)
    np.testing.assert_array_equal(np.frombuffer(y, np.float32).reshape(X.shape), X)


def test_a_packed_chunk_among_unknown_fields_is_one_too(server: ServerProcess) -> None:
    packed = pb.DeconvolveStreamRequest(packed_chunk=pack_by_definition(words(X)))
    unknown = b"\xf8\x7f\x01"  # field 2047
    messages = [
        header(takes_packed=False).SerializeToString(),
        pb.DeconvolveStreamRequest(chunk=IDENTITY.tobytes()).SerializeToString(),
        unknown + packed.SerializeToString(),
    ]
    with grpc.insecure_channel(server.target) as channel:
        rpc: Any = channel.stream_stream("/deconvd.v1.DeconvolutionService/DeconvolveStream")
        _, *rest = map(pb.DeconvolveStreamResponse.FromString, rpc(iter(messages)))

    y = b"".join(part.chunk for part in rest)
    np.testing.assert_array_equal(np.frombuffer(y, np.float32).reshape(X.shape), X)


DAMAGED = pytest.mark.parametrize(
    ("packed", "message"),
    [
        (b"\4\0\0\0\1\0\0\0\3" + bytes(4), "bitmask of 1 packed elements"),
        (b"\5\0\0\0\1\0\0\0\0", "2, 4 or 8 bytes"),
        (b"\2\0\0\0\xff\xff\xff\xff\0", "from 1 to 524288 of 2 bytes"),
    ],
)


@DAMAGED
def test_damaged_chunks_are_refused_by_grpc(
    server: ServerProcess, packed: bytes, message: str
) -> None:
    parts = [header(takes_packed=True), pb.DeconvolveStreamRequest(packed_chunk=packed)]
    with grpc.insecure_channel(server.target) as channel:
        stub = pb_grpc.DeconvolutionServiceStub(channel)
        with pytest.raises(grpc.RpcError, match=message) as raised:
            list(stub.DeconvolveStream(iter(parts)))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@DAMAGED
def test_damaged_frames_are_refused_on_direct_connections(
    far: ServerProcess, packed: bytes, message: str
) -> None:
    with open_stream(far, "tcp") as line:
        send_call(line, MethodCode.DeconvolveStream, _header_bytes())
        send_raw(line, pack_frame(FrameKind.PACKED_ELEMENTS, packed))

        error = receive_failure(line)

    assert isinstance(error, InvalidArgumentError)
    assert message in str(error)
    with open_stream(far, "tcp") as line:
        assert is_serving(line)


@pytest.mark.parametrize("size_bytes", [0, 8, 2 * MIB])
def test_frames_of_a_wrong_size_end_the_connection(far: ServerProcess, size_bytes: int) -> None:
    with open_stream(far, "tcp") as line:
        send_call(line, MethodCode.DeconvolveStream, _header_bytes())
        send_raw(
            line, pack_frame(FrameKind.PACKED_ELEMENTS, b"")[:4] + size_bytes.to_bytes(4, "little")
        )

        with pytest.raises(ConnectionBrokenError):
            receive_failure(line)
    with open_stream(far, "tcp") as line:
        assert is_serving(line)


def _header_bytes() -> bytes:
    return header(takes_packed=True).SerializeToString()


def test_a_tensor_to_keep_cannot_be_packed(far: ServerProcess) -> None:
    tensor = message_from_spec(spec_of(X))
    with open_session(far.target) as held, open_stream(far, "tcp") as line:
        put = pb.PutTensorRequest(header=pb.PutTensorHeader(session=held.session, tensor=tensor))
        send_call(line, MethodCode.PutTensor, put.SerializeToString())
        send_raw(line, pack_frame(FrameKind.PACKED_ELEMENTS, pack_by_definition(words(X))))

        with pytest.raises(InvalidArgumentError, match="PutTensorRequest must have no packed"):
            raise receive_failure(line)


class Prepared:
    """Elements that have come, some of them packed."""

    is_buffered = False

    def __init__(self, parts: list[PendingElements]) -> None:
        self._parts = parts

    def next(self) -> Message | PendingElements | None:
        return self._parts.pop(0)

    def read_into(self, target: Uint8Array) -> None:
        target[:] = 0


def test_results_that_came_packed_say_nothing_of_the_links_rate() -> None:
    rate = LinkRate()
    parts = [
        PendingElements(MIB),
        PendingElements(MIB, is_packed=True),
        *[PendingElements(MIB)] * 2,
    ]
    source = MeteredSource(Prepared(parts), rate, 2 * MIB, 2)
    target = np.empty(MIB, np.uint8)
    for _ in range(2):
        source.next()
        source.read_into(target)
    assert rate.bytes_per_s is None

    for _ in range(2):
        source.next()
        source.read_into(target)
    assert rate.bytes_per_s is not None
