"""The direct protocol without any I/O: whatever comes is an event or the peer's fault, and both ends agree."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import numpy as np
import pytest
from google.rpc import status_pb2
from hypothesis import given
from hypothesis import strategies as st

from deconvd.direct import events
from deconvd.direct.connection_errors import (
    ConnectionClosedError,
    LocalProtocolError,
    MessageTooLargeError,
    RemoteProtocolError,
)
from deconvd.direct.events import (
    ANY_INSTANCE,
    FRAME_HEAD_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_STRIPES_COUNT,
    TRANSFER_ID_BYTES,
    Answer,
    CallFailure,
    CallHead,
    EndOfStream,
    Event,
    FrameKind,
    Hello,
    MessagePart,
    MethodCode,
    PieceHead,
    ProgressReport,
    StripedCallHead,
    StripeHead,
    pack_frame,
)
from deconvd.direct.protocol import TRANSITIONS, DirectProtocol, ProtocolState, Role
from deconvd.wire.stream_parts import PendingElements

INSTANCE = bytes(range(16))
STATUS = status_pb2.Status(code=8, message="no room")

CALL = CallHead(MethodCode.Deconvolve, 30, b"x")
EARLY_CALL = CallHead(MethodCode.DeconvolveGrad, 30, b"x", is_overlapped=True, written_bytes=7)
STREAM_CALL = CallHead(MethodCode.PutTensor, 30, b"x")
FETCH_CALL = CallHead(MethodCode.GetTensor, 30, b"x")
TRANSFER = bytes(range(100, 116))
STRIPED_CALL = StripedCallHead(MethodCode.DeconvolveGrad, 30, b"x", TRANSFER, 4)

HANDSHAKE: list[tuple[Role, Event]] = [(Role.CLIENT, Hello(INSTANCE))]
IDLE: list[tuple[Role, Event]] = [*HANDSHAKE, (Role.SERVER, Hello(INSTANCE))]
STREAMING: list[tuple[Role, Event]] = [*IDLE, (Role.CLIENT, STREAM_CALL)]
WRITING: list[tuple[Role, Event]] = [*IDLE, (Role.CLIENT, EARLY_CALL)]
LANDING: list[tuple[Role, Event]] = [*IDLE, (Role.CLIENT, StripeHead(TRANSFER))]
WAYS: dict[ProtocolState, list[tuple[Role, Event]]] = {
    ProtocolState.NEW: [],
    ProtocolState.HANDSHAKE: HANDSHAKE,
    ProtocolState.IDLE: IDLE,
    ProtocolState.ANSWERING: [*IDLE, (Role.CLIENT, CALL)],
    ProtocolState.OVERLAPPING: WRITING,
    ProtocolState.TRAILING: [*WRITING, (Role.SERVER, Answer(b"y", ""))],
    ProtocolState.STREAMING: STREAMING,
    ProtocolState.RESPONDING: [*STREAMING, (Role.CLIENT, EndOfStream())],
    ProtocolState.LANDING: LANDING,
    ProtocolState.RETURNING: [*LANDING, (Role.CLIENT, EndOfStream())],
    ProtocolState.CLOSED: [*STREAMING, (Role.SERVER, CallFailure(STATUS))],
}
"""What is said before a line is in each state."""

EXAMPLES: dict[FrameKind, Event | PendingElements] = {
    FrameKind.HELLO: Hello(INSTANCE),
    FrameKind.CALL: CALL,
    FrameKind.OVERLAPPED_CALL: EARLY_CALL,
    FrameKind.STREAM_CALL: STREAM_CALL,
    FrameKind.FETCH_CALL: FETCH_CALL,
    FrameKind.MESSAGE: MessagePart(b"abc"),
    FrameKind.ELEMENTS: PendingElements(3),
    FrameKind.END: EndOfStream("server_us=1"),
    FrameKind.FAILED: CallFailure(STATUS),
    FrameKind.PROGRESS: ProgressReport(1 << 40),
    FrameKind.ANSWER: Answer(b"y", "server_us=1", 4),
    FrameKind.STRIPED_CALL: STRIPED_CALL,
    FrameKind.STRIPE: StripeHead(TRANSFER),
    FrameKind.PIECE: PieceHead(258),
    FrameKind.PACKED_ELEMENTS: PendingElements(9, is_packed=True),
}

FRAMES = {
    FrameKind.HELLO: "01000000 14000000 64636437" + INSTANCE.hex(),
    FrameKind.CALL: "02000000 19000000 01 00 000000000000 80c3c90100000000 0000000000000000 78",
    FrameKind.OVERLAPPED_CALL: "02000000 19000000 02 01 000000000000 80c3c90100000000 0700000000000000 78",
    FrameKind.STREAM_CALL: "02000000 19000000 05 00 000000000000 80c3c90100000000 0000000000000000 78",
    FrameKind.FETCH_CALL: "02000000 19000000 06 00 000000000000 80c3c90100000000 0000000000000000 78",
    FrameKind.MESSAGE: "03000000 03000000 616263",
    FrameKind.ELEMENTS: "04000000 03000000",
    FrameKind.END: "06000000 0b000000" + b"server_us=1".hex(),
    FrameKind.FAILED: "07000000 0b000000 0808 1207" + b"no room".hex(),
    FrameKind.PROGRESS: "08000000 08000000 0000000000010000",
    FrameKind.ANSWER: "09000000 14000000 0b00 04 0000000000" + b"server_us=1y".hex(),
    FrameKind.STRIPED_CALL: "0d000000 21000000 02 04 000000000000 80c3c90100000000"
    + TRANSFER.hex()
    + "78",
    FrameKind.STRIPE: "0e000000 10000000" + TRANSFER.hex(),
    FrameKind.PIECE: "0f000000 08000000 0201000000000000",
    FrameKind.PACKED_ELEMENTS: "10000000 09000000",
}
"""Each example on the line: what both ends of the version "dcd7" rely on."""

KINDS = pytest.mark.parametrize("kind", FrameKind, ids=lambda kind: kind.name)
ROLES = pytest.mark.parametrize("role", Role, ids=lambda role: role.name)
STATES = pytest.mark.parametrize("state", ProtocolState, ids=lambda state: state.name)

CHUNKS = st.lists(st.integers(1, 9) | st.integers(1, 100_000), min_size=1, max_size=5)
MESSAGES = st.binary(max_size=40) | st.integers(0, MAX_MESSAGE_BYTES - 60_000).map(bytes)
LEDGERS = st.text("abc_=;0123456789", max_size=40)
TIMEOUTS = st.integers(0, 10**6).map(float)


def calls(*methods: MethodCode, is_early: bool = False) -> st.SearchStrategy[CallHead]:
    return st.builds(
        CallHead,
        st.sampled_from(methods),
        TIMEOUTS,
        MESSAGES,
        st.just(is_early),
        st.integers(0, 2**64 - 1),
    )


EVENTS: dict[FrameKind, st.SearchStrategy[Event | PendingElements]] = {
    FrameKind.HELLO: st.sampled_from([Hello(INSTANCE), Hello(ANY_INSTANCE)]),
    FrameKind.CALL: calls(MethodCode.Deconvolve, MethodCode.DeconvolveGrad),
    FrameKind.OVERLAPPED_CALL: calls(
        MethodCode.Deconvolve, MethodCode.DeconvolveGrad, is_early=True
    ),
    FrameKind.STREAM_CALL: calls(
        MethodCode.DeconvolveStream, MethodCode.DeconvolveGradStream, MethodCode.PutTensor
    ),
    FrameKind.FETCH_CALL: calls(MethodCode.GetTensor),
    FrameKind.MESSAGE: st.builds(MessagePart, MESSAGES),
    FrameKind.ELEMENTS: st.builds(PendingElements, st.integers(0, 100_000)),
    FrameKind.END: st.builds(EndOfStream, LEDGERS),
    FrameKind.FAILED: st.builds(CallFailure, st.builds(status_pb2.Status, message=LEDGERS)),
    FrameKind.PROGRESS: st.builds(ProgressReport, st.integers(0, 2**64 - 1)),
    FrameKind.ANSWER: st.builds(Answer, MESSAGES, LEDGERS, st.integers(0, 255)),
    FrameKind.STRIPED_CALL: st.builds(
        StripedCallHead,
        st.sampled_from([MethodCode.Deconvolve, MethodCode.DeconvolveGrad]),
        TIMEOUTS,
        MESSAGES,
        st.binary(min_size=TRANSFER_ID_BYTES, max_size=TRANSFER_ID_BYTES),
        st.integers(1, MAX_STRIPES_COUNT),
    ),
    FrameKind.STRIPE: st.just(StripeHead(TRANSFER)),
    FrameKind.PIECE: st.builds(PieceHead, st.integers(0, 2**64 - 1)),
    FrameKind.PACKED_ELEMENTS: st.builds(
        PendingElements, st.integers(9, 100_000), is_packed=st.just(True)
    ),
}


def said(end: DirectProtocol, event: Event | PendingElements) -> bytes:
    """Return what an end sends for an event; elements with it, if those are ahead."""
    if isinstance(event, PendingElements):
        return end.begin_elements(event) + elements(event)
    return end.send(event)


def elements(ahead: PendingElements) -> bytes:
    return bytes(n % 251 for n in range(ahead.size_bytes))


def heard(
    end: DirectProtocol, data: bytes, sizes: Sequence[int] = (1 << 20,)
) -> list[Event | PendingElements]:
    """Return the events of bytes that come in chunks of these sizes, in turn, until the line is closed."""
    stream, chunks, events = memoryview(data), cycle(sizes), list[Event | PendingElements]()
    while end.state is not ProtocolState.CLOSED:
        event = end.next_event()
        if event is not None:
            events.append(event)
        elif stream:
            space = end.receive_buffer()
            count = min(len(space), next(chunks), len(stream))
            assert count
            space[:count] = stream[:count]
            end.note_received(count)
            stream = stream[count:]
        else:
            break
        if isinstance(event, PendingElements):
            if event.size_bytes > end.unread_bytes + len(stream):
                break  # they have not all come
            stream = taken(end, event, stream)
    return events


def taken(end: DirectProtocol, ahead: PendingElements, stream: memoryview) -> memoryview:
    """Take elements, of which those that the end has not read come next; return what comes after them."""
    target = np.zeros(ahead.size_bytes, np.uint8)
    count = end.take_elements(target.data)
    rest = len(target) - count
    target[count:] = np.frombuffer(stream[:rest], np.uint8)
    return stream[rest:]


def end_in(role: Role, state: ProtocolState) -> DirectProtocol:
    """Return an end of a line that has come into a state."""
    end = DirectProtocol(role, INSTANCE)
    for sender, event in WAYS[state]:
        if sender is role:
            end.send(event)
        else:
            assert heard(end, event.pack()) == [event]
    assert end.state is state
    return end


@KINDS
def test_frames_are_those_of_this_version(kind: FrameKind) -> None:
    state = next(state for state in ProtocolState if kind in TRANSITIONS[_sender(kind)][state])
    sender, receiver = end_in(_sender(kind), state), end_in(Role(1 - _sender(kind)), state)
    event = EXAMPLES[kind]

    data = said(sender, event)

    assert data[: len(bytes.fromhex(FRAMES[kind]))] == bytes.fromhex(FRAMES[kind])
    assert heard(receiver, data) == [event]


def _sender(kind: FrameKind) -> Role:
    may_send = any(kind in allowed for allowed in TRANSITIONS[Role.CLIENT].values())
    return Role.CLIENT if may_send else Role.SERVER


@ROLES
@STATES
@KINDS
def test_what_an_end_may_send_in_which_state_is_what_the_table_says(
    role: Role, state: ProtocolState, kind: FrameKind
) -> None:
    end = end_in(role, state)
    after = TRANSITIONS[role][state].get(kind)
    if after is None:
        error = ConnectionClosedError if state is ProtocolState.CLOSED else LocalProtocolError
        with pytest.raises(error):
            said(end, EXAMPLES[kind])
        assert end.state is state  # nothing was sent
    else:
        said(end, EXAMPLES[kind])
        assert end.state is after


@ROLES
@STATES
@KINDS
def test_what_an_end_may_hear_in_which_state_is_what_the_table_says(
    role: Role, state: ProtocolState, kind: FrameKind
) -> None:
    end = end_in(role, state)
    after = TRANSITIONS[Role(1 - role)][state].get(kind)
    if state is ProtocolState.CLOSED:
        with pytest.raises(ConnectionClosedError):
            end.next_event()
    elif after is None:
        with pytest.raises(RemoteProtocolError, match="may send"):
            heard(end, bytes.fromhex(FRAMES[kind]))
        assert end.state is ProtocolState.CLOSED
        with pytest.raises(ConnectionClosedError):
            end.next_event()
    else:
        assert heard(end, bytes.fromhex(FRAMES[kind])) == [EXAMPLES[kind]]
        assert end.state is after


def test_no_kind_of_frame_is_said_by_both_but_the_handshake_and_parts() -> None:
    client, server = (
        {kind for allowed in TRANSITIONS[role].values() for kind in allowed} for role in Role
    )
    assert client & server == {
        FrameKind.HELLO,
        FrameKind.ELEMENTS,
        FrameKind.END,
        FrameKind.PIECE,
        FrameKind.PACKED_ELEMENTS,
    }
    assert client | server == set(FrameKind)


@ROLES
@STATES
def test_whose_parts_are_over_follows_from_the_table(role: Role, state: ProtocolState) -> None:
    end = end_in(role, state)
    may_come = {
        Role.CLIENT: (
            ProtocolState.STREAMING,
            ProtocolState.RESPONDING,
            ProtocolState.RETURNING,
        ),
        Role.SERVER: (ProtocolState.STREAMING, ProtocolState.LANDING),
    }
    assert end.is_peer_done == (state not in (*may_come[role], ProtocolState.CLOSED))
    assert end.is_idle == (state in (ProtocolState.IDLE, ProtocolState.TRAILING))


NONSENSE = st.lists(
    st.binary(max_size=30)
    | st.builds(pack_frame, st.sampled_from(FrameKind), st.binary(max_size=60))
    | st.sampled_from([bytes.fromhex(data) for data in FRAMES.values()])
    | st.builds(
        lambda number, size, rest: bytes([number, 0, 0, 0]) + size.to_bytes(4, "little") + rest,
        st.integers(0, 16),
        st.integers(0, 2**32 - 1) | st.integers(MAX_MESSAGE_BYTES - 1, MAX_MESSAGE_BYTES + 1),
        st.binary(max_size=60),
    ),
    max_size=6,
).map(b"".join)


@given(st.sampled_from(Role), st.sampled_from(ProtocolState), NONSENSE, CHUNKS)
def test_whatever_comes_is_an_event_or_the_peers_fault_however_it_is_cut(
    role: Role, state: ProtocolState, data: bytes, sizes: list[int]
) -> None:
    whole, cut = end_in(role, state), end_in(role, state)

    assert _outcome(cut, data, sizes) == _outcome(whole, data, [1 << 20])
    assert cut.state is whole.state


def _outcome(
    end: DirectProtocol, data: bytes, sizes: list[int]
) -> list[Event | PendingElements] | str:
    try:
        return heard(end, data, sizes)
    except RemoteProtocolError as error:
        assert end.state is ProtocolState.CLOSED
        return str(error)


@given(st.data())
def test_two_ends_understand_each_other_whatever_crosses_on_the_way(data: st.DataObject) -> None:
    state = data.draw(
        st.sampled_from([ProtocolState.NEW, ProtocolState.IDLE, ProtocolState.TRAILING])
    )
    ends = {role: end_in(role, state) for role in Role}
    way = dict.fromkeys(Role, b"")
    sent: dict[Role, list[Event | PendingElements]] = {role: [] for role in Role}
    received: dict[Role, list[Event | PendingElements]] = {role: [] for role in Role}

    def deliver(role: Role, count: int) -> None:
        # whole frames: how they are cut is another test's
        sender = Role(1 - role)
        for _ in range(count):
            size_bytes = FRAME_HEAD_BYTES + int.from_bytes(way[role][4:8], "little")
            frame_bytes, way[role] = way[role][:size_bytes], way[role][size_bytes:]
            received[sender] += heard(ends[role], frame_bytes)

    for _ in range(data.draw(st.integers(0, 30))):
        role = data.draw(st.sampled_from(Role))
        kinds, speaks = sorted(TRANSITIONS[role][ends[role].state]), data.draw(st.booleans())
        if kinds and speaks:
            event = data.draw(EVENTS[FrameKind(data.draw(st.sampled_from(kinds)))])
            way[Role(1 - role)] += said(ends[role], event)
            sent[role].append(event)
        elif way[role]:
            deliver(role, 1)
    while any(way.values()):
        for role in Role:
            deliver(role, 1 if way[role] else 0)

    assert ends[Role.CLIENT].state is ends[Role.SERVER].state
    for role in Role:
        assert received[role] == sent[role][: len(received[role])]
        if ends[role].state is not ProtocolState.CLOSED:
            assert len(received[role]) == len(sent[role])


def test_an_end_of_a_request_beside_a_part_of_the_response_is_not_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    end = end_in(Role.CLIENT, ProtocolState.STREAMING)

    def parse(payload: bytes) -> MessagePart:
        end.send(EndOfStream())  # as another thread may
        return MessagePart(payload)

    monkeypatch.setitem(events.EVENT_PARSERS, FrameKind.MESSAGE, parse)
    heard(end, MessagePart(b"a").pack())

    assert end.state is ProtocolState.RESPONDING


def test_elements_are_taken_before_anything_else_and_no_more_than_there_are() -> None:
    end = end_in(Role.SERVER, ProtocolState.STREAMING)
    data = pack_frame(FrameKind.ELEMENTS, b"abcd") + EndOfStream().pack()
    end.receive_buffer()[: len(data)] = data
    end.note_received(len(data))
    assert end.next_event() == PendingElements(4)
    target = np.zeros(3, np.uint8)
    with pytest.raises(LocalProtocolError, match="4 bytes of elements must be taken before"):
        end.next_event()
    assert end.peek_kind() is None
    assert end.take_elements(target.data) == 3
    assert target.tobytes() == b"abc"
    with pytest.raises(LocalProtocolError, match="at most 1 bytes of elements can be taken, got 3"):
        end.take_elements(target.data)
    assert end.take_elements(target[:1].data) == 1
    assert end.peek_kind() == FrameKind.END
    assert end.next_event() == EndOfStream()


@pytest.mark.parametrize(
    ("state", "data", "fault"),
    [
        (
            ProtocolState.ANSWERING,
            pack_frame(FrameKind.ANSWER, b"\x09" + bytes(7) + b"12345678"),
            "an answer of 16 b",
        ),
        (
            ProtocolState.RESPONDING,
            pack_frame(FrameKind.FAILED, b"\xff"),
            "not a valid google.rpc.Status",
        ),
        (
            ProtocolState.HANDSHAKE,
            pack_frame(FrameKind.HELLO, b"dcd4" + INSTANCE),
            "another protocol",
        ),
        (
            ProtocolState.HANDSHAKE,
            pack_frame(FrameKind.HELLO, b"dcd7" + bytes(range(1, 17))),
            "another server instance",
        ),
        (
            ProtocolState.IDLE,
            pack_frame(FrameKind.CALL, b"\x07" + bytes(23)),
            "unknown method, number 7",
        ),
        (
            ProtocolState.IDLE,
            pack_frame(FrameKind.CALL, b"\x06\x01" + bytes(22)),
            "an overlapped call of GetTensor",
        ),
        (ProtocolState.IDLE, pack_frame(77, b""), "unknown kind 77"),
    ],
)
def test_what_makes_no_sense_is_the_peers_fault(
    state: ProtocolState, data: bytes, fault: str
) -> None:
    end = end_in(Role.SERVER if state is ProtocolState.IDLE else Role.CLIENT, state)
    with pytest.raises(RemoteProtocolError, match=fault):
        heard(end, data)
    assert end.state is ProtocolState.CLOSED


def test_a_frame_is_read_whole_wherever_it_lies_in_what_was_read_ahead() -> None:
    parts = [MessagePart(bytes(size)) for size in (10_000, 28_000, 20_000, 31_000, 32_760, 0)]
    data = b"".join(part.pack() for part in parts)
    assert heard(end_in(Role.CLIENT, ProtocolState.STREAMING), data) == parts


def test_memory_for_a_long_message_is_held_no_longer_than_it() -> None:
    end = end_in(Role.CLIENT, ProtocolState.STREAMING)
    usual_bytes = len(end.receive_buffer())
    long = MessagePart(bytes(MAX_MESSAGE_BYTES))
    assert heard(end, long.pack(), [10_000]) == [long]
    assert len(end.receive_buffer()) == usual_bytes < MAX_MESSAGE_BYTES


@pytest.mark.parametrize(
    ("role", "state", "fault"),
    [
        (
            Role.SERVER,
            ProtocolState.ANSWERING,
            "the peer sent END with a payload of 0 bytes, where the client may send nothing",
        ),
        (
            Role.SERVER,
            ProtocolState.TRAILING,
            "the peer sent END with a payload of 0 bytes, where the client may send "
            "PROGRESS, CALL, OVERLAPPED_CALL, STREAM_CALL, FETCH_CALL, STRIPED_CALL, STRIPE",
        ),
        (
            Role.CLIENT,
            ProtocolState.ANSWERING,
            "the peer sent END with a payload of 0 bytes, where the server may send ANSWER, FAILED",
        ),
    ],
)
def test_a_frame_out_of_turn_is_told_with_those_that_might_have_come(
    role: Role, state: ProtocolState, fault: str
) -> None:
    with pytest.raises(RemoteProtocolError) as raised:
        heard(end_in(role, state), pack_frame(FrameKind.END, b""))

    assert str(raised.value) == fault


def test_a_frame_of_another_size_is_told_with_those_that_it_may_have() -> None:
    size_bytes = MAX_MESSAGE_BYTES + 1

    with pytest.raises(RemoteProtocolError) as raised:
        heard(
            end_in(Role.CLIENT, ProtocolState.STREAMING),
            pack_frame(FrameKind.MESSAGE, bytes(size_bytes)),
        )

    assert str(raised.value) == (
        f"the peer sent MESSAGE with a payload of {size_bytes} bytes, "
        f"where from 0 to {MAX_MESSAGE_BYTES} are allowed"
    )


def test_a_part_of_a_frame_at_the_end_of_what_was_read_ahead_leaves_room_for_the_rest() -> None:
    end = end_in(Role.CLIENT, ProtocolState.STREAMING)
    usual_bytes = len(end.receive_buffer())
    first, second = MessagePart(bytes(usual_bytes * 2 // 3)), MessagePart(b"abc")

    assert heard(end, first.pack() + second.pack()[:-1]) == [first]

    assert len(end.receive_buffer()) == usual_bytes - len(second.pack()) + 1
    assert heard(end, second.pack()[-1:]) == [second]


def test_thirty_two_kibibytes_are_read_ahead() -> None:
    end = end_in(Role.SERVER, ProtocolState.IDLE)

    for _ in range(3):
        assert len(end.receive_buffer()) == 32 << 10
        assert heard(end, CALL.pack()) == [CALL]
        end.send(Answer(b"", ""))


def test_a_message_that_is_too_large_is_not_sent() -> None:
    end = end_in(Role.SERVER, ProtocolState.RESPONDING)

    with pytest.raises(MessageTooLargeError) as raised:
        end.send(MessagePart(bytes(MAX_MESSAGE_BYTES + 1)))

    assert str(raised.value) == (
        f"a message of a direct call must have at most {MAX_MESSAGE_BYTES} bytes, got {MAX_MESSAGE_BYTES + 1}"
    )
    largest = end.send(MessagePart(bytes(MAX_MESSAGE_BYTES)))
    assert len(largest) == FRAME_HEAD_BYTES + MAX_MESSAGE_BYTES


def test_a_deadline_that_has_passed_is_now() -> None:
    call = CallHead(MethodCode.Deconvolve, -1, b"")
    assert heard(end_in(Role.SERVER, ProtocolState.IDLE), call.pack()) == [
        call._replace(timeout_s=0)
    ]


def test_a_piece_is_sent_behind_its_head_and_that_of_its_elements() -> None:
    end = end_in(Role.CLIENT, ProtocolState.LANDING)
    head = end.begin_piece(258, 3)
    assert head == bytes.fromhex(FRAMES[FrameKind.PIECE] + FRAMES[FrameKind.ELEMENTS])
    assert heard(end_in(Role.SERVER, ProtocolState.LANDING), head + b"abc") == [
        PieceHead(258),
        PendingElements(3),
    ]


def test_a_piece_needs_a_stripe() -> None:
    with pytest.raises(LocalProtocolError, match="PIECE"):
        end_in(Role.CLIENT, ProtocolState.IDLE).begin_piece(0, 1)
