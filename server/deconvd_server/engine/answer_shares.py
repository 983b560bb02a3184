"""Shares of the bytes that calls keep until their answers are sent: a peer that reads none uses up only its own."""

from __future__ import annotations

from typing import Final

__all__ = ["SMALL_BYTES", "AnswerShares"]

SMALL_BYTES: Final = 256 << 10
"""A call that keeps no more than this is small, as all calls over direct connections are.

What waiting small calls have received is not counted: it is bounded by the number of places.
"""


class AnswerShares:
    """How many bytes each peer's calls keep until their answers are sent. Not thread-safe: `Admission` has a lock.

    Args:
        share_bytes: How many bytes the calls of one peer may keep together. A peer's only call may keep
            more. Small calls may keep half as much again, so that they are served while their peer does not
            read large answers.
    """

    def __init__(self, share_bytes: int) -> None:
        self._share_bytes = share_bytes
        self._small_share_bytes = share_bytes + share_bytes // 2
        self._used_bytes: dict[str, int] = {}  # by peer

    def has_room(self, peer: str, size_bytes: int) -> bool:
        """Return whether a peer's call may keep that many bytes next to the peer's other calls."""
        used_bytes = self._used_bytes.get(peer, 0)
        is_small = size_bytes <= SMALL_BYTES
        share_bytes = self._small_share_bytes if is_small else self._share_bytes
        return not used_bytes or used_bytes + size_bytes <= share_bytes

    def take(self, peer: str, size_bytes: int) -> None:
        """Count bytes that a peer's call keeps."""
        self._used_bytes[peer] = self._used_bytes.get(peer, 0) + size_bytes

    def give_back(self, peer: str, size_bytes: int) -> None:
        """Stop counting bytes that `take` counted."""
        self._used_bytes[peer] -= size_bytes
        if not self._used_bytes[peer]:
            del self._used_bytes[peer]
