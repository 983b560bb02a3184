"""The operands of one striped call while they arrive: which of their pieces have come, in which memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from deconvd.direct.pieces import PieceSpace
from deconvd.model.dtypes import Array

__all__ = ["LandingPieces", "WrongRunError"]

_ABSENT, _LANDING, _LANDED = range(3)
"""How far a piece is."""

_NONE_CAME: Final = bytes([_ABSENT])


class WrongRunError(ValueError):
    """A run of pieces must not come: the client breaks the rules. The message says which."""


class LandingPieces:
    """The pieces of a call's operands. Its transfer's lock guards it, but for `landed_bytes`, which only grows.

    Attributes:
        pieces_count: How many there are.
        size_bytes: The size of all together.
        landed_bytes: The size of those that have landed with all before them.
        lacking_count: How many have not landed.

    Args:
        arrays: Where they land, in the layout of `Tensor.raw`.
    """

    def __init__(self, arrays: Sequence[Array]) -> None:
        self._space = PieceSpace(arrays)
        self.size_bytes = self._space.size_bytes
        self.pieces_count = self.lacking_count = self._space.pieces_count
        self.landed_bytes = 0
        self._states = bytearray(_NONE_CAME) * self.pieces_count
        self._prefix_count = 0  # pieces that have landed with all before them

    def begin(self, number: int, size_bytes: int) -> tuple[int, list[memoryview]]:
        """Return how many pieces a run has that comes next, and where to put it.

        Args:
            number: The first of them.
            size_bytes: The size of the run.

        Raises:
            WrongRunError: There is no such run, or one of its pieces has come before.
        """
        count = self._space.count_in_run(number, size_bytes)
        if number >= self.pieces_count:
            raise WrongRunError(
                f"piece {number} is none of the {self.pieces_count} of the operands"
            )
        if not count:
            raise WrongRunError(
                f"no run of whole pieces begins with piece {number} and has {size_bytes} bytes"
            )
        if any(self._states[number : number + count]):
            raise WrongRunError(
                f"piece {number}, or one of the {count - 1} behind it, has come before"
            )
        self._states[number : number + count] = bytes([_LANDING]) * count
        return count, self._space.buffers(number, count)

    def note_landed(self, number: int, count: int) -> None:
        """Note that a run has landed."""
        states = self._states
        states[number : number + count] = bytes([_LANDED]) * count
        self.lacking_count -= count
        if number == self._prefix_count:
            prefix_count = number + count
            while prefix_count < len(states) and states[prefix_count] == _LANDED:
                prefix_count += 1
            self._prefix_count = prefix_count
            self.landed_bytes = self._space.bytes_before(prefix_count)
