"""Tensors in streams: the same numbers as in messages, of any size, in bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deconvd_client
from deconvd.errors import ExhaustedError, InvalidArgumentError
from deconvd.model.geometry import Geometry
from deconvd.model.operation import DECONVOLVE, DECONVOLVE_GRAD
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec, spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd.wire.chunks import ChunkSource, chunk_messages
from deconvd.wire.messages import message_from_geometry
from deconvd.wire.stream_parts import PartReader
from deconvd.wire.tensor import message_from_spec
from deconvd_client import Connection
from deconvd_server.service.parsed_request import ParsedRequest, SlicedRequest, parse_stream_header
from tests.processes import peak_memory_bytes
from tests.servers import ServerProcess, server_process

rng = np.random.default_rng(0)
EPSILON = {np.dtype(t): e for t, e in [(np.float16, 2**-10), (ml_dtypes.bfloat16, 2**-7)]}
EPSILON |= {np.dtype(np.float32): 2**-23, np.dtype(np.float64): 2**-52}
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@pytest.fixture
def device_F(device_server: ServerProcess) -> Iterator[Connection]:
    """A connection that does not use shared memory, which would leave nothing to stream."""
    with deconvd_client.connect(device_server.target, transport="unix") as connection:
        yield connection


@pytest.fixture
def stub(server: ServerProcess) -> Iterator[pb_grpc.DeconvolutionServiceStub]:
    with grpc.insecure_channel(server.target) as channel:
        yield pb_grpc.DeconvolutionServiceStub(channel)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("n", [5, 9])
def test_a_large_tensor_has_the_same_result_as_its_samples(
    device_F: Connection, n: int, dtype: Any
) -> None:
    x = rng.standard_normal((n, 3, 256, 300)).astype(dtype)
    W = rng.standard_normal((3, 4, 3, 4)).astype(dtype)
    b = rng.standard_normal(4).astype(dtype)

    y = device_F.deconvolution_2d(x, W, b, (2, 1), (1, 0), (512, None))

    assert y.nbytes > 4 << 20  # so it came in a stream, and most of its samples in messages
    assert y.dtype == dtype
    rows = [
        device_F.deconvolution_2d(x[i : i + 1], W, b, (2, 1), (1, 0), (512, None)) for i in range(n)
    ]
    # one product may cover several samples or a part of one, and so sum in another order
    error = 4 * EPSILON[np.dtype(dtype)] + 1e-5
    np.testing.assert_allclose(
        y.astype(np.float64), np.concatenate(rows).astype(np.float64), rtol=error, atol=error
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize(
    "wanted", [["gx", "gW", "gb"], ["gx"], ["gW"], ["gb"], ["gW", "gb"]], ids="-".join
)
def test_gradients_in_a_stream_are_sums_over_its_slices(
    device_F: Connection, wanted: list[str], dtype: Any
) -> None:
    x = rng.standard_normal((24, 2, 160, 160)).astype(dtype)
    W = rng.standard_normal((2, 3, 2, 2)).astype(dtype)
    b = np.zeros(3, dtype)
    gy = rng.standard_normal((24, 3, 320, 320)).astype(dtype)

    whole = device_F.deconvolution_2d_grad(x, W, b, gy, 2, wanted=wanted)
    parts = [
        device_F.deconvolution_2d_grad(x[i : i + 1], W, b, gy[i : i + 1], 2, wanted=wanted)
        for i in range(24)
    ]

    gx = [part.gx for part in parts]
    expected = {
        "gx": None if "gx" not in wanted else np.concatenate([g for g in gx if g is not None]),
        "gW": sum(np.asarray(p.gW, np.float64) for p in parts) if "gW" in wanted else None,
        "gb": sum(np.asarray(p.gb, np.float64) for p in parts) if "gb" in wanted else None,
    }
    for name, result in whole._asdict().items():
        if expected[name] is None:
            assert result is None
            continue
        assert result.dtype == dtype
        wide = np.asarray(expected[name], np.float64)
        # sums of 600,000 products of magnitude 1, some sqrt(600,000) = 800 large on the way: each
        # order of them rounds to its own few units in the last place of that
        error = EPSILON[np.dtype(dtype)] * 32 * max(np.abs(wide).max(), 800)
        np.testing.assert_allclose(result.astype(np.float64), wide, atol=error, rtol=0)


def test_a_results_memory_is_used_again_once_it_was_dropped_and_not_before(
    device_F: Connection,
) -> None:
    one = np.ones((1, 1, 1, 1), np.float32)
    xs = [np.full((3, 1, 1024, 1024), i, np.float32) for i in range(4)]

    dropped = device_F.deconvolution_2d(xs[0], one).ctypes.data
    held = [device_F.deconvolution_2d(x, one) for x in xs]

    assert held[0].ctypes.data == dropped
    for x, y in zip(xs, held, strict=True):
        np.testing.assert_array_equal(y, x)


def test_strided_and_reversed_arrays_stream_as_they_are(device_F: Connection) -> None:
    x = rng.standard_normal((6, 512, 256, 2)).astype(np.float32).transpose(0, 3, 1, 2)[::-1]
    W = np.eye(2, dtype=np.float32)[:, :, None, None]

    np.testing.assert_array_equal(device_F.deconvolution_2d(x, W), x)


def test_a_stream_of_no_samples_is_empty(device_F: Connection) -> None:
    # large W and no samples: a stream of W alone
    W = np.ones((128, 128, 9, 9), np.float32)
    x = np.ones((0, 128, 4, 4), np.float32)

    gx, gW, gb = device_F.deconvolution_2d_grad(
        x, W, W[0, :, 0, 0], device_F.deconvolution_2d(x, W)
    )

    assert [g.shape for g in (gx, gW, gb) if g is not None] == [x.shape, W.shape, (128,)]
    assert not np.any(gW)
    assert not np.any(gb)


@pytest.mark.parametrize(("slice_samples_count", "held"), [(1, 3), (2, 4), (3, 6), (4, 4), (9, 4)])
def test_a_stream_counts_the_slices_that_it_can_hold(slice_samples_count: int, held: int) -> None:
    stream_header = header(PROBLEM, slice_samples_count).header
    sliced = parse_stream_header(DECONVOLVE, stream_header)

    # three slices in flight, or as many as there are
    samples_bytes = held * (PROBLEM.x.nbytes + PROBLEM.y.nbytes) // PROBLEM.n
    assert sliced.footprint_bytes == PROBLEM.W.nbytes + samples_bytes


@pytest.mark.parametrize("wanted", [("gx",), ("gw",), ("gb",), ("gx", "gw", "gb")], ids="-".join)
def test_a_stream_of_gradients_counts_what_it_needs(wanted: tuple[str, ...]) -> None:
    wide = Problem(
        TensorSpec(PROBLEM.x.shape, np.dtype(np.float16)),
        TensorSpec(PROBLEM.W.shape, np.dtype(np.float64)),
        Geometry(),
    )
    parsed = ParsedRequest(
        operation=DECONVOLVE_GRAD, problem=wide, options=Options(), wanted=wanted
    )

    sliced_bytes = wide.y.nbytes
    sliced_bytes += 2 * wide.x.nbytes if {"gx", "gw"} <= {*wanted} else 0
    sliced_bytes += wide.x.nbytes if len({"gx", "gw"} & {*wanted}) == 1 else 0
    whole_bytes = wide.W.nbytes if "gx" in wanted else 0
    # the sum so far, in float64, and those of three slices
    whole_bytes += 4 * wide.W.nbytes if "gw" in wanted else 0
    whole_bytes += wide.c_O * (8 + 3 * 2) if "gb" in wanted else 0
    assert SlicedRequest(parsed, 4).footprint_bytes == whole_bytes + sliced_bytes


def test_a_stream_counts_a_bias() -> None:
    parsed, with_b = (
        ParsedRequest(
            operation=DECONVOLVE,
            problem=PROBLEM,
            options=Options(),
            wanted=("y",),
            optional=optional,
        )
        for optional in ((), ("b",))
    )
    without_bytes = SlicedRequest(parsed, 1).footprint_bytes
    assert SlicedRequest(with_b, 1).footprint_bytes == without_bytes + PROBLEM.b.nbytes


def test_a_slice_of_gradients_has_x_and_gy_and_gx() -> None:
    large = Problem(
        TensorSpec((9, 1, 1024, 1024), np.dtype(np.float64)),
        TensorSpec((1, 1, 1, 1), np.dtype(np.float64)),
        Geometry(),
    )
    parsed = ParsedRequest(
        operation=DECONVOLVE_GRAD, problem=large, options=Options(), wanted=("gx", "gw")
    )
    SlicedRequest(parsed, 2).check_slice_size(1)
    with pytest.raises(ExhaustedError, match=r"of 3 samples has 75497472 bytes, .* takes 67108864"):
        SlicedRequest(parsed, 3).check_slice_size(1)


def header(problem: Problem, slice_samples_count: int = 1) -> pb.DeconvolveStreamRequest:
    request = pb.DeconvolveRequest(
        x=message_from_spec(problem.x),
        w=message_from_spec(problem.W),
        geometry=message_from_geometry(problem.geometry),
    )
    return pb.DeconvolveStreamRequest(
        header=pb.DeconvolveStreamHeader(request=request, slice_samples_count=slice_samples_count)
    )


X = rng.standard_normal((4, 2, 3, 3)).astype(np.float32)
W = rng.standard_normal((2, 2, 2, 2)).astype(np.float32)
PROBLEM = Problem(spec_of(X), spec_of(W), Geometry())
ELEMENTS = W.tobytes() + X.tobytes()


def reader_of(messages: Iterator[bytes]) -> PartReader[pb.DeconvolveStreamRequest]:
    source = ChunkSource(messages, pb.DeconvolveStreamRequest)
    return PartReader(source, pb.DeconvolveStreamRequest)


@given(cuts=st.lists(st.integers(1, len(ELEMENTS) - 1), max_size=6, unique=True))
def test_chunks_may_end_anywhere(cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), len(ELEMENTS)]
    parts = [
        pb.DeconvolveStreamRequest(chunk=ELEMENTS[a:b]).SerializeToString()
        for a, b in pairwise(bounds)
    ]
    reader = reader_of(iter(parts))

    np.testing.assert_array_equal(reader.read("W", PROBLEM.W), W)
    np.testing.assert_array_equal(reader.read("x", PROBLEM.x), X)
    reader.expect_end()


def test_chunks_that_no_server_asks_for_are_refused() -> None:
    """Earlier clients sent them, but only if the server asked."""
    reader = reader_of(
        iter([pb.DeconvolveStreamRequest(missing_chunk=W.tobytes()).SerializeToString()])
    )
    with pytest.raises(InvalidArgumentError, match="only chunks after its header"):
        reader.read("W", PROBLEM.W)


def test_y_flows_back_while_x_is_still_coming(stub: pb_grpc.DeconvolutionServiceStub) -> None:
    y_came = threading.Event()
    waited: list[bool] = []

    def parts() -> Iterator[pb.DeconvolveStreamRequest]:
        yield header(PROBLEM)
        yield pb.DeconvolveStreamRequest(chunk=W.tobytes())
        for sample in X[:3]:
            yield pb.DeconvolveStreamRequest(chunk=sample.tobytes())
        waited.append(y_came.wait(timeout=60))
        yield pb.DeconvolveStreamRequest(chunk=X[3:].tobytes())

    responses = stub.DeconvolveStream(parts())
    next(responses)
    first = next(responses)
    y_came.set()
    rest = list(responses)

    assert waited == [True]
    assert len(first.chunk) + sum(len(part.chunk) for part in rest) == PROBLEM.y.nbytes


CHUNK = pb.DeconvolveStreamRequest(chunk=ELEMENTS)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "a stream must begin with a header"),
        ([CHUNK], "a stream must begin with a header"),
        ([pb.DeconvolveStreamRequest()], "a stream must begin with a header"),
        ([header(PROBLEM, 0), CHUNK], "slice_samples_count must be at least 1, got 0"),
        ([header(PROBLEM), CHUNK, header(PROBLEM)], "a stream must end with its last tensor"),
        ([header(PROBLEM), header(PROBLEM)], "only chunks after its header"),
        (
            [header(PROBLEM), pb.DeconvolveStreamRequest(chunk=ELEMENTS[:-7])],
            "the stream ends 7 bytes before x is complete",
        ),
        ([header(PROBLEM), CHUNK, CHUNK], "a stream must end with its last tensor"),
        (
            [header(Problem(TensorSpec((1, 2, 3, 3), X.dtype), PROBLEM.W, Geometry())), CHUNK],
            "a stream must end with its last tensor",
        ),
    ],
)
def test_a_stream_that_is_none_is_refused(
    stub: pb_grpc.DeconvolutionServiceStub,
    parts: list[pb.DeconvolveStreamRequest],
    message: str,
) -> None:
    with pytest.raises(grpc.RpcError, match=message) as raised:
        list(stub.DeconvolveStream(iter(parts)))

    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_garbage_in_a_stream_is_refused(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.target) as channel:
        rpc: Any = channel.stream_stream("/deconvd.v1.DeconvolutionService/DeconvolveStream")
        with pytest.raises(grpc.RpcError, match="must be a valid deconvd") as raised:
            list(rpc(iter([header(PROBLEM).SerializeToString(), b"\xff\xff"])))

    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_slice_beyond_the_limit_is_refused(socket_directory: Path) -> None:
    x = TensorSpec((100, 1, 300, 300), X.dtype)
    one = TensorSpec((1, 1, 1, 1), X.dtype)
    with (
        server_process(socket_directory, "--max-message-bytes", str(4 << 20)) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = pb_grpc.DeconvolutionServiceStub(channel)
        with pytest.raises(grpc.RpcError, match="a slice of 100 samples has 72000000 bytes"):
            list(stub.DeconvolveStream(iter([header(Problem(x, one, Geometry()), 100)])))


def test_a_slow_reader_does_not_make_the_servers_memory_grow(tmp_path: Path) -> None:
    x = np.zeros((400, 1, 512, 512), np.float32)  # 400 MiB each way
    one = np.ones((1, 1, 1, 1), np.float32)
    problem = Problem(spec_of(x), spec_of(one), Geometry())
    sent: list[int] = []

    def parts() -> Iterator[bytes]:
        yield header(problem).SerializeToString()
        yield from chunk_messages(one)
        for chunk in chunk_messages(x):
            sent.append(len(chunk))
            yield chunk

    with server_process(tmp_path) as server, grpc.insecure_channel(server.target) as channel:
        rpc: Any = channel.stream_stream("/deconvd.v1.DeconvolutionService/DeconvolveStream")
        responses = rpc(parts())
        next(responses)
        _wait_until_stalled(sent)
        peak_bytes = peak_memory_bytes(server.process.pid)
        responses.cancel()

    # windows of 64 MiB in either direction, of each end, and slices of 1 MiB
    assert sum(sent) < 320 << 20
    assert peak_bytes < 600 << 20


def _wait_until_stalled(sent: list[int]) -> None:
    pause = threading.Event()
    before = -1
    while len(sent) > before:
        before = len(sent)
        pause.wait(1.0)


def test_a_server_that_goes_in_the_middle_is_said(socket_directory: Path) -> None:
    x = np.zeros((400, 1, 512, 512), np.float32)
    one = np.ones((1, 1, 1, 1), np.float32)
    with (
        server_process(socket_directory, "--log-level", "debug") as server,
        deconvd_client.connect(server.target, transport="unix") as F,
    ):
        failures: list[BaseException] = []

        def call() -> None:
            try:
                F.deconvolution_2d(x, one)
            except deconvd_client.DeconvdError as error:
                failures.append(error)

        caller = threading.Thread(target=call)
        caller.start()
        while "begun" not in server.log.read_text():
            threading.Event().wait(0.01)
        server.process.kill()
        caller.join(timeout=60)

    assert [type(failure) for failure in failures] == [deconvd_client.UnavailableError]


@pytest.mark.parametrize("transport", ["unix", "grpc"])
def test_a_sum_over_slices_too_large_for_its_type_is_infinite(
    server: ServerProcess, transport: str
) -> None:
    x = np.full((96, 1, 256, 256), 0.125, np.float16)  # the sums of its slices are not too large
    W = np.ones((1, 1, 1, 1), np.float16)
    with deconvd_client.connect(server.target, transport=transport) as F:
        _, gW, _ = F.deconvolution_2d_grad(x, W, None, x)
    np.testing.assert_array_equal(gW, np.full_like(W, np.inf))
