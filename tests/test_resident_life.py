"""How long tensors stay: what ends a session, and what a server that is short of memory or goes does to them."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from deconvd.errors import (
    ExhaustedError,
    LostSessionError,
    LostTensorError,
    StaleRegionError,
    UnavailableError,
)
from deconvd.model.dtypes import Array
from deconvd.model.problem import spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.digest import digest_of
from deconvd.wire.grpc_status import error_from_rpc
from deconvd.wire.tensor import elements_of, message_from_spec
from deconvd_client.shared_memory import Borrower
from deconvd_server.daemon import Daemon
from deconvd_server.device import DeviceInfo
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.residents import ResidentLimits
from deconvd_server.settings import Settings
from tests.deadlines import short_deadline
from tests.processes import peak_memory_bytes, wait_until
from tests.servers import ServerProcess, server_process
from tests.session_clients import (
    SessionClient,
    array_of,
    error_of,
    open_session,
    raw_tensor,
    remember_stream,
    tensor_by_handle,
)

MIB = 1 << 20
_WAIT_S = 30
ONE = np.ones((1, 1, 1, 1), np.float32)


def image(value: float, size_bytes: int = MIB) -> Array:
    return np.full((size_bytes // MIB, 1, 512, 512), value, np.float32)


def assert_lost(held: SessionClient, handle: bytes, error: type[Exception]) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        held.get(handle)
    assert type(error_of(failure)) is error


@pytest.fixture
def small(socket_directory: Path) -> Iterator[ServerProcess]:
    """A server that keeps little, and for a short time."""
    options = ["--resident-memory-bytes", str(8 * MIB), "--session-lease-s", "2"]
    with server_process(socket_directory, *options) as running:
        yield running


def test_a_session_that_is_closed_is_over_at_once(server: ServerProcess) -> None:
    key = b"closed"
    with open_session(server.target, key) as watcher, open_session(server.target, key) as held:
        handle = held.put(image(1))
        assert watcher.resident_bytes() == MIB

        held.close()

        assert watcher.resident_bytes() == 0
        assert_lost(held, handle, LostSessionError)


def test_a_session_whose_stream_broke_is_over_after_a_while(small: ServerProcess) -> None:
    with open_session(small.target, b"key") as watcher, open_session(small.target, b"key") as held:
        handle = held.put(image(1))
        held.cancel()
        np.testing.assert_array_equal(held.get(handle), image(1))

        signs = threading.Timer(1, watcher.send_heartbeat)
        signs.start()
        wait_until(lambda: watcher.resident_bytes() == 0)

        signs.cancel()
        assert_lost(held, handle, LostSessionError)


def test_a_session_is_resumed_after_its_stream_broke(server: ServerProcess) -> None:
    with open_session(server.target) as held:
        handle = held.put(image(1))
        held.cancel()
        with open_session(server.target, resume=held.session) as again:
            assert again.session == held.session
            np.testing.assert_array_equal(again.get(handle), image(1))
            again.close()
            assert_lost(again, handle, LostSessionError)


def test_a_session_is_resumed_by_who_has_not_yet_lost_it(server: ServerProcess) -> None:
    with open_session(server.target) as held:
        handle = held.put(image(1))
        with open_session(server.target, resume=held.session) as again:
            with pytest.raises(grpc.RpcError):
                next(held.stream)  # the old stream was hung up, which ends nothing
            np.testing.assert_array_equal(again.get(handle), image(1))


def test_a_session_that_is_unknown_is_not_resumed(server: ServerProcess) -> None:
    with pytest.raises(grpc.RpcError) as failure, open_session(server.target, resume=bytes(16)):
        pass
    assert isinstance(error_of(failure), LostSessionError)
    assert error_of(failure).argument == "session"


@pytest.mark.parametrize("wrong_key", [b"", b"another", b"Key", b"key\0"])
def test_a_session_is_none_to_who_has_not_its_tenants_key(
    server: ServerProcess, wrong_key: bytes
) -> None:
    texts = []
    with open_session(server.target, b"key") as held:
        handle = held.put(image(1))
        for session in (held.session, bytes(16)):
            with pytest.raises(grpc.RpcError) as failure:
                SessionClient(held.channel, wrong_key, resume=session)
            assert isinstance(error_of(failure), LostSessionError)
            texts.append(str(error_of(failure)))
        assert texts[0] == texts[1]

        held.send_heartbeat()  # its stream was not hung up
        np.testing.assert_array_equal(held.get(handle), image(1))
        held.cancel()
        with open_session(server.target, b"key", resume=held.session) as again:
            np.testing.assert_array_equal(again.get(handle), image(1))


def test_what_others_keep_is_told_to_nobody(server: ServerProcess) -> None:
    with open_session(server.target, b"mine") as held, open_session(server.target) as stranger:
        handle = held.put(image(1))
        held.get(handle)
        for session in (b"", stranger.session, bytes(16), b"no name"):
            info = held.stub.GetServerInfo(pb.GetServerInfoRequest(session=session))
            caches = [cache for device in info.devices for cache in device.caches]
            assert caches
            for cache in caches:
                assert cache.limit_bytes > 0
                assert (cache.count, cache.size_bytes) == (0, 0)
                assert (cache.hits_count, cache.misses_count) == (0, 0)
        with open_session(server.target, b"mine") as same:
            assert (same.resident_count(), same.resident_bytes()) == (1, MIB)


def test_a_client_that_gives_no_sign_of_life_loses_its_session(small: ServerProcess) -> None:
    with open_session(small.target, b"key") as silent, open_session(small.target, b"key") as lively:
        silent.put(image(1))
        handle = lively.put(image(2))
        assert silent.opened.lease_s == 2

        for _ in range(8):
            lively.send_heartbeat()
            time.sleep(0.5)

        with pytest.raises(grpc.RpcError) as failure:
            next(silent.stream)
        assert failure.value.code() is grpc.StatusCode.CANCELLED
        assert lively.resident_bytes() == MIB
        np.testing.assert_array_equal(lively.get(handle), image(2))


CLIENT = """
import sys, time
import grpc, numpy as np
from tests.session_clients import SessionClient
held = SessionClient(grpc.insecure_channel(sys.argv[1]), b"key")
for number in range(3):
    held.put(np.ones(1 << 18, np.float32))
print("kept", flush=True)
time.sleep(600)
"""


def test_what_a_killed_client_kept_is_dropped(small: ServerProcess) -> None:
    with open_session(small.target, b"key") as watcher:
        with subprocess.Popen(
            [sys.executable, "-c", CLIENT, small.target], stdout=subprocess.PIPE, text=True
        ) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == "kept\n"
            assert watcher.resident_bytes() == 3 * MIB
            client.send_signal(signal.SIGKILL)

        def is_dropped() -> bool:
            watcher.send_heartbeat()
            return watcher.resident_bytes() == 0

        wait_until(is_dropped)


def test_a_server_that_was_started_anew_knows_nothing(socket_directory: Path) -> None:
    with server_process(socket_directory) as server, open_session(server.target) as held:
        handle = held.put(image(1))
        server.process.kill()
        server.process.wait()
        with pytest.raises(grpc.RpcError):
            next(held.stream)
        with server_process(socket_directory) as server:
            with pytest.raises(grpc.RpcError) as failure:
                with open_session(server.target, resume=held.session):
                    pass
            assert isinstance(error_of(failure), LostSessionError)
            with open_session(server.target) as anew:
                assert_lost(anew, handle, LostTensorError)


def test_a_drain_does_not_wait_for_sessions(socket_directory: Path) -> None:
    with server_process(socket_directory, "--drain-timeout-s", "60") as server:
        with open_session(server.target) as held, open_session(server.target) as other:
            held.put(image(1))
            start_s = time.monotonic()
            assert server.end() == 0
            # far from the 60 s that calls would have
            assert time.monotonic() - start_s < 30
            for stream in (held.stream, other.stream):
                with pytest.raises(grpc.RpcError):
                    next(stream)


def test_what_a_call_uses_stays_while_others_press(small: ServerProcess) -> None:
    with open_session(small.target) as held, open_session(small.target) as other:
        x = image(1, 2 * MIB)
        handle = held.put(x)
        request = pb.DeconvolveRequest(
            x=tensor_by_handle(x, handle), w=message_from_spec(spec_of(ONE)), session=held.session
        )
        header = pb.DeconvolveStreamHeader(request=request, slice_samples_count=1)
        go_on = threading.Event()

        def parts() -> Iterator[pb.DeconvolveStreamRequest]:
            yield pb.DeconvolveStreamRequest(header=header)
            assert go_on.wait(_WAIT_S)
            yield pb.DeconvolveStreamRequest(chunk=bytes(elements_of(ONE)))

        responses = held.stub.DeconvolveStream(parts())
        y = next(responses).header.y  # so the stream has x
        held.drop(handle)
        for number in range(20):
            held.send_heartbeat()
            other.send_heartbeat()
            other.put(image(number))
        assert_lost(held, handle, LostTensorError)
        assert held.resident_bytes() == 2 * MIB
        assert other.resident_bytes() == 6 * MIB
        go_on.set()

        elements = b"".join(part.chunk for part in responses)
        np.testing.assert_array_equal(array_of(y, elements), x)


def test_a_tenant_is_not_displaced_from_its_share(small: ServerProcess) -> None:
    with open_session(small.target) as modest, open_session(small.target) as greedy:
        handles = [modest.put(image(number)) for number in range(4)]
        for number in range(20):
            modest.send_heartbeat()
            greedy.send_heartbeat()
            greedy.put(image(number))

        for number, handle in enumerate(handles):
            np.testing.assert_array_equal(modest.get(handle), image(number))


def test_those_who_tell_a_secret_share_a_quota_and_what_they_keep(socket_directory: Path) -> None:
    with server_process(socket_directory, "--tenant-bytes", str(3 * MIB)) as server:
        key = b"a secret"
        with open_session(server.target, key) as first, open_session(server.target, key) as second:
            assert first.opened.quota_bytes == 3 * MIB
            handle = first.put(image(1))
            np.testing.assert_array_equal(second.get(handle), image(1))
            second.drop(handle)  # which is not its own
            second.put(image(2))
            second.put(image(3))
            with pytest.raises(grpc.RpcError, match="may keep 3145728 bytes") as failure:
                first.put(image(4))
            assert isinstance(error_of(failure), ExhaustedError)
            with open_session(server.target) as stranger:
                stranger.put(image(5))
            first.close()
            second.put(image(4))


def test_content_outlives_the_session_that_sent_it_but_not_the_tenant(
    server: ServerProcess,
) -> None:
    w = np.random.default_rng().standard_normal((1, 1, 3, 3)).astype(np.float32)
    description = message_from_spec(spec_of(w))
    description.digest.CopyFrom(digest_of(w))
    x = raw_tensor(image(1))

    def call(held: SessionClient) -> Array:
        request = pb.DeconvolveRequest(x=x, w=description, session=held.session)
        return array_of(held.stub.Deconvolve(request).y)

    key = b"another secret"
    with open_session(server.target, key) as first, open_session(server.target, key) as second:
        list(first.stub.DeconvolveStream(remember_stream(first.session, image(1), w)))
        y = call(first)
        first.close()
        np.testing.assert_array_equal(call(second), y)
        second.close()
    with open_session(server.target, key) as later:
        with pytest.raises(grpc.RpcError) as failure:
            call(later)
        assert isinstance(error_of(failure), LostTensorError)


def test_a_server_that_keeps_nothing_says_so(socket_directory: Path) -> None:
    with server_process(socket_directory, "--resident-memory-bytes", "0") as server:
        with open_session(server.target) as held:
            assert held.opened.quota_bytes == 0
            with pytest.raises(grpc.RpcError) as failure:
                held.put(image(1))
            assert isinstance(error_of(failure), ExhaustedError)


@pytest.mark.usefixtures("unmeasured", "small")  # in this order
@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
def test_ten_thousand_puts_and_drops_leave_the_servers_memory_flat(small: ServerProcess) -> None:
    with open_session(small.target) as held:
        array = np.ones((4, 4096), np.float32)

        def put_and_drop(count: int) -> None:
            for number in range(count):
                if number % 10 == 0:
                    held.send_heartbeat()
                held.drop(held.put(array))

        put_and_drop(1000)
        before_bytes = peak_memory_bytes(small.process.pid)
        put_and_drop(9000)
        after_bytes = peak_memory_bytes(small.process.pid)

        assert held.resident_bytes() == 0
    # 9000 tensors have 590 MB, and 9000 names and sessions of 1 KiB each would have 9 MB
    assert after_bytes - before_bytes < 6 * MIB


def test_many_clients_at_once_get_their_own(small: ServerProcess) -> None:
    errors: list[Any] = []

    def live(number: int) -> None:
        with open_session(small.target) as held:
            for step in range(30):
                held.send_heartbeat()
                value = number * 100 + step
                try:
                    handle = held.put(image(value))
                    np.testing.assert_array_equal(held.get(handle), image(value))
                except grpc.RpcError as error:
                    errors.append(error_from_rpc(error))
            held.close()

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(live, range(12)))
    # twelve tenants have less than a tensor each as their share, and so give way to each other
    assert {type(error) for error in errors} <= {LostTensorError, ExhaustedError}
    with open_session(small.target) as alone:
        handles = [
            alone.put(image(number)) for number in range(8)
        ]  # which is all the room there is
        for number, handle in enumerate(handles):
            np.testing.assert_array_equal(alone.get(handle), image(number))


def test_there_is_room_for_so_many_sessions_and_calls_beside_them() -> None:
    limits = ResidentLimits(sessions_count=3)
    daemon = Daemon(Settings(["127.0.0.1:0"], 4 * MIB, drain_timeout_s=10, residents=limits))
    daemon.serve(lambda: [CpuDevice(1)])
    try:
        target = daemon.addresses[0]
        with (
            open_session(target) as first,
            open_session(target) as second,
            open_session(target) as third,
        ):
            for held in (first, second, third):
                held.put(ONE)  # one that keeps nothing would give way
            with pytest.raises(
                grpc.RpcError, match="no place for more sessions: 3 of 3"
            ) as failure:
                with open_session(target):
                    pass
            assert isinstance(error_of(failure), UnavailableError)
            third.close()
            with open_session(target) as fourth:
                fourth.put(image(1))
                assert fourth.resident_bytes() == MIB
                assert second.resident_count() == 1  # what others keep is none of its business
    finally:
        daemon.drain()


class Counted(CpuDevice):
    """One of several devices, which counts its calls."""

    def __init__(self, name: str) -> None:
        super().__init__(1)
        self.name = name
        self.calls_count = 0

    @property
    def info(self) -> DeviceInfo:
        return replace(super().info, id=self.name)

    def run(self, *args: Any) -> None:
        self.calls_count += 1
        super().run(*args)


def test_two_devices_share_what_stays_and_work_goes_where_it_is() -> None:
    daemon = Daemon(Settings(["127.0.0.1:0"], 64 * MIB, drain_timeout_s=10))
    devices = [Counted("first"), Counted("second")]
    daemon.serve(lambda: devices)
    try:
        with open_session(daemon.addresses[0]) as held:
            arrays = [image(number, 2 * MIB) for number in range(4)]
            handles = [held.put(array) for array in arrays]
            assert [_kept_count(held, device.name) for device in devices] == [2, 2]

            for array, handle in zip(arrays, handles, strict=True):
                request = pb.DeconvolveRequest(
                    x=tensor_by_handle(array, handle), w=raw_tensor(ONE), session=held.session
                )
                before = [device.calls_count for device in devices]
                for _ in range(3):
                    y = array_of(held.stub.Deconvolve(request).y)
                    np.testing.assert_array_equal(y, array)
                after = [device.calls_count for device in devices]
                assert sorted(np.subtract(after, before)) == [0, 3]
            assert [device.calls_count for device in devices] == [6, 6]
    finally:
        daemon.drain()


def _kept_count(held: SessionClient, device_id: str) -> int:
    for device in held.info().devices:
        for cache in device.caches:
            if (device.id, cache.name) == (device_id, "resident tensors"):
                return cache.count
    raise AssertionError(f"no residents on {device_id}")


def test_operands_from_two_devices_meet_on_one() -> None:
    daemon = Daemon(Settings(["127.0.0.1:0"], 64 * MIB, drain_timeout_s=10))
    devices = [Counted("first"), Counted("second")]
    daemon.serve(lambda: devices)
    try:
        with open_session(daemon.addresses[0]) as held:
            x, w = image(3), 2 * ONE
            request = pb.DeconvolveRequest(
                x=tensor_by_handle(x, held.put(x)),
                w=tensor_by_handle(w, held.put(w)),
                session=held.session,
            )
            assert [_kept_count(held, device.name) for device in devices] == [1, 1]

            y = array_of(held.stub.Deconvolve(request).y)

            np.testing.assert_array_equal(y, 2 * x)
            assert [device.calls_count for device in devices] == [1, 0]  # where x is
    finally:
        daemon.drain()


@pytest.fixture
def lent(server: ServerProcess) -> Iterator[Borrower]:
    """Memory that the shared server lends."""
    with open_session(server.target) as held:
        info = held.stub.GetServerInfo(pb.GetServerInfoRequest())
    borrower = Borrower(lambda _: info.shared_memory_socket)
    yield borrower
    borrower.close()


def test_tensors_come_from_shared_memory_and_go_there(
    server: ServerProcess, lent: Borrower
) -> None:
    x = image(2)
    lies = lent.empty(x.shape, x.dtype, short_deadline())
    lies[...] = x
    result = lent.empty(x.shape, x.dtype, short_deadline())
    shared_x, result_place = message_from_spec(spec_of(x)), pb.SharedSlice()
    for array, message in ((lies, shared_x.shared), (result, result_place)):
        place = lent.locate(array)
        assert place is not None
        place.write_to(message)
    with open_session(server.target) as held:
        # put from there
        header = pb.PutTensorHeader(session=held.session, tensor=shared_x)
        parts = iter([pb.PutTensorRequest(header=header)])
        handle = held.stub.PutTensor(parts).resident.handle
        np.testing.assert_array_equal(held.get(handle), x)

        # got to there
        request = pb.GetTensorRequest(
            session=held.session, resident=pb.Resident(handle=handle), place=result_place
        )
        (answer,) = held.stub.GetTensor(request)
        assert answer.header.shared == result_place
        np.testing.assert_array_equal(result, x)

        # a call: x kept from there, its result put there
        call = pb.DeconvolveRequest(
            x=shared_x,
            w=raw_tensor(3 * ONE),
            y_place=result_place,
            session=held.session,
            keep=pb.OperandsToKeep(x=True),
        )
        response = held.stub.Deconvolve(call)
        assert response.y.shared == result_place
        np.testing.assert_array_equal(result, 3 * x)
        lies[...] = 0  # the client's again once the call has ended
        np.testing.assert_array_equal(held.get(response.kept.x.handle), x)


def test_a_place_that_is_none_is_told(server: ServerProcess) -> None:
    with open_session(server.target) as held:
        handle = held.put(image(1))
        request = pb.GetTensorRequest(
            session=held.session,
            resident=pb.Resident(handle=handle),
            place=pb.SharedSlice(region=bytes(16)),
        )
        with pytest.raises(grpc.RpcError) as failure:
            list(held.stub.GetTensor(request))
        assert isinstance(error_of(failure), StaleRegionError)
