"""A line: a byte stream that speaks the direct protocol. See `deconvd.direct.protocol`.

Elements are sent from where they lie, and received where they are to be.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

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
from deconvd.wire.status import error_from_status
from deconvd.wire.stream_parts import Part, PendingElements, Uint8Array, parse_part

__all__ = ["FrameSource", "FrameStream", "receive_progress", "report_progress"]

_MAX_FRAME_BYTES: Final = 16 << 20
"""Elements in a frame, at most: enough that a frame costs nothing beside its bytes."""


class FrameStream:
    """One end of a line. One thread may send while another receives; anyone may `shut`.

    Sending and receiving raise a ConnectionBrokenError when the line is of no more use: see `connection_errors`.

    Attributes:
        protocol: Where the line is, and what may come.
        set_deadline, shut, end_gently, close: Those of the stream.
    """

    def __init__(self, stream: ByteStream, protocol: DirectProtocol) -> None:
        self.protocol = protocol
        self._stream = stream
        # not as methods, which would be one more call each
        self.set_deadline: Callable[[float | None], None] = stream.set_deadline
        self.shutdown: Callable[[], None] = stream.shutdown
        self.half_close_and_drain: Callable[[float], None] = stream.half_close_and_drain
        self.close: Callable[[], None] = stream.close

    def send(self, event: Event) -> None:
        """Send an event."""
        self._stream.write(self.protocol.send(event))

    def send_part(self, part: Part) -> None:
        """Send a part of a stream."""
        if isinstance(part, Message):
            self.send(MessagePart(part.SerializeToString()))
            return
        for piece in part.pieces(_MAX_FRAME_BYTES):
            ahead = PendingElements(len(piece.data), is_missing=piece.is_missing)
            self._stream.write(self.protocol.begin_elements(ahead), piece.data)

    def next_event(self) -> Event | PendingElements:
        """Wait for the next event, and return it."""
        protocol = self.protocol
        event = protocol.next_event() if protocol.unread_bytes else None
        while event is None:
            protocol.unread_bytes += self._stream.read_into(protocol.receive_buffer())
            event = protocol.next_event()
        return event

    def poll_event(self, timeout_s: float) -> Event | PendingElements | None:
        """Return the next event; None if it does not come whole within so many seconds."""
        until_s = time.monotonic() + timeout_s
        while (event := self.protocol.next_event()) is None:
            if not self._stream.poll(until_s - time.monotonic()):
                return None
            self._fill_buffer()
        return event

    def read_into(self, target: Uint8Array) -> None:
        """Set `target` to the next of the elements that are ahead."""
        filled = self.protocol.take_elements(target)
        while filled < len(target):
            filled += self._stream.read_into(target[filled:].data)

    def poll(self, timeout_s: float) -> bool:
        """Return whether anything comes within so many seconds, if only the line's end; at the deadline False."""
        return self.protocol.unread_bytes > 0 or self._stream.poll(timeout_s)

    def wait(self) -> None:
        """Wait until something comes, if only the line's end."""
        if not self.protocol.unread_bytes:
            self._stream.wait()

    def is_quiet(self) -> bool:
        """Return whether nothing has come that was not asked for, not even the line's end."""
        return not self.protocol.unread_bytes and not self._stream.poll(0)

    def is_failure_next(self) -> bool:
        """Return whether the call has failed, as the next event will say."""
        while (kind := self.protocol.peek_kind()) is None and self._stream.poll(0):
            self._fill_buffer()
        return kind == FrameKind.FAILED

    def __enter__(self) -> FrameStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill_buffer(self) -> None:
        self.protocol.note_received(self._stream.read_into(self.protocol.receive_buffer()))


def report_progress(line: FrameStream, size_bytes: int) -> None:
    """Say how many bytes of an early call's operands are written."""
    line.send(ProgressReport(size_bytes))


def receive_progress(line: FrameStream, timeout_s: float) -> int | None:
    """Return how many bytes of an early call's operands are written, as the client says next.

    None if it does not say so within so many seconds.

    Raises:
        ConnectionBrokenError: It says something else, or goes.
    """
    event = line.poll_event(timeout_s)
    return event.written_bytes if isinstance(event, ProgressReport) else None


class FrameSource:
    """The parts of a request or a response that a line's frames carry. See `deconvd.wire.stream_parts.PartSource`.

    It raises what a server says that a call failed with, and as `Line` does.

    Attributes:
        ledger: What came with the last of them.

    Args:
        part_type: The type of the stream's messages.
        first: The first of them, if it has come already.
    """

    def __init__(
        self, line: FrameStream, part_type: type[Message], first: bytes | None = None
    ) -> None:
        self._stream = line
        self._part_type = part_type
        self._first = first
        self._has_ended = line.protocol.is_peer_done
        self.ledger = ""

    def next(self) -> Message | PendingElements | None:
        """Return the next part; None at the end."""
        if self._first is not None:
            first, self._first = self._first, None
            return parse_part(self._part_type, first)
        if self._has_ended:
            return None
        match self._stream.next_event():
            case PendingElements() as ahead:
                return ahead
            case MessagePart(data):
                return parse_part(self._part_type, data)
            case EndOfStream(ledger):
                self.ledger, self._has_ended = ledger, True
                return None
            case CallFailure(status):
                raise error_from_status(status)
            case event:
                raise AssertionError(f"no part of a call: {event}")

    def read_into(self, target: Uint8Array) -> None:
        """Read the next of the elements ahead."""
        self._stream.read_into(target)
