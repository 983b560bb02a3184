"""A striped call: its elements travel over several direct connections at once. See `deconvd.direct.protocol`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Final

from deconvd.direct.connection_errors import ConnectionClosedError, RemoteProtocolError
from deconvd.direct.events import (
    TRANSFER_ID_BYTES,
    Answer,
    CallFailure,
    EndOfStream,
    PieceHead,
    StripedCallHead,
    StripeHead,
)
from deconvd.direct.frame_stream import FrameStream
from deconvd.direct.pieces import PieceSpace, run_length
from deconvd.wire.status import error_from_status
from deconvd.wire.stream_parts import PendingElements
from deconvd_client.calls.transport import StripedAttempt
from deconvd_client.calls.uninterrupted import run_in_background

__all__ = ["run_striped_call"]

_CHECK_INTERVAL_S: Final = 0.05
"""How often a call that waits for its answer checks whether a stripe has broken."""

_REASON_TIMEOUT_S: Final = 1.0
"""How long the server may take to say why a stripe has broken."""

_EXIT_TIMEOUT_S: Final = 5.0
"""How long the threads of stripes may take to notice that their connections are shut down."""


def run_striped_call(
    control: FrameStream, stripes: Sequence[FrameStream], attempt: StripedAttempt, timeout_s: float
) -> Answer:
    """Make a striped call on connections that no other call uses, and that have deadlines.

    When it returns or raises, no thread uses the memory of the operands and results any more. If it raises, the stripes
    are shut down.

    Raises:
        DeconvdError: What the server raised.
        ConnectionBrokenError: The server did not say what it was.
    """
    transfer = os.urandom(TRANSFER_ID_BYTES)
    until_s = time.monotonic() + timeout_s
    control.send(
        StripedCallHead(attempt.method, timeout_s, attempt.request, transfer, len(stripes))
    )
    transfers = _Stripes(stripes, transfer, attempt)
    try:
        transfers.start()
        answer = transfers.wait_for_answer(control, until_s)
        if isinstance(answer, CallFailure):
            raise error_from_status(answer.status)
        transfers.finish()
    except BaseException:
        transfers.abandon()
        raise
    return answer


class _Stripes:
    """The stripes of one call. A background thread for each sends pieces of operands, then receives pieces of results.

    The numbers of the pieces are in shared objects: of those to be sent, the first of each run. `next()` on an
    iterator, and `remove()` on a set, are atomic: so each piece is sent once and received once, and no lock is needed.
    An exception from a signal handler can leave none locked.
    """

    def __init__(
        self, connections: Sequence[FrameStream], transfer: bytes, attempt: StripedAttempt
    ) -> None:
        self._connections = connections
        self._transfer = transfer
        self._operands = PieceSpace(attempt.operands)
        self._results = PieceSpace(attempt.results)
        self._transfer_count = attempt.transfer
        self._run_length = run_length(len(connections), self._operands.pieces_count)
        self._unsent_numbers = iter(range(0, self._operands.pieces_count, self._run_length))
        self._missing_numbers = set(range(self._results.pieces_count))
        self._ends: SimpleQueue[None] = SimpleQueue()  # has one item of each thread that has ended
        self._running_count = 0  # threads whose item has not been taken
        self._errors: list[BaseException] = []
        self._reason_until_s: float | None = None  # set once a stripe has broken

    def start(self) -> None:
        """Send and receive from now on."""
        self._running_count = len(self._connections)
        run_in_background(self._start_threads)

    def wait_for_answer(self, control: FrameStream, until_s: float) -> Answer | CallFailure:
        """Return the answer of the server. If a stripe breaks, raise its error unless the server soon says why.

        Args:
            until_s: The deadline of the call, on the monotonic clock.
        """
        while not control.poll(_CHECK_INTERVAL_S):
            now_s = time.monotonic()
            if self._reason_until_s is not None and now_s >= self._reason_until_s:
                self.finish()
            if now_s >= until_s:
                break  # the next line raises the error for it
        answer = control.next_event()
        assert isinstance(answer, (Answer, CallFailure)), (
            answer
        )  # the protocol lets nothing else come
        return answer

    def finish(self) -> None:
        """Wait for all stripes. Raise the error of the first one that has broken."""
        while self._running_count:
            self._ends.get()  # each stripe has the call's deadline
            self._running_count -= 1
        if self._errors:
            first, *_ = self._errors
            self._errors.clear()  # the error's traceback refers to this object: a cycle, which would keep the arrays
            try:
                raise first
            finally:
                del first
        if self._missing_numbers:
            raise RemoteProtocolError(
                f"the server ended all stripes with {len(self._missing_numbers)} of "
                f"{self._results.pieces_count} pieces of the results missing"
            )

    def abandon(self) -> None:
        """Shut the stripes down, and return when no thread uses the operands and results any more."""
        self._shut_down()
        until_s = time.monotonic() + _EXIT_TIMEOUT_S
        with suppress(Empty):  # an interrupt came before the threads were started
            while self._running_count:
                self._ends.get(timeout=max(until_s - time.monotonic(), 0))
                self._running_count -= 1
        self._errors.clear()

    def _start_threads(self) -> None:
        """Start a thread for each stripe. This runs in a background thread, where no interrupt strikes between two."""
        first, *others = self._connections
        for connection in others:
            try:
                run_in_background(partial(self._run, connection))
            except RuntimeError as error:  # the system allows no more threads
                self._fail(ConnectionClosedError(f"a stripe was not sent: {error}"))
                self._ends.put(None)
        self._run(first)

    def _run(self, connection: FrameStream) -> None:
        try:
            self._send(connection)
            self._receive(connection)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the caller's
            self._fail(error)
        self._ends.put(None)

    def _fail(self, error: BaseException) -> None:
        """End all stripes because of an error of one."""
        self._errors.append(error)
        self._reason_until_s = time.monotonic() + _REASON_TIMEOUT_S
        self._shut_down()

    def _shut_down(self) -> None:
        for connection in self._connections:
            connection.shutdown()

    def _send(self, connection: FrameStream) -> None:
        connection.send(StripeHead(self._transfer))
        for number in self._unsent_numbers:
            buffers = self._operands.buffers(number, self._run_length)
            connection.send_piece(number, buffers)
            if self._transfer_count is not None:
                self._transfer_count.add_sent(sum(map(len, buffers)))
        connection.send(EndOfStream())

    def _receive(self, connection: FrameStream) -> None:
        while True:
            event = connection.next_event()
            if isinstance(event, EndOfStream):
                return
            if not isinstance(event, PieceHead):
                raise RemoteProtocolError("the server sent elements outside a piece")
            self._receive_run(connection, event.number)

    def _receive_run(self, connection: FrameStream, number: int) -> None:
        elements = connection.next_event()
        count = 0
        if isinstance(elements, PendingElements):
            count = self._results.count_in_run(number, elements.size_bytes)
        if not count:
            raise RemoteProtocolError(
                f"the server sent {elements} as a run of pieces from number {number} on, which the results do not have"
            )
        try:
            for each in range(number, number + count):
                self._missing_numbers.remove(each)
        except KeyError:
            raise RemoteProtocolError(
                f"the server sent piece {each}, which it has sent before"
            ) from None
        for buffer in self._results.buffers(number, count):
            connection.read_into_buffer(buffer)
            if self._transfer_count is not None:
                self._transfer_count.add_received(len(buffer))
