"""Lenders of shared memory, and processes that borrow from them, for tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from deconvd.lending.protocol import (
    MAX_REPLY_BYTES,
    LendingOperation,
    LendingReply,
    LendingRequest,
    ReplyStatus,
)
from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec
from deconvd.wire.shared_slice import SharedSlice
from deconvd_server.resources.socket_file import Access
from deconvd_server.resources.unix_listener import SideSocket, SocketPurpose
from deconvd_server.shared_memory import Lender, LoanLimits, SharedTensors

__all__ = [
    "MIB",
    "BorrowerProcess",
    "MappingRecorder",
    "RawBorrower",
    "is_in_shared_memory",
    "lend_tensor",
    "memory_listener",
    "start_borrower_process",
    "start_lender",
]

MIB = 1 << 20
_TIMEOUT_S = 30

LIMITS = LoanLimits(all_bytes=512 * MIB, client_bytes=256 * MIB)


@contextmanager
def start_lender(
    path: Path,
    limits: LoanLimits = LIMITS,
    *,
    on_map: Callable[[int, int], Callable[[], None]] | None = None,
    spare_bytes: int = 0,
    users: frozenset[int] | None = None,
    access: Access | None = None,
) -> Iterator[Lender]:
    """Run a lender for the block, and see that it leaves nothing behind."""
    lender = Lender(
        [memory_listener(path, access)],
        limits,
        on_map=on_map or MappingRecorder(),
        spare_bytes=spare_bytes,
        users=users,
    )
    try:
        yield lender
    finally:
        lender.close()
    assert lender.wait_until_unused(_TIMEOUT_S)
    assert lender.lent_bytes == 0
    assert not path.exists()


def memory_listener(path: Path, access: Access | None = None) -> SideSocket:
    """Return a socket where memory can be lent."""
    return SideSocket(path, kind=SocketPurpose.MEMORY.kind, access=access)


@contextmanager
def lend_tensor(
    lender: Lender, name: str, lies_at: SharedSlice, spec: TensorSpec
) -> Iterator[Array]:
    """Use a tensor in lent memory for the block."""
    with SharedTensors(lender) as tensors:
        yield tensors.host_place(name, spec, lies_at)


class MappingRecorder:
    """An `on_map` that knows what is mapped: size by address."""

    def __init__(self) -> None:
        self.mapped: dict[int, int] = {}

    def __call__(self, address: int, size_bytes: int) -> Callable[[], None]:
        assert address not in self.mapped
        self.mapped[address] = size_bytes

        def undo() -> None:
            del self.mapped[address]

        return undo


def is_in_shared_memory(array: Array) -> bool:
    """Return whether an array lies in memory that a server lends."""
    address = array.__array_interface__["data"][0]
    with open("/proc/self/maps") as maps:
        for line in maps:
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            if begin <= address < end:
                return "/memfd:deconvd" in line
    return False


class BorrowerProcess:
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

    def read_line(self) -> str:
        """Return the next line that it prints, when it does; nothing once it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def write_line(self, line: str = "") -> None:
        """Write a line that it waits for by `input`."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()


class RawBorrower:
    """A client that speaks the protocol by hand, and keeps the descriptors of what it was lent."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(_TIMEOUT_S)
        self.socket.connect(str(path))
        self.descriptors: list[int] = []

    def ask(self, request: LendingRequest) -> LendingReply:
        return self.ask_raw(request.pack())

    def ask_raw(self, packet: bytes) -> LendingReply:
        self.socket.send(packet)
        answer, descriptors, _, _ = socket.recv_fds(self.socket, MAX_REPLY_BYTES, 4)
        self.descriptors += descriptors
        return LendingReply.parse(answer)

    def lend(self, size_bytes: int) -> LendingReply:
        return self.ask(LendingRequest(LendingOperation.LEND, size_bytes))

    def borrow(self, size_bytes: int) -> bytes:
        reply = self.lend(size_bytes)
        assert reply.status is ReplyStatus.DONE
        return reply.region

    def is_dropped(self) -> bool:
        """Wait for the end of the connection; False if there is something to read instead."""
        return self.socket.recv(MAX_REPLY_BYTES) == b""

    def give_back(self, region: bytes) -> LendingReply:
        return self.ask(LendingRequest(LendingOperation.RETURN, region=region))

    def close_descriptors(self) -> None:
        """Keep no memory that was lent."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []

    def close(self) -> None:
        self.socket.close()
        self.close_descriptors()


_PRELUDE = """
import os, socket, sys
import numpy as np
from deconvd.lending.protocol import LendingOperation, LendingReply, LendingRequest, ReplyStatus
from deconvd_client.calls.deadline import Deadline
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
def start_borrower_process(
    script: str, path: Path, *, user: int | None = None
) -> Iterator[BorrowerProcess]:
    """Run a script for the block, and kill it then."""
    running = BorrowerProcess(script, path, user)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.communicate()
