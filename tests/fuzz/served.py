"""Real servers that are fuzzed from the outside, and what must be true of them after each batch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import grpc
import numpy as np

import deconvd_client
from deconvd.model.dtypes import Array
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from tests.fuzz.requests import W, X, tensor
from tests.fuzz.target import Target
from tests.processes import process_resources, wait_until
from tests.servers import ServerProcess, server_process

__all__ = ["ServerTarget", "hold_names"]

_LIMITS = ("--max-message-bytes", str(4 << 20), "--device-memory-bytes", str(64 << 20))
_SPARE_BYTES = 200 << 20
"""More than the server keeps of its own: caches, pools and the arenas of its threads."""

_SPARE_THREADS_COUNT = 180
"""Threads that serve calls are kept for the next ones."""

_SPARE_DESCRIPTORS_COUNT = 8


class ServerTarget(Target):
    """A target in a server process, which must go on serving, and give back whatever inputs made it take.

    Attributes:
        server: The process.
        unwanted: What its log must not have.
    """

    unwanted: tuple[bytes, ...] = (b"unforeseen", b"Traceback")

    def options(self) -> Sequence[str]:
        """Return its options."""
        return _LIMITS

    def open(self, stack: ExitStack) -> None:
        listen = ("unix", "127.0.0.1:0")
        self.server: ServerProcess = stack.enter_context(
            server_process(self.directory, *self.options(), listen=listen)
        )
        self.F = stack.enter_context(
            deconvd_client.connect(self.server.target, transport="grpc", timeout_s=60)
        )
        self._y: Array = self.F.deconvolution_2d(X, W)
        self._before = process_resources(self.server.process.pid)
        self._read_bytes = 0

    def check(self) -> None:
        assert self.server.process.poll() is None, "the server has ended"
        np.testing.assert_array_equal(self.F.deconvolution_2d(X, W), self._y)
        self._check_log()
        wait_until(self._has_given_back)

    def _check_log(self) -> None:
        with self.server.log.open("rb") as log:
            log.seek(self._read_bytes)
            new = log.read()
        self._read_bytes += len(new)
        for word in self.unwanted:
            assert word not in new, new[max(new.find(word) - 200, 0) :][:4000].decode()

    def _has_given_back(self) -> bool:
        before, now = self._before, process_resources(self.server.process.pid)
        (device,) = self.F.server_info().devices
        return (
            now.memory_bytes <= before.memory_bytes + _SPARE_BYTES
            and now.threads_count <= before.threads_count + _SPARE_THREADS_COUNT
            and now.descriptors_count <= before.descriptors_count + _SPARE_DESCRIPTORS_COUNT
            and (device.running_calls_count, device.waiting_calls_count) == (0, 0)
        )


@contextmanager
def hold_names(target: str) -> Iterator[tuple[bytes, bytes]]:
    """Give the names of a session that is held for the block, and of a tensor that the server keeps for it."""
    ended = threading.Event()

    def heartbeats() -> Iterator[pb.HoldSessionRequest]:
        yield pb.HoldSessionRequest()
        while not ended.wait(0.5):
            yield pb.HoldSessionRequest()

    with grpc.insecure_channel(target) as channel:
        stub = pb_grpc.DeconvolutionServiceStub(channel)
        held = stub.HoldSession(heartbeats())
        session = next(held).session
        header = pb.PutTensorHeader(session=session, tensor=tensor(X, with_elements=False))
        parts = [pb.PutTensorRequest(header=header), pb.PutTensorRequest(chunk=X.tobytes())]
        try:
            yield session, stub.PutTensor(iter(parts)).resident.handle
        finally:
            ended.set()
            assert list(held) == []
