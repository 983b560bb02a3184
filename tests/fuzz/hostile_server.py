"""A server that answers the client's calls, by every way, with the bytes that it is given."""

from __future__ import annotations

import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from deconvd.direct.events import FRAME_HEAD, FRAME_HEAD_BYTES, EndOfStream, FrameKind
from deconvd.lending.protocol import LendingOperation, LendingReply, LendingRequest
from tests.fuzz.requests import SERVICE

__all__ = ["SLOTS", "HostileServer"]

SLOTS = (
    "GetServerInfo",
    "Deconvolve",
    "DeconvolveGrad",
    "DeconvolveStream",
    "chunk",  # of the two streams
    "HoldSession",
    "PutTensor",
    "GetTensor",
    "health",
    "ledger",
    "failure",  # a google.rpc.Status; empty if calls succeed
    "hello",
    "answer",  # frames
    "stripe",  # frames
    "identity",
    "loan",
    "descriptor",  # its first byte says what comes with a loan
)
"""What the bytes of an input are, in this order."""

_TIMEOUT_S = 20.0
_STREAMS = ("DeconvolveStream", "GetTensor")


class HostileServer:
    """A server at a Unix socket and at a TCP port, with side sockets. A context manager.

    Attributes:
        answers: What it answers, by the names in `SLOTS`. It may be replaced at any time.
        counts: How many calls came by each way.
        path: Its Unix socket for gRPC.
        port: Its TCP port for gRPC.
    """

    def __init__(self, directory: Path) -> None:
        self.answers: Mapping[str, bytes] = {}
        self.counts: Counter[str] = Counter()
        self.path = directory / "deconvd.sock"
        self._transfer = b""
        self._stack = ExitStack()

    def __enter__(self) -> HostileServer:
        with ExitStack() as stack:
            threads = stack.enter_context(ThreadPoolExecutor(16))
            server = grpc.server(threads)
            server.add_generic_rpc_handlers([_Handler(self)])
            server.add_insecure_port(f"unix:{self.path}")
            self.port = server.add_insecure_port("127.0.0.1:0")
            server.start()
            stack.callback(lambda: server.stop(None).wait())
            sides: dict[str, tuple[socket.SocketKind, Callable[[socket.socket], None]]] = {
                "calls": (socket.SOCK_STREAM, self._speak),
                "memory": (socket.SOCK_SEQPACKET, self._lend),
            }
            for name, (kind, serve) in sides.items():
                listener = socket.socket(socket.AF_UNIX, kind)
                listener.bind(f"{self.path}.{name}")
                listener.listen(64)
                stack.callback(listener.close)
                stack.callback(listener.shutdown, socket.SHUT_RDWR)
                threading.Thread(target=_accept, args=(listener, serve), daemon=True).start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def serve_rpc(self, name: str, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """Answer an RPC."""
        self.counts["grpc"] += 1
        answers = self.answers
        text = "".join(c for c in answers["ledger"].decode("latin1") if " " <= c <= "~").strip()
        metadata: list[tuple[str, str | bytes]] = [("deconvd-ledger", text)] if text else []
        if answers["failure"] and name not in ("GetServerInfo", "HoldSession"):
            self._fail(answers["failure"], metadata, context)
        context.set_trailing_metadata(metadata)
        next(requests, None)
        yield answers[name]
        if name in _STREAMS:
            yield answers["chunk"]
        if name == "HoldSession":
            for _ in requests:  # until the client ends the session
                self.counts["heartbeats"] += 1

    def _fail(self, failure: bytes, metadata: list[tuple[str, str | bytes]], context: Any) -> None:
        try:
            number = status_pb2.Status.FromString(failure).code
        except DecodeError:
            number = len(failure)
        code = [*grpc.StatusCode][1:][number % (len(grpc.StatusCode) - 1)]
        context.set_trailing_metadata([*metadata, ("grpc-status-details-bin", failure)])
        context.abort(code, "no")

    def _speak(self, end: socket.socket) -> None:
        """Serve a direct connection."""
        _read_frame(end)
        end.sendall(self.answers["hello"])
        while True:
            kind, payload = _read_frame(end)
            self.counts[FrameKind(kind).name] += 1
            if kind in (FrameKind.CALL, FrameKind.STRIPED_CALL):
                end.sendall(self.answers["answer"])
            elif kind == FrameKind.STRIPE:  # all results come by the first stripe
                is_first = payload != self._transfer
                self._transfer = payload
                end.sendall(self.answers["stripe"] if is_first else EndOfStream().pack())
            else:
                continue
            if (
                not self.answers["descriptor"][:1] > b"\x7f"
            ):  # else the client waits until its deadline
                end.shutdown(socket.SHUT_WR)

    def _lend(self, end: socket.socket) -> None:
        """Serve a borrower."""
        while packet := end.recv(1 << 10):
            request = LendingRequest.parse(packet)
            if request.operation is not LendingOperation.LEND:
                end.send(self.answers["identity"] or b"\0")
                continue
            self.counts["LEND"] += 1
            with ExitStack() as stack:
                descriptors = _descriptors(self.answers["descriptor"], request.size_bytes, stack)
                packet = _with_size(self.answers["loan"], request.size_bytes)
                socket.send_fds(end, [packet or b"\0"], descriptors)


class _Handler(grpc.GenericRpcHandler):
    """All RPCs, as streams of bytes."""

    def __init__(self, server: HostileServer) -> None:
        self._server = server

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        path = handler_call_details.method
        name = path.rpartition("/")[2] if path.startswith(f"/{SERVICE.full_name}/") else "health"
        name = {"DeconvolveGradStream": "DeconvolveStream", "DropTensors": "PutTensor"}.get(
            name, name
        )
        return grpc.stream_stream_rpc_method_handler(
            lambda requests, context: self._server.serve_rpc(name, requests, context)
        )


def _accept(listener: socket.socket, serve: Callable[[socket.socket], None]) -> None:
    with suppress(OSError):  # it was closed
        while True:
            end, _ = listener.accept()
            end.settimeout(_TIMEOUT_S)
            threading.Thread(target=_serve, args=(end, serve), daemon=True).start()


def _serve(end: socket.socket, serve: Callable[[socket.socket], None]) -> None:
    with end, suppress(OSError):  # the client has gone
        serve(end)


def _read_frame(end: socket.socket) -> tuple[int, bytes]:
    head = _read(end, FRAME_HEAD_BYTES)
    kind, size_bytes = FRAME_HEAD.unpack(head)
    return kind, _read(end, size_bytes)


def _read(end: socket.socket, size_bytes: int) -> bytes:
    data = b""
    while len(data) < size_bytes:
        piece = end.recv(size_bytes - len(data))
        if not piece:
            raise ConnectionResetError("the client has closed the connection")
        data += piece
    return data


def _with_size(packet: bytes, size_bytes: int) -> bytes:
    """Return a reply that lends as much as was asked for, if it is an undamaged one."""
    with suppress(ValueError):
        reply = LendingReply.parse(packet)
        if reply.size_bytes == 0:
            return LendingReply(reply.status, size_bytes, reply.region, reply.text).pack()
    return packet


def _descriptors(choice: bytes, size_bytes: int, stack: ExitStack) -> list[int]:
    """Return what comes with a loan: memory as it should be, or as it should not."""
    import fcntl

    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    memory = os.memfd_create("deconvd-hostile", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    stack.callback(os.close, memory)
    number = choice[0] % 8 if choice else 0
    if number == 1:
        return []
    if number == 2:
        reading, writing = os.pipe()
        stack.callback(os.close, reading)
        stack.callback(os.close, writing)
        return [reading]
    os.ftruncate(memory, size_bytes // 2 if number == 3 else min(size_bytes, 1 << 30))
    if number != 4:
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, seals)
    return [memory] * (3 if number == 5 else 1)
