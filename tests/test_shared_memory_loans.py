"""How a borrower stands with the server that lends, and what its link to it is doing: states and transitions."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deconvd.errors import CallCancelledError, StaleRegionError, UnavailableError
from deconvd.lending.protocol import LendingReply, ReplyStatus
from deconvd_client.calls.deadline import Deadline
from deconvd_client.shared_memory import Borrower
from deconvd_client.shared_memory.link import Link, LinkLostError, LinkState
from deconvd_client.shared_memory.loan_thread import LenderState, LoanClient
from deconvd_client.transports.retry_policy import PinnedTransportError
from deconvd_server.shared_memory import Lender
from tests.deadlines import short_deadline
from tests.interrupts import interrupt_everywhere
from tests.lenders import MIB, start_lender
from tests.processes import descriptors_count, exit_code, wait_until

WAIT_S = 30


@pytest.fixture
def listener(path: Path) -> Iterator[socket.socket]:
    """A server that takes connections and answers nothing by itself."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(path))
        listening.listen()
        listening.settimeout(WAIT_S)
        yield listening


def loans(borrower: Borrower) -> LoanClient:
    return borrower._loan_client


def state(link: Link) -> LinkState:
    return link.state


def is_open(link: Link) -> bool:
    return link.is_open


class TestLenderState:
    """Of a borrower, which has a link while it is LENDING and at no other time."""

    def test_a_server_that_lends_goes_and_comes_back(self, path: Path) -> None:
        borrower = Borrower(lambda _: str(path))
        assert loans(borrower).state is LenderState.UNTRIED
        with start_lender(path):
            assert borrower.allocate(MIB, short_deadline()) is not None
            assert loans(borrower).state is LenderState.LENDING
            assert loans(borrower).link is not None

        borrower.check_link()
        assert loans(borrower).state is LenderState.AWAY
        assert loans(borrower).link is None
        assert borrower.borrowed_bytes == 0

        with start_lender(path):
            assert borrower.allocate(MIB, short_deadline()) is not None
            assert loans(borrower).state is LenderState.LENDING
        borrower.close()
        assert loans(borrower).state is LenderState.CLOSED

    def test_a_server_that_never_lends_is_told_from_a_borrower_that_is_closed(self) -> None:
        borrower = Borrower(lambda _: "", is_only_way=True)
        assert borrower.allocate(MIB, short_deadline()) is None
        assert loans(borrower).state is LenderState.REFUSED
        with pytest.raises(PinnedTransportError, match="lends none"):
            borrower.check_fallback()

        borrower.close()

        assert loans(borrower).state is LenderState.CLOSED
        with pytest.raises(CallCancelledError, match="connection is closed"):
            borrower.check_fallback()

    def test_a_loss_that_an_interrupt_breaks_off_is_noted_the_next_time(self, path: Path) -> None:
        def lose_one() -> tuple[Borrower, Link]:
            borrower = Borrower(lambda _: str(path))
            with start_lender(path):
                assert borrower.allocate(MIB, short_deadline()) is not None
                link = loans(borrower).link
            assert link is not None
            return borrower, link

        lost = [lose_one()]
        for _ in interrupt_everywhere(lambda: lost[-1][0].check_link()):
            borrower, link = lost[-1]
            borrower.check_link()
            assert loans(borrower).state is LenderState.AWAY
            assert borrower.borrowed_bytes == 0
            assert link.state is LinkState.CLOSED
            lost.append(lose_one())
        lost[-1][0].close()

    def test_calls_that_go_to_another_server_end_the_lending(
        self, path: Path, lender: Lender
    ) -> None:
        borrower = Borrower(lambda _: str(path))
        assert borrower.allocate(MIB, short_deadline()) is not None

        borrower.note_failure(StaleRegionError("x is not in memory of this server's"), ())

        assert loans(borrower).state is LenderState.AWAY
        assert borrower.allocate(MIB, short_deadline()) is None  # it is left in peace for a second
        borrower.close()

    def test_a_borrower_that_is_closed_while_it_looks_for_a_server_stays_closed(
        self, path: Path, lender: Lender
    ) -> None:
        is_asked, may_answer = threading.Event(), threading.Event()

        def find_socket(_: Deadline) -> str:
            is_asked.set()
            may_answer.wait(WAIT_S)
            return str(path)

        borrower = Borrower(find_socket)
        with ThreadPoolExecutor(1) as threads:
            taking = threads.submit(borrower.allocate, MIB, short_deadline())
            assert is_asked.wait(WAIT_S)
            assert loans(borrower).state is LenderState.AWAY
            borrower.close()
            may_answer.set()

            assert taking.result(WAIT_S) is None
        assert loans(borrower).state is LenderState.CLOSED
        assert loans(borrower).link is None
        assert lender.wait_until_unused(WAIT_S)

    def test_what_the_server_says_after_the_end_does_not_change_why_there_is_no_memory(
        self, path: Path, listener: socket.socket
    ) -> None:
        borrower = Borrower(lambda _: str(path), is_only_way=True)
        with ThreadPoolExecutor(1) as threads:
            taking = threads.submit(borrower.allocate, MIB, short_deadline())
            server, _ = listener.accept()
            server.recv(1 << 16)
            borrower.close()
            assert taking.result(WAIT_S) is None
            server.close()
        with pytest.raises(CallCancelledError):
            borrower.check_fallback()

    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
    def test_a_forked_child_begins_anew_but_for_what_is_for_good(
        self, path: Path, lender: Lender
    ) -> None:
        lent, refused = Borrower(lambda _: str(path)), Borrower(lambda _: "")
        closed = Borrower(lambda _: str(path))
        assert lent.allocate(MIB, short_deadline()) is not None
        assert refused.allocate(MIB, short_deadline()) is None
        closed.close()
        link = loans(lent).link
        assert link is not None

        def is_right() -> bool:
            states = [loans(borrower).state for borrower in (lent, refused, closed)]
            return (
                states == [LenderState.UNTRIED, LenderState.REFUSED, LenderState.CLOSED]
                and loans(lent).link is None
                and link.state is LinkState.CLOSED
            )

        assert exit_code(is_right) == 0
        assert loans(lent).state is LenderState.LENDING
        assert link.is_open  # the child's end of it is not the parent's
        lent.close()

    def test_each_loss_is_told_once_and_louder_when_memory_was_lent(
        self, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        borrower = Borrower(lambda _: str(path))
        for _ in range(2):
            assert borrower.allocate(MIB, short_deadline()) is None
            loans(borrower)._backoff.note_success()  # it is asked again at once
        for _ in range(2):
            with start_lender(path):
                assert borrower.allocate(MIB, short_deadline()) is not None
            borrower.check_link()
        borrower.close()

        told = [record.levelno for record in caplog.records if "sent instead" in record.message]
        assert told == [logging.INFO, logging.WARNING, logging.WARNING]


class TestLink:
    """One thread asks, and any may close the link meanwhile."""

    def test_it_asks_and_is_idle_again(self, path: Path, lender: Lender) -> None:
        link = Link(str(path))
        region = link.borrow(MIB)
        assert state(link) is LinkState.IDLE
        assert is_open(link)
        link.give_back(region.name)
        link.close()
        link.close()
        assert state(link) is LinkState.CLOSED
        assert not is_open(link)
        with pytest.raises(LinkLostError, match="is closed"):
            link.borrow(MIB)

    def test_an_answer_that_nobody_has_read_yet_is_not_taken_for_the_end(
        self, path: Path, listener: socket.socket
    ) -> None:
        link = Link(str(path))
        server, _ = listener.accept()
        with server, ThreadPoolExecutor(1) as threads:
            asking = threads.submit(link.give_back, bytes(16))
            server.recv(1 << 16)
            assert state(link) is LinkState.BUSY
            assert is_open(link)
            server.send(LendingReply(ReplyStatus.DONE).pack())
            asking.result(WAIT_S)
            assert state(link) is LinkState.IDLE
            assert is_open(link)
            server.send(LendingReply(ReplyStatus.DONE).pack())  # nobody has asked
            assert not is_open(link)
        link.close()

    def test_closing_ends_the_asking_and_then_frees_the_descriptor(
        self, path: Path, listener: socket.socket
    ) -> None:
        before = descriptors_count()
        link = Link(str(path))
        server, _ = listener.accept()
        with server, ThreadPoolExecutor(1) as threads:
            asking = threads.submit(link.borrow, MIB)
            server.recv(1 << 16)
            link.close()
            assert state(link) in (LinkState.CLOSING, LinkState.CLOSED)
            assert not is_open(link)
            with pytest.raises(LinkLostError):
                asking.result(WAIT_S)
        assert state(link) is LinkState.CLOSED
        wait_until(lambda: descriptors_count() <= before)


def test_an_error_says_when_to_ask_again(path: Path) -> None:
    """A lender that was lost may come back: that is unlike one that is not here at all."""
    borrower = Borrower(lambda _: str(path), is_only_way=True)
    with start_lender(path):
        assert borrower.allocate(MIB, short_deadline()) is not None
    borrower.check_link()
    with pytest.raises(UnavailableError) as raised:
        borrower.check_fallback()
    assert raised.value.retry_after_s is not None
    borrower.close()
