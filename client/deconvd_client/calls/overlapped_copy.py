"""Copies of operands into shared memory that overlap with their call: they are made once the server knows of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Final, NamedTuple

from deconvd.host.parallel_copy import copy_all
from deconvd.model.dtypes import Array

__all__ = ["OverlappedCopy", "SharedOperand"]

_MAX_REPORTS_COUNT: Final = 8
"""How often progress is reported at most, apart from the ends of operands. A card uploads x in as many parts."""


class SharedOperand(NamedTuple):
    """An operand that a call has in shared memory.

    Attributes:
        size_bytes: Its size.
        copy: The target and the source of its copy; None if it is there already.
    """

    size_bytes: int
    copy: tuple[Array, Array] | None


class OverlappedCopy:
    """Copies of one call. They are made once, however often the call is tried. Not thread-safe.

    Args:
        operands: All operands in shared memory, in the order of `Operation.write_order`.

    Attributes:
        is_done: Whether all copies are made.
        initial_bytes: How many bytes of the operands, one after the other, are there before the first copy.
    """

    def __init__(self, operands: Sequence[SharedOperand]) -> None:
        self._operands = operands
        self.is_done: bool = False
        self.initial_bytes: int = sum(
            o.size_bytes for o in takewhile(lambda o: o.copy is None, operands)
        )

    def run(self, report: Callable[[int], None] | None = None) -> None:
        """Make the copies, unless they are made.

        Args:
            report: Called with the number of bytes of the operands that are there, now and then, in any thread.
        """
        if self.is_done:
            return
        copies = [operand.copy for operand in self._operands if operand.copy is not None]
        copy_all(copies, report and _ProgressThrottle(report, self._operands))
        self.is_done = True


class _ProgressThrottle:
    """Passes progress on, but only when enough has been copied since the last report.

    The copies count the bytes that they have made. The server counts all bytes of the operands in their order, also
    those that were there before::

        operands   [ W, there already ][ b, to be copied ][ x, to be copied      ]
        copied                          [================][======>
        reported   [====================================================>

    Args:
        report: Called with the number of bytes of the operands that are there.
    """

    def __init__(self, report: Callable[[int], None], operands: Sequence[SharedOperand]) -> None:
        self._report = report
        self._operands = operands
        self._end_offsets = [*_end_offsets(operands)]
        self._reported_bytes = 0

    def __call__(self, copied_bytes: int) -> None:
        """Note how many bytes have been copied."""
        present_bytes = self._present_bytes(copied_bytes)
        step_bytes = self._end_offsets[-1] / _MAX_REPORTS_COUNT
        is_at_an_end = any(self._reported_bytes < end <= present_bytes for end in self._end_offsets)
        if is_at_an_end or present_bytes - self._reported_bytes >= step_bytes:
            self._reported_bytes = present_bytes
            self._report(present_bytes)

    def _present_bytes(self, copied_bytes: int) -> int:
        present_bytes = 0
        for operand in self._operands:
            operand_bytes = operand.size_bytes
            if operand.copy is not None:
                operand_bytes = min(copied_bytes, operand_bytes)
                copied_bytes -= operand_bytes
            present_bytes += operand_bytes
            if operand_bytes < operand.size_bytes:
                break
        return present_bytes


def _end_offsets(operands: Sequence[SharedOperand]) -> Iterator[int]:
    end_bytes = 0
    for operand in operands:
        end_bytes += operand.size_bytes
        yield end_bytes
