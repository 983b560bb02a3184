"""What the server holds stays what it was: over many calls of all kinds, and when its clients are killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import grpc
import numpy as np
import pytest

import deconvd_client
from deconvd.model.dtypes import Array
from deconvd.model.problem import spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd.wire.tensor import message_from_array, message_from_spec
from deconvd_client import Connection
from tests.processes import lent_bytes, process_resources, wait_until
from tests.servers import ServerProcess, only_server, server_process

CALLS_COUNT = 1000
CALLERS_COUNT = 4
KILLED_COUNT = 100

SPARE_BYTES = 40 << 20
"""What the allocator may hold more than before: less than any kind of call would leave if it leaked a tensor."""

W = np.eye(4, dtype=np.float32)[:, :, None, None]
SMALL = np.ones((1, 4, 8, 8), np.float32)
LARGE = np.ones((4, 4, 128, 128), np.float32)  # 1 MiB: in shared memory, or a message
LONG = np.ones((10, 4, 160, 160), np.float32)  # 4 MiB: in shared memory, or a stream
EARLY = np.ones(
    (10, 4, 230, 230), np.float32
)  # 8.1 MiB: called with before it is copied to shared memory


@pytest.fixture
def leak_server(socket_directory: Path) -> Iterator[ServerProcess]:
    with server_process(socket_directory, listen=("unix", "127.0.0.1:0")) as server:
        yield server


@dataclass
class Callers:
    """Clients by each way to a server, and the generated one."""

    shared: Connection
    unix: Connection
    tcp: Connection
    stub: pb_grpc.DeconvolutionServiceStub


@pytest.fixture
def callers(leak_server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callers]:
    unix, tcp = leak_server.targets
    with ExitStack() as stack:
        connections = [
            stack.enter_context(deconvd_client.connect(target, transport=transport))
            for target, transport in ((unix, "shared_memory"), (unix, "unix"), (tcp, "tcp"))
        ]
        stub = pb_grpc.DeconvolutionServiceStub(stack.enter_context(grpc.insecure_channel(tcp)))
        direct = only_server(connections[0]).route.target_stub.direct
        assert direct is not None
        # although the processor follows no copy
        monkeypatch.setattr(direct._overlap_backoff, "is_due", lambda: True)
        yield Callers(connections[0], connections[1], connections[2], stub)


def deconvolve(F: Connection, x: Array) -> None:
    np.testing.assert_array_equal(F.deconvolution_2d(x, W), x)


def differentiate(F: Connection, x: Array) -> None:
    gx, gW, gb = F.deconvolution_2d_grad(x, W, np.zeros(4, np.float32), x)
    np.testing.assert_array_equal(gx, x)
    assert gW is not None
    assert gb is not None


def deconvolve_what_lies_there(F: Connection) -> None:
    x = F.empty(LARGE.shape, LARGE.dtype)
    x[...] = LARGE
    deconvolve(F, x)


def request_for(x: Array) -> pb.DeconvolveRequest:
    return pb.DeconvolveRequest(x=message_from_array(x), w=message_from_array(W), waits=True)


def be_refused(callers: Callers) -> None:
    without_channels = message_from_array(np.ones((4, 3, 128, 192), np.float32))
    request = pb.DeconvolveRequest(x=without_channels, w=message_from_array(W))
    assert failure(lambda: callers.stub.Deconvolve(request)) is grpc.StatusCode.INVALID_ARGUMENT


def ask_for_too_much(callers: Callers) -> None:
    request = request_for(LARGE)
    request.geometry.stride.h = request.geometry.stride.w = 1 << 20
    assert failure(lambda: callers.stub.Deconvolve(request)) is grpc.StatusCode.RESOURCE_EXHAUSTED


def name_memory_that_is_not_lent(callers: Callers) -> None:
    request = request_for(LARGE)
    request.y_place.region = bytes(16)
    assert failure(lambda: callers.stub.Deconvolve(request)) is grpc.StatusCode.NOT_FOUND


def break_off(callers: Callers) -> None:
    parts = islice(stream_of(LONG), 2)
    code = failure(lambda: list(callers.stub.DeconvolveStream(parts)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


def failure(rpc: Callable[[], object]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as raised:
        rpc()
    code = raised.value.code()
    assert isinstance(code, grpc.StatusCode)
    return code


def stream_of(x: Array) -> Iterator[pb.DeconvolveStreamRequest]:
    described = pb.DeconvolveRequest(
        x=message_from_spec(spec_of(x)), w=message_from_spec(spec_of(W)), waits=True
    )
    header = pb.DeconvolveStreamHeader(request=described, slice_samples_count=2)
    yield pb.DeconvolveStreamRequest(header=header)
    yield pb.DeconvolveStreamRequest(chunk=W.tobytes())
    for sample in x:
        yield pb.DeconvolveStreamRequest(chunk=sample.tobytes())


def cancel(callers: Callers) -> None:
    call = callers.stub.Deconvolve.future(request_for(LARGE))
    call.cancel()


def cancel_in_the_middle(callers: Callers) -> None:
    responses = callers.stub.DeconvolveStream(stream_of(LONG))
    next(responses)
    next(responses)
    responses.cancel()


def have_no_time(callers: Callers) -> None:
    with suppress(grpc.RpcError):  # it may be done in time, too
        callers.stub.Deconvolve(request_for(LARGE), timeout=0.002)


KINDS: list[Callable[[Callers], None]] = [
    lambda callers: deconvolve(callers.shared, SMALL),
    lambda callers: deconvolve(callers.shared, LARGE),
    lambda callers: deconvolve(callers.shared, LONG),
    lambda callers: deconvolve(callers.shared, EARLY),
    lambda callers: deconvolve_what_lies_there(callers.shared),
    lambda callers: differentiate(callers.shared, LARGE),
    lambda callers: deconvolve(callers.unix, LARGE),
    lambda callers: deconvolve(callers.unix, LONG),
    lambda callers: differentiate(callers.unix, LONG),
    lambda callers: deconvolve(callers.tcp, SMALL),
    lambda callers: deconvolve(callers.tcp, LARGE),
    lambda callers: deconvolve(callers.tcp, LONG),
    lambda callers: differentiate(callers.tcp, LARGE),
    lambda callers: differentiate(callers.tcp, LONG),
    be_refused,
    ask_for_too_much,
    name_memory_that_is_not_lent,
    break_off,
    cancel,
    cancel_in_the_middle,
    have_no_time,
]


def call_often(callers: Callers, count: int) -> None:
    with ThreadPoolExecutor(CALLERS_COUNT) as threads:
        list(threads.map(lambda kind: kind(callers), islice(cycle(KINDS), count)))


def assert_idle(server: ServerProcess, F: Connection) -> None:
    """See that no call has a place, or will soon have none."""

    def is_idle() -> bool:
        (device,) = F.server_info().devices
        calls_count = device.running_calls_count + device.waiting_calls_count
        return calls_count == 0 and device.used_bytes == 0

    wait_until(is_idle)


def test_a_thousand_calls_of_all_kinds_leave_nothing(
    leak_server: ServerProcess, callers: Callers
) -> None:
    pid = leak_server.process.pid
    call_often(callers, CALLS_COUNT // 4)
    assert_idle(leak_server, callers.unix)
    before = process_resources(pid)

    call_often(callers, CALLS_COUNT)

    assert_idle(leak_server, callers.unix)
    after = process_resources(pid)
    assert after.memory_bytes < before.memory_bytes + SPARE_BYTES
    # a kind of call that leaves something is made often enough to show it, while pools may still grow a little
    spare_count = CALLS_COUNT // len(KINDS) // 2
    assert after.threads_count <= before.threads_count + spare_count
    assert after.descriptors_count <= before.descriptors_count + spare_count
    assert lent_bytes(pid) > 0
    callers.shared.close()
    wait_until(lambda: lent_bytes(pid) == 0)


# gRPC does not survive a fork, so the parent has not used it yet.
NURSERY = """
import os, random, signal, sys, time
import numpy as np
import deconvd_client
from tests.test_leaks import LARGE, LONG, W, SMALL
unix, tcp, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
WAYS = [(unix, "shared_memory"), (unix, "unix"), (tcp, "tcp")]

def call_for_ever(number):
    generator = random.Random(number)
    target, transport = WAYS[number % 3]
    F = deconvd_client.connect(target, transport=transport)
    while True:
        x = generator.choice([SMALL, LARGE, LONG])
        if transport == "shared_memory":
            x, given = F.empty(x.shape, x.dtype), x
            x[...] = given
        F.deconvolution_2d(x, W)
        F.deconvolution_2d_grad(x, W, None, x)

moments = random.Random(seed)
for number in range(seed, seed + int(sys.argv[4])):
    child = os.fork()
    if not child:
        call_for_ever(number)
    time.sleep(moments.uniform(0.0, 0.4))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def kill_clients(server: ServerProcess, count: int) -> None:
    """Have so many clients killed, a few at a time, each while it calls."""
    shares = [str(len(range(i, count, CALLERS_COUNT))) for i in range(CALLERS_COUNT)]
    nurseries = [
        subprocess.Popen([sys.executable, "-c", NURSERY, *server.targets, str(i), share])
        for i, share in enumerate(shares)
    ]
    assert [nursery.wait(100) for nursery in nurseries] == [0] * CALLERS_COUNT


def test_a_hundred_clients_that_are_killed_leave_nothing(
    leak_server: ServerProcess, callers: Callers
) -> None:
    pid = leak_server.process.pid
    kill_clients(leak_server, KILLED_COUNT // 2)
    call_often(callers, len(KINDS))
    callers.shared.close()
    assert_idle(leak_server, callers.unix)
    wait_until(lambda: lent_bytes(pid) == 0)
    before = process_resources(pid)

    kill_clients(leak_server, KILLED_COUNT)

    assert_idle(leak_server, callers.unix)
    wait_until(lambda: lent_bytes(pid) == 0)
    wait_until(lambda: process_resources(pid).descriptors_count <= before.descriptors_count)
    after = process_resources(pid)
    assert after.memory_bytes < before.memory_bytes + SPARE_BYTES
    deconvolve(callers.tcp, LONG)
    with deconvd_client.connect(leak_server.target, transport="shared_memory") as F:
        deconvolve(F, LONG)
