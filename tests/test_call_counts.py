"""What a server counts of its calls, by real calls over each transport, and by threads that count at the same time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

import deconvd_client
from deconvd.model.operation import DECONVOLVE
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1.deconvd_pb2_grpc import DeconvolutionServiceStub
from deconvd.wire.server_counts import BUCKETS_COUNT, MethodCounts, ServerCounts
from deconvd.wire.tensor import message_from_array
from deconvd_client import Connection
from deconvd_server.call.context import CallContext
from deconvd_server.call.counts import CallCounts
from deconvd_server.call.ledger import Stage
from tests.direct_calls import target_of
from tests.fault_proxy import Direction, Fault, LinkConditions, faulty_proxy
from tests.processes import wait_until
from tests.servers import ServerProcess, server_process
from tests.striped_calls import StripedClient
from tests.striped_clients import (
    LARGE,
    SMALL_PIECES,
    TWICE,
    force_stripes,
    shrink_pieces,
)

pytestmark = pytest.mark.usefixtures("patient")

X = np.ones(
    (1, 2, 64, 64), np.float32
)  # 32 KiB: enough for shared memory, and not too much for a message
W = np.ones((2, 3, 2, 2), np.float32)
Y_BYTES = 3 * 65 * 65 * 4
MIB = 1 << 20
THREADS_COUNT = 8
HASTY_CALLS_COUNT = 60
"""So many that a race is lost in at least one of them."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("server")
    listen = ("unix", "127.0.0.1:0")
    with server_process(directory, listen=listen, constants=SMALL_PIECES) as running:
        yield running


@pytest.fixture
def observer(server: ServerProcess) -> Iterator[Connection]:
    """A connection that makes no calls but GetServerInfo."""
    with deconvd_client.connect(server.target, transport="grpc") as F:
        yield F


def counts_of(F: Connection) -> ServerCounts:
    counts = F.server_info().counts
    assert counts is not None
    return counts


def method_counts(F: Connection, method: str, transport: str) -> MethodCounts:
    for each in counts_of(F).methods:
        if (each.method, each.transport) == (method, transport):
            return each
    return MethodCounts(method, transport, {}, 0, 0, 0)


def settled_counts(F: Connection, method: str, transport: str) -> MethodCounts:
    """Return the counts once no call is under way: a call ends after its last byte has left."""
    wait_until(lambda: not method_counts(F, method, transport).running_count)
    return method_counts(F, method, transport)


def ended_count(counts: MethodCounts, status: str = "OK") -> int:
    return counts.ended.get(status, 0)


def stage_count(counts: ServerCounts, stage: str) -> int:
    return sum(each.count for each in counts.stages if each.stage == stage)


class _SlowlyHashed(str):
    """A text that lets other threads run whenever a dict looks it up: also between a count's reading and writing."""

    __slots__ = ()

    def __hash__(self) -> int:
        for _ in range(500):
            pass  # the interpreter may change threads here
        return super().__hash__()


def test_threads_that_count_at_the_same_time_lose_nothing() -> None:
    counts, rounds_count = CallCounts(), 500
    start = threading.Barrier(THREADS_COUNT)

    def count(number: int) -> None:
        start.wait()
        for _ in range(rounds_count):
            call = CallContext(transport="tcp")
            counts.begin("Deconvolve", call)
            call.received_bytes, call.sent_bytes = 3, 5
            call.ledger.times_us[Stage.COMPUTE] = number
            counts.end("Deconvolve", call, _SlowlyHashed("OK" if number % 2 else "CANCELLED"), None)

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(THREADS_COUNT) as threads:
            list(threads.map(count, range(THREADS_COUNT)))
    finally:
        sys.setswitchinterval(interval_s)

    half, calls_count = THREADS_COUNT * rounds_count // 2, THREADS_COUNT * rounds_count
    assert counts.methods() == [
        MethodCounts(
            method="Deconvolve",
            transport="tcp",
            ended={"CANCELLED": half, "OK": half},
            running_count=0,
            received_bytes=3 * calls_count,
            sent_bytes=5 * calls_count,
        )
    ]
    (compute,) = (each for each in counts.stages() if each.stage == "compute")
    assert compute.count == sum(compute.counts) == calls_count
    assert compute.total_us == rounds_count * sum(range(THREADS_COUNT))
    assert compute.counts == tuple(rounds_count * n for n in (1, 1, 2, 4))  # 0, 1, 2 and 3, 4 to 7


@pytest.mark.parametrize(
    ("time_us", "bucket"),
    [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), ((1 << 26) - 1, 26), (1 << 26, 27), (10**12, 27)],
)
def test_a_time_is_in_the_first_bucket_whose_bound_is_more(time_us: int, bucket: int) -> None:
    counts, call = CallCounts(), CallContext()
    call.ledger.times_us[Stage.UPLOAD] = time_us

    counts.begin("Deconvolve", call)
    counts.end("Deconvolve", call, "OK", None)

    (upload,) = (each for each in counts.stages() if each.stage == "upload")
    assert upload.counts == (0,) * bucket + (1,)
    assert len(upload.counts) <= BUCKETS_COUNT
    assert upload.total_us == time_us


def count_calls(counts: CallCounts, *identities: str) -> None:
    for identity in identities:
        call = CallContext(identity=identity, transport="tcp")
        call.received_bytes, call.ledger.times_us[Stage.COMPUTE] = 3, 1
        counts.begin("Deconvolve", call)
        counts.end("Deconvolve", call, "OK", None)


def calls_by_tenant(counts: CallCounts) -> dict[str, int]:
    return {
        tenant: sum(each.ended.get("OK", 0) for each in methods)
        for tenant, methods in counts.methods_by_tenant().items()
    }


def test_the_first_identities_have_names_of_their_own_and_all_others_have_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deconvd_server.call.counts._TENANTS_COUNT", 2)
    counts = CallCounts()

    count_calls(counts, "alice", "", "bob", "alice", "carol", "dave", "carol", "other")

    by_tenant = {"": 1, "alice": 2, "bob": 1, "other": 4}
    assert calls_by_tenant(counts) == by_tenant
    assert [each.received_bytes for each in counts.methods_by_tenant()["other"]] == [12]
    own = {name: [each.ended for each in counts.methods(name)] for name in ("bob", "carol", "eve")}
    assert own == {"bob": [{"OK": 1}], "carol": [{"OK": 2}], "eve": []}
    assert [each.ended for each in counts.methods("other")] == [{"OK": 1}]
    assert [each.ended for each in counts.methods()] == [{"OK": 8}]
    assert [each.count for each in counts.stages() if each.stage == "compute"] == [8]


def test_of_too_many_others_the_one_that_called_first_begins_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deconvd_server.call.counts._TENANTS_COUNT", 0)
    monkeypatch.setattr("deconvd_server.call.counts._PASSING_COUNT", 2)
    counts = CallCounts()

    count_calls(counts, "alice", "bob", "alice", "carol")

    ended = {name: [each.ended for each in counts.methods(name)] for name in ("alice", "bob", "")}
    assert ended == {"alice": [{"OK": 2}], "bob": [], "": [{"OK": 4}]}
    assert calls_by_tenant(counts) == {"": 0, "other": 4}


def test_what_a_running_call_has_sent_never_changes_its_tenant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deconvd_server.call.counts._TENANTS_COUNT", 1)
    counts = CallCounts()
    calls = [CallContext(identity=name, transport="tcp") for name in ("alice", "bob")]
    for call in calls:
        counts.begin("Deconvolve", call)
        call.received_bytes = 5

    running = counts.methods_by_tenant()
    for call in reversed(calls):
        counts.end("Deconvolve", call, "OK", None)

    received = {
        tenant: [each.received_bytes for each in methods] for tenant, methods in running.items()
    }
    assert received == {"": [], "alice": [5], "other": [5]}
    assert calls_by_tenant(counts) == {"": 0, "alice": 1, "other": 1}


def test_the_stages_of_a_call_that_needed_no_device_do_not_count() -> None:
    counts, call = CallCounts(), CallContext()

    counts.begin("HoldSession", call)
    counts.end("HoldSession", call, "OK", None)

    assert counts.stages() == []


@pytest.mark.parametrize("transport", ["shared_memory", "unix", "tcp", "grpc"])
def test_calls_and_bytes_are_counted_by_method_and_transport(
    server: ServerProcess, observer: Connection, transport: str
) -> None:
    target = target_of(server, transport)
    with deconvd_client.connect(target, transport=transport) as F:
        F.deconvolution_2d(X, W)
        before = settled_counts(observer, "Deconvolve", transport)
        all_before = counts_of(observer)
        for _ in range(3):
            y = F.deconvolution_2d(X, W)
        grad_before = method_counts(observer, "DeconvolveGrad", transport)
        F.deconvolution_2d_grad(X, W, None, y, wanted=["gx"])

    after = settled_counts(observer, "Deconvolve", transport)
    grad_after = settled_counts(observer, "DeconvolveGrad", transport)
    all_after = counts_of(observer)
    assert ended_count(after) - ended_count(before) == 3
    assert ended_count(grad_after) - ended_count(grad_before) == 1
    assert after.received_bytes - before.received_bytes == 3 * (X.nbytes + W.nbytes)
    assert after.sent_bytes - before.sent_bytes == 3 * Y_BYTES
    assert grad_after.received_bytes - grad_before.received_bytes == Y_BYTES + W.nbytes
    assert grad_after.sent_bytes - grad_before.sent_bytes == X.nbytes
    for stage in ("queue", "compute", "server"):
        assert stage_count(all_after, stage) - stage_count(all_before, stage) == 4


@pytest.mark.parametrize("transport", ["tcp", "grpc"])
def test_a_stream_is_counted_as_one_call_with_all_its_bytes(
    server: ServerProcess,
    observer: Connection,
    monkeypatch: pytest.MonkeyPatch,
    transport: str,
) -> None:
    force_stripes(monkeypatch, 0)
    before = method_counts(observer, "DeconvolveStream", transport)

    with deconvd_client.connect(server.targets[1], transport=transport) as F:
        F.deconvolution_2d(LARGE, TWICE)

    after = settled_counts(observer, "DeconvolveStream", transport)
    assert ended_count(after) - ended_count(before) == 1
    assert after.received_bytes - before.received_bytes == LARGE.nbytes + TWICE.nbytes
    assert after.sent_bytes - before.sent_bytes == LARGE.nbytes


def test_a_striped_call_is_counted_as_one_call(
    server: ServerProcess, observer: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink_pieces(monkeypatch)
    force_stripes(monkeypatch, 2)
    before = method_counts(observer, "Deconvolve", "tcp")
    with deconvd_client.connect(server.targets[1], transport="tcp") as F:
        F.deconvolution_2d(LARGE, TWICE)

    after = settled_counts(observer, "Deconvolve", "tcp")
    assert ended_count(after) - ended_count(before) == 1
    assert after.received_bytes - before.received_bytes == LARGE.nbytes + TWICE.nbytes
    assert after.sent_bytes - before.sent_bytes == LARGE.nbytes


def close_control(client: StripedClient) -> None:
    client.control.close()


def close_a_stripe(client: StripedClient) -> None:
    client.stripes[0].close()


@pytest.mark.parametrize("go", [StripedClient.close, close_control, close_a_stripe])
def test_a_striped_call_has_succeeded_once_its_client_has_everything_however_soon_it_goes(
    server: ServerProcess, observer: Connection, go: Callable[[StripedClient], None]
) -> None:
    """The server's threads may learn that the client has gone before they know that everything was sent."""
    port, operands = observer.server_info().direct_port, {"w": W, "x": X}
    before = settled_counts(observer, "Deconvolve", "tcp")

    for _ in range(HASTY_CALLS_COUNT):
        client = StripedClient(port)
        client.compute(DECONVOLVE, operands)
        go(client)
        after = settled_counts(observer, "Deconvolve", "tcp")
        client.close()

    ok_count = before.ended.get("OK", 0) + HASTY_CALLS_COUNT
    assert after.ended == {**before.ended, "OK": ok_count}
    assert after.sent_bytes - before.sent_bytes == HASTY_CALLS_COUNT * Y_BYTES


@pytest.mark.parametrize(
    ("transport", "method", "samples_count"),
    [("tcp", "Deconvolve", 1), ("tcp", "DeconvolveStream", 8), ("grpc", "Deconvolve", 1)],
)
def test_a_call_has_succeeded_once_its_client_has_its_answer_however_soon_it_goes(
    server: ServerProcess,
    observer: Connection,
    monkeypatch: pytest.MonkeyPatch,
    transport: str,
    method: str,
    samples_count: int,
) -> None:
    force_stripes(monkeypatch, 0)
    x = np.tile(X, (samples_count, 1, 1, 1))
    before = settled_counts(observer, method, transport)

    for _ in range(HASTY_CALLS_COUNT // 4):
        with deconvd_client.connect(server.targets[1], transport=transport) as F:
            F.deconvolution_2d(x, W)

    after = settled_counts(observer, method, transport)
    assert ended_count(after) - ended_count(before) == HASTY_CALLS_COUNT // 4
    assert after.ended == {**before.ended, "OK": ended_count(after)}


@pytest.mark.parametrize("transport", ["shared_memory", "grpc"])
def test_residents_travel_once(server: ServerProcess, observer: Connection, transport: str) -> None:
    before = method_counts(observer, "PutTensor", transport)
    fetched_before = method_counts(observer, "GetTensor", transport)
    called_before = method_counts(observer, "Deconvolve", transport)

    with deconvd_client.connect(server.target, transport=transport) as F:
        with F.put(X) as x:
            F.deconvolution_2d(x, W)
            x.numpy()
        sessions_count = counts_of(F).sessions_count

    put = settled_counts(observer, "PutTensor", transport)
    fetched = settled_counts(observer, "GetTensor", transport)
    called = settled_counts(observer, "Deconvolve", transport)
    assert put.received_bytes - before.received_bytes == X.nbytes
    assert fetched.sent_bytes - fetched_before.sent_bytes == X.nbytes
    assert called.received_bytes - called_before.received_bytes == W.nbytes
    assert sessions_count == 1


def test_failures_are_counted_by_their_status(server: ServerProcess, observer: Connection) -> None:
    before = method_counts(observer, "Deconvolve", "grpc")

    with grpc.insecure_channel(server.targets[1]) as channel:
        stub = DeconvolutionServiceStub(channel)
        for _ in range(2):
            with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):
                stub.Deconvolve(pb.DeconvolveRequest())

    after = settled_counts(observer, "Deconvolve", "grpc")
    status = "INVALID_ARGUMENT"
    assert ended_count(after, status) - ended_count(before, status) == 2
    assert ended_count(after) == ended_count(before)


def test_a_call_that_runs_is_counted_with_its_bytes_so_far_and_again_once_it_has_ended(
    server: ServerProcess, observer: Connection
) -> None:
    name = "DeconvolveStream"
    before = method_counts(observer, name, "grpc")
    hung = LinkConditions(fault=Fault.HANG, direction=Direction.DOWN, after_bytes=LARGE.nbytes // 4)

    with (
        faulty_proxy(server.targets[1], hung) as proxy,
        deconvd_client.connect(proxy.target, transport="grpc") as F,
    ):
        future = F.submit(F.deconvolution_2d, LARGE, TWICE)
        wait_until(lambda: proxy.faults_count > 0)
        running = method_counts(observer, name, "grpc")
        streams_count = counts_of(observer).running_streams_count
        future.cancel()

    assert running.running_count == 1
    assert streams_count == 1
    assert running.ended == before.ended
    assert LARGE.nbytes // 4 <= running.sent_bytes - before.sent_bytes <= LARGE.nbytes
    after = settled_counts(observer, name, "grpc")
    assert ended_count(after, "CANCELLED") - ended_count(before, "CANCELLED") == 1
    assert after.sent_bytes >= running.sent_bytes


def test_eight_clients_at_the_same_time_are_all_counted(
    server: ServerProcess, observer: Connection
) -> None:
    rounds_count = 40
    x, w = np.ones((1, 1, 3, 3), np.float32), np.ones((1, 1, 1, 1), np.float32)
    # a direct connection that is opened too late on a busy machine leaves its call to gRPC
    ways = ("unix", "grpc")
    before = [method_counts(observer, "Deconvolve", way) for way in ways]
    all_before = counts_of(observer)

    def call_often(_number: int) -> None:
        with deconvd_client.connect(server.target, transport="unix") as F:
            for _ in range(rounds_count):
                F.deconvolution_2d(x, w)

    with ThreadPoolExecutor(THREADS_COUNT) as threads:
        list(threads.map(call_often, range(THREADS_COUNT)))

    calls_count = THREADS_COUNT * rounds_count
    after = [settled_counts(observer, "Deconvolve", way) for way in ways]
    all_after = counts_of(observer)

    def grown(count: Callable[[MethodCounts], int]) -> int:
        return sum(map(count, after)) - sum(map(count, before))

    assert grown(ended_count) == calls_count
    assert grown(lambda counts: counts.received_bytes) == calls_count * (x.nbytes + w.nbytes)
    assert grown(lambda counts: counts.sent_bytes) == calls_count * x.nbytes
    assert stage_count(all_after, "server") - stage_count(all_before, "server") == calls_count


def test_what_is_in_use_is_told(server: ServerProcess, observer: Connection) -> None:
    (device_before,) = observer.server_info().devices

    with deconvd_client.connect(server.target, transport="shared_memory") as F:

        def is_direct() -> bool:  # on a busy machine the first calls may go by gRPC
            F.deconvolution_2d(X, W)
            return counts_of(F).direct_connections_count == 1

        wait_until(is_direct)
        counts, (device,) = counts_of(F), F.server_info().devices

    used = {each.name: each.used_bytes for each in counts.memory}
    assert used.keys() == {"messages", "streams", "pools", "shared memory", "process"}
    assert used["shared memory"] >= X.nbytes
    assert used["process"] > 10 * MIB
    assert all(each.used_bytes <= each.limit_bytes for each in counts.memory)
    assert counts.borrowers_count == 1
    assert counts.direct_connections_count == 1
    assert 0 < device.busy_us - device_before.busy_us < counts.uptime_us


def test_calls_that_find_no_place_are_counted_as_refused(socket_directory: Path) -> None:
    handlers = "deconvd_server.transports.grpc.handlers"
    constants = {f"{handlers}:CALLS_COUNT": 2, f"{handlers}:_RESERVED_CALLS_COUNT": 0}
    header = pb.DeconvolveStreamHeader(
        request=pb.DeconvolveRequest(x=_described(X), w=_described(W)), slice_samples_count=1
    )
    are_done = threading.Event()

    def stall() -> Iterator[pb.DeconvolveStreamRequest]:
        yield pb.DeconvolveStreamRequest(header=header)
        are_done.wait()

    listen = ("127.0.0.1:0", "unix")
    with (
        server_process(socket_directory, listen=listen, constants=constants) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = DeconvolutionServiceStub(channel)
        stalled = [stub.DeconvolveStream(stall()) for _ in range(2)]
        try:
            for call in stalled:
                next(call)  # the header of its response
            with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
                stub.Deconvolve(pb.DeconvolveRequest())
            # another peer gets a place, for which one of the two streams must end
            with deconvd_client.connect(server.targets[1], transport="grpc") as F:
                refused = method_counts(F, "Deconvolve", "grpc")
        finally:
            are_done.set()
            for call in stalled:
                call.cancel()

    assert (refused.ended, refused.running_count) == ({"UNAVAILABLE": 1}, 0)


def _described(array: np.ndarray) -> pb.Tensor:
    message = message_from_array(array)
    message.ClearField("payload")
    return message


def test_evictions_are_counted_for_the_tenant_whose_tensors_go(socket_directory: Path) -> None:
    image = np.ones((1, 1, 512, 512), np.float32)  # 1 MiB
    with (
        server_process(socket_directory, "--resident-memory-bytes", "3Mi") as server,
        deconvd_client.connect(server.target) as F,
    ):
        kept = [F.put(image) for _ in range(5)]
        (device,) = F.server_info().devices
        (cache,) = device.caches

    assert len(kept) == 5
    assert cache.evictions_count == 5 - cache.count > 0
