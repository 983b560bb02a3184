"""What hostile clients do to the memory that the server lends."""

from __future__ import annotations

import mmap
import os
import socket
from contextlib import suppress

from deconvd.direct.events import MethodCode
from deconvd.lending.protocol import (
    MAX_REPLY_BYTES,
    LendingOperation,
    LendingReply,
    LendingRequest,
    ReplyStatus,
)
from deconvd.v1 import deconvd_pb2 as pb
from tests.direct_calls import receive_answer, send_call
from tests.soak.hostile.attack import Attacker, hostile
from tests.soak.hostile.requests import tensor
from tests.soak.places import connect_unix

__all__ = ["Borrower"]

_PAGE_BYTES = 4096
_MIB = 1 << 20


class Borrower:
    """A client of the socket where memory is lent.

    Attributes:
        descriptors: Those of all that it has borrowed, given back or not.
    """

    def __init__(self, path: str) -> None:
        self._socket = connect_unix(path, socket.SOCK_SEQPACKET)
        self.descriptors: list[int] = []

    def ask(self, packet: bytes) -> LendingReply:
        """Send a packet, and return the reply. Raises ConnectionError if there is none."""
        self._socket.send(packet)
        data, descriptors, *_ = socket.recv_fds(self._socket, MAX_REPLY_BYTES, 1)
        self.descriptors += descriptors
        if not data:
            raise ConnectionResetError("the server has closed the socket")
        return LendingReply.parse(data)

    def lend(self, size_bytes: int) -> pb.SharedSlice:
        """Return where so much memory begins, of which nothing is written."""
        reply = self.ask(LendingRequest(LendingOperation.LEND, size_bytes).pack())
        if reply.status is not ReplyStatus.DONE:
            raise ConnectionRefusedError(reply.text)
        return pb.SharedSlice(region=reply.region)

    def give_back(self, place: pb.SharedSlice) -> None:
        """Say that it is not used any more."""
        self.ask(LendingRequest(LendingOperation.RETURN, region=place.region).pack())

    def __enter__(self) -> Borrower:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        for descriptor in self.descriptors:
            os.close(descriptor)


@hostile
def borrowers_by_the_hundred(a: Attacker) -> None:
    """More borrowers than there are, with a page each."""
    for _ in range(300):
        with suppress(OSError):  # of those that are too many
            a.held.enter_context(Borrower(a.places.memory_path)).lend(_PAGE_BYTES)


@hostile
def returned_memory_kept(a: Attacker) -> None:
    """Memory that was written to, given back and kept, four times as much as one may have."""
    borrower = a.held.enter_context(Borrower(a.places.memory_path))
    for _ in range(16):
        place = borrower.lend(32 * _MIB)
        with mmap.mmap(borrower.descriptors[-1], 32 * _MIB) as memory:
            for begin in range(0, 32 * _MIB, _PAGE_BYTES):
                memory[begin] = 1
        borrower.give_back(place)


@hostile
def lying_shared_memory(a: Attacker) -> None:
    """Places that are nobody's, reach beyond their region, or were given back; and packets of no sense."""
    for _ in range(30):
        with suppress(OSError), Borrower(a.places.memory_path) as borrower:
            _call(a, borrower)
            packet = LendingRequest(LendingOperation.LEND, a.random.getrandbits(63)).pack()
            borrower.ask(packet)
            borrower.ask(a.random.randbytes(a.random.choice([1, 32, 64])))


def _call(a: Attacker, borrower: Borrower) -> None:
    place = borrower.lend(4 * _PAGE_BYTES)
    match a.random.randrange(4):
        case 0:
            place.offset_bytes = a.random.choice([-4, 2, 4 * _PAGE_BYTES, 2**62])
        case 1:
            place.region = os.urandom(16)
        case 2:
            borrower.give_back(place)
        case _:
            os.ftruncate(borrower.descriptors[-1], 0)  # raises, since it is sealed
    x = tensor((4, 1, 32, 32))
    x.shared.CopyFrom(place)
    request = pb.DeconvolveRequest(x=x, w=tensor((1, 1, 1, 1), bytes(4)), y_place=place)
    line = a.line()
    send_call(line, MethodCode.Deconvolve, request.SerializeToString())
    receive_answer(line)


@hostile
def descriptor_floods(a: Attacker) -> None:
    """Descriptors that nobody asked for, sent by the hundred to every Unix socket."""
    sockets = {a.places.path: socket.SOCK_STREAM, a.places.calls_path: socket.SOCK_STREAM}
    sockets[a.places.memory_path] = socket.SOCK_SEQPACKET
    with open(os.devnull) as nothing:
        for path, kind in [*sockets.items()] * 100:
            end = a.held.enter_context(connect_unix(path, kind))
            with suppress(OSError):
                for _ in range(4):
                    socket.send_fds(end, [bytes(32)], [nothing.fileno()] * 250)
