"""A drain ends in time, whatever clients do, and every call that was accepted before ends well or is told."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import deconvd_client
from deconvd.host.startup_line import address_in_startup_line
from deconvd.model.geometry import Geometry
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd.wire.messages import message_from_geometry
from deconvd_client import UnavailableError
from deconvd_server.exit_codes import ExitCode
from tests.http2 import METHODS, Http2Client
from tests.processes import wait_until
from tests.servers import ServerProcess, server_process
from tests.session_clients import open_session, raw_tensor

X = np.ones((1, 4, 8, 8), np.float32)
W = np.ones((4, 4, 3, 3), np.float32)
SPREAD = message_from_geometry(Geometry(stride=(64, 64)))  # makes much of little

SLACK_S = 10.0
"""What a drain may take over its limit."""

CALLERS_COUNT = 8

_STUCK_SERVER = """
import sys, threading
from deconvd_server.__main__ import main
from deconvd_server.device.cpu import CpuDevice

def run(*args):
    print("stuck", flush=True)
    threading.Event().wait()

CpuDevice.run = run
main()
"""


def ends(server: ServerProcess, number: int = signal.SIGTERM) -> tuple[int, float]:
    """Send a signal; return the exit code, and how long the end took."""
    began_s = time.monotonic()
    return server.end(number), time.monotonic() - began_s


def test_clients_that_do_nothing_hold_up_no_drain(tmp_path: Path) -> None:
    with server_process(tmp_path, "--drain-timeout-s", "30", listen=("127.0.0.1:0",)) as server:
        with ExitStack() as stack:
            for path in METHODS:
                stack.enter_context(Http2Client(server.target)).begin(path)
            stack.enter_context(open_session(server.target))
            F = stack.enter_context(deconvd_client.connect(server.target, transport="tcp"))
            F.deconvolution_2d(X, W)
            exit_code, duration_s = ends(server)

    assert exit_code == ExitCode.DRAINED
    assert duration_s < SLACK_S


def test_a_client_that_does_not_read_its_answer_does_not_hold_up_a_drain(tmp_path: Path) -> None:
    with server_process(tmp_path, "--drain-timeout-s", "1", listen=("127.0.0.1:0",)) as server:
        with Http2Client(server.target) as client:  # whose window is 64 KiB, for good
            request = pb.DeconvolveRequest(x=raw_tensor(X), w=raw_tensor(W), geometry=SPREAD)
            number = client.begin(METHODS[0])
            client.send(number, request.SerializeToString(), is_last=True)
            client.read_until(bytes(1 << 14))  # of what it has room for
            exit_code, duration_s = ends(server)

    assert exit_code == ExitCode.CUT_SHORT
    assert duration_s < 1 + SLACK_S


def test_calls_are_served_until_balancers_have_noticed_and_a_second_signal_ends_that(
    tmp_path: Path,
) -> None:
    options = ("--drain-delay-s", "600")
    with (
        server_process(tmp_path, *options, listen=("127.0.0.1:0",)) as server,
        grpc.insecure_channel(server.target) as channel,
        deconvd_client.connect(server.target, fail_fast=True) as F,
    ):
        health: Any = health_pb2_grpc.HealthStub(channel)
        F.deconvolution_2d(X, W)
        server.process.send_signal(signal.SIGTERM)
        for status in health.Watch(health_pb2.HealthCheckRequest(), timeout=30):
            if status.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                break
        for _ in range(3):
            F.deconvolution_2d(X, W)
        with deconvd_client.connect(server.target, fail_fast=True) as newcomer:
            newcomer.deconvolution_2d(X, W)
        alive = health.Check(health_pb2.HealthCheckRequest(service="liveness"), timeout=30)
        exit_code, duration_s = ends(server)

    assert alive.status == health_pb2.HealthCheckResponse.SERVING
    assert exit_code in (ExitCode.DRAINED, ExitCode.CUT_SHORT)  # CUT_SHORT on a busy machine
    assert duration_s < SLACK_S


@contextmanager
def stuck_server(directory: Path, drain_timeout_s: float) -> Iterator[ServerProcess]:
    """A server with a call that never ends, by gRPC and directly."""
    log = directory / "server.log"
    options = "--device", "cpu", "--listen", "127.0.0.1:0", "--drain-timeout-s", drain_timeout_s
    command = [sys.executable, "-c", _STUCK_SERVER, *map(str, options)]
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
        ThreadPoolExecutor(2) as callers,
    ):
        try:
            assert process.stdout is not None
            target = address_in_startup_line(process.stdout.readline())
            for transport in ("grpc", "tcp"):
                callers.submit(_call_in_vain, target, transport)
                assert process.stdout.readline() == "stuck\n"
            yield ServerProcess(process, [target], log)
        finally:
            process.kill()


def _call_in_vain(target: str, transport: str) -> None:
    with deconvd_client.connect(target, transport=transport, timeout_s=60, fail_fast=True) as F:
        with pytest.raises(UnavailableError):
            F.deconvolution_2d(X, W)


def test_a_call_that_never_ends_does_not_hold_up_a_drain(tmp_path: Path) -> None:
    with stuck_server(tmp_path, 1) as server:
        exit_code, duration_s = ends(server)

    assert exit_code == ExitCode.CUT_SHORT
    assert duration_s < 1 + SLACK_S
    assert "the process ends without them" in server.log.read_text()


def test_health_is_answered_while_no_worker_is_free(tmp_path: Path) -> None:
    with stuck_server(tmp_path, 1) as server, grpc.insecure_channel(server.target) as channel:
        request = pb.DeconvolveRequest(x=raw_tensor(X), w=raw_tensor(W))
        stub = pb_grpc.DeconvolutionServiceStub(channel)
        calls = [stub.Deconvolve.future(request) for _ in range(400)]
        wait_until(lambda: any(call.done() for call in calls))  # some are refused
        health: Any = health_pb2_grpc.HealthStub(channel)
        response = health.Check(health_pb2.HealthCheckRequest(), timeout=10)
        exit_code, duration_s = ends(server)

    assert response.status == health_pb2.HealthCheckResponse.SERVING
    assert exit_code == ExitCode.CUT_SHORT
    assert duration_s < 1 + SLACK_S


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    with stuck_server(tmp_path, 1000) as server:
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "draining" in server.log.read_text())
        exit_code, duration_s = ends(server)

    assert exit_code == ExitCode.CUT_SHORT
    assert duration_s < SLACK_S


@pytest.mark.parametrize("option", ["--drain-timeout-s", "--session-lease-s"])
@pytest.mark.parametrize("value", ["inf", "nan", "-1", "1e300"])
def test_what_is_no_duration_is_a_wrong_option(option: str, value: str) -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "deconvd_server", "--device", "cpu", f"{option}={value}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert outcome.returncode == ExitCode.WRONG_OPTION
    assert option in outcome.stderr
    assert "Traceback" not in outcome.stderr


class Caller:
    """Calls until the server is gone, and counts what came of each call that began before the signal."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self.outcomes: Counter[str] = Counter()

    def run(self, is_over: threading.Event) -> None:
        while not is_over.is_set():
            self.outcomes[self._outcome()] += 1

    def _outcome(self) -> str:
        try:
            self._call()
        except UnavailableError:
            return "UNAVAILABLE"
        except grpc.RpcError as error:
            return str(error.code().name)
        except Exception as error:
            return repr(error)
        return "OK"


def _stock(stack: ExitStack, target: str) -> Callable[[], Any]:
    channel = stack.enter_context(
        grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)])
    )
    stub = pb_grpc.DeconvolutionServiceStub(channel)
    request = pb.DeconvolveRequest(x=raw_tensor(X), w=raw_tensor(W))
    return lambda: stub.Deconvolve(request, timeout=10)


def _ours(transport: str) -> Callable[[ExitStack, str], Callable[[], Any]]:
    def connect(stack: ExitStack, target: str) -> Callable[[], Any]:
        F = stack.enter_context(
            deconvd_client.connect(target, transport=transport, timeout_s=10, fail_fast=True)
        )
        return lambda: F.deconvolution_2d(X, W)

    return connect


CLIENTS = {
    "stock": _stock,
    "grpc": _ours("grpc"),
    "tcp": _ours("tcp"),
    "unix": _ours("unix"),
    "shared_memory": _ours("shared_memory"),
}


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        *((kind, "127.0.0.1:0") for kind in ("stock", "grpc", "tcp")),
        *((kind, "unix") for kind in ("stock", "grpc", "unix", "shared_memory")),
    ],
)
def test_no_call_is_lost_on_a_signal(kind: str, way: str, socket_directory: Path) -> None:
    is_over = threading.Event()
    with server_process(socket_directory, listen=(way,)) as server, ExitStack() as stack:
        callers = [Caller(CLIENTS[kind](stack, server.target)) for _ in range(CALLERS_COUNT)]
        with ThreadPoolExecutor(CALLERS_COUNT) as threads:
            runs = [threads.submit(caller.run, is_over) for caller in callers]
            wait_until(lambda: sum(caller.outcomes["OK"] for caller in callers) > 400)
            exit_code = server.end()
            is_over.set()
            for run in runs:
                run.result(30)

    outcomes = sum((caller.outcomes for caller in callers), Counter())
    assert exit_code == ExitCode.DRAINED
    assert set(outcomes) <= {"OK", "UNAVAILABLE"}, outcomes


_HANGING = """
import time
from deconvd_server.transports.grpc.server import GrpcServer

def start_and_hang(self):
    self.call_later(1.0, lambda: time.sleep(3600))
    start(self)

start, GrpcServer.start = GrpcServer.start, start_and_hang
"""

_LOSING_SERVER = """
import deconvd_server.transports.grpc.server as grpc_server
from deconvd_server.__main__ import main

def lose(self):
    raise SystemExit("lost")

grpc_server.GrpcServer._run_due_timers = lose  # about a second after its start
main()
"""


def test_a_thread_of_gRPC_that_hangs_ends_a_server_that_nobody_watches(tmp_path: Path) -> None:
    limits = {"deconvd_server.shutdown:_BLOCKED_S": 1.5, "deconvd_server.shutdown:_LOST_S": 3.0}
    with server_process(tmp_path, prelude=_HANGING, constants=limits) as server:
        assert server.process.wait(60) == ExitCode.NEEDS_RESTART

        assert "must be restarted: gRPC's thread has not run for 3 s" in server.log.read_text()


def test_a_lost_thread_of_gRPC_ends_the_process_with_a_code_of_its_own(tmp_path: Path) -> None:
    began_s = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", _LOSING_SERVER, "--device", "cpu", "--listen", "127.0.0.1:0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert process.returncode == ExitCode.NEEDS_RESTART
    assert "must be restarted: gRPC's thread" in process.stderr
    assert time.monotonic() - began_s < 45
