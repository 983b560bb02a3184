"""Calls that take long: they take turns, small calls do not wait for them, and what cannot end in time is not begun."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2

import deconvd_client
from deconvd.errors import CallCancelledError, DeadlineError, UnavailableError
from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd.wire.messages import message_from_geometry
from deconvd_client import Connection
from tests.processes import is_idle, wait_until
from tests.servers import ServerProcess, server_process
from tests.session_clients import tensor_header

X = np.arange(36, dtype=np.float32).reshape(1, 4, 3, 3)
W = np.ones((4, 2, 2, 2), np.float32)

LARGE = np.ones((1, 1, 512, 512), np.float32)
"""As x and as W, of a kernel: 7e10 products in a mebibyte each, which take minutes."""

HUGE = np.ones((1, 1, 1024, 1024), np.float32)
"""As x and as W: 1e12 products."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with server_process(tmp_path, "--drain-timeout-s", "0.5") as running:
        yield running


@contextmanager
def busy(server: ServerProcess, transport: str) -> Iterator[None]:
    """Have all places of a server taken, for the block, by calls that take long."""
    with deconvd_client.connect(server.target, transport=transport, timeout_s=50) as F:
        places_count = F.server_info().devices[0].threads_count
        with ThreadPoolExecutor(places_count) as callers:
            futures = [callers.submit(deconvolved, F, LARGE) for _ in range(places_count)]
            wait_until(lambda: running_count(F) == places_count)
            begin_s = time.monotonic()
            yield
            assert time.monotonic() - begin_s < 40, "the calls may have ended by themselves"
            F.close()
    errors = [future.exception() for future in futures]
    assert {type(error) for error in errors} <= {CallCancelledError, UnavailableError}, errors


def deconvolved(F: Connection, both: Array) -> Array:
    """Return y of an array, as x and as W, of the array's size."""
    return F.deconvolution_2d(both, both, pad=both.shape[-1] // 2)


def gradients_of(F: Connection, both: Array) -> object:
    """Return gx and gW of such a y."""
    extent = both.shape[-1] // 2 * 2 - 1
    b, gy = np.zeros(1, np.float32), np.ones((1, 1, extent, extent), np.float32)
    return F.deconvolution_2d_grad(both, both, b, gy, pad=both.shape[-1] // 2, wanted=["gx", "gW"])


def running_count(F: Connection) -> int:
    device = F.server_info().devices[0]
    return device.running_calls_count + device.waiting_calls_count


@pytest.mark.parametrize("transport", ["grpc", "auto"], ids=["grpc", "direct"])
def test_small_calls_beside_large_ones_are_answered_soon(
    server: ServerProcess, transport: str
) -> None:
    with deconvd_client.connect(server.target, transport=transport, timeout_s=20) as F:
        F.deconvolution_2d(X, W)
        with busy(server, transport):
            durations_s = list[float]()
            for _ in range(20):
                begin_s = time.monotonic()
                F.deconvolution_2d(X, W)
                durations_s.append(time.monotonic() - begin_s)

    assert max(durations_s) < 5, durations_s  # the large ones take minutes


def test_health_beside_large_calls_is_told_soon(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.target) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        with busy(server, "auto"):
            for _ in range(20):
                response = check(health_pb2.HealthCheckRequest(), timeout=5)
                assert response.status == health_pb2.HealthCheckResponse.SERVING


def test_calls_that_take_long_make_progress_beside_each_other_and_many_small_ones(
    server: ServerProcess,
) -> None:
    x = np.ones((1, 1, 96, 96), np.float32)  # several turns
    ended = threading.Event()

    def call_again_and_again(F: Connection) -> None:
        while not ended.is_set():
            F.deconvolution_2d(X, W)

    with deconvd_client.connect(server.target) as F, ThreadPoolExecutor(4) as callers:
        small = [callers.submit(call_again_and_again, F) for _ in range(4)]
        try:
            with busy(server, "auto"):
                begin_s = time.monotonic()
                y = deconvolved(F, x)
                duration_s = time.monotonic() - begin_s
        finally:
            ended.set()
        for future in small:
            future.result()

    assert y[0, 0, 47, 47] == 96 * 96
    assert duration_s < 30


def test_large_calls_end_when_their_caller_goes(server: ServerProcess) -> None:
    with busy(server, "auto"):
        pass

    wait_until(lambda: is_idle(server.process.pid))


def test_large_calls_end_when_the_server_does(server: ServerProcess) -> None:
    with busy(server, "auto"):
        begin_s = time.monotonic()
        server.end(signal.SIGTERM)
        duration_s = time.monotonic() - begin_s

    assert (
        duration_s < 10
    )  # the drain takes 0.5 s, and the process may take 2 more; the calls take minutes


class TestHugeKernels:
    """Few bytes that ask for much: taps that reach no pixel cost nothing."""

    def test_gW_of_one_pixel_takes_as_long_as_its_bytes(self, server: ServerProcess) -> None:
        k = 4096
        geometry = Geometry(pad=(k // 2 - 1, k // 2 - 1))
        request = pb.DeconvolveGradRequest(
            x=tensor_header(1, 1, 1, 1),
            w=tensor_header(1, 1, k, k),
            gy=tensor_header(1, 1, 2, 2),
            geometry=message_from_geometry(geometry),
            wanted=pb.GradientMask(gw=True),
        )
        header = pb.DeconvolveGradStreamHeader(request=request, slice_samples_count=1)
        parts = [
            pb.DeconvolveGradStreamRequest(header=header),
            pb.DeconvolveGradStreamRequest(chunk=np.float32(3).tobytes()),
            pb.DeconvolveGradStreamRequest(chunk=np.arange(4, dtype=np.float32).tobytes()),
        ]

        with grpc.insecure_channel(server.target) as channel:
            stub = pb_grpc.DeconvolutionServiceStub(channel)
            begin_s = time.monotonic()
            responses = list(stub.DeconvolveGradStream(iter(parts), timeout=30))
            duration_s = time.monotonic() - begin_s

        gW = np.frombuffer(b"".join(r.chunk for r in responses), np.float32).reshape(k, k)
        middle = slice(k // 2 - 1, k // 2 + 1)
        np.testing.assert_array_equal(gW[middle, middle], [[0, 3], [6, 9]])
        assert np.count_nonzero(gW) == 3
        assert duration_s < 5


class TestWhatCannotEnd:
    """Work that cannot end within its deadline is refused at once; what may end in time is done."""

    @pytest.mark.parametrize("transport", ["grpc", "auto"], ids=["grpc", "direct"])
    @pytest.mark.parametrize("is_gradient", [False, True], ids=["y", "gradients"])
    def test_it_is_refused_with_the_estimate(
        self, server: ServerProcess, transport: str, is_gradient: bool
    ) -> None:
        with deconvd_client.connect(server.target, transport=transport, timeout_s=5) as F:
            F.deconvolution_2d(X, W)
            begin_s = time.monotonic()
            with pytest.raises(DeadlineError, match=r"more than [\d.]+ s .*deadline is in"):
                gradients_of(F, HUGE) if is_gradient else deconvolved(F, HUGE)

        assert time.monotonic() - begin_s < 3
        assert is_idle(server.process.pid)

    def test_a_stream_of_it_is_refused_before_it_comes(self, server: ServerProcess) -> None:
        geometry = message_from_geometry(Geometry(pad=(512, 512)))
        request = pb.DeconvolveRequest(
            x=tensor_header(64, 1, 1024, 1024), w=tensor_header(1, 1, 1024, 1024), geometry=geometry
        )
        header = pb.DeconvolveStreamHeader(request=request, slice_samples_count=1)
        part = pb.DeconvolveStreamRequest(header=header)
        stays_open = threading.Event()

        def parts() -> Iterator[pb.DeconvolveStreamRequest]:
            yield part
            stays_open.wait(30)

        with grpc.insecure_channel(server.target) as channel:
            stub = pb_grpc.DeconvolutionServiceStub(channel)
            with pytest.raises(grpc.RpcError, match="would take more than") as raised:
                next(stub.DeconvolveStream(parts(), timeout=20))
            stays_open.set()

        assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED

    def test_what_may_end_in_time_is_done(self, server: ServerProcess) -> None:
        x = np.ones((1, 1, 96, 96), np.float32)
        with deconvd_client.connect(server.target) as F:
            deconvolved(F, x)
            begin_s = time.monotonic()
            deconvolved(F, x)
            duration_s = time.monotonic() - begin_s
        with deconvd_client.connect(server.target, timeout_s=max(4 * duration_s, 2)) as F:
            y = deconvolved(F, x)

        assert y[0, 0, 47, 47] == 96 * 96
