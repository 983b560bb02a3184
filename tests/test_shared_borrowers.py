"""Borrowers of shared memory, who share its places by process: what one borrows leaves some to others."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from deconvd.lending.protocol import (
    MAX_REPLY_BYTES,
    LendingOperation,
    LendingReply,
    LendingRequest,
    ReplyStatus,
)
from deconvd_client import Connection
from tests.lenders import is_in_shared_memory, start_borrower_process
from tests.servers import ServerProcess, server_process

MIB = 1 << 20
X = np.ones((16, 2, 256, 256), np.float32)
TWICE = 2 * np.eye(2, dtype=np.float32)[:, :, None, None]

BORROW = """
def borrow(size_bytes):
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link.settimeout(20)
    link.connect(path)
    try:
        link.send(LendingRequest(LendingOperation.LEND, size_bytes).pack())
    except BrokenPipeError:
        pass  # it was refused before
    packet, descriptors, _, _ = socket.recv_fds(link, 4096, 1)
    for descriptor in descriptors:
        os.close(descriptor)
    return link, LendingReply.parse(packet).status
"""
HOSTILE_LINKS = BORROW + "links = [borrow(1) for _ in range(200)]; say('done'); input()"
HOSTILE_BYTES = BORROW + f"links = [borrow({8 * MIB}) for _ in range(8)]; say('done'); input()"
HONEST = BORROW + "links = [borrow(1) for _ in range(3)]; say(*{a.name for _, a in links}); input()"


@pytest.fixture
def running(tmp_path: Path) -> Iterator[ServerProcess]:
    with server_process(tmp_path, "--shared-memory-bytes", "512Mi") as server:
        yield server


def memory_path(server: ServerProcess) -> Path:
    return Path(f"{server.target.removeprefix('unix:')}.memory")


def borrow_pages(server: ServerProcess, count: int, stack: ExitStack) -> list[ReplyStatus]:
    """Borrow a page by each of so many connections of this process, and return what is answered."""
    answers = []
    for _ in range(count):
        link = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        link.settimeout(20)
        link.connect(os.fspath(memory_path(server)))
        with suppress(BrokenPipeError):  # it was refused before
            link.send(LendingRequest(LendingOperation.LEND, 1).pack())
        packet, descriptors, _, _ = socket.recv_fds(link, MAX_REPLY_BYTES, 1)
        for descriptor in descriptors:
            os.close(descriptor)
        answers.append(LendingReply.parse(packet).status)
    return answers


def goes_by_shared_memory(F: Connection) -> bool:
    y = F.deconvolution_2d(X, TWICE)
    np.testing.assert_array_equal(y, 2 * X)
    return is_in_shared_memory(y)


def test_borrowers_of_one_process_shut_nobody_else_out(running: ServerProcess) -> None:
    with start_borrower_process(HOSTILE_LINKS, memory_path(running)) as hostile:
        assert hostile.read_line() == "done"
        with deconvd_client.connect(running.target) as F:
            assert goes_by_shared_memory(F)


def test_a_process_cannot_borrow_all_memory(tmp_path: Path) -> None:
    with server_process(tmp_path, "--shared-memory-bytes", "64Mi") as server:
        with start_borrower_process(HOSTILE_BYTES, memory_path(server)) as hostile:
            assert hostile.read_line() == "done"
            with ExitStack() as stack:
                assert borrow_pages(server, 2, stack) == [ReplyStatus.DONE] * 2


def test_a_process_cannot_borrow_all_regions(running: ServerProcess) -> None:
    many = BORROW + (
        "links = [borrow(1)[0] for _ in range(10)]\n"
        "for link in links:\n"
        "    for _ in range(31):\n"
        "        link.send(LendingRequest(LendingOperation.LEND, 1).pack())\n"
        "        _, descriptors, _, _ = socket.recv_fds(link, 4096, 1)\n"
        "        for descriptor in descriptors: os.close(descriptor)\n"
        "say('done'); input()"
    )
    with start_borrower_process(many, memory_path(running)) as hostile:
        assert hostile.read_line() == "done"
        with deconvd_client.connect(running.target) as F:
            assert goes_by_shared_memory(F)


def test_a_client_whose_place_is_given_to_another_notices_nothing(running: ServerProcess) -> None:
    with deconvd_client.connect(running.target) as F, ExitStack() as stack:
        assert goes_by_shared_memory(F)
        answers = borrow_pages(running, 120, stack)  # so F has been idle for longest
        assert 100 < answers.count(ReplyStatus.DONE) < 120
        with start_borrower_process(HONEST, memory_path(running)) as other:
            assert other.read_line() == "DONE"
            for _ in range(3):
                goes_by_shared_memory(F)
        stack.close()
    log = running.log.read_text()
    assert "one of the clients of shared memory of process" in log
    assert "Traceback" not in log


def test_who_uses_what_it_borrowed_is_not_idle(running: ServerProcess) -> None:
    with deconvd_client.connect(running.target) as F, ExitStack() as stack:
        assert goes_by_shared_memory(F)
        borrow_pages(running, 120, stack)
        assert goes_by_shared_memory(F)
        before = F.deconvolution_2d(X, TWICE)
        other = stack.enter_context(start_borrower_process(HONEST, memory_path(running)))
        assert other.read_line() == "DONE"
        assert goes_by_shared_memory(F)
        np.testing.assert_array_equal(before, 2 * X)
