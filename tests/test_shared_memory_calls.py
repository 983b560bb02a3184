"""Calls through shared memory, from the outside: same results, by memory where it pays, and on without it where not."""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc
import numpy as np
import pytest

import deconvd_client
from deconvd.errors import DeadlineError, InvalidArgumentError
from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd.wire.tensor import message_from_array
from deconvd_client.shared_memory import Borrower, SharedCall
from deconvd_client.shared_memory.shared_calls import SharedResult
from tests.deadlines import short_deadline
from tests.lenders import is_in_shared_memory
from tests.processes import wait_until
from tests.servers import ServerProcess, only_server, server_process, stop_server

MIB = 1 << 20


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[deconvd_client.Connection]:
    """A connection to a server that lends nothing."""
    directory = tmp_path_factory.mktemp("plain")
    with server_process(directory, "--shared-memory-bytes", "0") as running:
        with deconvd_client.connect(running.target) as connection:
            yield connection


def operands(seed: int = 0, n: int = 4) -> tuple[Array, Array, Array]:
    random = np.random.default_rng(seed)
    x = random.random((n, 8, 64, 64), np.float32)
    return x, random.random((8, 6, 4, 4), np.float32), random.random(6, np.float32)


def test_results_are_views_of_shared_memory_and_right(
    F: deconvd_client.Connection, plain: deconvd_client.Connection
) -> None:
    x, W, b = operands()
    expected = plain.deconvolution_2d(x, W, b, stride=2, pad=1)

    y = F.deconvolution_2d(x, W, b, stride=2, pad=1)

    assert is_in_shared_memory(y)
    assert not is_in_shared_memory(expected)
    np.testing.assert_array_equal(y, expected)
    assert y.flags.writeable


def test_an_operand_may_lie_there_already(F: deconvd_client.Connection) -> None:
    x, W, b = operands()
    there = F.empty(x.shape, x.dtype)
    there[...] = x

    assert is_in_shared_memory(there)
    np.testing.assert_array_equal(F.deconvolution_2d(there, W, b), F.deconvolution_2d(x, W, b))
    np.testing.assert_array_equal(
        F.deconvolution_2d(there[1:3], W, b), F.deconvolution_2d(x[1:3], W, b)
    )


def test_a_result_may_be_the_next_operand(F: deconvd_client.Connection) -> None:
    x, W, _ = operands()
    W = np.ascontiguousarray(np.concatenate([W, W], axis=1)[:, :8])

    y = F.deconvolution_2d(F.deconvolution_2d(x, W), W)

    expected = F.deconvolution_2d(F.deconvolution_2d(x, W).copy(), W)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("wanted", [("gx", "gW", "gb"), ("gx",), ("gW",), ("gb",)])
def test_gradients_come_by_shared_memory_too(
    F: deconvd_client.Connection, plain: deconvd_client.Connection, wanted: tuple[str, ...]
) -> None:
    x, W, b = operands()
    gy = plain.deconvolution_2d(x, W, b, 2, 1)
    expected = plain.deconvolution_2d_grad(x, W, b, gy, 2, 1, wanted=wanted)

    gradients = F.deconvolution_2d_grad(x, W, b, gy, 2, 1, wanted=wanted)

    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    if gradients.gx is not None:
        assert is_in_shared_memory(gradients.gx)


@pytest.mark.usefixtures("patient")
def test_a_server_on_tcp_shares_memory_with_its_own_host(tmp_path: Path) -> None:
    x, W, b = operands()
    with server_process(tmp_path, listen=("127.0.0.1:0",)) as running:
        with deconvd_client.connect(running.target) as F:
            y = F.deconvolution_2d(x, W, b)
            assert is_in_shared_memory(y)
        assert not running.end()
    assert y.shape == (4, 6, 67, 67)


def test_a_drained_server_leaves_no_socket_behind(tmp_path: Path) -> None:
    with server_process(tmp_path) as running:
        assert (tmp_path / "deconvd.sock.memory").is_socket()
        assert not running.end()
    assert os.listdir(tmp_path) == ["server.log"]


def test_a_killed_server_is_succeeded_and_results_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x, W, b = operands()
    with server_process(tmp_path) as first:
        F = deconvd_client.connect(first.target)
        there = F.empty(x.shape, x.dtype)
        there[...] = x
        y = F.deconvolution_2d(there, W, b)
        kept = y.copy()
        first.end(signal.SIGKILL)
    with server_process(tmp_path):
        again = F.deconvolution_2d(there, W, b)
        F.close()
    assert is_in_shared_memory(again)
    np.testing.assert_array_equal(y, kept)
    np.testing.assert_array_equal(again, kept)
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len([r for r in warnings if "shared memory" in r.getMessage()]) == 1


def test_over_the_quota_tensors_are_streamed(tmp_path: Path) -> None:
    x, W, b = operands()
    with server_process(tmp_path, "--shared-memory-bytes", str(MIB)) as running:
        with deconvd_client.connect(running.target) as F:
            y = F.deconvolution_2d(x, W, b)
            assert not is_in_shared_memory(y)
            small = F.deconvolution_2d(x[:1], W)
            assert is_in_shared_memory(small)
    assert y.shape == (4, 6, 67, 67)


def test_results_held_at_once_are_all_right(F: deconvd_client.Connection) -> None:
    inputs = [operands(seed) for seed in range(12)]

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda given: F.deconvolution_2d(*given), inputs))

    for given, y in zip(inputs, results, strict=True):
        np.testing.assert_array_equal(y, F.deconvolution_2d(*given))


def test_memory_is_flat_over_many_calls(F: deconvd_client.Connection) -> None:
    x, W, b = operands(n=1)
    addresses = {F.deconvolution_2d(x, W, b).__array_interface__["data"][0] for _ in range(500)}

    assert len(addresses) <= 3


def test_a_deadline_leaves_other_calls_their_memory(server: ServerProcess) -> None:
    x, W, b = operands(n=64)
    with deconvd_client.connect(server.target) as F:
        expected = F.deconvolution_2d(x[:2], W, b).copy()
        with deconvd_client.connect(server.target, timeout_s=0.002) as hasty:
            for _ in range(20):
                with suppress(DeadlineError):
                    hasty.deconvolution_2d(x, W, b)
                np.testing.assert_array_equal(F.deconvolution_2d(x[:2], W, b), expected)


class TestStockClient:
    """A client that only knows the schema, and borrows by hand."""

    @pytest.fixture
    def stub(self, server: ServerProcess) -> Iterator[pb_grpc.DeconvolutionServiceStub]:
        with grpc.insecure_channel(server.target) as channel:
            yield pb_grpc.DeconvolutionServiceStub(channel)

    @pytest.fixture
    def borrower(self, stub: pb_grpc.DeconvolutionServiceStub) -> Iterator[Borrower]:
        info = stub.GetServerInfo(pb.GetServerInfoRequest())
        borrower = Borrower(lambda _: info.shared_memory_socket)
        yield borrower
        borrower.close()

    def refused(
        self, stub: pb_grpc.DeconvolutionServiceStub, request: pb.DeconvolveRequest
    ) -> grpc.StatusCode:
        with pytest.raises(grpc.RpcError) as raised:
            stub.Deconvolve(request)
        code: grpc.StatusCode = raised.value.code()
        return code

    def request(self) -> pb.DeconvolveRequest:
        x, W, _ = operands(n=1)
        return pb.DeconvolveRequest(x=message_from_array(x), w=message_from_array(W))

    def test_an_unknown_region_is_not_found(self, stub: pb_grpc.DeconvolutionServiceStub) -> None:
        request = self.request()
        request.x.shared.region = bytes(16)
        assert self.refused(stub, request) is grpc.StatusCode.NOT_FOUND

    @pytest.mark.parametrize("offset", [-4, 2, 64 * MIB - 4, 2**62])
    @pytest.mark.parametrize("place", ["x", "y"])
    def test_a_wrong_offset_is_an_invalid_argument(
        self,
        stub: pb_grpc.DeconvolutionServiceStub,
        borrower: Borrower,
        offset: int,
        place: str,
    ) -> None:
        slice_ = borrower.locate(borrower.empty(4, np.float32, short_deadline()))
        assert slice_ is not None
        request = self.request()
        wrong = slice_._replace(offset_bytes=offset)
        wrong.write_to(request.x.shared if place == "x" else request.y_place)

        assert self.refused(stub, request) is grpc.StatusCode.INVALID_ARGUMENT

    def test_places_that_overlap_what_is_read_harm_no_one(
        self, stub: pb_grpc.DeconvolutionServiceStub, borrower: Borrower
    ) -> None:
        request = self.request()
        slice_ = borrower.locate(borrower.empty(MIB, np.float32, short_deadline()))
        assert slice_ is not None
        slice_.write_to(request.x.shared)
        slice_.write_to(request.y_place)

        response = stub.Deconvolve(request)

        assert response.y.shared == request.y_place

    def test_a_stream_takes_no_notice_of_a_place(
        self, stub: pb_grpc.DeconvolutionServiceStub, borrower: Borrower
    ) -> None:
        x, W, _ = operands(n=1)
        request = self.request()
        for tensor in (request.x, request.w):
            tensor.ClearField("raw")
        place = borrower.locate(borrower.empty(MIB, np.float32, short_deadline()))
        assert place is not None
        place.write_to(request.y_place)
        header = pb.DeconvolveStreamHeader(request=request, slice_samples_count=1)
        parts = [
            pb.DeconvolveStreamRequest(header=header),
            pb.DeconvolveStreamRequest(chunk=W.tobytes()),
            pb.DeconvolveStreamRequest(chunk=x.tobytes()),
        ]

        first, *rest = stub.DeconvolveStream(iter(parts))

        assert not first.header.y.HasField("shared")
        assert sum(len(part.chunk) for part in rest) == 4 * math.prod(first.header.y.shape)


def test_an_argument_at_fault_is_named_as_ever(F: deconvd_client.Connection) -> None:
    x, W, b = operands()
    with pytest.raises(InvalidArgumentError) as raised:
        F.deconvolution_2d(x, W[:4], b)
    assert raised.value.argument == "W"


@pytest.mark.parametrize("is_fetched", [False, True], ids=["computed", "fetched"])
def test_what_is_called_again_since_its_line_was_cut_has_its_result_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_fetched: bool
) -> None:
    """The server may be writing the result of the first call when the second one's is there already."""
    given: list[Array] = []
    make_result = SharedCall.allocate_result

    def result(call: SharedCall, spec: TensorSpec, field: str = "") -> SharedResult | None:
        made = make_result(call, spec, field)
        assert made is not None
        given.append(made.array)
        return made

    x, W, b = operands()
    with server_process(tmp_path) as server, deconvd_client.connect(server.target) as F:
        kept = F.remote.deconvolution_2d(x, W, b)
        expected = F.deconvolution_2d(x, W, b)
        stub = only_server(F).route.current_stub
        assert stub is not None
        direct = stub.direct
        assert direct is not None
        wait_until(lambda: kept.numpy() is not None and bool(direct._idle))
        monkeypatch.setattr(SharedCall, "allocate_result", result)
        with ThreadPoolExecutor(1) as pool:
            with stop_server(server):
                called = (
                    pool.submit(kept.numpy)
                    if is_fetched
                    else pool.submit(F.deconvolution_2d, x, W, b)
                )
                wait_until(lambda: bool(direct._busy))
                (line,) = (known() for known in direct._busy)
                assert line is not None
                wait_until(lambda: not line.protocol.is_idle)
                line.shutdown()
            y = called.result()

        assert is_in_shared_memory(y)
        assert not np.shares_memory(y, given[0])
        np.testing.assert_array_equal(y, expected)
