"""Memory of cards that is lent: to whom, how much, and until when. No card is needed: the host's memory plays one."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deconvd.errors import ExhaustedError, InvalidArgumentError, StaleRegionError
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
from deconvd_server.device import DeviceTensor, LentMemory
from deconvd_server.device.cpu.tensor import HostTensor, array_of
from deconvd_server.engine.engine import Engine
from deconvd_server.resources.accept_loop import Listener
from deconvd_server.shared_memory import CardLender, Lender, LoanLimits, SharedTensors
from tests.lenders import LIMITS, memory_listener, start_borrower_process
from tests.processes import leaves_no_descriptor, wait_until

BLOCK_BYTES = 2 << 20
CARD, OTHER_CARD = bytes(range(16)), bytes(range(1, 17))
FLOATS = TensorSpec((4, 8), np.dtype(np.float32))
TIMEOUT_S = 30


class Lent:
    """Memory of the host, as if it were a card's."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.handle = bytes(64)
        self.bytes: Array = np.zeros(size_bytes, np.uint8)

    def tensor(self, spec: TensorSpec, offset_bytes: int) -> DeviceTensor:
        part = self.bytes[offset_bytes : offset_bytes + spec.nbytes]
        return HostTensor(part.view(spec.dtype).reshape(spec.shape))

    def free(self) -> None:
        raise AssertionError("the engine counts what is freed")


class FakeEngine:
    """Lends up to 16 MiB, and knows what is lent."""

    def __init__(self) -> None:
        self.lent: list[LentMemory] = []

    def lend(self, size_bytes: int) -> LentMemory:
        if sum(lent.size_bytes for lent in self.lent) + size_bytes > 8 * BLOCK_BYTES:
            raise ExhaustedError("the card is full")
        self.lent.append(Lent(size_bytes))
        return self.lent[-1]

    def take_back(self, lent: LentMemory) -> None:
        self.lent.remove(lent)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def lender(path: Path, engine: FakeEngine) -> Iterator[Lender]:
    cards = CardLender({CARD: engine}, LoanLimits(16 * BLOCK_BYTES, 4 * BLOCK_BYTES))
    lender = Lender([memory_listener(path)], LIMITS, card_lender=cards)
    yield lender
    lender.close()
    assert engine.lent == []


class Peer:
    """One connection to the lender."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(TIMEOUT_S)
        self.socket.connect(str(path))

    def ask(
        self, operation: LendingOperation, size_bytes: int = 0, region: bytes = CARD
    ) -> LendingReply:
        self.socket.send(LendingRequest(operation, size_bytes, region).pack())
        return LendingReply.parse(self.socket.recv(MAX_REPLY_BYTES))

    def borrowed(self, size_bytes: int) -> bytes:
        reply = self.ask(LendingOperation.LEND_ON_CARD, size_bytes)
        assert reply.status is ReplyStatus.DONE, reply.text
        return reply.region


@pytest.fixture
def peer(lender: Lender, path: Path) -> Iterator[Peer]:
    peer = Peer(path)
    yield peer
    peer.socket.close()


def test_a_client_gets_a_handle_and_calls_find_tensors_there(
    lender: Lender, peer: Peer, engine: FakeEngine
) -> None:
    reply = peer.ask(LendingOperation.LEND_ON_CARD, BLOCK_BYTES)
    assert (reply.status, reply.size_bytes) == (ReplyStatus.DONE, BLOCK_BYTES)
    assert bytes.fromhex(reply.text) == engine.lent[0].handle

    with SharedTensors(lender) as tensors:
        x = tensors.operand("x", FLOATS, SharedSlice(reply.region, 128))
        y = tensors.place("y_place", FLOATS, SharedSlice(reply.region, 0))
        array_of(x)[...] = 7
        assert (array_of(y) == 0).all()

    lent = engine.lent[0]
    assert isinstance(lent, Lent)
    assert (lent.bytes[128:256].view(np.float32) == 7).all()


@pytest.mark.parametrize(
    ("offset_bytes", "message"), [(BLOCK_BYTES - 64, "inside its region"), (2, "mult")]
)
def test_a_slice_that_is_none_is_refused(
    lender: Lender, peer: Peer, offset_bytes: int, message: str
) -> None:
    region = peer.borrowed(BLOCK_BYTES)
    with SharedTensors(lender) as tensors, pytest.raises(InvalidArgumentError, match=message):
        tensors.operand("x", FLOATS, SharedSlice(region, offset_bytes))


def test_memory_of_a_card_is_none_of_the_hosts(lender: Lender, peer: Peer) -> None:
    place = SharedSlice(peer.borrowed(BLOCK_BYTES), 0)
    with (
        SharedTensors(lender) as tensors,
        pytest.raises(InvalidArgumentError, match="in host memory"),
    ):
        tensors.host_place("place", FLOATS, place)


def test_memory_comes_in_whole_blocks_in_which_nobody_elses_lies(
    peer: Peer, engine: FakeEngine
) -> None:
    reply = peer.ask(LendingOperation.LEND_ON_CARD, BLOCK_BYTES + 1)
    assert reply.size_bytes == engine.lent[0].size_bytes == 2 * BLOCK_BYTES


def test_a_card_that_the_server_has_not_is_never_lent(peer: Peer) -> None:
    reply = peer.ask(LendingOperation.LEND_ON_CARD, BLOCK_BYTES, OTHER_CARD)
    assert reply.status is ReplyStatus.NO_SUCH_CARD


def test_a_server_without_cards_says_so(path: Path) -> None:
    lender = Lender([memory_listener(path)], LIMITS)
    peer = Peer(path)
    assert peer.ask(LendingOperation.LEND_ON_CARD, BLOCK_BYTES).status is ReplyStatus.NO_SUCH_CARD
    peer.socket.close()
    lender.close()


def test_a_client_has_no_more_than_its_share(peer: Peer, engine: FakeEngine) -> None:
    region = peer.borrowed(3 * BLOCK_BYTES)
    assert (
        peer.ask(LendingOperation.LEND_ON_CARD, 2 * BLOCK_BYTES).status
        is ReplyStatus.OVER_CLIENT_LIMIT
    )

    assert peer.ask(LendingOperation.RETURN, region=region).status is ReplyStatus.DONE
    assert engine.lent == []
    peer.borrowed(4 * BLOCK_BYTES)


def test_a_card_without_room_lends_none(path: Path, lender: Lender, engine: FakeEngine) -> None:
    peers = [Peer(path) for _ in range(3)]
    answers = [peer.ask(LendingOperation.LEND_ON_CARD, 4 * BLOCK_BYTES).status for peer in peers]
    assert answers == [ReplyStatus.DONE, ReplyStatus.DONE, ReplyStatus.OVER_SERVER_LIMIT]

    assert peers[2].ask(LendingOperation.LEND_ON_CARD, 0).status is ReplyStatus.OVER_SERVER_LIMIT
    assert [lent.size_bytes for lent in engine.lent] == [4 * BLOCK_BYTES, 4 * BLOCK_BYTES]
    for peer in peers:
        peer.socket.close()


def test_what_is_given_back_stays_until_the_last_call_that_uses_it_ends(
    lender: Lender, peer: Peer, engine: FakeEngine
) -> None:
    region = peer.borrowed(BLOCK_BYTES)
    with SharedTensors(lender) as tensors:
        x = tensors.operand("x", FLOATS, SharedSlice(region, 0))
        assert peer.ask(LendingOperation.RETURN, region=region).status is ReplyStatus.DONE
        array_of(x)[...] = 1
        assert len(engine.lent) == 1
        with SharedTensors(lender) as others, pytest.raises(StaleRegionError):
            others.operand("x", FLOATS, SharedSlice(region, 0))
    assert engine.lent == []


def test_another_client_can_neither_give_it_back_nor_guess_it(
    lender: Lender, path: Path, peer: Peer, engine: FakeEngine
) -> None:
    region, thief = peer.borrowed(BLOCK_BYTES), Peer(path)
    assert thief.ask(LendingOperation.RETURN, region=region).status is ReplyStatus.MALFORMED
    thief.socket.close()
    assert len(engine.lent) == 1


BORROW_AND_LEAVE = f"""
peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
peer.connect(path)
peer.send(LendingRequest(LendingOperation.LEND_ON_CARD, {BLOCK_BYTES}, {CARD!r}).pack())
say(LendingReply.parse(peer.recv(1024)).status.name)
peer.close()
input()
"""


def test_memory_stays_while_a_client_that_left_may_have_it_open(
    lender: Lender, path: Path, engine: FakeEngine
) -> None:
    with start_borrower_process(BORROW_AND_LEAVE, path) as running:
        assert running.read_line() == "DONE"
        wait_until(lambda: lender.borrowers_count == 0)
        later = Peer(path)
        later.ask(LendingOperation.RETURN)  # the lender has been through with those before
        later.socket.close()
        assert len(engine.lent) == 1

        running.process.kill()
        wait_until(lambda: engine.lent == [])


def test_what_a_client_that_left_has_is_taken_back_although_no_more_could_be_watched_for_a_moment(
    lender: Lender, path: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Listener.watch
    errors = [OSError(errno.ENOSPC, "No space left on device")]

    def watch_with_luck(listener: Listener, descriptor: int, *rest: Any) -> None:
        if errors and os.readlink(f"/proc/self/fd/{descriptor}") == "anon_inode:[pidfd]":
            raise errors.pop()
        watch(listener, descriptor, *rest)

    monkeypatch.setattr(Listener, "watch", watch_with_luck)
    with start_borrower_process(BORROW_AND_LEAVE, path) as running:
        wait_until(lambda: not errors)
        running.process.kill()
        wait_until(lambda: engine.lent == [])


def test_a_client_that_gave_all_back_leaves_nothing(lender: Lender, path: Path) -> None:
    with leaves_no_descriptor():
        for _ in range(5):
            peer = Peer(path)
            assert (
                peer.ask(LendingOperation.RETURN, region=peer.borrowed(BLOCK_BYTES)).status
                is ReplyStatus.DONE
            )
            peer.socket.close()


def test_a_client_that_is_killed_loses_all(lender: Lender, path: Path, engine: FakeEngine) -> None:
    with start_borrower_process(BORROW_AND_LEAVE.replace("peer.close()", ""), path) as running:
        assert running.read_line() == "DONE"
        running.process.kill()
        wait_until(lambda: engine.lent == [])


def test_an_engine_lends_what_takes_of_its_budget() -> None:
    """A device of the host's memory lends, so that the engine's account can be seen without a card."""
    from deconvd_server.device.cpu import CpuDevice

    class Lending(CpuDevice):
        def lend(self, size_bytes: int) -> LentMemory:
            return Freed(size_bytes)

    class Freed(Lent):
        def free(self) -> None:
            self.size_freed = self.size_bytes

    device = Lending(1, memory_limit_bytes=4 * BLOCK_BYTES)
    engine = Engine(device, waiting_count=1)
    lent = engine.lend(3 * BLOCK_BYTES)
    assert engine.load.reserved_bytes == 3 * BLOCK_BYTES
    with pytest.raises(ExhaustedError):
        engine.lend(2 * BLOCK_BYTES)

    engine.take_back(lent)

    assert engine.load.reserved_bytes == 0
    device.close()
