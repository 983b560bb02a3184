"""A copy of an operand that a call does not wait for: it is made once the server knows of the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from deconvd.copying import copy_into
from deconvd.tensor import Array

__all__ = ["LateCopy"]

_STEPS_COUNT: Final = 8
"""How often progress is told, at most: in as many parts a card takes x."""


class LateCopy:
    """A copy to be made once, however often its call is tried. For one thread.

    Attributes:
        is_made: Whether the target has the source's elements.
    """

    def __init__(self, target: Array, source: Array) -> None:
        self._target, self._source = target, source
        self.is_made = False

    def make(self, tell: Callable[[int], None] | None = None) -> None:
        """Make it, unless it is made.

        Args:
            tell: Told how many bytes are there, from the begin: as `copy_into` does, but not as often.
        """
        if self.is_made:
            return
        copy_into(self._target, self._source, tell and _Seldom(tell, self._target.nbytes))
        self.is_made = True


class _Seldom:
    """Passes progress on once it is worth telling."""

    def __init__(self, tell: Callable[[int], None], total_bytes: int) -> None:
        self._tell = tell
        self._total_bytes = total_bytes
        self._told_bytes = 0

    def __call__(self, done_bytes: int) -> None:
        step_bytes = self._total_bytes / _STEPS_COUNT
        if done_bytes - self._told_bytes >= step_bytes or done_bytes == self._total_bytes:
            self._told_bytes = done_bytes
            self._tell(done_bytes)
