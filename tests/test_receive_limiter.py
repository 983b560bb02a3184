"""What gRPC holds of messages that are not admitted yet is bounded, in real cgroups: the server lives, others go on."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd_client import Connection, connect
from deconvd_server.transports.grpc.receive_limiter import ReceiveLimiter
from tests.cgroups import Cgroup, cgroup
from tests.processes import wait_until
from tests.servers import ServerProcess, server_process
from tests.soak.hostile.http2 import HEALTH, REFLECTION, SERVICE, Http2
from tests.soak.hostile.requests import of_a_huge_kernel, of_one_pixel, stream_of, tensor

MEMORY_BYTES = 600_000_000
MESSAGE_BYTES = 60_000_000
HOSTILE = "127.0.0.3"
HEALTH_S = 5.0

X = np.ones((1, 8, 16, 16), np.float32)
W = np.ones((8, 4, 4, 4), np.float32)

HELD = pb.HoldSessionRequest().SerializeToString()
WATCHED = health_pb2.HealthCheckRequest().SerializeToString()
STREAMED = stream_of(pb.DeconvolveRequest(x=tensor((64, 1, 512, 512)), w=tensor((1, 1, 3, 3))))
ANNOUNCED_BYTES = 50_000_000
ANNOUNCED = stream_of(of_one_pixel(None, side=2500))
SLOW = of_a_huge_kernel().SerializeToString()

WAYS: dict[str, tuple[str, bytes | None]] = {
    "first message": (f"{SERVICE}Deconvolve", None),
    "first of a session": (f"{SERVICE}HoldSession", None),
    "health": (f"{HEALTH}Check", None),
    "reflection": (REFLECTION, None),
    "later message of a stream": (f"{SERVICE}DeconvolveStream", STREAMED),
    "later message of a session": (f"{SERVICE}HoldSession", HELD),
    "behind the only message": (f"{SERVICE}DeconvolveGrad", SLOW),
    "behind that of a watch": (f"{HEALTH}Watch", WATCHED),
}
"""Methods, and the messages that are sent whole before one that is not."""


@dataclass
class Serving:
    server: ServerProcess
    group: Cgroup

    def assert_lives(self) -> None:
        assert self.server.process.poll() is None, self.server.log.read_text()
        assert self.group.kills_count == 0
        with connect(self.server.target, transport="grpc", timeout_s=10) as F:
            assert F.deconvolution_2d(X, W).shape == (1, 4, 19, 19)


@contextmanager
def serving(directory: Path) -> Iterator[Serving]:
    with (
        cgroup(memory_bytes=MEMORY_BYTES) as group,
        server_process(directory, listen=("127.0.0.1:0",), within=group) as server,
    ):
        serving = Serving(server, group)
        yield serving
        serving.assert_lives()


def hostile_connection(target: str) -> socket.socket:
    port = int(target.rpartition(":")[2])
    connection = socket.create_connection(("127.0.0.1", port), source_address=(HOSTILE, 0))
    connection.settimeout(2)
    return connection


def half_messages(stack: ExitStack, target: str, path: str, before: bytes | None) -> None:
    """Make eight calls on one connection, each with a message that lacks its last byte."""
    client = stack.enter_context(Http2(hostile_connection(target)))
    with suppress(OSError):  # what the server does to it
        for _ in range(8):
            stream = client.begin(path)
            if before is not None:
                client.send(stream, before)
            client.send(stream, bytes(MESSAGE_BYTES), lacking_bytes=1)


def assert_healthy(channel: grpc.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    stub.Check(health_pb2.HealthCheckRequest(), timeout=HEALTH_S)


@pytest.mark.parametrize(("path", "before"), WAYS.values(), ids=WAYS)
def test_half_messages_take_little_memory_and_nothing_from_others(
    path: str, before: bytes | None, tmp_path: Path
) -> None:
    with serving(tmp_path) as here, ExitStack() as stack:
        target = here.server.target
        threads = stack.enter_context(ThreadPoolExecutor(8))
        channel = stack.enter_context(grpc.insecure_channel(target))
        F = stack.enter_context(connect(target, transport="grpc", timeout_s=10))
        attacks = [threads.submit(half_messages, stack, target, path, before) for _ in range(8)]
        is_first = True
        while is_first or not all(attack.done() for attack in attacks):
            is_first = False
            assert F.deconvolution_2d(X, W).shape == (1, 4, 19, 19)
            assert_healthy(channel)
        for attack in attacks:
            attack.result()


def large_calls(target: str, count: int) -> Counter[str]:
    """Make so many calls of 46 MiB at once, on eight connections; return how they ended."""
    request = pb.DeconvolveRequest(
        x=tensor((1, 1, 3072, 3925), bytes(3072 * 3925 * 4)), w=tensor((1, 1, 1, 1), bytes(4))
    )
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    options.append(("grpc.use_local_subchannel_pool", 1))
    with ExitStack() as stack:
        channels = [stack.enter_context(grpc.insecure_channel(target, options)) for _ in range(8)]
        stubs: list[Any] = [pb_grpc.DeconvolutionServiceStub(channel) for channel in channels]
        calls = [stubs[i % 8].Deconvolve.future(request, timeout=90) for i in range(count)]
        return Counter(call.code().name for call in calls)


@pytest.mark.parametrize("count", [20, pytest.param(80, marks=pytest.mark.slow)])
def test_many_large_messages_at_once_end_in_answers_or_refusals(count: int, tmp_path: Path) -> None:
    with serving(tmp_path) as here:
        ends = large_calls(here.server.target, count)

    assert ends.total() == count
    # CANCELLED: gRPC resets the stream of a call that is refused, and on a busy machine that overtakes its status
    assert ends.keys() <= {"OK", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"}


def test_a_large_message_alone_is_served(tmp_path: Path) -> None:
    """Though gRPC, its copy and its answer take four times as much for a moment."""
    with serving(tmp_path) as here:
        x = np.ones((1, 1, 3072, 1024), np.float32)
        with connect(here.server.target, transport="grpc") as F:
            for _ in range(5):
                assert F.deconvolution_2d(x, W[:1, :1, :1, :1]).shape == x.shape

        assert "not admitted yet" not in here.server.log.read_text()


def test_a_proxy_with_many_small_calls_at_once_notices_nothing(tmp_path: Path) -> None:
    """Of one peer 72 may wait for the processor, and these say that they would."""
    path, before = WAYS["first message"]
    x, w = tensor(X.shape, X.tobytes()), tensor(W.shape, W.tobytes())
    request = pb.DeconvolveRequest(x=x, w=w, waits=True)
    with serving(tmp_path) as here, ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(8))
        channel = stack.enter_context(grpc.insecure_channel(here.server.target))
        stub: Any = pb_grpc.DeconvolutionServiceStub(channel)
        attacks = [
            threads.submit(half_messages, stack, here.server.target, path, before) for _ in range(8)
        ]
        until_s = time.monotonic() + 3
        while time.monotonic() < until_s:
            calls = [stub.Deconvolve.future(request, timeout=10) for _ in range(64)]
            for call in calls:
                assert call.code() is grpc.StatusCode.OK, call.details()
        for attack in attacks:
            attack.result()


def test_eight_who_stream_at_once_are_served(tmp_path: Path) -> None:
    x, w = np.ones((16, 1, 512, 512), np.float32), np.ones((1, 1, 1, 1), np.float32)
    with serving(tmp_path) as here, ThreadPoolExecutor(8) as threads:

        def stream(_number: int) -> bool:
            with connect(here.server.target, transport="grpc", timeout_s=60) as F:
                return bool((F.deconvolution_2d(x, w) == x).all())

        assert all(threads.map(stream, range(8)))


def test_small_answers_that_nobody_reads_count_as_well(tmp_path: Path) -> None:
    """No budget knows of calls for health, and each unread one takes some kilobytes until its client goes."""
    constants = {"deconvd_server.transports.grpc.server:STALL_LIMIT_S": 600.0}  # not for their age
    with (
        cgroup(memory_bytes=340_000_000) as group,
        server_process(
            tmp_path, listen=("127.0.0.1:0",), within=group, constants=constants
        ) as server,
        ExitStack() as stack,
    ):
        channel = stack.enter_context(grpc.insecure_channel(server.target))
        clients = []
        for _ in range(40):
            connection = hostile_connection(server.target)
            connection.settimeout(60)
            clients.append(stack.enter_context(Http2(connection, answer_bytes=0)))
            numbers = [clients[-1].call(f"{HEALTH}Check", b"") for _ in range(500)]
            assert_healthy(channel)  # so they have been answered, too

        clients[0].wait_for_reset(numbers[0])


def streams_bytes(F: Connection) -> int:
    counts = F.server_info().counts
    assert counts is not None
    return next(use.used_bytes for use in counts.memory if use.name == "streams")


def test_what_budgets_count_before_it_is_allocated_is_taken_from_nobody_later(
    tmp_path: Path,
) -> None:
    """Streams that announce much and send nothing do not lower what the process is thought to take at rest."""
    x, w = np.ones((1, 8, 1024, 512), np.float32), np.ones((8, 1, 1, 1), np.float32)
    without_pools = {"deconvd_server.backend:_POOLS_COUNT": 0}
    with (
        cgroup(memory_bytes=MEMORY_BYTES) as group,
        server_process(
            tmp_path, listen=("127.0.0.1:0",), within=group, constants=without_pools
        ) as server,
        connect(server.target, transport="grpc", timeout_s=20) as F,
    ):
        with ExitStack() as stack:
            attacker = stack.enter_context(Http2(hostile_connection(server.target)))
            for _ in range(8):
                attacker.call(f"{SERVICE}DeconvolveStream", ANNOUNCED, is_last=False)
            wait_until(lambda: streams_bytes(F) > ANNOUNCED_BYTES)
            until_s = time.monotonic() + 1  # it is measured several times meanwhile
            while time.monotonic() < until_s:
                F.deconvolution_2d(X, W)
        wait_until(lambda: streams_bytes(F) == 0)
        for _ in range(8):
            np.testing.assert_array_equal(F.deconvolution_2d(x, w), x.sum(axis=1, keepdims=True))

        assert "not admitted yet" not in server.log.read_text()


def test_a_check_without_memory_is_followed_by_one_check_as_any_other() -> None:
    """What raises MemoryError when it is due is run again: with two checks then, there would be more each time."""
    due: list[Callable[[], None]] = []
    limiter = ReceiveLimiter((), 1 << 20, lambda _delay_s, work: due.append(work), lambda: None)

    def fail() -> int:
        raise MemoryError

    limiter.set_accounting(lambda: 0, 0)
    limiter._budgeted_bytes = fail
    limiter.check()

    assert due == [limiter.check]
