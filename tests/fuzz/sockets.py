"""Bytes to every socket of a real server: frames, HTTP/2 and packets, damaged, out of order, and cut anywhere.

Sockets with TLS, and servers that ask who calls, are in `tests.fuzz.secured_sockets`.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from deconvd.direct.events import (
    ANY_INSTANCE,
    EndOfStream,
    FrameKind,
    Hello,
    MethodCode,
    PieceHead,
    ProgressReport,
    StripedCallHead,
    StripeHead,
    pack_frame,
)
from deconvd.lending.protocol import LendingOperation, LendingRequest
from deconvd.v1 import deconvd_pb2 as pb
from tests.fuzz.case import Case, Seed
from tests.fuzz.frames import TRANSFER, call_frames, client_sequences
from tests.fuzz.http2_frames import http2_sequences
from tests.fuzz.requests import HANDLE, SESSION, W, X, tensor
from tests.fuzz.served import ServerTarget, hold_names

__all__ = ["Sockets", "connect_unix"]

_TIMEOUT_S = 20.0
"""How long the server may leave a connection open whose client has ended its half."""

_ANSWER_S = 0.005
"""How long an answer is waited for: some are then lost on a busy machine, as with a client that goes."""

_CANCELLED_BY_HALF_CLOSE = ("direct_tcp", "direct_unix", "striped")
"""Kinds whose client must be there until it is answered: a server takes the end of its half for its end."""

_ENDS = {
    **{kind: (kind,) for kind in ("direct_tcp", "direct_unix", "grpc_tcp", "grpc_unix", "memory")},
    "striped": ("direct_unix", "direct_unix"),
}
"""The connections of each kind."""


def _packets() -> list[bytes]:
    operations = LendingOperation
    return [
        LendingRequest(operations.IDENTIFY).pack(),
        LendingRequest(operations.LEND, 1 << 16).pack(),
        LendingRequest(operations.LEND_ON_CARD, 1 << 16, bytes(16)).pack(),
        LendingRequest(operations.RETURN, region=bytes(16)).pack(),
    ]


def _striped_seeds() -> Iterator[Seed]:
    """Yield striped calls: the first part goes by the control connection, and the rest by a stripe."""
    request = pb.DeconvolveRequest(
        x=tensor(X, with_elements=False), w=tensor(W, with_elements=False)
    )
    message = request.SerializeToString()
    elements = pack_frame(FrameKind.ELEMENTS, W.tobytes() + X.tobytes())
    for _ in range(3):
        call = StripedCallHead(MethodCode.Deconvolve, 2.0, message, TRANSFER, 1)
        end = EndOfStream().pack()
        yield Seed(
            "striped",
            [call.pack(), StripeHead(TRANSFER).pack(), PieceHead(0).pack(), elements, end],
        )


def _seeds() -> Iterator[Seed]:
    for sequence in client_sequences():
        for kind in ("direct_tcp", "direct_unix"):
            yield Seed(kind, sequence)
    overlapped = call_frames("Deconvolve", is_overlapped=True)
    yield Seed("direct_unix", [Hello(ANY_INSTANCE).pack(), *overlapped, *overlapped])
    yield Seed(
        "direct_tcp",
        [
            Hello(ANY_INSTANCE).pack(),
            *[frame for name in MethodCode.__members__ for frame in call_frames(name)],
            ProgressReport(1).pack(),
            EndOfStream().pack(),
        ],
    )
    for sequence in http2_sequences():
        for kind in ("grpc_tcp", "grpc_unix"):
            yield Seed(kind, sequence)
    yield from _striped_seeds()
    for kind in (
        "memory",
        "memory",
        "direct_unix",
        "grpc_unix",
    ):  # packets to the wrong socket, too
        yield Seed(kind, _packets())


class Sockets(ServerTarget):
    """All sockets. A connection must end soon after its client has ended its half."""

    seeds = (*_seeds(),)
    batch_count = 200
    limit_s = 30.0
    bounded_count = 600
    share = 2

    def open(self, stack: ExitStack) -> None:
        super().open(stack)
        self._session, self._handle = stack.enter_context(hold_names(self.server.target))
        path = Path(self.server.target.removeprefix("unix:"))
        host, _, port = self.server.targets[1].rpartition(":")
        direct_port = self.F.server_info().direct_port
        connect_to = socket.create_connection
        self._connect = {
            "grpc_tcp": partial(connect_to, (host, int(port)), _TIMEOUT_S),
            "direct_tcp": partial(connect_to, (host, direct_port), _TIMEOUT_S),
            "grpc_unix": partial(connect_unix, str(path), socket.SOCK_STREAM),
            "direct_unix": partial(connect_unix, f"{path}.calls", socket.SOCK_STREAM),
            "memory": partial(connect_unix, f"{path}.memory", socket.SOCK_SEQPACKET),
        }

    def feed(self, case: Case) -> None:
        self._transfer = os.urandom(len(TRANSFER))  # the server takes none twice
        with ExitStack() as stack:
            ends = [stack.enter_context(self._connect[kind]()) for kind in _ENDS[case.kind]]
            if case.kind == "striped":
                hello = Hello(ANY_INSTANCE).pack()
                self._send(ends[0], [hello, *case.parts[:1]])
                self._send(ends[1], [hello, *case.parts[1:]])
            else:
                self._send(ends[0], case.parts)
            if case.kind in _CANCELLED_BY_HALF_CLOSE:
                while ready := select.select(ends, (), (), _ANSWER_S)[0]:
                    if not all(map(_receive, ready)):
                        break
            for end in ends:
                with suppress(OSError):  # the server has ended it
                    end.shutdown(socket.SHUT_WR)
            for end in ends:
                while _receive(end):
                    pass

    def _send(self, end: socket.socket, parts: Sequence[bytes]) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # the server has refused the rest
            if end.type == socket.SOCK_SEQPACKET:
                for part in parts:
                    end.send(part[: 32 << 10])
            else:
                end.sendall(b"".join(map(self._with_names, parts)))

    def _with_names(self, part: bytes) -> bytes:
        names = ((SESSION, self._session), (HANDLE, self._handle), (TRANSFER, self._transfer))
        for stand_in, name in names:
            part = part.replace(stand_in, name)
        return part


def _receive(end: socket.socket) -> bytes:
    """Return some of what has come; nothing once the server has ended the connection."""
    try:
        return end.recv(1 << 16)
    except ConnectionResetError:
        return b""


def connect_unix(path: str, kind: socket.SocketKind) -> socket.socket:
    """Return a connection to a Unix socket."""
    end = socket.socket(socket.AF_UNIX, kind)
    end.settimeout(_TIMEOUT_S)
    end.connect(path)
    return end
