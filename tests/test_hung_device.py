"""A device that hangs: readiness fails, callers learn it with the advice to come back, and the process ends."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import deconvd_client
from deconvd.errors import UnavailableError
from deconvd_client.transports.route import TransportName
from deconvd_server.device.native_waits import NativeWaits
from deconvd_server.exit_codes import ExitCode
from tests.certificates import Authority, CertificateFiles
from tests.hung_device import HUNG_SAMPLES_COUNT, PRELUDE
from tests.processes import wait_until
from tests.servers import ServerProcess, server_process

DEVICE_TIMEOUT_S = 1.0
W = np.ones((1, 1, 2, 2), np.float32)
HUNG = np.ones((HUNG_SAMPLES_COUNT, 1, 8, 8), np.float32)
QUICK = np.ones((1, 1, 8, 8), np.float32)

WAYS = [("tcp", 0), ("unix", 1), ("shared_memory", 1), ("grpc", 1)]
_Status = health_pb2.HealthCheckResponse


def hanging_server(
    directory: Path, timeout_s: float, *options: str
) -> AbstractContextManager[ServerProcess]:
    options = ("--device-timeout-s", str(timeout_s), *options)
    return server_process(directory, *options, listen=("127.0.0.1:0", "unix"), prelude=PRELUDE)


@pytest.fixture
def hanging(socket_directory: Path) -> Iterator[ServerProcess]:
    """A server whose device hangs in some calls."""
    with hanging_server(socket_directory, DEVICE_TIMEOUT_S) as server:
        yield server


@pytest.fixture
def no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have clients raise the first error that a server answers, instead of calling again."""
    module = "deconvd_client.transports.retry_policy.RetryPolicy"
    monkeypatch.setattr(f"{module}._pause_s", lambda *_: None)


def failure_of(future: Future[Any]) -> UnavailableError:
    error = future.exception(30)
    assert isinstance(error, UnavailableError), error
    return error


def uptime_us(F: deconvd_client.Connection) -> int:
    counts = F.server_info().counts
    assert counts is not None
    return counts.uptime_us


@pytest.mark.usefixtures("patient", "no_retries")
def test_callers_by_every_transport_are_told_to_come_back_and_the_process_ends(
    socket_directory: Path,
) -> None:
    timeout_s = 3.0  # in which all calls come, however busy this machine is
    with (
        hanging_server(socket_directory, timeout_s) as hanging,
        ThreadPoolExecutor(len(WAYS)) as executor,
    ):
        connections = [
            deconvd_client.connect(hanging.targets[number], transport=transport, timeout_s=60)
            for transport, number in WAYS
        ]
        for F in connections:
            F.deconvolution_2d(QUICK, W)
        calls = [executor.submit(F.deconvolution_2d, HUNG, W) for F in connections]
        errors = [failure_of(call) for call in calls]
        code = hanging.process.wait(30)
        for F in connections:
            F.close()

    for error in errors:
        assert error.retry_after_s == 2.0
        assert f"has not ended a kernel or copy for {timeout_s:g} s" in str(error)
    assert code == ExitCode.DEVICE_HUNG
    assert "cpu has not ended a kernel or copy" in hanging.log.read_text()


@pytest.mark.usefixtures("patient", "no_retries")
@pytest.mark.parametrize("transport", ["tcp", "grpc"])
def test_callers_with_tls_are_told_too(
    socket_directory: Path,
    loopback_certificate: CertificateFiles,
    authority: Authority,
    transport: TransportName,
) -> None:
    files = ("--tls-cert", loopback_certificate.cert, "--tls-key", loopback_certificate.key)
    with (
        hanging_server(socket_directory, DEVICE_TIMEOUT_S, *map(str, files)) as hanging,
        deconvd_client.connect(
            hanging.target, transport=transport, timeout_s=60, tls=deconvd_client.Tls(authority.ca)
        ) as F,
    ):
        F.deconvolution_2d(QUICK, W)
        with pytest.raises(UnavailableError, match="has not ended a kernel or copy"):
            F.deconvolution_2d(HUNG, W)
        code = hanging.process.wait(30)

    assert code == ExitCode.DEVICE_HUNG


@pytest.mark.usefixtures("no_retries")
def test_readiness_fails_before_the_process_ends(hanging: ServerProcess) -> None:
    statuses = []
    with (
        grpc.insecure_channel(hanging.target) as channel,
        deconvd_client.connect(hanging.target, transport="grpc", timeout_s=60) as F,
    ):
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        statuses.append(next(watch).status)
        hung = threading.Thread(target=lambda: failure_of(F.submit(F.deconvolution_2d, HUNG, W)))
        hung.start()
        statuses.append(next(watch).status)
        code = hanging.process.wait(30)
        hung.join()

    assert statuses == [_Status.SERVING, _Status.NOT_SERVING]
    assert code == ExitCode.DEVICE_HUNG


@pytest.mark.usefixtures("patient", "no_retries")
@pytest.mark.parametrize("transport", ["tcp", "grpc"])
def test_a_client_in_the_midst_of_a_stream_learns_it_too(
    hanging: ServerProcess, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deconvd_client.dispatch._MAX_UNARY_BYTES", 0)
    with deconvd_client.connect(hanging.target, transport=transport, timeout_s=60) as F:
        F.deconvolution_2d(QUICK, W)
        with pytest.raises(UnavailableError):
            F.deconvolution_2d(HUNG, W)

    assert hanging.process.wait(30) == ExitCode.DEVICE_HUNG


@pytest.mark.usefixtures("patient")
def test_callers_get_their_results_of_the_next_process(
    hanging: ServerProcess, socket_directory: Path
) -> None:
    with (
        deconvd_client.connect(hanging.targets[1], timeout_s=60) as F,
        ThreadPoolExecutor(1) as executor,
    ):
        y = F.deconvolution_2d(QUICK, W)
        call = executor.submit(F.deconvolution_2d, HUNG, W)
        assert hanging.process.wait(30) == ExitCode.DEVICE_HUNG
        with server_process(socket_directory):
            np.testing.assert_array_equal(call.result(60)[:1], y)


def test_work_that_ends_in_time_is_no_reason_to_end(hanging: ServerProcess) -> None:
    with deconvd_client.connect(hanging.target, transport="grpc", timeout_s=60) as F:
        began_us = uptime_us(F)

        def is_past_the_limit() -> bool:
            F.deconvolution_2d(QUICK, W)
            return uptime_us(F) - began_us > 2e6 * DEVICE_TIMEOUT_S

        wait_until(is_past_the_limit)

    assert hanging.process.poll() is None


def test_the_longest_wait_counts_until_it_ends() -> None:
    waits = NativeWaits()
    seen = []
    first, second = threading.Event(), threading.Event()

    def note_both() -> None:
        seen.append(waits.since_s)
        first.set()
        second.wait(30)

    other = threading.Thread(target=waits.run, args=(note_both,))
    before_s = waits.since_s
    other.start()
    first.wait(30)
    waits.run(lambda: seen.append(waits.since_s))
    second.set()
    other.join()

    assert seen[0] == seen[1] < math.inf == before_s == waits.since_s


def test_a_wait_that_raises_has_ended() -> None:
    waits = NativeWaits()

    with pytest.raises(ZeroDivisionError):
        waits.run(lambda: 1 // 0)

    assert waits.since_s == math.inf
