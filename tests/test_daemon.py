"""The daemon's life, seen from other processes."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import deconvd_client
from deconvd_client import UnavailableError
from deconvd_server.exit_codes import ExitCode
from tests.servers import ServerProcess, server_process

X = np.ones((8, 16, 48, 48), np.float32)
W = np.ones((16, 16, 5, 5), np.float32)
ENDLESS_X = np.ones((64, 64, 64, 64), np.float32)  # with ENDLESS_W, a minute of work
ENDLESS_W = np.ones((64, 64, 33, 33), np.float32)


def test_every_address_is_served_and_printed(socket_directory: Path) -> None:
    with server_process(socket_directory, listen=("unix", "127.0.0.1:0", "[::1]:0")) as server:
        ports = [int(target.rpartition(":")[2]) for target in server.targets[1:]]
        for target in server.targets:
            with deconvd_client.connect(target) as F:
                assert F.health() == "SERVING"

    assert min(ports) > 0


def test_options_come_from_the_environment_too(socket_directory: Path) -> None:
    environment = {
        "DECONVD_LISTEN": f"unix:{socket_directory}/a.sock unix:{socket_directory}/b.sock",
        "DECONVD_MAX_MESSAGE_BYTES": "4194304",
        "DECONVD_THREADS": "3",
        "DECONVD_DEVICE": "cpu",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "deconvd_server"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        with deconvd_client.connect(f"unix:{socket_directory}/b.sock") as F:
            info = F.server_info()
        process.terminate()

    assert all("listening on unix:" in line for line in lines)
    assert info.max_message_bytes == 4194304
    assert info.devices[0].threads_count == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_exit_code_0_and_no_socket(
    socket_directory: Path, number: int
) -> None:
    with server_process(socket_directory) as server:
        exit_code = server.end(number)

    assert exit_code == 0
    assert not (socket_directory / "deconvd.sock").exists()


def test_a_signal_that_another_thread_is_handed_ends_it_too(socket_directory: Path) -> None:
    # a system call that signals one thread, as the kernel may do with any signal
    tgkill = {"x86_64": 234, "aarch64": 131}[os.uname().machine]
    with (
        server_process(socket_directory) as server,
        deconvd_client.connect(server.target) as F,
    ):
        F.deconvolution_2d(X, W)
        pid = server.process.pid
        others = {int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()} - {pid}
        assert ctypes.CDLL(None).syscall(tgkill, pid, max(others), int(signal.SIGTERM)) == 0
        exit_code = server.process.wait(30)

    assert exit_code == 0


def test_a_drain_loses_no_accepted_call(socket_directory: Path) -> None:
    with (
        server_process(socket_directory) as server,
        deconvd_client.connect(server.target, fail_fast=True) as F,
        ThreadPoolExecutor(8) as callers,
    ):
        expected = F.deconvolution_2d(X, W)
        begun = threading.Semaphore(0)
        results = [callers.submit(_calls_until_refused, F, begun) for _ in range(8)]
        for _ in range(24):
            begun.acquire()
        exit_code = server.end()
        done = [result.result(timeout=60) for result in results]

    assert exit_code == 0
    # each caller's calls were answered in full until the first that found nobody
    assert sum(len(ys) for ys in done) >= 16
    for y in (y for ys in done for y in ys):
        np.testing.assert_array_equal(y, expected)


def _calls_until_refused(F: deconvd_client.Connection, begun: threading.Semaphore) -> list[Any]:
    ys = []
    while True:
        begun.release()
        try:
            ys.append(F.deconvolution_2d(X, W))
        except UnavailableError:
            return ys


def test_a_drain_is_bounded(socket_directory: Path) -> None:
    with (
        server_process(
            socket_directory, "--drain-timeout-s", "0.2", "--log-level", "debug"
        ) as server,
        deconvd_client.connect(server.target, timeout_s=100) as F,
    ):
        endless = _endless_call(F, server)
        exit_code = server.end()

    assert exit_code == ExitCode.CUT_SHORT
    assert isinstance(endless.exception(timeout=60), deconvd_client.DeconvdError)


def test_a_second_signal_cuts_the_drain_short(socket_directory: Path) -> None:
    with (
        server_process(
            socket_directory, "--drain-timeout-s", "1000", "--log-level", "debug"
        ) as server,
        deconvd_client.connect(server.target, timeout_s=100) as F,
    ):
        endless = _endless_call(F, server)
        server.process.send_signal(signal.SIGTERM)
        _wait_for_log(server, "draining")
        exit_code = server.end()

    assert exit_code == ExitCode.CUT_SHORT
    assert isinstance(endless.exception(timeout=60), deconvd_client.DeconvdError)


def _endless_call(F: deconvd_client.Connection, server: ServerProcess) -> Future[Any]:
    """Start a call that outlasts the test, and return once the server has it."""
    caller = ThreadPoolExecutor(1)
    endless = caller.submit(F.deconvolution_2d, ENDLESS_X, ENDLESS_W)
    caller.shutdown(wait=False)
    _wait_for_log(server, "Deconvolve from")  # others tell where the server is
    return endless


def _wait_for_log(server: ServerProcess, text: str) -> None:
    waiting = threading.Event()
    for _ in range(600):
        if text in server.log.read_text():
            return
        waiting.wait(0.05)
    pytest.fail(f"{text!r} is not in the log: {server.log.read_text()}")


def test_a_watcher_of_health_is_told_and_does_not_hold_up_the_drain(
    socket_directory: Path,
) -> None:
    with (
        server_process(socket_directory, "--drain-timeout-s", "1000") as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        watch = _health_watch(channel)
        first = next(watch)
        exit_code = server.end()
        rest = _statuses_until_end(watch)

    assert first.status == health_pb2.HealthCheckResponse.SERVING
    assert exit_code == 0
    assert set(rest) <= {health_pb2.HealthCheckResponse.NOT_SERVING}


def _health_watch(channel: grpc.Channel) -> Any:
    watch: grpc.UnaryStreamMultiCallable[Any, Any] = channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    return watch(health_pb2.HealthCheckRequest())


def _statuses_until_end(watch: Any) -> list[int]:
    statuses: list[int] = []
    try:
        statuses.extend(response.status for response in watch)
    except grpc.RpcError:
        return statuses
    return statuses


def test_reflection_names_the_service(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.target) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        (response,) = stub.ServerReflectionInfo(iter([ask]))

    names = {service.name for service in response.list_services_response.service}
    assert names >= {"deconvd.v1.DeconvolutionService", "grpc.health.v1.Health"}


def test_a_dead_servers_socket_is_taken_over(socket_directory: Path) -> None:
    with server_process(socket_directory) as dead:
        assert dead.end(signal.SIGKILL) == -signal.SIGKILL
    assert (socket_directory / "deconvd.sock").exists()

    with (
        server_process(socket_directory) as server,
        deconvd_client.connect(server.target) as F,
    ):
        assert F.health() == "SERVING"


def test_a_live_servers_socket_and_port_are_not(socket_directory: Path) -> None:
    with server_process(socket_directory, listen=("unix", "127.0.0.1:0")) as server:
        for target in server.targets:
            reason = "a live server listens there" if "unix:" in target else "in use"
            assert reason in _failure_to_start("--listen", target)
        with deconvd_client.connect(server.target) as F:
            assert F.health() == "SERVING"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--listen", "nonsense"], "--listen must be host:port or unix:path, got 'nonsense'"),
        (["--listen", "unix:/nowhere/deconvd.sock"], "in a directory that exists"),
        (
            ["--device", "tpu"],
            "--device must be cpu, cuda, cuda:N, several as in cuda:0,cuda:1, or auto, got 'tpu'",
        ),
        (["--device", "cuda:x"], "got 'cuda:x'"),
        (["--device", f"cuda:{'1' * 5000}"], "--device must be cpu, cuda, cuda:N,"),
        (["--max-message-bytes", "0"], "0 is not in the range"),
        (["--threads", "0"], "0 is not in the range"),
        (
            ["--shared-memory-users", "me"],
            "'me' is not a list of user ids up to 4294967294, as in 1000,1001",
        ),
    ],
)
def test_a_wrong_option_ends_it_with_one_clear_line(options: list[str], message: str) -> None:
    assert message in _failure_to_start(*options)


def _failure_to_start(*options: str) -> str:
    outcome = subprocess.run(
        [sys.executable, "-m", "deconvd_server", "--device", "cpu", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert outcome.returncode in (1, 2)
    assert "Traceback" not in outcome.stderr
    return outcome.stderr


def test_more_callers_than_places_are_all_served(server: ServerProcess) -> None:
    x = np.ones((1, 4, 8, 8), np.float32)
    w = np.ones((4, 4, 3, 3), np.float32)
    with (
        deconvd_client.connect(server.target) as F,
        ThreadPoolExecutor(64) as callers,
    ):
        ys = list(callers.map(lambda _: F.deconvolution_2d(x, w), range(256)))

    assert len(ys) == 256
    assert all((y == ys[0]).all() for y in ys)


def test_a_connection_that_speaks_no_http2_harms_nobody(server: ServerProcess) -> None:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(server.target.removeprefix("unix:"))
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + b"\x00" * 4096)
        with deconvd_client.connect(server.target) as F:
            assert F.health() == "SERVING"
