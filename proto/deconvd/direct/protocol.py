"""The direct protocol: a state machine that says which end may send which frame. It does no I/O.

A direct call is a call of one of the service's methods without gRPC. A server that listens for gRPC also listens for
direct connections: on a Unix socket next to each of its Unix sockets, and on a TCP port. GetServerInfo names them. A
direct connection carries one call after another, in frames (`deconvd.direct.events`). Both ends follow the same states,
and `TRANSITIONS` contains all of them:

    NEW --HELLO (client)--> HANDSHAKE --HELLO (server)--> IDLE

    IDLE --CALL-------------> ANSWERING ----ANSWER or FAILED--> IDLE
    IDLE --OVERLAPPED_CALL--> OVERLAPPING --ANSWER or FAILED--> TRAILING
    IDLE --STREAM_CALL------> STREAMING ----END (client)------> RESPONDING --END (server)--> IDLE
    IDLE --FETCH_CALL-------> RESPONDING ---END (server)------> IDLE

    IDLE --STRIPED_CALL-----> ANSWERING ----ANSWER or FAILED--> IDLE
    IDLE --STRIPE-----------> LANDING ------END (client)------> RETURNING --END (server)--> IDLE

    STREAMING or RESPONDING --FAILED--> CLOSED
    any state --a frame that is not allowed in it--> CLOSED

TRAILING is the same as IDLE, except that late PROGRESS frames of the last call may still arrive.

Calls of Deconvolve and DeconvolveGrad MAY be overlapped: the client sends the call first, and then writes the operands
to shared memory, each from front to back, in the order of `Operation.write_order`. PROGRESS frames report the number of
bytes written so far; the last one reports all of them. So the server can upload each part as soon as it is written. The
server MAY answer before it has read every PROGRESS frame, and MUST ignore those that arrive after its answer.

Calls of Deconvolve and DeconvolveGrad MAY be striped: other connections of the client, the stripes, carry the elements.
The control connection carries the call, whose message describes each tensor, and its answer. A client SHOULD send the
call and all stripes at once. The elements of the operands that are sent, in the order of `Operation.write_order`, are
cut into pieces (`deconvd.direct.pieces`), and so are those of the results that are sent, in the operation's order. Each
piece travels once, by any stripe and in any order: PIECE, then one ELEMENTS frame with all of it, and perhaps with all
of some pieces that come next. A stripe MAY carry none. In a stripe the client sends first, and the server MUST NOT send
pieces before the client's END. The server answers once the results are computed, before or after it has sent them; the
client has them once it has the answer and the END of every stripe. A server whose processors many calls share MAY limit
the stripes of the client's next calls in its answer. If the call fails, or a stripe breaks, the server MUST close all
stripes on which it has not sent its END, and answer FAILED unless it has answered already or the control connection has
ended. A client SHOULD have greeted on all connections before it sends the call: a server that drains accepts no new
ones, but waits for the stripes of calls that have come.

Both ends may send at the same time. A client MUST wait for the server's HELLO before its first call, since another
program may listen on the port. A client that closes a connection cancels its call, unless the server has written all
of the answer: ANSWER, or END, or ANSWER and the END of every stripe. Such a call has succeeded, and the server MUST
count it so. A server that closes a connection either has not begun the call or cannot report its outcome, so the client
repeats the call over gRPC. A server MUST
close a connection whose client wants another instance. It MUST also close a connection after a call of a method with
streams has failed, since the rest of the request may still be arriving. It MAY close a connection between calls.
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
    PieceHead,
)
from deconvd.wire.stream_parts import PendingElements

__all__ = ["TRANSITIONS", "DirectProtocol", "ProtocolState", "Role"]

_RECEIVE_BUFFER_BYTES: Final = 32 << 10
"""Size of the receive buffer: large enough for a small call.

It is small because elements that are read into it must be copied again.
"""


class Role(IntEnum):
    """One of the two ends of a connection."""

    CLIENT = 0
    SERVER = 1


class ProtocolState(IntEnum):
    """The state of a connection, which says what each end may send next."""

    NEW = auto()
    HANDSHAKE = auto()
    IDLE = auto()
    ANSWERING = auto()
    OVERLAPPING = auto()
    TRAILING = auto()
    STREAMING = auto()
    RESPONDING = auto()
    LANDING = auto()
    RETURNING = auto()
    CLOSED = auto()


_CLOSED: Final = ProtocolState.CLOSED  # a global is found faster than an attribute of the enum
_read_head: Final = FRAME_HEAD.unpack_from

_CALL_STATES: Final[Mapping[int, ProtocolState]] = {
    FrameKind.CALL: ProtocolState.ANSWERING,
    FrameKind.OVERLAPPED_CALL: ProtocolState.OVERLAPPING,
    FrameKind.STREAM_CALL: ProtocolState.STREAMING,
    FrameKind.FETCH_CALL: ProtocolState.RESPONDING,
    FrameKind.STRIPED_CALL: ProtocolState.ANSWERING,
    FrameKind.STRIPE: ProtocolState.LANDING,
}

TRANSITIONS: Final[Mapping[Role, Mapping[ProtocolState, Mapping[int, ProtocolState]]]] = {
    Role.CLIENT: {
        ProtocolState.NEW: {FrameKind.HELLO: ProtocolState.HANDSHAKE},
        ProtocolState.HANDSHAKE: {},
        ProtocolState.IDLE: _CALL_STATES,
        ProtocolState.ANSWERING: {},
        ProtocolState.OVERLAPPING: {FrameKind.PROGRESS: ProtocolState.OVERLAPPING},
        ProtocolState.TRAILING: {FrameKind.PROGRESS: ProtocolState.TRAILING, **_CALL_STATES},
        ProtocolState.STREAMING: {
            FrameKind.ELEMENTS: ProtocolState.STREAMING,
            FrameKind.PACKED_ELEMENTS: ProtocolState.STREAMING,
            FrameKind.END: ProtocolState.RESPONDING,
        },
        ProtocolState.RESPONDING: {},
        ProtocolState.LANDING: {
            FrameKind.PIECE: ProtocolState.LANDING,
            FrameKind.ELEMENTS: ProtocolState.LANDING,
            FrameKind.END: ProtocolState.RETURNING,
        },
        ProtocolState.RETURNING: {},
        ProtocolState.CLOSED: {},
    },
    Role.SERVER: {
        ProtocolState.NEW: {},
        ProtocolState.HANDSHAKE: {FrameKind.HELLO: ProtocolState.IDLE},
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
            FrameKind.PACKED_ELEMENTS: ProtocolState.STREAMING,
            FrameKind.FAILED: ProtocolState.CLOSED,
        },
        ProtocolState.RESPONDING: {
            FrameKind.MESSAGE: ProtocolState.RESPONDING,
            FrameKind.ELEMENTS: ProtocolState.RESPONDING,
            FrameKind.PACKED_ELEMENTS: ProtocolState.RESPONDING,
            FrameKind.END: ProtocolState.IDLE,
            FrameKind.FAILED: ProtocolState.CLOSED,
        },
        ProtocolState.LANDING: {},
        ProtocolState.RETURNING: {
            FrameKind.PIECE: ProtocolState.RETURNING,
            FrameKind.ELEMENTS: ProtocolState.RETURNING,
            FrameKind.END: ProtocolState.IDLE,
        },
        ProtocolState.CLOSED: {},
    },
}
"""For each end and state: the frames that it may send, and the state that follows each."""


class DirectProtocol:
    """One end of a connection: events to bytes, bytes to events, and the state.

    To receive, the caller reads bytes into `receive_buffer`, calls `note_received`, and then calls `next_event` until
    it returns None. Elements are not copied here. `next_event` returns a `PendingElements`, and the caller takes the
    elements from two places: first those that are already in the buffer, with `take_elements`, and then the rest from
    the socket, directly to where they belong.

        bytes on the wire   | head of ELEMENTS | elements           | elements         | next frame ...
        where they are      |<---------- receive buffer ----------->|<---- socket ---------------------
        who takes them      | next_event()     | take_elements()    | the caller reads | next_event()

    One thread may send while another receives: no state can be left both by sending and by receiving.

    The code that small calls run has few functions on purpose: each function call costs a fraction of a microsecond.

    Attributes:
        state: The connection's state.
        unread_bytes: Number of bytes in the buffer that no event has consumed.

    Args:
        role: Which end this object is.
        instance: On a server, its own id. On a client, the id of the wanted server, or `ANY_INSTANCE`.
    """

    def __init__(self, role: Role, instance: bytes) -> None:
        self.state = ProtocolState.NEW
        self.unread_bytes = 0
        self._instance = instance
        self._peer = Role(1 - role)
        self._may_send = TRANSITIONS[role]
        self._may_receive = TRANSITIONS[self._peer]
        self._buffer = memoryview(bytearray(_RECEIVE_BUFFER_BYTES))
        self._begin = 0  # where the unread bytes start in the buffer
        self._pending_bytes = 0  # bytes of the current elements frame that are not taken yet

    @property
    def is_idle(self) -> bool:
        """Whether the client may begin a call."""
        return self.state is ProtocolState.IDLE or self.state is ProtocolState.TRAILING

    @property
    def is_peer_done(self) -> bool:
        """Whether the peer has no more parts to send in the current call."""
        state = self.state
        return (
            state is not ProtocolState.CLOSED and FrameKind.ELEMENTS not in self._may_receive[state]
        )

    def send(self, event: Event) -> bytes:
        """Return the bytes to send for an event.

        Raises:
            LocalProtocolError: This end may not send the event in this state.
            ConnectionClosedError: The connection has ended.
            MessageTooLargeError: The event's message is too large.
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
                f"a message of a direct call must have at most {MAX_MESSAGE_BYTES} bytes, got {size_bytes}"
            )
        if state is not before:  # an unconditional write could undo a change by the other thread
            self.state = state
        return data

    def begin_elements(self, pending: PendingElements) -> bytes:
        """Return the bytes to send before some elements. Raises the same errors as `send`."""
        kind = FrameKind.PACKED_ELEMENTS if pending.is_packed else FrameKind.ELEMENTS
        if kind not in self._may_send[self.state]:
            raise _send_error(kind, self.state)
        return FRAME_HEAD.pack(kind, pending.size_bytes)  # elements never change the state

    def begin_piece(self, number: int, size_bytes: int) -> bytes:
        """Return the bytes to send before a run of pieces of a striped call. Raises the same errors as `send`."""
        elements = PendingElements(size_bytes)
        return self.send(PieceHead(number)) + self.begin_elements(elements)

    def receive_buffer(self) -> memoryview:
        """Return the buffer to read the next bytes into. It is never empty once `next_event` has returned None."""
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
        """Record that `size_bytes` bytes were read into the start of `receive_buffer`."""
        self.unread_bytes += size_bytes

    def peek_kind(self) -> int | None:
        """Return the kind of the next frame without consuming it. None until its head has arrived."""
        has_come = not self._pending_bytes and self.unread_bytes >= FRAME_HEAD_BYTES
        return self._buffer[self._begin] if has_come else None

    def next_event(self) -> Event | PendingElements | None:
        """Return the next event. None until more bytes have arrived.

        Raises:
            RemoteProtocolError: The peer has sent a frame that is malformed or not allowed.
            LocalProtocolError: The pending elements were not taken yet.
            ConnectionClosedError: The connection has ended.
        """
        before, unread_bytes, begin = self.state, self.unread_bytes, self._begin
        if self._pending_bytes:
            raise LocalProtocolError(
                f"{self._pending_bytes} bytes of elements must be taken before the next event"
            )
        if before is _CLOSED:
            raise ConnectionClosedError("the connection has ended")
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
            # elements never change the state
            return PendingElements(size_bytes, is_packed=number == FrameKind.PACKED_ELEMENTS)
        frame_bytes = FRAME_HEAD_BYTES + size_bytes
        if unread_bytes < frame_bytes:
            if len(self._buffer) < frame_bytes:  # a large message: give it a buffer of its own
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
        if state is not before:  # as in `send`
            self.state = state
        return event

    def take_elements(self, target: memoryview) -> int:
        """Copy pending elements that are in the buffer to the start of `target`, and return how many bytes they are.

        The caller must read the rest of `target` from the socket. Raises LocalProtocolError if `target` is larger than
        the pending elements.
        """
        if len(target) > self._pending_bytes:
            raise LocalProtocolError(
                f"at most {self._pending_bytes} bytes of elements can be taken, got {len(target)}"
            )
        self._pending_bytes -= len(target)
        count = min(len(target), self.unread_bytes)
        target[:count] = self._buffer[self._begin : self._begin + count]
        self._begin += count
        self.unread_bytes -= count
        return count

    def _move_to(self, buffer: memoryview) -> None:
        """Move the unread bytes to the start of a buffer, and use that buffer from now on."""
        rest = bytes(self._buffer[self._begin : self._begin + self.unread_bytes])
        self._buffer = buffer
        self._buffer[: len(rest)] = rest
        self._begin = 0

    def _check_instance(self, hello: Hello) -> None:
        """Raise RemoteProtocolError unless client and server agree on the server's instance."""
        ids = (hello.instance, self._instance)
        if hello.instance != self._instance and ANY_INSTANCE not in ids:
            raise RemoteProtocolError("the peer's handshake names another server instance")

    def _remote_protocol_error(
        self, number: int, size_bytes: int, allowed: Mapping[int, ProtocolState]
    ) -> RemoteProtocolError:
        """Return the error for a frame that the peer may not send."""
        sizes = PAYLOAD_SIZES.get(number)
        if sizes is None:
            return RemoteProtocolError(f"the peer sent a frame of the unknown kind {number}")
        what = f"the peer sent {FrameKind(number).name} with a payload of {size_bytes} bytes"
        if number in allowed:
            return RemoteProtocolError(f"{what}, where from {sizes[0]} to {sizes[-1]} are allowed")
        names = ", ".join(FrameKind(other).name for other in allowed) or "nothing"
        return RemoteProtocolError(f"{what}, where the {self._peer.name.lower()} may send {names}")


def _send_error(kind: FrameKind, state: ProtocolState) -> Exception:
    """Return the error for a frame that this end may not send."""
    if state is ProtocolState.CLOSED:
        return ConnectionClosedError("the connection has ended")
    return LocalProtocolError(f"{kind.name} must not be sent in the state {state.name}")
