"""Sockets, with TLS and without, as byte streams: all bytes, in order, wherever they are split, and bounded in time."""

from __future__ import annotations

import fcntl
import gc
import math
import resource
import select
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import cycle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deconvd.direct.byte_stream import SocketStream
from deconvd.direct.connection_errors import ConnectionClosedError, ConnectionTimeoutError
from tests.certificates import Authority, CertificateFiles
from tests.processes import wait_until
from tests.tls_streams import established_engines, tls_streams

_HIGH_DESCRIPTOR = 1500
"""Beyond FD_SETSIZE, and below what systems allow."""

Ends = tuple[SocketStream, SocketStream]


@pytest.fixture(params=["plain", "tls"])
def ends(
    request: pytest.FixtureRequest, authority: Authority, loopback_certificate: CertificateFiles
) -> Iterator[Ends]:
    if request.param == "tls":
        with tls_streams(established_engines(authority, loopback_certificate)) as streams:
            yield streams
        return
    one, other = socket.socketpair()
    with closing(SocketStream(one)) as near, closing(SocketStream(other)) as far:
        yield near, far


def taken(stream: SocketStream, size_bytes: int) -> bytes:
    """Return the next bytes."""
    target = memoryview(bytearray(size_bytes))
    filled = 0
    while filled < size_bytes:
        filled += stream.read_into(target[filled:])
    return bytes(target)


@pytest.mark.filterwarnings("error")
def test_a_stream_in_a_cycle_that_is_dropped_closes_its_socket_without_a_warning() -> None:
    one, other = socket.socketpair()
    owners: list[object] = [SocketStream(one)]
    owners.append(owners)

    del one, owners
    gc.collect()

    with other:
        other.settimeout(20)
        assert other.recv(1) == b""


@given(
    writes=st.lists(st.lists(st.integers(0, 300_000), max_size=4), max_size=4),
    reads=st.lists(st.integers(1000, 100_000), min_size=1, max_size=4),
)
def test_bytes_arrive_as_they_were_written(writes: list[list[int]], reads: list[int]) -> None:
    sent = [[bytes([len(write) + i]) * size for i, size in enumerate(write)] for write in writes]
    expected = b"".join(buffer for buffers in sent for buffer in buffers)
    one, other = socket.socketpair()
    with (
        closing(SocketStream(one)) as near,
        closing(SocketStream(other)) as far,
        ThreadPoolExecutor(1) as pool,
    ):
        writing = [pool.submit(near.write, *buffers) for buffers in sent]
        received, sizes = bytearray(), cycle(reads)
        while len(received) < len(expected):
            space = memoryview(bytearray(next(sizes)))
            received += space[: far.read_into(space)]
        for written in writing:
            written.result()
        assert received == expected
        assert not far.poll(0)


def test_the_other_end_closes_it(ends: Ends) -> None:
    near, far = ends
    near.write(b"abc")
    near.close()
    assert taken(far, 3) == b"abc"
    assert far.poll(0)
    far.wait()
    with pytest.raises(ConnectionClosedError, match="closed"):
        taken(far, 1)


def test_a_deadline_ends_whatever_waits(ends: Ends) -> None:
    near, far = ends
    for wait in (far.wait, lambda: taken(far, 1)):
        far.set_deadline(0.05)
        with pytest.raises(ConnectionTimeoutError):
            wait()
    near.set_deadline(0.05)
    with pytest.raises(ConnectionTimeoutError):  # once the socket is full
        near.write(bytes(16 << 20))
    near.set_deadline(0)
    with pytest.raises(ConnectionTimeoutError):
        near.write(b"a")


LARGE_BYTES = 4 << 20
"""So much is moved by system calls that wait in the kernel."""


def test_a_large_buffer_is_filled_with_what_was_written(ends: Ends) -> None:
    near, far = ends
    sent = np.random.default_rng(0).integers(0, 256, 3 * LARGE_BYTES, np.uint8)
    target = np.zeros_like(sent)
    for timeout_s in (60, None):
        near.set_deadline(timeout_s)
        far.set_deadline(timeout_s)
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(
                near.write, b"head", sent.data[:LARGE_BYTES], sent.data[LARGE_BYTES:]
            )
            assert taken(far, 4) == b"head"
            far.fill(target.data)
            writing.result()
        np.testing.assert_array_equal(target, sent)
        assert not far.poll(0)
        target[:] = 0


def test_a_deadline_ends_what_fills_a_large_buffer(ends: Ends) -> None:
    near, far = ends
    near.write(b"a")
    target = memoryview(bytearray(LARGE_BYTES))
    for timeout_s in (0.05, 0.35):
        began_s = time.monotonic()
        far.set_deadline(timeout_s)
        with pytest.raises(ConnectionTimeoutError):
            far.fill(target)
        assert timeout_s <= time.monotonic() - began_s < 30


def test_a_peer_that_stalls_in_the_middle_of_a_large_buffer_is_given_up() -> None:
    one, other = socket.socketpair()
    with closing(SocketStream(one)) as near, closing(SocketStream(other, stall_limit_s=0.2)) as far:
        near.write(b"a")
        far.set_deadline(3600)
        with pytest.raises(ConnectionTimeoutError, match="sent and accepted nothing"):
            far.fill(memoryview(bytearray(LARGE_BYTES)))
        assert far.blocked_since_s == math.inf
        with pytest.raises(ConnectionTimeoutError, match="sent and accepted nothing"):
            far.write(bytes(16 << 20))


def test_other_threads_see_since_when_a_large_buffer_is_waited_for(ends: Ends) -> None:
    near, far = ends
    began_s = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        filling = pool.submit(far.fill, memoryview(bytearray(LARGE_BYTES)))
        wait_until(lambda: far.blocked_since_s < math.inf)
        assert began_s <= far.blocked_since_s <= time.monotonic()
        near.write(bytes(LARGE_BYTES))
        filling.result()
    assert far.blocked_since_s == math.inf


@pytest.mark.parametrize("is_ended_here", [True, False])
def test_the_end_of_the_stream_ends_what_fills_a_large_buffer(
    ends: Ends, is_ended_here: bool
) -> None:
    near, far = ends
    near.write(b"a")
    with ThreadPoolExecutor(1) as pool:
        filling = pool.submit(far.fill, memoryview(bytearray(LARGE_BYTES)))
        (far if is_ended_here else near).shutdown()
        with pytest.raises(ConnectionClosedError):
            filling.result()


def test_a_shutdown_ends_a_large_write(ends: Ends) -> None:
    near, far = ends
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(near.write, bytes(16 << 20))
        far.wait()
        near.shutdown()
        with pytest.raises(ConnectionClosedError):
            writing.result()


def test_a_deadline_may_be_far_or_none(ends: Ends) -> None:
    near, far = ends
    for timeout_s in (1e15, None):
        near.set_deadline(timeout_s)
        far.set_deadline(timeout_s)
        near.write(b"x")
        far.wait()
        assert taken(far, 1) == b"x"


def test_shutting_it_ends_whoever_waits(ends: Ends) -> None:
    near, far = ends
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(taken, far, 1)
        threading.Timer(0.05, far.shutdown).start()
        with pytest.raises(ConnectionClosedError):
            reading.result()
    with pytest.raises(ConnectionClosedError):
        taken(near, 1)
    near.shutdown()  # harmless, however often
    near.shutdown()


def test_what_was_written_last_is_read_before_the_end(ends: Ends) -> None:
    near, far = ends
    near.set_deadline(1)
    with suppress(ConnectionTimeoutError):
        near.write(np.ones(16 << 20, np.uint8).data)
    near.set_deadline(30)
    far.write(b"why")
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(far.half_close_and_drain, 30)
        assert taken(near, 3) == b"why"
        near.close()
        ending.result()


def test_a_peer_that_reads_nothing_hears_of_an_abort(ends: Ends) -> None:
    near, far = ends
    near.set_deadline(0.2)
    with suppress(ConnectionTimeoutError):
        near.write(
            np.ones(64 << 20, np.uint8).data
        )  # fills all buffers: an end would stand behind it
    departed = select.poll()
    departed.register(far.descriptor, select.POLLRDHUP)
    assert not departed.poll(0)

    near.abort()
    near.close()

    assert departed.poll(30_000)


def test_an_end_is_waited_for_no_longer_than_was_said(ends: Ends) -> None:
    _, far = ends
    began_s = time.monotonic()
    far.half_close_and_drain(0.05)
    assert 0.05 <= time.monotonic() - began_s < 30


def test_a_socket_among_very_many_descriptors_is_waited_for_too() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], _HIGH_DESCRIPTOR + 1), limits[1]))
    one, other = socket.socketpair()
    with other:
        high = socket.socket(fileno=fcntl.fcntl(other, fcntl.F_DUPFD_CLOEXEC, _HIGH_DESCRIPTOR))
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with closing(SocketStream(one)) as near, closing(SocketStream(high)) as far:
        assert far.descriptor >= _HIGH_DESCRIPTOR
        assert not far.poll(0)
        assert not far.poll(0.002)
        near.write(b"abc")
        assert far.poll(0.002)
        assert taken(far, 3) == b"abc"


def test_what_comes_is_waited_for_as_long_as_was_said(ends: Ends) -> None:
    near, far = ends
    began_s = time.monotonic()
    assert not far.poll(0.05)
    assert time.monotonic() - began_s >= 0.05
    threading.Timer(0.05, near.write, [b"a"]).start()
    assert far.poll(30)


def test_nothing_is_waited_for_beyond_the_deadline(ends: Ends) -> None:
    near, _ = ends
    near.set_deadline(0.05)
    assert not near.poll(10_000)
    with pytest.raises(ConnectionTimeoutError):
        taken(near, 1)
