"""A line: a byte stream that speaks the direct protocol. See `deconvd.direct.protocol`.

Elements are sent from where they lie, and received where they are to be.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from google.protobuf.message import Message

from deconvd.direct.byte_stream import ByteStream
from deconvd.direct.events import End, Event, Failed, FrameKind, MessagePart, Written
from deconvd.direct.protocol import DirectProtocol
from deconvd.wire.status import error_from_status
from deconvd.wire.stream_parts import Ahead, Bytes, Part, parsed

__all__ = ["FrameSource", "Line", "hear_written", "tell_written"]

_FRAME_BYTES: Final = 16 << 20
"""Elements in a frame, at most: enough that a frame costs nothing beside its bytes."""


class Line:
    """One end of a line. One thread may send while another receives; anyone may `shut`.

    Sending and receiving raise a LineBrokenError when the line is of no more use: see `connection_errors`.

    Attributes:
        protocol: Where the line is, and what may come.
        set_deadline, shut, end_gently, close: Those of the stream.
    """

    def __init__(self, stream: ByteStream, protocol: DirectProtocol) -> None:
        self.protocol = protocol
        self._stream = stream
        # not as methods, which would be one more call each
        self.set_deadline: Callable[[float | None], None] = stream.set_deadline
        self.shut: Callable[[], None] = stream.shut
        self.end_gently: Callable[[float], None] = stream.end_gently
        self.close: Callable[[], None] = stream.close

    def send(self, event: Event) -> None:
        """Send an event."""
        self._stream.write(self.protocol.send(event))

    def send_part(self, part: Part) -> None:
        """Send a part of a stream."""
        if isinstance(part, Message):
            self.send(MessagePart(part.SerializeToString()))
            return
        for piece in part.pieces(_FRAME_BYTES):
            ahead = Ahead(len(piece.data), is_missing=piece.is_missing)
            self._stream.write(self.protocol.begin_elements(ahead), piece.data)

    def next_event(self) -> Event | Ahead:
        """Wait for the next event, and return it."""
        event = self.protocol.next_event() if self.protocol.unread_bytes else None
        while event is None:
            self.protocol.note_received(self._stream.read_into(self.protocol.space()))
            event = self.protocol.next_event()
        return event

    def event_within(self, timeout_s: float) -> Event | Ahead | None:
        """Return the next event; None if it does not come whole within so many seconds."""
        until_s = time.monotonic() + timeout_s
        while (event := self.protocol.next_event()) is None:
            if not self._stream.has_come(until_s - time.monotonic()):
                return None
            self._read_ahead()
        return event

    def read_into(self, target: Bytes) -> None:
        """Set `target` to the next of the elements that are ahead."""
        filled = self.protocol.take_elements(target)
        while filled < len(target):
            filled += self._stream.read_into(target[filled:].data)

    def has_come(self, timeout_s: float) -> bool:
        """Return whether anything comes within so many seconds, if only the line's end; at the deadline False."""
        return self.protocol.unread_bytes > 0 or self._stream.has_come(timeout_s)

    def wait(self) -> None:
        """Wait until something comes, if only the line's end."""
        if not self.protocol.unread_bytes:
            self._stream.wait()

    def is_quiet(self) -> bool:
        """Return whether nothing has come that was not asked for, not even the line's end."""
        return not self.protocol.unread_bytes and not self._stream.has_come(0)

    def next_is_failure(self) -> bool:
        """Return whether the call has failed, as the next event will say."""
        while (kind := self.protocol.next_kind()) is None and self._stream.has_come(0):
            self._read_ahead()
        return kind == FrameKind.FAILED

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_ahead(self) -> None:
        self.protocol.note_received(self._stream.read_into(self.protocol.space()))


def tell_written(line: Line, size_bytes: int) -> None:
    """Say how many bytes of an early call's operands are written."""
    line.send(Written(size_bytes))


def hear_written(line: Line, timeout_s: float) -> int | None:
    """Return how many bytes of an early call's operands are written, as the client says next.

    None if it does not say so within so many seconds.

    Raises:
        LineBrokenError: It says something else, or goes.
    """
    event = line.event_within(timeout_s)
    return event.size_bytes if isinstance(event, Written) else None


class FrameSource:
    """The parts of a request or a response that a line's frames carry. See `deconvd.wire.stream_parts.PartSource`.

    It raises what a server says that a call failed with, and as `Line` does.

    Attributes:
        ledger: What came with the last of them.

    Args:
        part_type: The type of the stream's messages.
        first: The first of them, if it has come already.
    """

    def __init__(self, line: Line, part_type: type[Message], first: bytes | None = None) -> None:
        self._line = line
        self._part_type = part_type
        self._first = first
        self._is_whole = line.protocol.is_peer_done
        self.ledger = ""

    def next(self) -> Message | Ahead | None:
        """Return the next part; None at the end."""
        if self._first is not None:
            first, self._first = self._first, None
            return parsed(self._part_type, first)
        if self._is_whole:
            return None
        match self._line.next_event():
            case Ahead() as ahead:
                return ahead
            case MessagePart(data):
                return parsed(self._part_type, data)
            case End(ledger):
                self.ledger, self._is_whole = ledger, True
                return None
            case Failed(status):
                raise error_from_status(status)
            case event:
                raise AssertionError(f"no part of a call: {event}")

    def read_into(self, target: Bytes) -> None:
        """Read the next of the elements ahead."""
        self._line.read_into(target)
