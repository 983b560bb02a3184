"""Frames on a line: whole, in order, wherever the socket splits them, and bounded in time."""

from __future__ import annotations

import fcntl
import resource
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deconvd.line import (
    MAX_MESSAGE_BYTES,
    FrameKind,
    Line,
    LineBrokenError,
    LineTimeoutError,
)
from deconvd.parts import elements_part

_HIGH_DESCRIPTOR = 1500
"""Beyond FD_SETSIZE, and below what systems allow."""

ELEMENTS = (FrameKind.ELEMENTS, FrameKind.MISSING_ELEMENTS)
FRAMES = st.lists(
    st.tuples(
        st.sampled_from(FrameKind),
        st.integers(0, 100) | st.integers(0, MAX_MESSAGE_BYTES) | st.just(32 << 10),
    ),
    min_size=1,
    max_size=8,
)


@pytest.fixture
def ends() -> Iterator[tuple[Line, Line]]:
    near, far = map(Line, socket.socketpair())
    with near, far:
        yield near, far


def payload_of(number: int, size_bytes: int) -> bytes:
    return bytes([number + 1]) * size_bytes


@given(frames=FRAMES, together=st.booleans(), pieces=st.lists(st.integers(1, 5000), max_size=4))
def test_frames_arrive_as_they_were_sent(
    frames: list[tuple[FrameKind, int]], together: bool, pieces: list[int]
) -> None:
    near, far = map(Line, socket.socketpair())
    sent = [(kind, payload_of(i, size)) for i, (kind, size) in enumerate(frames)]

    def send() -> None:
        for group in [sent] if together else [[frame] for frame in sent]:
            near.send(*group)

    with near, far, ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send)
        for kind, payload in sent:
            assert far.receive() == (kind, len(payload))
            if kind not in ELEMENTS:
                assert far.receive_payload(len(payload)) == payload
                continue
            received = np.zeros(len(payload), np.uint8)  # in pieces, as for several tensors
            bounds = np.minimum(np.cumsum([0, *pieces]), len(payload))
            for begin, end in zip(bounds, [*bounds[1:], len(payload)], strict=True):
                far.read_into(received[begin:end])
            assert received.tobytes() == payload
        sending.result()
        assert far.is_quiet()


def test_elements_of_any_size_are_cut_into_frames(ends: tuple[Line, Line]) -> None:
    near, far = ends
    array = np.arange(10 << 20, dtype=np.float32)
    received = np.zeros(array.nbytes, np.uint8)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(near.send_part, elements_part(array))
        filled = 0
        while filled < len(received):
            kind, size_bytes = far.receive()
            assert kind is FrameKind.ELEMENTS
            far.read_into(received[filled : filled + size_bytes])
            filled += size_bytes
        sending.result()

    np.testing.assert_array_equal(received.view(np.float32), array)


def test_a_message_may_be_as_long_as_is_said(ends: tuple[Line, Line]) -> None:
    near, far = ends
    message = bytes(MAX_MESSAGE_BYTES)
    with ThreadPoolExecutor(1) as pool:
        frames = (FrameKind.MESSAGE, message), (FrameKind.END, message + b"1")
        sending = pool.submit(near.send, *frames)
        kind, size_bytes = far.receive()
        assert (kind, far.receive_payload(size_bytes)) == (FrameKind.MESSAGE, message)
        kind, size_bytes = far.receive()
        with pytest.raises(LineBrokenError, match="131073 bytes, and 131072 may be"):
            far.receive_payload(size_bytes)
        far.shut()
        with suppress(LineBrokenError):
            sending.result()


def test_an_unknown_kind_of_frame_breaks_the_line() -> None:
    near, other = socket.socketpair()
    with near, Line(other) as far:
        near.sendall(bytes([77, 0, 0, 0, 0, 0, 0, 0]))
        with pytest.raises(LineBrokenError, match="unknown kind 77"):
            far.receive()


@pytest.mark.parametrize("begun", [b"", b"\x01", bytes([2, 0, 0, 0, 9, 0, 0, 0, 1])])
def test_the_other_end_closes_it_anywhere(begun: bytes) -> None:
    near, other = socket.socketpair()
    with Line(other) as far:
        near.sendall(begun)
        near.close()
        with pytest.raises(LineBrokenError, match="closed"):
            far.receive_payload(far.receive()[1])


def test_a_deadline_ends_whatever_waits(ends: tuple[Line, Line]) -> None:
    near, far = ends
    far.set_deadline(0.05)
    with pytest.raises(LineTimeoutError):
        far.receive()
    near.set_deadline(0.05)
    with pytest.raises(LineTimeoutError):  # once the socket is full
        near.send_part(elements_part(np.ones(16 << 20, np.uint8)))
    near.set_deadline(0)
    with pytest.raises(LineTimeoutError):
        near.send((FrameKind.END, b""))


def test_a_deadline_may_be_far_or_none(ends: tuple[Line, Line]) -> None:
    near, far = ends
    for timeout_s in (1e15, None):
        near.set_deadline(timeout_s)
        far.set_deadline(timeout_s)
        near.send((FrameKind.END, b"x"))
        assert far.receive() == (FrameKind.END, 1)
        assert far.take(1) == b"x"


def test_shutting_it_ends_whoever_waits(ends: tuple[Line, Line]) -> None:
    near, far = ends
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(far.receive)
        threading.Timer(0.05, far.shut).start()
        with pytest.raises(LineBrokenError):
            receiving.result()
    with pytest.raises(LineBrokenError):
        near.receive()
    near.shut()  # harmless, however often
    near.shut()


def test_what_was_sent_last_is_read_before_the_end(ends: tuple[Line, Line]) -> None:
    near, far = ends
    near.set_deadline(1)
    with suppress(LineTimeoutError):
        near.send_part(elements_part(np.ones(16 << 20, np.uint8)))
    near.set_deadline(30)
    far.send((FrameKind.FAILED, b"why"))
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(far.end_gently, 30)
        assert near.receive() == (FrameKind.FAILED, 3)
        assert near.take(3) == b"why"
        near.close()
        ending.result()


def test_a_line_among_very_many_descriptors_is_waited_for_too() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], _HIGH_DESCRIPTOR + 1), limits[1]))
    one, other = socket.socketpair()
    with other:
        high = socket.socket(fileno=fcntl.fcntl(other, fcntl.F_DUPFD_CLOEXEC, _HIGH_DESCRIPTOR))
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with Line(one) as near, Line(high) as far:
        assert far.descriptor >= _HIGH_DESCRIPTOR
        assert far.is_quiet()
        assert not far.has_come(1, 0.002)
        near.send((FrameKind.MESSAGE, b"abc"))
        assert far.has_come(11, 0.002)
        assert far.receive() == (FrameKind.MESSAGE, 3)


def test_nothing_is_waited_for_beyond_the_deadline(ends: tuple[Line, Line]) -> None:
    near, _ = ends
    near.set_deadline(0.05)
    assert not near.has_come(1, 10_000)
    with pytest.raises(LineTimeoutError):
        near.receive()


def test_what_has_come_is_known_without_taking_it(ends: tuple[Line, Line]) -> None:
    near, far = ends
    began_s = time.monotonic()
    assert not far.has_come(1, 0.05)
    assert time.monotonic() - began_s >= 0.05
    near.send((FrameKind.MESSAGE, b"abc"))
    assert far.has_come(11, 0)
    assert not far.has_come(12, 0)
    near.send((FrameKind.MESSAGE, b"de"))
    assert far.has_come(21, 10)
    assert far.receive() == (FrameKind.MESSAGE, 3)
    assert far.receive_payload(3) == b"abc"
    assert far.receive() == (FrameKind.MESSAGE, 2)
    assert far.receive_payload(2) == b"de"
    near.close()
    with pytest.raises(LineBrokenError):
        far.has_come(1, 10)


def test_a_line_is_quiet_until_something_comes(ends: tuple[Line, Line]) -> None:
    near, far = ends
    assert far.is_quiet()
    near.send((FrameKind.END, b""))
    assert not far.is_quiet()
    far.receive()
    assert far.is_quiet()
    near.send((FrameKind.END, b""), (FrameKind.END, b""))
    far.receive()
    assert not far.is_quiet()  # the second was read ahead
    far.receive()
    near.close()
    assert not far.is_quiet()
