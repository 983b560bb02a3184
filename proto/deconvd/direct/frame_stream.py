"""A direct connection: the direct protocol (`deconvd.direct.protocol`) over a byte stream.

Elements are sent from the caller's memory and received into it, without a copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from google.protobuf.message import Message

from deconvd.direct.byte_stream import ByteStream
from deconvd.direct.events import (
    CallFailure,
    EndOfStream,
    Event,
    FrameKind,
    MessagePart,
    ProgressReport,
)
from deconvd.direct.protocol import DirectProtocol
from deconvd.errors import DeconvdError, InvalidArgumentError
from deconvd.wire.packed_elements import unpack
from deconvd.wire.status import error_from_status
from deconvd.wire.stream_parts import Part, PendingElements, Uint8Array, parse_part, takes_packed

__all__ = ["FrameSource", "FrameStream", "receive_progress", "report_progress"]

_EMPTY: Final[Uint8Array] = np.empty(0, np.uint8)

_MAX_FRAME_BYTES: Final = 16 << 20
"""Largest payload of an ELEMENTS frame: so large that the cost of a frame is negligible."""


class FrameStream:
    """One end of a direct connection.

    One thread may send while another receives, and any thread may call `shutdown` or `abort`.
    Sending and receiving raise a ConnectionBrokenError when the connection cannot be used any more.

    Attributes:
        protocol: The connection's state.
        set_deadline, shutdown, abort, half_close_and_drain, close: The methods of the byte stream.
    """

    def __init__(self, stream: ByteStream, protocol: DirectProtocol) -> None:
        self.protocol = protocol
        self._stream = stream
        # attributes instead of methods: a method would cost one more function call
        self.set_deadline: Callable[[float | None], None] = stream.set_deadline
        self.shutdown: Callable[[], None] = stream.shutdown
        self.abort: Callable[[], None] = stream.abort
        self.half_close_and_drain: Callable[[float], None] = stream.half_close_and_drain
        self.close: Callable[[], None] = stream.close

    def send(self, event: Event) -> None:
        """Send an event. Raises the errors of `DirectProtocol.send` and of `ByteStream.write`."""
        self._stream.write(self.protocol.send(event))

    def send_part(self, part: Part) -> None:
        """Send a message or elements of a streamed request or response."""
        if isinstance(part, Message):
            self.send(MessagePart(part.SerializeToString()))
            return
        for piece in part.pieces(_MAX_FRAME_BYTES):
            pending = PendingElements(len(piece.data), piece.is_packed)
            self._stream.write(self.protocol.begin_elements(pending), piece.data)

    def send_piece(self, number: int, buffers: Sequence[memoryview]) -> None:
        """Send a run of pieces of a striped call, from `number` on, whose elements are in one or several buffers."""
        head = self.protocol.begin_piece(number, sum(map(len, buffers)))
        self._stream.write(head, *buffers)

    def next_event(self) -> Event | PendingElements:
        """Wait for the next event and return it."""
        protocol = self.protocol
        event = protocol.next_event() if protocol.unread_bytes else None
        while event is None:
            protocol.unread_bytes += self._stream.read_into(protocol.receive_buffer())
            event = protocol.next_event()
        return event

    def try_next_event(self) -> Event | PendingElements | None:
        """Return the next event; None if what has arrived is not all of it. Wait for something to arrive, once."""
        protocol = self.protocol
        event = protocol.next_event() if protocol.unread_bytes else None
        if event is None:
            protocol.unread_bytes += self._stream.read_into(protocol.receive_buffer())
            event = protocol.next_event()
        return event

    def poll_event(self, timeout_s: float) -> Event | PendingElements | None:
        """Return the next event. None if it has not arrived completely within `timeout_s` seconds."""
        until_s = time.monotonic() + timeout_s
        while (event := self.protocol.next_event()) is None:
            if not self._stream.poll(until_s - time.monotonic()):
                return None
            self._fill_buffer()
        return event

    def read_into(self, target: Uint8Array) -> None:
        """Fill `target` with the next of the pending elements."""
        self.read_into_buffer(target.data)

    def read_into_buffer(self, target: memoryview) -> None:
        """Fill a buffer with the next of the pending elements."""
        filled = self.protocol.take_elements(target)
        if filled < len(target):
            self._stream.fill(target[filled:])

    def poll(self, timeout_s: float) -> bool:
        """Return whether data, or the end of the connection, arrives within `timeout_s` seconds.

        False at the deadline.
        """
        return self.protocol.unread_bytes > 0 or self._stream.poll(timeout_s)

    def wait(self) -> None:
        """Wait until data, or the end of the connection, arrives."""
        if not self.protocol.unread_bytes:
            self._stream.wait()

    def is_quiet(self) -> bool:
        """Return whether nothing has arrived: no unexpected data, and not the end of the connection."""
        return not self.protocol.unread_bytes and not self._stream.poll(0)

    def is_failure_next(self) -> bool:
        """Return whether the next event is the failure of the call. Does not wait."""
        while (kind := self.protocol.peek_kind()) is None and self._stream.poll(0):
            self._fill_buffer()
        return kind == FrameKind.FAILED

    def __enter__(self) -> FrameStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill_buffer(self) -> None:
        self.protocol.note_received(self._stream.read_into(self.protocol.receive_buffer()))


def report_progress(frames: FrameStream, written_bytes: int) -> None:
    """Tell the server how many bytes of an overlapped call's operands are written."""
    frames.send(ProgressReport(written_bytes))


def receive_progress(frames: FrameStream, timeout_s: float) -> int | None:
    """Return the client's next report of how many bytes of an overlapped call's operands are written.

    None if no report arrives within `timeout_s` seconds.

    Raises:
        ConnectionBrokenError: The client sent another frame, or the connection ended.
    """
    event = frames.poll_event(timeout_s)
    return event.written_bytes if isinstance(event, ProgressReport) else None


class FrameSource:
    """The parts of a request or response on a direct connection. See `deconvd.wire.stream_parts.PartSource`.

    It raises the error with which the server ended the call, and the errors of `FrameStream`.

    Attributes:
        ledger: The call's ledger, once the response has ended.
        failure: The error with which the server ended the call, once it was raised.

    Args:
        frames: The connection.
        part_type: The type of the stream's messages.
        first: The first message, if it has arrived already: on a server, the one in the call's head.
    """

    is_buffered: bool = False

    def __init__(
        self, frames: FrameStream, part_type: type[Message], first: bytes | None = None
    ) -> None:
        self._stream = frames
        self._part_type = part_type
        self._first = first
        self._has_ended = frames.protocol.is_peer_done
        self._unpacked: Uint8Array = _EMPTY  # of the pending elements, if they came packed
        self.ledger = ""
        self.failure: DeconvdError | None = None

    def next(self) -> Message | PendingElements | None:
        """Return the next part. None at the end."""
        if self._first is not None:
            first, self._first = self._first, None
            return parse_part(self._part_type, first)
        if self._has_ended:
            return None
        match self._stream.next_event():
            case PendingElements() as pending:
                return self._unpack(pending) if pending.is_packed else pending
            case MessagePart(data):
                return parse_part(self._part_type, data)
            case EndOfStream(ledger):
                self.ledger, self._has_ended = ledger, True
                return None
            case CallFailure(status):
                self.failure = error_from_status(status)
                raise self.failure
            case event:
                raise AssertionError(
                    f"the protocol let an event through that is not a part of a stream: {event}"
                )

    def read_into(self, target: Uint8Array) -> None:
        """Fill `target` with the next of the pending elements."""
        unpacked = self._unpacked
        if not len(unpacked):
            self._stream.read_into(target)
            return
        target[:] = unpacked[: len(target)]
        self._unpacked = unpacked[len(target) :] if len(unpacked) > len(target) else _EMPTY

    def _unpack(self, pending: PendingElements) -> PendingElements:
        if not takes_packed(self._part_type):
            name = self._part_type.DESCRIPTOR.full_name
            raise InvalidArgumentError(f"a stream of {name} must have no packed elements")
        packed = np.empty(pending.size_bytes, np.uint8)
        self._stream.read_into(packed)
        self._unpacked = unpack(packed.data)
        return PendingElements(len(self._unpacked), is_packed=True)
