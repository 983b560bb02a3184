"""The direct protocol: which end of a line may say what when. It does no I/O: bytes in, events out, and back.

Direct calls are the service's methods without gRPC, on lines of their own, for ends that both know this. A server that
listens for gRPC listens for direct calls too: on a Unix socket beside each of its own, and on a TCP port. GetServerInfo
tells which. A line is a connection to one of them: it carries one call after the other, in frames. How those are
written is told in `deconvd.direct.events`.

A line is in one of these states, which both ends follow. `TRANSITIONS` is the whole of it.

    NEW --HELLO--> GREETED --HELLO--> IDLE
    IDLE --CALL---------> ANSWERING --ANSWER or FAILED--> IDLE
    IDLE --EARLY_CALL---> WRITING --ANSWER or FAILED--> TRAILING, which is IDLE, but WRITTEN may still come
    IDLE --STREAM_CALL--> STREAMING --END--> RESPONDING --END--> IDLE
    IDLE --FETCH_CALL---> RESPONDING --END--> IDLE
    a call in parts that fails, and whatever comes against the rules --> CLOSED

A call of Deconvolve or DeconvolveGrad may be early: its client is still writing the operands that are in shared memory,
in the order of `Operation.write_order`, each from its begin to its end. It says now and then how far it has come, and
at last that all are written. Thus they can be uploaded while they are being written. A server need not wait for the
rest to answer: what is said after that it passes over.

Both send at once; the order is that of the stream. A client waits for the greeting before its first call, so as not to
call a stranger at the port. A client that closes a line gives its call up. A server that closes it has not begun the
call, or cannot say what came of it: the client makes it again by gRPC. A server closes a line that means another
instance, and after a call in parts that has failed, since the rest of the request may be on its way. It MAY close one
between calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, auto
from typing import Final

from deconvd.direct.connection_errors import (
    ConnectionClosedError,
    LocalProtocolError,
    MessageTooLargeError,
    RemoteProtocolError,
)
from deconvd.direct.events import (
    ANY_INSTANCE,
    EVENT_PARSERS,
    FRAME_HEAD,
    FRAME_HEAD_BYTES,
    FRAME_KINDS,
    MAX_MESSAGE_BYTES,
    PAYLOAD_SIZES,
    CallHead,
    Event,
    FrameKind,
    Hello,
)
from deconvd.wire.stream_parts import PendingElements, Uint8Array

__all__ = ["TRANSITIONS", "DirectProtocol", "ProtocolState", "Role"]

_RECEIVE_BUFFER_BYTES: Final = 32 << 10
"""What is read ahead: whole brief calls, and little of elements that belong elsewhere."""


class Role(IntEnum):
    """One of the two ends."""

    CLIENT = 0
    SERVER = 1


class ProtocolState(IntEnum):
    """Where a line is: what may be said next, and by whom."""

    NEW = auto()
    GREETED = auto()
    IDLE = auto()
    ANSWERING = auto()
    OVERLAPPING = auto()
    TRAILING = auto()
    STREAMING = auto()
    RESPONDING = auto()
    CLOSED = auto()


_CLOSED: Final = ProtocolState.CLOSED  # quicker to find
_read_head: Final = FRAME_HEAD.unpack_from

_CALL_STATES: Final[Mapping[int, ProtocolState]] = {
    FrameKind.CALL: ProtocolState.ANSWERING,
    FrameKind.OVERLAPPED_CALL: ProtocolState.OVERLAPPING,
    FrameKind.STREAM_CALL: ProtocolState.STREAMING,
    FrameKind.FETCH_CALL: ProtocolState.RESPONDING,
}

TRANSITIONS: Final[Mapping[Role, Mapping[ProtocolState, Mapping[int, ProtocolState]]]] = {
    Role.CLIENT: {
        ProtocolState.NEW: {FrameKind.HELLO: ProtocolState.GREETED},
        ProtocolState.GREETED: {},
        ProtocolState.IDLE: _CALL_STATES,
        ProtocolState.ANSWERING: {},
        ProtocolState.OVERLAPPING: {FrameKind.PROGRESS: ProtocolState.OVERLAPPING},
        ProtocolState.TRAILING: {FrameKind.PROGRESS: ProtocolState.TRAILING, **_CALL_STATES},
        ProtocolState.STREAMING: {
            FrameKind.ELEMENTS: ProtocolState.STREAMING,
            FrameKind.MISSING_ELEMENTS: ProtocolState.STREAMING,
            FrameKind.END: ProtocolState.RESPONDING,
        },
        ProtocolState.RESPONDING: {},
        ProtocolState.CLOSED: {},
    },
    Role.SERVER: {
        ProtocolState.NEW: {},
        ProtocolState.GREETED: {FrameKind.HELLO: ProtocolState.IDLE},
        ProtocolState.IDLE: {},
        ProtocolState.ANSWERING: {
            FrameKind.ANSWER: ProtocolState.IDLE,
            FrameKind.FAILED: ProtocolState.IDLE,
        },
        ProtocolState.OVERLAPPING: {
            FrameKind.ANSWER: ProtocolState.TRAILING,
            FrameKind.FAILED: ProtocolState.TRAILING,
        },
        ProtocolState.TRAILING: {},
        ProtocolState.STREAMING: {
            FrameKind.MESSAGE: ProtocolState.STREAMING,
            FrameKind.ELEMENTS: ProtocolState.STREAMING,
            FrameKind.FAILED: ProtocolState.CLOSED,
        },
        ProtocolState.RESPONDING: {
            FrameKind.MESSAGE: ProtocolState.RESPONDING,
            FrameKind.ELEMENTS: ProtocolState.RESPONDING,
            FrameKind.END: ProtocolState.IDLE,
            FrameKind.FAILED: ProtocolState.CLOSED,
        },
        ProtocolState.CLOSED: {},
    },
}
"""What each end may send in which state, and the state that follows."""


class DirectProtocol:
    """One end of a line: turns events into bytes, and bytes into events, and knows which may come.

    What comes is put into `space` and told to `note_received`; `next_event` then returns what it says. Elements
    are not touched: the event is that they are ahead, and the next bytes, of which `take_elements` gives those that
    came too early, are theirs. One thread may send while another receives: no state is left by both.

    What small calls go through is written in few functions: each costs a part of a microsecond.

    Attributes:
        state: Where the line is.
        unread_bytes: How many bytes have come that are not taken.

    Args:
        role: Which end it is.
        instance: The id of the server: its own, or the one that is meant.
    """

    def __init__(self, role: Role, instance: bytes) -> None:
        self.state = ProtocolState.NEW
        self.unread_bytes = 0
        self._instance = instance
        self._peer = Role(1 - role)
        self._may_send = TRANSITIONS[role]
        self._may_receive = TRANSITIONS[self._peer]
        self._buffer = memoryview(bytearray(_RECEIVE_BUFFER_BYTES))
        self._begin = 0  # of what has come and is not taken
        self._pending_bytes = 0  # elements that are not taken

    @property
    def is_idle(self) -> bool:
        """Whether the next call may begin."""
        return self.state is ProtocolState.IDLE or self.state is ProtocolState.TRAILING

    @property
    def is_peer_done(self) -> bool:
        """Whether the peer has sent all parts that it has in the call under way."""
        state = self.state
        return (
            state is not ProtocolState.CLOSED and FrameKind.ELEMENTS not in self._may_receive[state]
        )

    def send(self, event: Event) -> bytes:
        """Return the bytes to send for an event.

        Raises:
            LocalProtocolError: It is not ours to say in this state.
            ConnectionClosedError: The line has ended.
            MessageTooLargeError: Its message is too large.
        """
        before = self.state
        kind = event.kind if isinstance(event, CallHead) else FRAME_KINDS[type(event)]
        state = self._may_send[before].get(kind)
        if state is None:
            raise _send_error(kind, before)
        data = event.pack()
        if len(data) > FRAME_HEAD_BYTES + MAX_MESSAGE_BYTES:
            size_bytes = len(data) - FRAME_HEAD_BYTES
            raise MessageTooLargeError(
                f"{size_bytes} bytes, too many for a message of a direct call"
            )
        if state is not before:  # or one thread could undo what another has just done
            self.state = state
        return data

    def begin_elements(self, ahead: PendingElements) -> bytes:
        """Return the bytes to send before elements. Raises as `send`."""
        kind = FrameKind.MISSING_ELEMENTS if ahead.is_missing else FrameKind.ELEMENTS
        if kind not in self._may_send[self.state]:
            raise _send_error(kind, self.state)
        return FRAME_HEAD.pack(kind, ahead.size_bytes)  # they leave the state as it is

    def receive_buffer(self) -> memoryview:
        """Return where the next bytes are to be put, from its begin. Not empty once there is no next event."""
        end = self._begin + self.unread_bytes
        if not self.unread_bytes:
            self._begin = end = 0
            if len(self._buffer) > _RECEIVE_BUFFER_BYTES:
                self._buffer = memoryview(bytearray(_RECEIVE_BUFFER_BYTES))
        elif end == len(self._buffer) or self._begin > _RECEIVE_BUFFER_BYTES // 2:
            self._move_to(self._buffer)
            end = self.unread_bytes
        return self._buffer[end:]

    def note_received(self, size_bytes: int) -> None:
        """Note that so many bytes were put into `space`."""
        self.unread_bytes += size_bytes

    def peek_kind(self) -> int | None:
        """Return the kind of the next frame, which is not taken; None until it has come."""
        has_come = not self._pending_bytes and self.unread_bytes >= FRAME_HEAD_BYTES
        return self._buffer[self._begin] if has_come else None

    def next_event(self) -> Event | PendingElements | None:
        """Return the next event; None until more bytes have come.

        Raises:
            RemoteProtocolError: The peer has sent what it may not.
            LocalProtocolError: Elements that are ahead were not taken.
            ConnectionClosedError: The line has ended.
        """
        before, unread_bytes, begin = self.state, self.unread_bytes, self._begin
        if self._pending_bytes:
            raise LocalProtocolError(
                f"{self._pending_bytes} bytes of elements are to be taken first"
            )
        if before is _CLOSED:
            raise ConnectionClosedError("the line has ended")
        if unread_bytes < FRAME_HEAD_BYTES:
            return None
        number, size_bytes = _read_head(self._buffer, begin)
        allowed = self._may_receive[before]
        if number not in allowed or size_bytes not in PAYLOAD_SIZES.get(number, ()):
            self.state = ProtocolState.CLOSED
            raise self._remote_protocol_error(number, size_bytes, allowed)
        parse = EVENT_PARSERS.get(number)
        if parse is None:
            self._begin = begin + FRAME_HEAD_BYTES
            self.unread_bytes = unread_bytes - FRAME_HEAD_BYTES
            self._pending_bytes = size_bytes
            return PendingElements(
                size_bytes, number == FrameKind.MISSING_ELEMENTS
            )  # the state stays
        frame_bytes = FRAME_HEAD_BYTES + size_bytes
        if unread_bytes < frame_bytes:
            if len(self._buffer) < frame_bytes:
                self._move_to(memoryview(bytearray(frame_bytes)))
            return None
        payload = bytes(self._buffer[begin + FRAME_HEAD_BYTES : begin + frame_bytes])
        self._begin = begin + frame_bytes
        self.unread_bytes = unread_bytes - frame_bytes
        try:
            event = parse(payload)
            if isinstance(event, Hello):
                self._check_instance(event)
        except RemoteProtocolError:
            self.state = ProtocolState.CLOSED
            raise
        state = allowed[event.kind if isinstance(event, CallHead) else number]
        if state is not before:  # see `send`
            self.state = state
        return event

    def take_elements(self, target: Uint8Array) -> int:
        """Set the begin of `target` to elements that have come too early, and return how many bytes they are.

        The next bytes of the stream are the rest of `target`. Raises LocalProtocolError if fewer are ahead.
        """
        if len(target) > self._pending_bytes:
            raise LocalProtocolError(
                f"{len(target)} bytes of the {self._pending_bytes} that are ahead"
            )
        self._pending_bytes -= len(target)
        count = min(len(target), self.unread_bytes)
        target[:count] = self._buffer[self._begin : self._begin + count]
        self._begin += count
        self.unread_bytes -= count
        return count

    def _move_to(self, buffer: memoryview) -> None:
        """Move what has come and is not taken to the begin of a buffer."""
        rest = bytes(self._buffer[self._begin : self._begin + self.unread_bytes])
        self._buffer = buffer
        self._buffer[: len(rest)] = rest
        self._begin = 0

    def _check_instance(self, hello: Hello) -> None:
        """Raise RemoteProtocolError unless both ends mean the same server."""
        ids = (hello.instance, self._instance)
        if hello.instance != self._instance and ANY_INSTANCE not in ids:
            raise RemoteProtocolError("a greeting from or to another server")

    def _remote_protocol_error(
        self, number: int, size_bytes: int, allowed: Mapping[int, ProtocolState]
    ) -> RemoteProtocolError:
        """Return what is wrong with a frame."""
        sizes = PAYLOAD_SIZES.get(number)
        if sizes is None:
            return RemoteProtocolError(f"a frame of the unknown kind {number}")
        what = f"{FrameKind(number).name} of {size_bytes} bytes"
        if number in allowed:
            return RemoteProtocolError(f"{what}, and from {sizes[0]} to {sizes[-1]} may be")
        names = ", ".join(FrameKind(other).name for other in allowed) or "nothing"
        return RemoteProtocolError(f"{what} where the {self._peer.name.lower()} may send {names}")


def _send_error(kind: FrameKind, state: ProtocolState) -> Exception:
    """Return what is wrong with sending a frame."""
    if state is ProtocolState.CLOSED:
        return ConnectionClosedError("the line has ended")
    return LocalProtocolError(f"{kind.name} is not to be sent while {state.name}")
