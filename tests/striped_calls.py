"""Striped calls, frame by frame, for tests from the outside."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle

import numpy as np

from deconvd.direct.events import (
    TRANSFER_ID_BYTES,
    Answer,
    CallFailure,
    EndOfStream,
    MethodCode,
    PieceHead,
    StripedCallHead,
    StripeHead,
)
from deconvd.direct.frame_stream import FrameStream
from deconvd.direct.pieces import PieceSpace
from deconvd.model.dtypes import Array
from deconvd.model.problem import spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.stream_parts import PendingElements
from deconvd.wire.tensor import message_from_spec
from tests.direct_calls import connect_stream_from

__all__ = ["LARGE", "TWICE", "StripedCall", "striped_call"]

LARGE = np.random.default_rng(0).integers(-3, 4, (36, 2, 256, 256)).astype(np.float32)
"""Five pieces there, and as many back."""

TWICE = 2 * np.eye(2, dtype=np.float32)[:, :, None, None]


class StripedCall:
    """A call of Deconvolve by several lines, whose steps a test takes one by one.

    Attributes:
        control: Its control connection.
        stripes: Its other lines.
        operands: W and x, in pieces.
        results: y, in pieces: what `receive_results` fills.
        timeout_s: How long the server is told that the caller waits.
    """

    def __init__(
        self,
        control: FrameStream,
        stripes: list[FrameStream],
        x: Array = LARGE,
        W: Array = TWICE,
        *,
        timeout_s: float = 60.0,
    ) -> None:
        self.control = control
        self.stripes = stripes
        self.operands = PieceSpace([W, x])
        self.y = np.full_like(x, 77)
        self.results = PieceSpace([self.y])
        self.timeout_s = timeout_s
        self._transfer = secrets.token_bytes(TRANSFER_ID_BYTES)
        self._request = pb.DeconvolveRequest(
            x=message_from_spec(spec_of(x)), w=message_from_spec(spec_of(W))
        )

    def send_call(self) -> None:
        """Send the call."""
        message = self._request.SerializeToString()
        self.control.send(
            StripedCallHead(
                *(MethodCode.Deconvolve, self.timeout_s, message),
                *(self._transfer, len(self.stripes)),
            )
        )

    def join(self, stripes: Sequence[FrameStream] | None = None) -> None:
        """Have stripes join the call; all of them by default."""
        for stripe in self.stripes if stripes is None else stripes:
            stripe.send(StripeHead(self._transfer))

    def send_pieces(
        self,
        numbers: Iterable[int] | None = None,
        stripes: Sequence[FrameStream] | None = None,
    ) -> None:
        """Send pieces of the operands, by each stripe in turn; all of them, by all stripes, by default."""
        numbers = range(self.operands.pieces_count) if numbers is None else numbers
        for number, stripe in zip(numbers, cycle(stripes or self.stripes), strict=False):
            stripe.send_piece(number, self.operands.buffers(number))

    def end_pieces(self, stripes: Sequence[FrameStream] | None = None) -> None:
        """Say on stripes that their pieces have been sent; on all of them by default."""
        for stripe in stripes or self.stripes:
            stripe.send(EndOfStream())

    def receive_answer(self) -> Answer | CallFailure:
        """Return what the server answers."""
        event = self.control.next_event()
        assert isinstance(event, (Answer, CallFailure)), event
        return event

    def receive_piece(self, stripe: FrameStream) -> int | None:
        """Receive the next piece of the results of a stripe, and return its number; None at the stripe's end."""
        head = stripe.next_event()
        if isinstance(head, EndOfStream):
            return None
        assert isinstance(head, PieceHead), head
        elements = stripe.next_event()
        assert isinstance(elements, PendingElements), elements
        assert elements.size_bytes == self.results.piece_bytes(head.number)
        for buffer in self.results.buffers(head.number):
            stripe.read_into_buffer(buffer)
        return head.number

    def receive_results(self) -> Array:
        """Receive the other pieces of the results, and return y."""
        for stripe in self.stripes:
            while self.receive_piece(stripe) is not None:
                pass
        return self.y

    def run(self) -> Array:
        """Make the call from its begin to its end, and return y."""
        self.send_call()
        self.join()
        self.send_pieces()
        self.end_pieces()
        y = self.receive_results()
        answer = self.receive_answer()
        assert isinstance(answer, Answer), answer
        return y


@contextmanager
def striped_call(
    port: int, *, stripes_count: int = 2, host: str = "127.0.0.1", timeout_s: float = 60.0
) -> Iterator[StripedCall]:
    """Give the block a call that is to be made from an address of the loopback to a port for direct connections."""
    with ExitStack() as stack:
        control, *stripes = (
            stack.enter_context(connect_stream_from(host, port)) for _ in range(1 + stripes_count)
        )
        yield StripedCall(control, stripes, timeout_s=timeout_s)
