"""What a hostile client does with tensors that stay takes nobody's time, memory or share away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from deconvd.direct.events import MethodCode
from deconvd.errors import ExhaustedError
from deconvd.model.dtypes import Array
from deconvd.model.problem import spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.grpc_status import error_from_rpc
from deconvd.wire.tensor import message_from_spec
from deconvd_server.residents.quotas import counted_bytes, names_limit
from tests.direct_calls import open_stream, send_call
from tests.processes import memory_bytes, wait_until
from tests.servers import ServerProcess, server_process
from tests.session_clients import (
    SessionClient,
    open_session,
    raw_tensor,
    remember_stream,
    tensor_by_digest,
    tensor_by_handle,
)

pytestmark = pytest.mark.usefixtures("unmeasured")

MIB = 1 << 20
ONE = np.ones((1, 1, 1, 1), np.float32)
ONE_BYTES = counted_bytes(spec_of(ONE))
LONGEST_S = 3.0
"""What an honest client's small call, and health, may take beside whatever others do, on a busy machine."""

LONGEST_PER_TENSOR_S = 5e-4
"""What each tensor that makes room may take: some ten times what it does. It must not grow with their number."""


def image(value: float, size_bytes: int = MIB) -> Array:
    return np.full((size_bytes // MIB, 1, 512, 512), value, np.float32)


def keep_ones(held: SessionClient, count: int) -> None:
    """Keep tensors of one number, four by each call."""
    request = pb.DeconvolveRequest(
        x=raw_tensor(ONE),
        w=raw_tensor(ONE),
        b=raw_tensor(ONE.reshape(1)),
        session=held.session,
        keep=pb.OperandsToKeep(x=True, w=True, b=True),
        keep_y=True,
        waits=True,  # 32 at once are more than a busy server answers soon
    )
    calls_count, at_once = count // 4, 32
    for start in range(0, calls_count, at_once):
        calls = [
            held.stub.Deconvolve.future(request) for _ in range(min(at_once, calls_count - start))
        ]
        for call in calls:
            call.result()
        held.send_heartbeat()


def check_health(held: SessionClient) -> None:
    check: Any = held.channel.unary_unary("/grpc.health.v1.Health/Check")
    assert check(b"") == b"\x08\x01"  # SERVING


@contextmanager
def honest_client(target: str) -> Iterator[list[float]]:
    """Let a client put, use and drop a small tensor, and ask for health, over and over for the block.

    Yields what each of its steps took, in seconds: complete after the block.
    """
    took: list[float] = []
    done = threading.Event()

    def timed(step: Callable[..., Any], *args: Any) -> Any:
        begin_s = time.monotonic()
        result = step(*args)
        took.append(time.monotonic() - begin_s)
        return result

    def live() -> None:
        with open_session(target) as held:
            while not done.is_set():
                handle = timed(held.put, ONE)
                request = pb.DeconvolveRequest(
                    x=tensor_by_handle(ONE, handle),
                    w=raw_tensor(ONE),
                    session=held.session,
                    waits=True,
                )
                timed(held.stub.Deconvolve, request)
                timed(check_health, held)
                timed(held.drop, handle)
                held.send_heartbeat()

    with ThreadPoolExecutor(1) as pool:
        living = pool.submit(live)
        try:
            yield took
        finally:
            done.set()
        living.result()


@pytest.mark.parametrize("count", [8192, pytest.param(65536, marks=pytest.mark.slow)])
def test_room_among_many_tensors_is_made_while_others_go_on(
    socket_directory: Path, count: int
) -> None:
    limit_bytes = count * ONE_BYTES + MIB
    with server_process(socket_directory, "--resident-memory-bytes", str(limit_bytes)) as server:
        with open_session(server.target) as held:
            keep_ones(held, count)
            assert held.resident_count() >= count
            with honest_client(server.target) as took:
                large = np.zeros((1, 1, 1, (limit_bytes - MIB) // 4), np.float32)
                begin_s = time.monotonic()
                handle = held.put(large)  # for which nearly all must go
                made_s = time.monotonic() - begin_s
                held.send_heartbeat()
                held.get(handle)
            assert made_s < count * LONGEST_PER_TENSOR_S
            assert max(took) < LONGEST_S


@pytest.mark.parametrize("count", [8192, pytest.param(65536, marks=pytest.mark.slow)])
def test_what_many_tensors_leave_behind_is_cleared_while_others_go_on(
    socket_directory: Path, count: int
) -> None:
    limit_bytes = count * ONE_BYTES + 2 * MIB
    with server_process(socket_directory, "--resident-memory-bytes", str(limit_bytes)) as server:
        with open_session(server.target) as held:
            keep_ones(held, count)
            # opened last, as its lease may end while so many tensors are kept
            watching = open_session(server.target)
            with watching as watcher, honest_client(server.target) as took:
                held.close()
                watcher.put(np.zeros((1, 1, 1, (limit_bytes - MIB) // 4), np.float32))
            assert max(took) < LONGEST_S


def test_the_smallest_tensors_take_no_more_than_they_count_for(socket_directory: Path) -> None:
    count = 16384
    limit_bytes = count * ONE_BYTES + MIB
    with server_process(socket_directory, "--resident-memory-bytes", str(limit_bytes)) as server:
        with open_session(server.target) as held:
            keep_ones(held, 256)  # what all calls need is there
            before_bytes = memory_bytes(server.process.pid)
            keep_ones(held, count - 256)
            grown_bytes = memory_bytes(server.process.pid) - before_bytes
            assert held.resident_count() >= count
            assert grown_bytes <= held.resident_bytes()


def test_a_tensor_has_only_so_many_handles(server: ServerProcess) -> None:
    with open_session(server.target) as held:
        # so that the server has it for its digest
        list(held.stub.DeconvolveStream(remember_stream(held.session, ONE, ONE)))
        request = pb.DeconvolveRequest(
            x=raw_tensor(ONE),
            w=tensor_by_digest(ONE),
            session=held.session,
            keep=pb.OperandsToKeep(w=True),
        )
        for _ in range(names_limit(spec_of(ONE))):
            held.stub.Deconvolve(request)

        with pytest.raises(grpc.RpcError, match="handles at once: drop some") as failure:
            held.stub.Deconvolve(request)

        assert isinstance(error_from_rpc(failure.value), ExhaustedError)


@pytest.fixture
def small(socket_directory: Path) -> Iterator[ServerProcess]:
    """A server that keeps 64 MiB, and all of whose ways are open."""
    options = "--resident-memory-bytes", str(64 * MIB)
    with server_process(socket_directory, *options, listen=("unix", "127.0.0.1:0")) as running:
        yield running


def read_nothing(
    server: ServerProcess, held: SessionClient, handle: bytes, way: str
) -> Callable[[], object]:
    """Ask for a tensor and do not take it; return what ends that."""
    request = pb.GetTensorRequest(session=held.session, resident=pb.Resident(handle=handle))
    if way == "grpc":
        responses = held.stub.GetTensor(request)
        next(responses)  # so the server is at it
        return responses.cancel
    line = open_stream(server)
    send_call(line, MethodCode.GetTensor, request.SerializeToString(), timeout_s=600)
    line.next_event()
    return line.close


def write_nothing(held: SessionClient, size_bytes: int) -> Callable[[], object]:
    """Begin to put a tensor and send none of it; return what ends that."""
    header = pb.PutTensorHeader(
        session=held.session, tensor=message_from_spec(spec_of(image(0, size_bytes)))
    )
    ended = threading.Event()

    def parts() -> Iterator[pb.PutTensorRequest]:
        yield pb.PutTensorRequest(header=header)
        ended.wait()

    call = held.stub.PutTensor.future(parts())

    def end() -> None:
        ended.set()
        call.cancel()

    return end


@pytest.mark.parametrize("way", ["grpc", "direct"])
def test_tensors_that_nobody_reads_keep_no_tenant_from_its_share(
    small: ServerProcess, way: str
) -> None:
    with (
        open_session(small.target) as greedy,
        open_session(small.target) as modest,
        ExitStack() as stack,
    ):
        for number in range(5):
            handle = greedy.put(image(number, 12 * MIB))
            stack.callback(read_nothing(small, greedy, handle, way))

        begin_s = time.monotonic()
        handles = [modest.put(image(number, 8 * MIB)) for number in range(4)]
        assert time.monotonic() - begin_s < 20

        for number, handle in enumerate(handles):
            np.testing.assert_array_equal(modest.get(handle), image(number, 8 * MIB))


def test_tensors_that_never_come_keep_no_tenant_from_its_share(small: ServerProcess) -> None:
    with (
        open_session(small.target) as greedy,
        open_session(small.target) as modest,
        ExitStack() as stack,
    ):
        for _ in range(5):
            stack.callback(write_nothing(greedy, 12 * MIB))
        wait_until(lambda: greedy.resident_count() == 5)

        modest.put(image(1, 32 * MIB))


@pytest.mark.parametrize("way", ["grpc", "direct"])
def test_tensors_of_streams_that_wait_keep_no_tenant_from_its_share(
    small: ServerProcess, way: str
) -> None:
    with (
        open_session(small.target) as greedy,
        open_session(small.target) as modest,
        ExitStack() as stack,
    ):
        for number in range(5):
            stack.callback(stream_nothing(small, greedy, image(number, 12 * MIB), way))

        handles = [modest.put(image(number, 8 * MIB)) for number in range(4)]

        for number, handle in enumerate(handles):
            np.testing.assert_array_equal(modest.get(handle), image(number, 8 * MIB))


def stream_nothing(
    server: ServerProcess, held: SessionClient, x: Array, way: str
) -> Callable[[], object]:
    """Begin a stream with an x that is kept and a W that never comes; return what ends that."""
    request = pb.DeconvolveRequest(
        x=tensor_by_handle(x, held.put(x)), w=message_from_spec(spec_of(ONE)), session=held.session
    )
    header = pb.DeconvolveStreamRequest(
        header=pb.DeconvolveStreamHeader(request=request, slice_samples_count=1)
    )
    if way == "direct":
        line = open_stream(server)
        send_call(line, MethodCode.DeconvolveStream, header.SerializeToString(), timeout_s=600)
        line.next_event()  # so the server has x
        return line.close
    ended = threading.Event()

    def parts() -> Iterator[pb.DeconvolveStreamRequest]:
        yield header
        ended.wait()

    responses = held.stub.DeconvolveStream(parts())
    next(responses)

    def end() -> None:
        ended.set()
        responses.cancel()

    return end
