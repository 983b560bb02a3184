"""Both ends of the direct protocol, without sockets: frames in any order, damaged, and cut anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from google.rpc import status_pb2

from deconvd.direct.connection_errors import ConnectionBrokenError, ConnectionClosedError
from deconvd.direct.events import (
    ANY_INSTANCE,
    FRAME_HEAD_BYTES,
    MAX_MESSAGE_BYTES,
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
from deconvd.direct.frame_stream import FrameSource, FrameStream
from deconvd.direct.protocol import DirectProtocol, ProtocolState, Role
from deconvd.errors import DeconvdError
from deconvd.model.problem import spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.codec import Buffer
from deconvd.wire.stream_parts import PartReader, PendingElements
from tests.fuzz.case import Case, Seed
from tests.fuzz.requests import GY, REQUESTS, W, X, tensor
from tests.fuzz.target import Target
from tests.packed import pack_by_definition

__all__ = ["Frames", "call_frames", "client_sequences", "server_sequences", "token_hello"]

INSTANCE: Final = bytes(range(16))
TOKEN: Final = "dcd_" + "A-z_0" * 8 + "abc"
TRANSFER: Final = bytes(range(100, 116))
_LEDGER: Final = "queue_us=1;compute_us=31;server_us=64"
_MOST_BUFFERED_BYTES: Final = FRAME_HEAD_BYTES + MAX_MESSAGE_BYTES


def token_hello() -> bytes:
    """Return a client's handshake with a token."""
    return Hello(ANY_INSTANCE, TOKEN).pack()


def call_frames(name: str, *, is_overlapped: bool = False) -> list[bytes]:
    """Return the frames of a call of a method with an undamaged request."""
    first, *rest = REQUESTS[name]
    head = CallHead(MethodCode[name], 2.0, first.SerializeToString(), is_overlapped)
    frames = [head.pack()]
    for part in rest:
        chunk: Any = part
        if chunk.WhichOneof("part") == "packed_chunk":
            frames.append(pack_frame(FrameKind.PACKED_ELEMENTS, chunk.packed_chunk))
        else:
            frames.append(pack_frame(FrameKind.ELEMENTS, chunk.chunk))
    if rest:
        frames.append(EndOfStream().pack())
    if is_overlapped:
        frames += [ProgressReport(n).pack() for n in (64, 144)]
    return frames


def _piece_frames() -> list[bytes]:
    return [PieceHead(0).pack(), pack_frame(FrameKind.ELEMENTS, W.tobytes()), EndOfStream().pack()]


def client_sequences() -> Iterator[Sequence[bytes]]:
    """Yield what clients send, the handshake first."""
    for name in MethodCode.__members__:
        yield [token_hello(), *call_frames(name)]
    yield [Hello(INSTANCE).pack(), *call_frames("Deconvolve", is_overlapped=True)]
    yield [token_hello(), *call_frames("GetTensor"), *call_frames("Deconvolve")]
    message = REQUESTS["Deconvolve"][0].SerializeToString()
    striped = StripedCallHead(MethodCode.Deconvolve, 2.0, message, TRANSFER, 2)
    yield [token_hello(), striped.pack(), *call_frames("Deconvolve")]
    yield [token_hello(), StripeHead(TRANSFER).pack(), *_piece_frames()]


def server_sequences() -> Iterator[Sequence[bytes]]:
    """Yield what servers send after what a client has sent, the handshake first."""
    hello = Hello(INSTANCE).pack()
    response = pb.DeconvolveResponse(y=tensor(GY, with_elements=True))
    yield [hello, Answer(response.SerializeToString(), _LEDGER, 4).pack()]
    yield [hello, CallFailure(status_pb2.Status(code=8, message="no room")).pack()]
    header = pb.DeconvolveStreamResponse(
        header=pb.DeconvolveResponse(y=tensor(GY, with_elements=False))
    )
    packed = pack_by_definition(GY.reshape(-1).view("u4"))
    yield [
        hello,
        MessagePart(header.SerializeToString()).pack(),
        pack_frame(FrameKind.ELEMENTS, GY.tobytes()[:40]),
        pack_frame(FrameKind.PACKED_ELEMENTS, packed),
        EndOfStream(_LEDGER).pack(),
    ]
    yield [hello, *_piece_frames()]


class _Bytes:
    """A byte stream whose peer has sent some bytes, in pieces, and then ended. It takes whatever is sent."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]

    def read_into(self, target: memoryview) -> int:
        if not self._pieces:
            raise ConnectionClosedError("the peer has closed the connection")
        assert len(target), "there is no room to read into"
        piece, rest = self._pieces[0][: len(target)], self._pieces[0][len(target) :]
        self._pieces[:1] = [rest] if rest else []
        target[: len(piece)] = piece
        return len(piece)

    def fill(self, target: memoryview) -> None:
        while target:
            target = target[self.read_into(target) :]

    def write(self, *buffers: Buffer) -> None:
        pass

    def poll(self, timeout_s: float) -> bool:
        return True

    def set_deadline(self, timeout_s: float | None) -> None:
        pass

    def wait(self) -> None:
        pass

    shutdown = abort = close = wait

    def half_close_and_drain(self, timeout_s: float) -> None:
        pass


class _End:
    """One end of a connection: it answers as the protocol lets it, so that any state can be reached."""

    def __init__(self, role: Role, pieces: Sequence[bytes], choices: bytes) -> None:
        self._choices = choices
        self.protocol = DirectProtocol(role, INSTANCE)
        self.frames = FrameStream(_Bytes(pieces), self.protocol)

    def choose(self, count: int) -> int:
        """Return a number below `count`, which the input says."""
        choice, self._choices = self._choices[:1], self._choices[1:]
        return choice[0] % count if choice else 0

    def receive(self) -> Event | PendingElements:
        """Return the next event, and take the elements, if it has any."""
        event = self.frames.next_event()
        assert self.protocol.unread_bytes <= _MOST_BUFFERED_BYTES
        if isinstance(event, PendingElements):
            rest_bytes = event.size_bytes
            target = np.empty(1 << 16, np.uint8)
            while rest_bytes:  # in pieces, as larger than memory they may be said to be
                taken_bytes = min(rest_bytes, len(target))
                self.frames.read_into(target[:taken_bytes])
                rest_bytes -= taken_bytes
        return event


def _serve(case: Case) -> None:
    """Be a server for what a client sends."""
    end = _End(Role.SERVER, case.parts[:-1], case.parts[-1])
    assert isinstance(end.receive(), Hello)
    end.frames.send(Hello(INSTANCE))
    while True:
        event = end.receive()
        match event:
            case CallHead(method=method, message=message) if method.name in _STREAMED:
                if end.choose(3):
                    _read_stream(end, method.name, message)
                end.frames.send(CallFailure(status_pb2.Status(code=3)))
            case CallHead() | StripedCallHead():
                if end.protocol.state is ProtocolState.RESPONDING:
                    end.frames.send(EndOfStream(_LEDGER))
                    continue
                if end.choose(2):
                    end.frames.send(Answer(b"y", _LEDGER, 4))
                else:
                    end.frames.send(CallFailure(status_pb2.Status(code=3)))
            case EndOfStream() if end.protocol.state is ProtocolState.RETURNING:
                end.frames.send(EndOfStream())


_STREAMED: Final = {
    "DeconvolveStream": (W, X),
    "DeconvolveGradStream": (W, X, GY),
    "PutTensor": (X,),
}


def _read_stream(end: _End, name: str, message: bytes) -> None:
    part_type: type[Any] = getattr(pb, f"{name}Request")
    reader: PartReader[Any] = PartReader(FrameSource(end.frames, part_type, message), part_type)
    reader.read_header()
    for array in _STREAMED[name]:
        reader.read("x", spec_of(array))
    reader.expect_end()


def _call(case: Case) -> None:
    """Be a client for what a server sends."""
    end = _End(Role.CLIENT, case.parts[:-1], case.parts[-1])
    end.frames.send(Hello(INSTANCE, TOKEN))
    assert isinstance(end.receive(), Hello)
    while True:
        match end.choose(5):
            case 0:
                end.frames.send(CallHead(MethodCode.Deconvolve, 2.0, b"x"))
            case 1:
                end.frames.send(CallHead(MethodCode.Deconvolve, 2.0, b"x", is_overlapped=True))
                end.frames.send(ProgressReport(7))
            case 2:
                end.frames.send(CallHead(MethodCode.DeconvolveStream, 2.0, b"x"))
                end.frames.send(EndOfStream())
                reader: PartReader[Any] = PartReader(
                    FrameSource(end.frames, pb.DeconvolveStreamResponse),
                    pb.DeconvolveStreamResponse,
                )
                reader.read_header()
                reader.read("y", spec_of(GY))
                reader.expect_end()
                continue
            case 3:
                end.frames.send(CallHead(MethodCode.GetTensor, 2.0, b"x"))
            case _:
                end.frames.send(StripeHead(TRANSFER))
                end.frames.send(EndOfStream())
        while not end.protocol.is_idle:
            end.receive()


def _seeds() -> Iterator[Seed]:
    for choices in (b"\1\2\1\2", bytes(8), b"\2\3\4\5\6\7"):
        for sequence in client_sequences():
            yield Seed("server", [*sequence, choices])
    for choices in (b"\0\1\2\3\4", b"\1\1", b"\2\2", b"\3\0", b"\4\0"):
        for sequence in server_sequences():
            yield Seed("client", [*sequence, choices])


class Frames(Target):
    """The state machine at both ends, and what reads streams from it. The last part says what the end itself does."""

    seeds = (*_seeds(),)

    def feed(self, case: Case) -> None:
        if not case.parts:
            return
        try:
            {"server": _serve, "client": _call}[case.kind](case)
        except (ConnectionBrokenError, DeconvdError):
            return
        raise AssertionError("a connection went on without bytes")
