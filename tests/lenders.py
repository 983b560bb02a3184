"""Lenders of shared memory, and processes that borrow from them, for tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from deconvd.lending.protocol import MAX_REPLY_BYTES, Answer, Operation, Reply, Request
from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec
from deconvd.wire.shared_slice import SharedSlice
from deconvd_server.resources.socket_file import Access
from deconvd_server.resources.unix_listener import Purpose, SideSocket
from deconvd_server.shared_memory import CallTensors, Lender, Limits

__all__ = [
    "MIB",
    "Child",
    "Peer",
    "Watch",
    "child",
    "lending",
    "lent_tensor",
    "lies_in_shared_memory",
    "memory_side",
]

MIB = 1 << 20
_TIMEOUT_S = 30

LIMITS = Limits(all_bytes=512 * MIB, client_bytes=256 * MIB)


@contextmanager
def lending(
    path: Path,
    limits: Limits = LIMITS,
    *,
    on_map: Callable[[int, int], Callable[[], None]] | None = None,
    users: frozenset[int] | None = None,
    access: Access | None = None,
) -> Iterator[Lender]:
    """Run a lender for the block, and see that it leaves nothing behind."""
    lender = Lender([memory_side(path, access)], limits, on_map=on_map or Watch(), users=users)
    try:
        yield lender
    finally:
        lender.close()
    assert lender.wait_until_unused(_TIMEOUT_S)
    assert lender.lent_bytes == 0
    assert not path.exists()


def memory_side(path: Path, access: Access | None = None) -> SideSocket:
    """Return a socket where memory can be lent."""
    return SideSocket(path, kind=Purpose.MEMORY.kind, access=access)


@contextmanager
def lent_tensor(
    lender: Lender, name: str, lies_at: SharedSlice, spec: TensorSpec
) -> Iterator[Array]:
    """Use a tensor in lent memory for the block."""
    with CallTensors(lender) as tensors:
        yield tensors.host_place(name, spec, lies_at)


class Watch:
    """An `on_map` that knows what is mapped: size by address."""

    def __init__(self) -> None:
        self.mapped: dict[int, int] = {}

    def __call__(self, address: int, size_bytes: int) -> Callable[[], None]:
        assert address not in self.mapped
        self.mapped[address] = size_bytes

        def undo() -> None:
            del self.mapped[address]

        return undo


def lies_in_shared_memory(array: Array) -> bool:
    """Return whether an array lies in memory that a server lends."""
    address = array.__array_interface__["data"][0]
    with open("/proc/self/maps") as maps:
        for line in maps:
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            if begin <= address < end:
                return "/memfd:deconvd" in line
    return False


class Child:
    """A Python process that runs a script, to which `path` is a side socket's.

    Args:
        user: Whom it becomes once it has its modules; None for whoever this is.
    """

    def __init__(self, script: str, path: Path, user: int | None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", _PRELUDE + script, str(path), str(user or 0)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hear(self) -> str:
        """Return the next line that it prints, when it does; nothing once it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, line: str = "") -> None:
        """Write a line that it waits for by `input`."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()


class Peer:
    """A client that speaks the protocol by hand, and keeps the descriptors of what it was lent."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(_TIMEOUT_S)
        self.socket.connect(str(path))
        self.descriptors: list[int] = []

    def ask(self, request: Request) -> Reply:
        return self.ask_raw(request.pack())

    def ask_raw(self, packet: bytes) -> Reply:
        self.socket.send(packet)
        answer, descriptors, _, _ = socket.recv_fds(self.socket, MAX_REPLY_BYTES, 4)
        self.descriptors += descriptors
        return Reply.parse(answer)

    def lend(self, size_bytes: int) -> Reply:
        return self.ask(Request(Operation.LEND, size_bytes))

    def borrowed(self, size_bytes: int) -> bytes:
        reply = self.lend(size_bytes)
        assert reply.answer is Answer.DONE
        return reply.region

    def is_dropped(self) -> bool:
        """Wait for the end of the connection; False if there is something to read instead."""
        return self.socket.recv(MAX_REPLY_BYTES) == b""

    def give_back(self, region: bytes) -> Reply:
        return self.ask(Request(Operation.RETURN, region=region))

    def let_go(self) -> None:
        """Keep no memory that was lent."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []

    def close(self) -> None:
        self.socket.close()
        self.let_go()


_PRELUDE = """
import os, socket, sys
import numpy as np
from deconvd.shared_memory import Answer, Operation, Reply, Request
from deconvd_client.deadline import Deadline
from deconvd_client.shared_memory import Borrower, SharedCall
path, user = sys.argv[1], int(sys.argv[2])
if user:  # only now: it may not read our modules
    os.setgid(user)
    os.setuid(user)
def find(_): return path
def soon(): return Deadline(30)
def say(*words): print(*words, flush=True)
"""


@contextmanager
def child(script: str, path: Path, *, user: int | None = None) -> Iterator[Child]:
    """Run a script for the block, and kill it then."""
    running = Child(script, path, user)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.communicate()
