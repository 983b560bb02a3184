"""The bytes of a budget that last until answers have left, shared by peer: who reads no answers keeps its bytes."""

from __future__ import annotations

from typing import Final

__all__ = ["SMALL_BYTES", "AnswerShares"]

SMALL_BYTES: Final = 256 << 10
"""A call that keeps no more is small, as those of direct lines are. What such calls have brought while they wait is not
counted: the number of places bounds it."""


class AnswerShares:
    """What each peer's calls keep until their answers have left. Not thread-safe: its admission has a lock.

    Args:
        share_bytes: What the calls of one peer may keep together. A peer's only call may keep more. Small calls may
            keep half as much again, so that they go on beside large answers that their peer does not read.
    """

    def __init__(self, share_bytes: int) -> None:
        self._share_bytes = share_bytes
        self._share_of_small_bytes = share_bytes + share_bytes // 2
        self._kept_bytes: dict[str, int] = {}  # by peer

    def has_room(self, peer: str, size_bytes: int) -> bool:
        """Return whether a call of a peer may keep that many bytes beside its peer's others."""
        kept_bytes = self._kept_bytes.get(peer, 0)
        is_small = size_bytes <= SMALL_BYTES
        share_bytes = self._share_of_small_bytes if is_small else self._share_bytes
        return not kept_bytes or kept_bytes + size_bytes <= share_bytes

    def take(self, peer: str, size_bytes: int) -> None:
        """Count bytes that a peer's call keeps from now on."""
        self._kept_bytes[peer] = self._kept_bytes.get(peer, 0) + size_bytes

    def give_back(self, peer: str, size_bytes: int) -> None:
        """Count them no more."""
        self._kept_bytes[peer] -= size_bytes
        if not self._kept_bytes[peer]:
            del self._kept_bytes[peer]
