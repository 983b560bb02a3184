"""Copies of operands that a call does not wait for: they are made once the server knows of the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Final, NamedTuple

from deconvd.host.parallel_copy import copy_all
from deconvd.model.dtypes import Array

__all__ = ["OverlappedCopy", "SharedOperand"]

_MAX_REPORTS_COUNT: Final = 8
"""How often progress is told, at most, beside the ends of operands: in as many parts a card takes x."""


class SharedOperand(NamedTuple):
    """One of the operands that a call has in shared memory.

    Attributes:
        size_bytes: Its size.
        copy: Where it is to be copied and what from, if it is not there yet.
    """

    size_bytes: int
    copy: tuple[Array, Array] | None


class OverlappedCopy:
    """Copies to be made once, however often their call is tried. For one thread.

    Args:
        operands: All operands in shared memory, in the order of `Operation.write_order`.

    Attributes:
        is_made: Whether all is copied.
        written_bytes: How many bytes of the operands, one behind the other, are there at first.
    """

    def __init__(self, operands: Sequence[SharedOperand]) -> None:
        self._operands = operands
        self.is_done: bool = False
        self.initial_bytes: int = sum(
            o.size_bytes for o in takewhile(lambda o: o.copy is None, operands)
        )

    def run(self, tell: Callable[[int], None] | None = None) -> None:
        """Make them, unless they are made.

        Args:
            tell: Told how many bytes of the operands are there, as `copy_all` does, but not as often.
        """
        if self.is_done:
            return
        copies = [operand.copy for operand in self._operands if operand.copy is not None]
        copy_all(copies, tell and _ProgressThrottle(tell, self._operands))
        self.is_done = True


class _ProgressThrottle:
    """Passes progress on once it is worth telling.

    Args:
        tell: Told how many bytes of the operands are there.
    """

    def __init__(self, tell: Callable[[int], None], operands: Sequence[SharedOperand]) -> None:
        self._report = tell
        self._operands = operands
        self._end_offsets = [*_end_offsets(operands)]
        self._reported_bytes = 0

    def __call__(self, copied_bytes: int) -> None:
        """Take note how many bytes of those that are to be copied, one behind the other, are there."""
        there_bytes = self._present_bytes(copied_bytes)
        step_bytes = self._end_offsets[-1] / _MAX_REPORTS_COUNT
        is_at_an_end = any(self._reported_bytes < end <= there_bytes for end in self._end_offsets)
        if is_at_an_end or there_bytes - self._reported_bytes >= step_bytes:
            self._reported_bytes = there_bytes
            self._report(there_bytes)

    def _present_bytes(self, copied_bytes: int) -> int:
        there_bytes = 0
        for operand in self._operands:
            operand_bytes = operand.size_bytes
            if operand.copy is not None:
                operand_bytes = min(copied_bytes, operand_bytes)
                copied_bytes -= operand_bytes
            there_bytes += operand_bytes
            if operand_bytes < operand.size_bytes:
                break
        return there_bytes


def _end_offsets(operands: Sequence[SharedOperand]) -> Iterator[int]:
    end_bytes = 0
    for operand in operands:
        end_bytes += operand.size_bytes
        yield end_bytes
