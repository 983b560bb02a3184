"""Calls that give every metric something to count: by each way, of several tenants, and failing in each way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final

import grpc
import numpy as np

import deconvd_client
from benchmarks.monitoring.watched_server import WatchedServer
from deconvd.model.dtypes import Array
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd.wire.tensor import message_from_array
from deconvd_client import Connection

__all__ = ["Load", "flood", "jobs_of", "refusals_of"]

Job = Callable[[], None]
"""Some calls. It returns within seconds."""

_FLOOD_COUNT: Final = 160
"""More calls than may wait for a device."""

_FLOOD_PERIOD_S: Final = 0.5
"""From one flood to the next, however soon calls are refused."""

_PAUSE_S: Final = 0.05
"""Between two runs of a job: the server, Prometheus and this process may share two processors."""

_W: Final = np.ones((8, 8, 4, 4), np.float32)
_SMALL: Final = np.ones((1, 8, 16, 16), np.float32)
_LARGE: Final = np.ones((16, 8, 128, 128), np.float32)
"""8 MiB, which are streamed."""


class Load:
    """Runs jobs, each in a thread of its own, again and again until the block ends.

    The block raises the first error of a job when it ends.
    """

    def __init__(self, jobs: list[Job]) -> None:
        self._jobs = jobs
        self._ended = threading.Event()
        self._threads = ThreadPoolExecutor(len(jobs))
        self._running: list[Future[None]] = []

    def __enter__(self) -> Load:
        self._running = [self._threads.submit(self._repeat, job) for job in self._jobs]
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._threads.shutdown()
        for job in self._running:
            job.result()

    def _repeat(self, job: Job) -> None:
        while not self._ended.wait(_PAUSE_S):
            job()


@contextmanager
def jobs_of(server: WatchedServer) -> Iterator[list[Job]]:
    """Give the block jobs whose calls succeed, by each transport."""
    with ExitStack() as stack:

        def connect(target: str, transport: str, name: str = "") -> Connection:
            credentials: dict[str, Any] = (
                {"tls": server.tls, "token": server.token(name)} if name else {}
            )
            return stack.enter_context(
                deconvd_client.connect(target, transport=transport, **credentials)
            )

        alice = connect(server.tcp_target, "tcp", "alice")
        bob = connect(server.tcp_target, "grpc", "bob")
        local = connect(server.unix_target, "shared_memory")
        near = connect(server.unix_target, "unix")
        yield [
            lambda: _train(alice),
            lambda: _call(bob),
            lambda: _call(local),
            lambda: _keep(near),
        ]


def _call(F: Connection) -> None:
    F.deconvolution_2d(_SMALL, _W, stride=2, pad=1)
    F.deconvolution_2d(_LARGE, _W, stride=1, pad=1)


def _train(F: Connection) -> None:
    y, pullback = F.vjp(_SMALL, _W, stride=2, pad=1)
    pullback(y)


def _keep(F: Connection) -> None:
    """Put more tensors than the server keeps, and use the one that it still has."""
    kept = [F.put(np.full((1, 8, 128, 128), number, np.float32)) for number in range(3)]
    F.deconvolution_2d(kept[-1], _W)
    for tensor in kept:
        tensor.close()


@contextmanager
def refusals_of(server: WatchedServer, name: str) -> Iterator[Job]:
    """Give the block a job whose calls the server refuses: they are wrong, too large, or about nothing."""
    with _stub(server) as stub:
        metadata = (("authorization", f"Bearer {server.token(name)}"),)
        wrong = _request(_SMALL, _W)
        wrong.x.shape[0] = 2
        large = _request(_SMALL, _W)
        large.geometry.stride.CopyFrom(pb.Pair(h=512, w=512))

        def refuse() -> None:
            for request in (wrong, large):
                with suppress(grpc.RpcError):
                    stub.Deconvolve(request, metadata=metadata)
            with suppress(grpc.RpcError):
                list(stub.GetTensor(pb.GetTensorRequest(session=bytes(16)), metadata=metadata))
            with suppress(grpc.RpcError):
                stub.Deconvolve(wrong)  # without a token

        yield refuse


@contextmanager
def flood(server: WatchedServer, name: str) -> Iterator[Job]:
    """Give the block a job of an identity that makes more calls at once than may wait, and cancels some."""
    with _stub(server) as stub:
        metadata = (("authorization", f"Bearer {server.token(name)}"),)
        request = _request(np.ones((4, 8, 48, 48), np.float32), _W)

        def make_calls() -> None:
            next_s = time.monotonic() + _FLOOD_PERIOD_S
            calls = [
                stub.Deconvolve.future(request, metadata=metadata, timeout=0.3)
                for _ in range(_FLOOD_COUNT)
            ]
            for call in calls[::8]:
                call.cancel()
            for call in calls:
                with suppress(grpc.RpcError, grpc.FutureCancelledError):
                    call.result()
            time.sleep(max(next_s - time.monotonic(), 0))

        yield make_calls


def _request(x: Array, W: Array) -> pb.DeconvolveRequest:
    return pb.DeconvolveRequest(x=message_from_array(x), w=message_from_array(W))


@contextmanager
def _stub(server: WatchedServer) -> Iterator[pb_grpc.DeconvolutionServiceStub]:
    """Give the block what another language would have: generated code alone."""
    credentials = grpc.ssl_channel_credentials(server.ca.read_bytes())
    with grpc.secure_channel(server.tcp_target, credentials) as channel:
        yield pb_grpc.DeconvolutionServiceStub(channel)
