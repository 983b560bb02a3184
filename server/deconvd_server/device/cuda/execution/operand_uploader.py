"""Uploads the operands of a large call that are not divided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from deconvd.model.dtypes import Array
from deconvd_server.device.arriving import Arriving, Operand, OverlappedOperands
from deconvd_server.device.cuda.api.runtime import Stream, copy, upload
from deconvd_server.device.cuda.execution.reachable import ReachableMemory
from deconvd_server.device.cuda.execution.staging import bytes_of

__all__ = ["OperandUploader"]

_OVERLAP_PIECE_BYTES: Final = 2 << 20
"""Size of the pieces in which an operand is uploaded while it arrives."""


class OperandUploader:
    """Enqueues the copies of whole operands to where a call's work reads them.

    Args:
        stream: The upload stream.
        reachable: The host memory that the card reaches.
    """

    def __init__(self, stream: Stream, reachable: ReachableMemory) -> None:
        self._stream = stream
        self._reachable = reachable

    def upload(self, array: Array, target: int) -> None:
        """Enqueue a copy of an array that the card reaches."""
        upload(target, bytes_of(array), self._stream.pointer)

    def place(
        self,
        operand: Operand,
        address: int | None,
        target: int,
        upload_array: Callable[[Array, int], None],
        overlapped: OverlappedOperands,
    ) -> None:
        """Enqueue a copy of an operand to where the work reads it, unless it is there.

        Args:
            address: Where it is on the card; None if it is an array.
            target: Where the work reads it.
            upload_array: Enqueues a copy of an array.
        """
        if isinstance(operand, Arriving):
            self._upload_overlapped(operand, target, upload_array, overlapped)
        elif isinstance(operand, np.ndarray):
            upload_array(operand, target)
        elif address is not None and address != target:  # not aligned as plans need it
            copy(target, address, operand.spec.nbytes, self._stream.pointer)

    def _upload_overlapped(
        self,
        operand: Arriving,
        target: int,
        upload_array: Callable[[Array, int], None],
        overlapped: OverlappedOperands,
    ) -> None:
        """Enqueue copies of an arriving operand: of each piece once it is there, if the card reaches it."""
        if not self._reachable.holds(operand.array):
            overlapped.wait_for_all(operand)
            upload_array(operand.array, target)
            return
        whole = bytes_of(operand.array)
        for begin in range(0, whole.size, _OVERLAP_PIECE_BYTES):
            piece = whole[begin : begin + _OVERLAP_PIECE_BYTES]
            overlapped.wait_for(operand, begin + piece.size)
            upload(target + begin, piece, self._stream.pointer)
