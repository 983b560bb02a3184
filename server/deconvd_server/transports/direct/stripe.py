"""Serves a stripe: it receives some pieces of a call's operands, and then sends some pieces of its results."""

from __future__ import annotations

from typing import Final

from deconvd.direct.connection_errors import ConnectionClosedError
from deconvd.direct.events import EndOfStream, PieceHead
from deconvd.direct.frame_stream import FrameStream
from deconvd.wire.stream_parts import PendingElements
from deconvd_server.call.context import ClientWait
from deconvd_server.transports.direct.striped_transfer import (
    STRIPE_WAIT_S,
    StripedTransfer,
    StripeMember,
    StripeState,
)
from deconvd_server.transports.direct.transfers import TransferTable

__all__ = ["Stripe"]

_MARGIN_S: Final = 5.0
"""How long after the deadline of its call a stripe ends by itself: the call has then ended it long before."""


class Stripe:
    """One connection's part in a striped call, from its STRIPE frame to its END.

    Args:
        frames: The connection.
        wait: Tells since when it has waited for its client.
    """

    def __init__(self, frames: FrameStream, wait: ClientWait) -> None:
        self._frames = frames
        self._member = StripeMember(wait, frames.shutdown)
        self._transfer: StripedTransfer | None = None
        self._is_cancelled = False

    def cancel(self) -> None:
        """Fail the call if this stripe is not done. The connection has been shut down. Does not wait.

        A stripe that is ENDING has written its END before the connection was shut down, or fails to: its own thread
        tells. One that is not yet ENDING cannot write it any more.
        """
        self._is_cancelled = True
        is_done = self._member.state in (StripeState.ENDING, StripeState.ENDED)
        if self._transfer is not None and not is_done:
            self._transfer.drop(self._member)

    def serve(self, transfers: TransferTable, transfer_id: bytes, peer_key: str) -> None:
        """Carry the stripe's part of the elements.

        Raises:
            ConnectionBrokenError: There is no such call, it has failed, or the connection has broken, which fails it.
        """
        member = self._member
        self._transfer = transfer = transfers.join(transfer_id, peer_key, member)
        try:
            if self._is_cancelled:  # before `cancel` could find the transfer
                raise ConnectionClosedError("the connection has been shut down")
            call = transfer.wait_until_open(member, STRIPE_WAIT_S)
            remaining_s = call.remaining_s()
            self._frames.set_deadline(None if remaining_s is None else remaining_s + _MARGIN_S)
            transfer.wait_until_receivable()
            self._receive_operands(transfer)
            self._send_results(transfer)
            member.state = StripeState.ENDING
            self._frames.send(EndOfStream())
            member.state = StripeState.ENDED
        except BaseException:
            transfer.drop(member)
            raise
        finally:
            transfers.leave(transfer_id, transfer, member)

    def _receive_operands(self, transfer: StripedTransfer) -> None:
        frames, member = self._frames, self._member
        member.state = StripeState.TRANSFERRING
        while not isinstance(event := frames.next_event(), EndOfStream):
            if not isinstance(event, PieceHead):
                raise transfer.refuse("elements of a striped call must follow a PIECE frame")
            number = event.number
            elements = frames.next_event()
            if not isinstance(elements, PendingElements):
                raise transfer.refuse(
                    f"the elements of piece {number} of a striped call must follow its PIECE frame"
                )
            count, buffers = transfer.begin_landing(number, elements.size_bytes)
            for buffer in buffers:
                frames.read_into_buffer(buffer)
            transfer.note_landed(number, count)
        member.state = StripeState.WAITING
        transfer.end_landing()

    def _send_results(self, transfer: StripedTransfer) -> None:
        frames, member = self._frames, self._member
        while (piece := transfer.take_result()) is not None:
            member.state = StripeState.TRANSFERRING
            frames.send_piece(*piece)
            member.state = StripeState.WAITING
