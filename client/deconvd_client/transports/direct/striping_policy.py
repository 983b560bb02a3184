"""How many connections a large call is striped over: what has paid is done again. Pure.

Whether stripes pay depends on the network and on both ends: on a fast network four carry three times as much as one;
through a slow link a stream of slices is better, as it is sent and received at the same time. So all ways are tried,
and the time of whole calls decides.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Final

from deconvd.direct.events import MAX_STRIPES_COUNT
from deconvd.direct.pieces import PIECE_BYTES

__all__ = ["STREAM", "StripingPolicy"]

STREAM: Final = 0
"""In place of a number of stripes: the call is a stream through one connection."""

_STRIPES_COUNTS: Final = (2, 4, MAX_STRIPES_COUNT)
"""The numbers of stripes that calls may have. In between, the differences are small."""

_FIRST_COUNT: Final = 4
"""The number that is tried first: it is seldom far from the best."""

_MIN_STRIPE_BYTES: Final = 4 * PIECE_BYTES
"""What a call must have for each stripe. With fewer pieces a slow stripe would keep the others waiting at the end."""

_PROCESSORS_PER_STRIPE: Final = 2
"""A stripe has a thread here and, if the server is on the same host, one there."""

_TRIALS_COUNT: Final = 3
"""How often each candidate is tried at first."""

_REMEMBERED_COUNT: Final = 16
"""How many of the last calls of each candidate are remembered.

The fastest of them counts: others may have disturbed the rest. So the policy leaves a candidate that has become slow
after so many calls.
"""

_EXPLORATION_PERIOD: Final = 192
"""How many calls pass until another candidate than the best is tried again. It may have become better."""

_MAX_SLOWDOWN: Final = 8.0
"""A candidate that was slower by some factor is tried again that much later, up to this factor."""


class StripingPolicy:
    """Chooses the number of stripes of each call, and learns from the time that calls take. Thread-safe.

    The candidates for a call are the stream, and the numbers of stripes that its size and the processors allow. At
    first each is tried a few times. After that the best is used, and each of the others is tried again now and then,
    which takes less than a fiftieth of the time. Calls are compared with those of the same kind and about the same
    size.

    Args:
        processors_count: Returns how many processors this process may use.
    """

    def __init__(self, processors_count: Callable[[], int]) -> None:
        self._processors_count = processors_count
        self._records: dict[Hashable, _Record] = {}
        self._stripes_limit = MAX_STRIPES_COUNT

    def choose(self, kind: Hashable, size_bytes: int) -> int:
        """Return how many stripes a call should have, or `STREAM`.

        Args:
            kind: What is computed, from which operands.
            size_bytes: The size of the call's operands and results together.
        """
        candidates = self.candidates(size_bytes)
        if len(candidates) == 1:
            return STREAM
        return self._record_of(kind, size_bytes).choose(candidates)

    def record(self, kind: Hashable, size_bytes: int, choice: int, duration_s: float) -> None:
        """Note how long a call took for which `choice` was returned, even if it went another way in the end."""
        if len(self.candidates(size_bytes)) > 1:
            self._record_of(kind, size_bytes).add(choice, duration_s / size_bytes)

    def limit_stripes(self, count: int) -> None:
        """Choose no more stripes from now on, as the server asks while others call it, too. 0: as many as before.

        What one client measures cannot tell it this: with more stripes it is faster, and the others slower.
        """
        if count:
            self._stripes_limit = count

    def candidates(self, size_bytes: int) -> Sequence[int]:
        """Return the choices for a call: `STREAM`, and numbers of stripes in ascending order."""
        most_count = min(
            self._processors_count() // _PROCESSORS_PER_STRIPE,
            size_bytes // _MIN_STRIPE_BYTES,
            self._stripes_limit,
        )
        return (STREAM, *(count for count in _STRIPES_COUNTS if count <= most_count))

    def _record_of(self, kind: Hashable, size_bytes: int) -> _Record:
        return self._records.setdefault((kind, size_bytes.bit_length()), _Record())


class _Record:
    """What is known about the calls of one kind and size.

    It has no lock. Each change is one atomic step of the interpreter, and it does no harm if one is lost.
    """

    def __init__(self) -> None:
        self._paces: dict[int, tuple[float, ...]] = {}  # seconds per byte of the last calls
        self._choices_count = 0
        self._tried_at: dict[int, int] = {}  # values of `_choices_count`

    def add(self, choice: int, pace: float) -> None:
        """Note how many seconds a byte took."""
        self._paces[choice] = (*self._paces.get(choice, ()), pace)[-_REMEMBERED_COUNT:]

    def choose(self, candidates: Sequence[int]) -> int:
        """Return one of the candidates, which are in ascending order."""
        counts = {c: len(self._paces.get(c, ())) for c in candidates}
        if min(counts.values()) < _TRIALS_COUNT:
            # in turn: the first calls of a server are slow, whichever way they go
            return min(counts, key=lambda c: (counts[c], abs(c - _FIRST_COUNT), c))
        self._choices_count += 1
        best = min(candidates, key=self._pace)
        for other in candidates:
            slowdown = min(self._pace(other) / self._pace(best), _MAX_SLOWDOWN)
            waited_count = self._choices_count - self._tried_at.get(other, 0)
            if other != best and waited_count >= _EXPLORATION_PERIOD * slowdown:
                self._tried_at[other] = self._choices_count
                return other
        return best

    def _pace(self, choice: int) -> float:
        return min(self._paces[choice])
