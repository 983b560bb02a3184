"""Calls that send no message, or send what none may be, take nothing from others: neither threads nor gRPC."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import deconvd_client
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd.wire.grpc_status import error_from_rpc
from deconvd_server.exit_codes import ExitCode
from tests.cgroups import Cgroup, cgroup
from tests.http2 import METHODS, SERVICE, Http2Client
from tests.processes import limit_address_space, process_resources
from tests.servers import ServerProcess, server_process
from tests.session_clients import open_session

pytestmark = pytest.mark.usefixtures("unmeasured")

X = np.ones((1, 4, 8, 8), np.float32)
W = np.ones((4, 4, 3, 3), np.float32)
REFLECTION = METHODS[-1]

HEALTH_S = 5.0
DRAIN_S = 1
ENDED_S = DRAIN_S + 10.0


@contextmanager
def serving(
    directory: Path, *, within: Cgroup | None = None, limits: Mapping[int, int] | None = None
) -> Iterator[ServerProcess]:
    """Serve by TCP for the block; then the server must answer, and end by a signal in time."""
    options = "--drain-timeout-s", str(DRAIN_S)
    listen = ("127.0.0.1:0",)
    with server_process(directory, *options, listen=listen, within=within, limits=limits) as server:
        yield server
        assert server.process.poll() is None, server.log.read_text()
        assert_healthy(server)
        assert_served(server)
        assert_ends(server)


def assert_healthy(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.target) as channel:
        grpc.channel_ready_future(channel).result(10)
        began_s = time.monotonic()
        request = health_pb2.HealthCheckRequest()
        stub: Any = health_pb2_grpc.HealthStub(channel)
        response = stub.Check(request, timeout=HEALTH_S)
        assert time.monotonic() - began_s < HEALTH_S
    assert response.status == health_pb2.HealthCheckResponse.SERVING


def assert_served(server: ServerProcess) -> None:
    for transport in ("grpc", "tcp"):
        with deconvd_client.connect(server.target, transport=transport, timeout_s=10) as F:
            assert F.deconvolution_2d(X, W).shape == (1, 4, 10, 10)


def assert_ends(server: ServerProcess) -> None:
    began_s = time.monotonic()
    exit_code = server.end()
    assert time.monotonic() - began_s < ENDED_S
    assert exit_code in (ExitCode.DRAINED, ExitCode.CUT_SHORT)


@pytest.mark.parametrize("path", METHODS)
def test_many_calls_without_a_message_stop_nobody(path: str, tmp_path: Path) -> None:
    with serving(tmp_path) as server, ExitStack() as stack:
        threads_count = process_resources(server.process.pid).threads_count
        for _ in range(3):
            client = stack.enter_context(Http2Client(server.target))
            for _ in range(400):
                client.begin(path)
        assert_healthy(server)
        assert_served(server)

        assert process_resources(server.process.pid).threads_count <= threads_count + 16


def test_many_calls_on_one_connection_are_bounded(tmp_path: Path) -> None:
    with serving(tmp_path) as server, Http2Client(server.target) as client:
        for _ in range(1100):
            client.begin(SERVICE + "HoldSession")
        assert_served(server)


def test_calls_that_the_system_has_no_threads_for_stop_nobody(tmp_path: Path) -> None:
    with cgroup(tasks_count=200) as group, serving(tmp_path, within=group) as server:
        with Http2Client(server.target) as client:
            for _ in range(250):
                client.begin(SERVICE + "Deconvolve")
            assert_healthy(server)
        assert_served(server)


def test_sessions_that_the_system_has_no_threads_for_stop_nobody(tmp_path: Path) -> None:
    """Each thread's stack takes so much of the address space that it holds few more."""
    stack_bytes = 256 << 20
    with (
        serving(tmp_path, limits={resource.RLIMIT_STACK: stack_bytes}) as server,
        ExitStack() as stack,
    ):
        assert_served(server)
        limit_address_space(server.process.pid, 8 * stack_bytes)
        for _ in range(60):
            stack.enter_context(open_session(server.target))
        assert_served(server)


def test_a_message_that_there_is_no_memory_for_fails_its_call_alone(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        assert_served(server)
        limit_address_space(server.process.pid, 80 << 20)
        options = [("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(server.target, options) as channel:
            request = pb.DeconvolveRequest(x=pb.Tensor(raw=bytes(64 << 20)))
            with pytest.raises(grpc.RpcError) as failure:
                pb_grpc.DeconvolutionServiceStub(channel).Deconvolve(request, timeout=20)
        assert error_from_rpc(failure.value).status == "RESOURCE_EXHAUSTED"


@pytest.mark.parametrize(
    "path", [b"/\xff\xfe", b"", b"/" + b"a" * 100, REFLECTION.encode() + b"\0"]
)
def test_a_path_of_no_method_stops_nobody(path: bytes, tmp_path: Path) -> None:
    with serving(tmp_path) as server, Http2Client(server.target) as client:
        client.begin(path)
        with suppress(AssertionError, TimeoutError):  # a connection that sends none may be closed
            client.read_until(b"grpc-status")


@pytest.mark.parametrize("message", [b"\xff\xff", b"\x0a\x02\xff\xff", bytes(1 << 14)])
def test_a_malformed_message_to_reflection_or_health_stops_nobody(
    message: bytes, tmp_path: Path
) -> None:
    with serving(tmp_path) as server, ExitStack() as stack:
        for path in METHODS[-3:]:
            client = stack.enter_context(Http2Client(server.target))
            number = client.begin(path)
            client.send(number, message)
            client.read_until(b"grpc-status")


def test_an_idle_call_costs_no_thread(tmp_path: Path) -> None:
    with serving(tmp_path) as server, ExitStack() as stack:
        stack.enter_context(open_session(server.target))
        threads_count = process_resources(server.process.pid).threads_count
        for _ in range(40):
            stack.enter_context(open_session(server.target))

        assert process_resources(server.process.pid).threads_count <= threads_count + 16
