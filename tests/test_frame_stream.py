"""A line: events of the direct protocol and elements, whatever carries them, and bounded in time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deconvd.direct.connection_errors import (
    ConnectionBrokenError,
    ConnectionClosedError,
    ConnectionTimeoutError,
    LocalProtocolError,
    MessageTooLargeError,
    RemoteProtocolError,
)
from deconvd.direct.events import (
    ANY_INSTANCE,
    MAX_MESSAGE_BYTES,
    CallFailure,
    CallHead,
    EndOfStream,
    FrameKind,
    Hello,
    MessagePart,
    MethodCode,
    ProgressReport,
    pack_frame,
)
from deconvd.direct.frame_stream import FrameSource, FrameStream, receive_progress, report_progress
from deconvd.direct.protocol import DirectProtocol, ProtocolState, Role
from deconvd.errors import ExhaustedError
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.codec import Buffer
from deconvd.wire.status import status_from_error
from deconvd.wire.stream_parts import ElementsPart, PendingElements, elements_part
from tests.stream_pairs import connected_streams, overlapped_streams, send_raw, server_stream

Ends = tuple[FrameStream, FrameStream]

PUT = CallHead(MethodCode.PutTensor, 30, b"")


@pytest.fixture
def ends() -> Iterator[Ends]:
    """The client's and the server's end in the middle of a stream."""
    with connected_streams() as (client, server):
        client.send(PUT)
        assert server.next_event() == PUT
        yield client, server


class MemoryStream:
    """A byte stream in memory: what is written can be read, at most so many bytes at once."""

    def __init__(self, longest_read_bytes: int) -> None:
        self._bytes = bytearray()
        self._longest_read_bytes = longest_read_bytes

    def set_deadline(self, timeout_s: float | None) -> None:
        """See `ByteStream`: nothing takes long here."""

    def read_into(self, target: memoryview) -> int:
        """See `ByteStream`."""
        if not self._bytes:
            raise ConnectionClosedError("there is nothing left")
        count = min(len(target), len(self._bytes), self._longest_read_bytes)
        target[:count] = self._bytes[:count]
        del self._bytes[:count]
        return count

    def fill(self, target: memoryview) -> None:
        """See `ByteStream`."""
        while target:
            target = target[self.read_into(target) :]

    def write(self, *buffers: Buffer) -> None:
        """See `ByteStream`."""
        for buffer in buffers:
            self._bytes += buffer

    def poll(self, timeout_s: float) -> bool:
        """See `ByteStream`."""
        return bool(self._bytes)

    def wait(self) -> None:
        """See `ByteStream`: nobody writes meanwhile."""

    def shutdown(self) -> None:
        """See `ByteStream`."""
        self._bytes.clear()

    def abort(self) -> None:
        """See `ByteStream`."""
        self.shutdown()

    def half_close_and_drain(self, timeout_s: float) -> None:
        """See `ByteStream`."""
        self.shutdown()

    def close(self) -> None:
        """See `ByteStream`."""


@given(
    sizes=st.lists(st.integers(0, 100_000), max_size=4),
    pieces=st.lists(st.integers(1, 50_000), max_size=4),
    longest_read_bytes=st.integers(100, 100_000),
)
def test_elements_arrive_where_they_are_to_be_by_any_byte_stream(
    sizes: list[int], pieces: list[int], longest_read_bytes: int
) -> None:
    stream = MemoryStream(longest_read_bytes)
    sender, receiver = (FrameStream(stream, DirectProtocol(role, ANY_INSTANCE)) for role in Role)
    for line in (sender, receiver):
        line.protocol.state = ProtocolState.STREAMING
    sent = [np.full(size, i + 1, np.uint8) for i, size in enumerate(sizes)]
    for array in sent:
        sender.send_part(elements_part(array))
    sender.send(EndOfStream())

    for array in filter(len, sent):
        assert receiver.next_event() == PendingElements(array.size)
        received = np.zeros_like(array)  # in pieces, as for several tensors
        bounds = np.minimum(np.cumsum([0, *pieces]), array.size)
        for begin, end in zip(bounds, [*bounds[1:], array.size], strict=True):
            receiver.read_into(received[begin:end])
        np.testing.assert_array_equal(received, array)
    assert receiver.next_event() == EndOfStream()
    assert receiver.is_quiet()


def test_elements_of_any_size_are_cut_into_frames(ends: Ends) -> None:
    client, server = ends
    array = np.arange(10 << 20, dtype=np.float32)
    received = np.zeros(array.nbytes, np.uint8)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(client.send_part, elements_part(array))
        filled = frames_count = 0
        while filled < len(received):
            ahead = server.next_event()
            assert isinstance(ahead, PendingElements)
            server.read_into(received[filled : filled + ahead.size_bytes])
            filled += ahead.size_bytes
            frames_count += 1
        sending.result()

    np.testing.assert_array_equal(received.view(np.float32), array)
    assert frames_count == 3


def test_a_message_may_be_as_long_as_is_said(ends: Ends) -> None:
    client, server = ends
    part = MessagePart(bytes(MAX_MESSAGE_BYTES))
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(server.send, part)
        assert client.next_event() == part
        sending.result()
    with pytest.raises(MessageTooLargeError, match="at most 131072 bytes, got 131073"):
        server.send(MessagePart(part.data + b"1"))
    server.send(MessagePart(b"short"))  # the line is as it was
    assert client.next_event() == MessagePart(b"short")
    send_raw(
        server,
        pack_frame(FrameKind.MESSAGE, b"")[:4] + (MAX_MESSAGE_BYTES + 1).to_bytes(4, "little"),
    )
    with pytest.raises(
        RemoteProtocolError, match="131073 bytes, where from 0 to 131072 are allowed"
    ):
        client.next_event()


@pytest.mark.parametrize("begun", [b"", b"\x01", bytes([6, 0, 0, 0, 9, 0, 0, 0, 1])])
def test_the_other_end_closes_it_anywhere(ends: Ends, begun: bytes) -> None:
    client, server = ends
    send_raw(client, begun)
    client.close()
    with pytest.raises(ConnectionClosedError, match="closed"):
        server.next_event()


def test_it_is_closed_in_the_middle_of_elements(ends: Ends) -> None:
    client, server = ends
    send_raw(client, bytes([FrameKind.ELEMENTS, 0, 0, 0, 9, 0, 0, 0, 1]))
    client.close()
    assert server.next_event() == PendingElements(9)
    with pytest.raises(ConnectionClosedError, match="closed"):
        server.read_into(np.zeros(9, np.uint8))


def test_a_deadline_ends_whatever_waits(ends: Ends) -> None:
    client, server = ends
    waits: list[Callable[[], object]] = [server.next_event, server.wait]
    for wait in waits:
        server.set_deadline(0.05)
        with pytest.raises(ConnectionTimeoutError):
            wait()
    client.set_deadline(0.05)
    with pytest.raises(ConnectionTimeoutError):  # once the socket is full
        client.send_part(elements_part(np.ones(16 << 20, np.uint8)))
    client.set_deadline(0)
    with pytest.raises(ConnectionTimeoutError):
        client.send(EndOfStream())


def test_shutting_it_ends_whoever_waits(ends: Ends) -> None:
    client, server = ends
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(server.next_event)
        threading.Timer(0.05, server.shutdown).start()
        with pytest.raises(ConnectionBrokenError):
            receiving.result()
    with pytest.raises(ConnectionBrokenError):
        client.next_event()


def test_an_event_is_waited_for_until_it_is_whole(ends: Ends) -> None:
    client, server = ends
    began_s = time.monotonic()
    assert server.poll_event(0.05) is None
    assert time.monotonic() - began_s >= 0.05
    told = pack_frame(FrameKind.END, b"abc")
    for data in (told[:3], told[3:-1]):
        send_raw(client, data)
        assert server.poll_event(0) is None
        assert server.poll_event(0.01) is None
    threading.Timer(0.02, send_raw, [client, told[-1:]]).start()
    assert server.poll_event(30) == EndOfStream("abc")
    client.close()
    with pytest.raises(ConnectionClosedError):
        server.poll_event(30)


def test_what_is_written_is_heard_in_time() -> None:
    with overlapped_streams() as (client, server):
        assert receive_progress(server, 0.01) is None
        for size_bytes in (7, 2**64 - 1):
            report_progress(client, size_bytes)
        assert receive_progress(server, 30) == 7
        assert receive_progress(server, 0) == 2**64 - 1
        assert receive_progress(server, 0) is None
        client.close()
        with pytest.raises(ConnectionClosedError):
            receive_progress(server, 30)


def test_a_line_is_quiet_until_something_comes(ends: Ends) -> None:
    client, server = ends
    assert client.is_quiet()
    server.send(MessagePart(b"a"))
    assert not client.is_quiet()
    client.next_event()
    assert client.is_quiet()
    for _ in range(2):
        server.send(MessagePart(b"a"))
    client.next_event()
    assert not client.is_quiet()  # the second was read ahead
    assert client.poll(0)
    client.wait()
    client.next_event()
    server.close()
    assert not client.is_quiet()


def test_a_failure_is_seen_before_it_is_taken(ends: Ends) -> None:
    client, server = ends
    assert not client.is_failure_next()
    server.send(MessagePart(b"a"))
    assert not client.is_failure_next()
    assert client.next_event() == MessagePart(b"a")
    status = status_from_error(ExhaustedError("no room"))
    server.send(CallFailure(status))
    assert client.is_failure_next()
    assert client.next_event() == CallFailure(status)
    for line in ends:
        with pytest.raises(ConnectionClosedError):
            line.send(EndOfStream())


def test_the_parts_of_a_response_are_read_to_their_end(ends: Ends) -> None:
    client, server = ends
    source = FrameSource(client, pb.PutTensorResponse)
    server.send_part(pb.PutTensorResponse())
    server.send_part(ElementsPart(memoryview(b"abc")))
    assert source.next() == pb.PutTensorResponse()
    assert source.next() == PendingElements(3)
    elements = np.zeros(3, np.uint8)
    source.read_into(elements)
    assert elements.tobytes() == b"abc"
    client.send(EndOfStream())
    assert server.next_event() == EndOfStream()
    server.send(EndOfStream("server_us=1"))
    assert [source.next(), source.next()] == [None, None]
    assert source.ledger == "server_us=1"
    assert client.protocol.is_idle


def test_what_was_cut_is_no_end(ends: Ends) -> None:
    client, server = ends
    source = FrameSource(client, pb.PutTensorResponse)
    send_raw(server, pack_frame(FrameKind.CALL, bytes(24)))
    with pytest.raises(RemoteProtocolError):
        source.next()
    with pytest.raises(ConnectionClosedError):
        source.next()


def test_what_is_not_ours_to_say_is_not_sent(ends: Ends) -> None:
    client, server = ends
    with pytest.raises(
        LocalProtocolError, match="PROGRESS must not be sent in the state STREAMING"
    ):
        client.send(ProgressReport(1))
    with pytest.raises(LocalProtocolError):
        client.send(PUT)
    client.send(EndOfStream())
    with pytest.raises(LocalProtocolError):
        client.send_part(elements_part(np.ones(1)))
    assert server.next_event() == EndOfStream()
    assert server.is_quiet()


@pytest.mark.parametrize("other", [bytes(16), bytes(range(16)), bytes(range(1, 17))])
def test_a_server_is_the_one_that_is_meant_or_breaks_the_line(other: bytes) -> None:
    one, another = socket.socketpair()
    instance = bytes(range(16))
    with server_stream(one, instance) as server, server_stream(another) as near:
        send_raw(near, Hello(other).pack())
        if other in (ANY_INSTANCE, instance):
            assert server.next_event() == Hello(other)
        else:
            with pytest.raises(RemoteProtocolError, match="another server"):
                server.next_event()
