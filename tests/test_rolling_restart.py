"""Servers behind the Envoy of docs/envoy-balancer.yaml stop and start under load, and no call fails.

The clients are stock ones: they make each call once. Nor does the proxy try a call again.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

import deconvd_client
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1.deconvd_pb2_grpc import DeconvolutionServiceStub
from deconvd.wire.tensor import message_from_array
from deconvd_server.exit_codes import ExitCode
from tests.envoys import run_documented_envoy
from tests.processes import wait_until
from tests.servers import ServerProcess, free_port, server_process

pytest.importorskip("envoy", reason="there is no Envoy for this system")

X = np.ones((4, 4, 32, 32), np.float32)
W = np.ones((4, 4, 4, 4), np.float32)
CLIENTS_COUNT = 4
ENOUGH_COUNT = 100

OPTIONS = ("--access-log", "--no-direct-calls", "--drain-delay-s", "2")


def balancer(directory: Path, ports: tuple[int, int]) -> AbstractContextManager[str]:
    """Run the Envoy of the documents before servers at two ports, and return its address."""
    replacements = {
        f"address: 10.0.0.{number}, port_value: 50051": f"address: 127.0.0.1, port_value: {port}"
        for number, port in enumerate(ports, 1)
    }
    return run_documented_envoy(
        directory, "envoy-balancer.yaml", {**replacements, "interval: 1s": "interval: 0.2s"}
    )


class Load:
    """Clients that call one after the other, until they are told to stop."""

    def __init__(self, target: str) -> None:
        self.outcomes: Counter[str] = Counter()
        self._target = target
        self._lock = threading.Lock()
        self._is_over = threading.Event()

    def call_on(self) -> None:
        """Call as a stock client does, by messages."""
        request = pb.DeconvolveRequest(x=message_from_array(X), w=message_from_array(W), waits=True)
        options = (("grpc.enable_retries", 0),)
        with grpc.insecure_channel(self._target, options) as channel:
            stub = DeconvolutionServiceStub(channel)
            while not self._is_over.is_set():
                try:
                    stub.Deconvolve(request, timeout=60)
                except grpc.RpcError as error:
                    self._note(f"{error.code()}: {error.details()}")
                else:
                    self._note("OK")

    def stream_on(self) -> None:
        """Call by streams, which a proxy could not make again."""
        x = np.ones((160, 4, 32, 64), np.float32)  # 5 MiB
        with deconvd_client.connect(self._target, transport="grpc") as F:
            while not self._is_over.is_set():
                F.deconvolution_2d(x, W)
                self._note("streamed")

    def stop(self) -> None:
        self._is_over.set()

    def go_on(self) -> None:
        """Return once the clients have made many more calls."""
        enough_count = self.outcomes.total() + ENOUGH_COUNT
        wait_until(lambda: self.outcomes.total() >= enough_count)

    def _note(self, outcome: str) -> None:
        with self._lock:
            self.outcomes[outcome] += 1


def calls_count(server: ServerProcess) -> int:
    return server.log.read_text().count(" Deconvolve grpc from ")


@contextmanager
def listening(directory: Path, port: int) -> Iterator[ServerProcess]:
    directory.mkdir()
    with server_process(directory, *OPTIONS, listen=(f"127.0.0.1:{port}",)) as server:
        yield server


def test_a_server_that_is_restarted_behind_a_balancer_loses_no_call(tmp_path: Path) -> None:
    ports = free_port(), free_port()
    with (
        listening(tmp_path / "a", ports[0]) as a,
        listening(tmp_path / "b", ports[1]) as b,
        balancer(tmp_path, ports) as target,
        ThreadPoolExecutor(CLIENTS_COUNT + 1) as clients,
    ):
        with grpc.insecure_channel(target) as channel:
            stub = DeconvolutionServiceStub(channel)  # waits until the proxy has found a server
            stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=60, wait_for_ready=True)
        load = Load(target)
        futures = [clients.submit(load.call_on) for _ in range(CLIENTS_COUNT)]
        futures.append(clients.submit(load.stream_on))
        try:
            wait_until(lambda: min(calls_count(a), calls_count(b)) > ENOUGH_COUNT)
            assert a.end() == ExitCode.DRAINED
            load.go_on()
            with listening(tmp_path / "a again", ports[0]) as again:
                wait_until(lambda: calls_count(again) > ENOUGH_COUNT)
                assert b.end() == ExitCode.DRAINED
                load.go_on()
                load.stop()
                for future in futures:
                    future.result()
        finally:
            load.stop()

    assert {*load.outcomes} == {"OK", "streamed"}, load.outcomes
