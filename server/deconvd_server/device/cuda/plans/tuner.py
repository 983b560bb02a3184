"""Takes one of the candidates: the first that runs, or the fastest of some or of all."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

from deconvd.model.options import UseCudnn
from deconvd_server.device.cuda.plans.candidate import Candidate
from deconvd_server.device.cuda.plans.key import PlanKey

if TYPE_CHECKING:  # the rest needs CUDA, choosing does not
    from deconvd_server.device.cuda.api.runtime import Stream
    from deconvd_server.device.cuda.plans.candidates import Candidates
    from deconvd_server.device.cuda.plans.plan_timer import PlanTimer

__all__ = ["Tuner"]

log = logging.getLogger(__name__)

_GIVE_UP_RATIO = 2.0
"""A candidate that is so many times slower than the best so far is not timed twice."""

_TIE_MS = 0.001
"""What a candidate may be slower than the best, and be taken for a smaller workspace: without one, small calls
stay where they can be captured whole, which is worth a hundred times as much."""


class Tuner:
    """Takes one of a request's candidates.

    With autotune that is the fastest of all. Without, it is the fastest of a few, which takes some
    milliseconds once; but it is the first that runs where results are to be deterministic, so that
    a restarted server gives the same bits, and where cuDNN is to be used whenever it can be.

    Args:
        open_bench: Lends a bench for a key, with a workspace of so many bytes, on a stream.
        tuning_limit_s: How long new candidates are made and timed for one key.
    """

    def __init__(
        self,
        candidates: Candidates,
        open_bench: Callable[[PlanKey, int, Stream], AbstractContextManager[PlanTimer]],
        *,
        tuning_limit_s: float,
    ) -> None:
        self._candidates = candidates
        self._open_timer = open_bench
        self._tuning_limit_s = tuning_limit_s

    def choose(self, key: PlanKey, stream: Stream) -> Candidate:
        """Return the candidate that is to serve `key`.

        Args:
            stream: Where plans are tried.

        Raises:
            ExhaustedError: The card has not the memory to try any.
        """
        if key.options.autotune:
            return self._choose_fastest(key, stream, self._candidates.list_all(key, stream.pointer))
        candidates = self._candidates.shortlist(key, stream.pointer)
        if key.options.cudnn_deterministic or key.options.use_cudnn is UseCudnn.ALWAYS:
            return self._choose_first(key, stream, candidates)
        return self._choose_fastest(key, stream, candidates)

    def _choose_first(
        self, key: PlanKey, stream: Stream, candidates: Iterator[Candidate]
    ) -> Candidate:
        for candidate in self._filter_candidates(key, candidates):
            with self._open_timer(key, candidate.plan.workspace_bytes, stream) as bench:
                if bench.can_run(candidate.plan):
                    return candidate
            candidate.close()
        return self._candidates.fallback(key)

    def _choose_fastest(
        self, key: PlanKey, stream: Stream, candidates: Iterator[Candidate]
    ) -> Candidate:
        start_s = time.monotonic()
        end_s = start_s + self._tuning_limit_s
        # making them must leave time for timing them
        made = self._make_candidates(key, candidates, start_s + self._tuning_limit_s / 2)
        room_bytes = max(candidate.plan.workspace_bytes for candidate in made)
        timed: list[tuple[float, Candidate]] = []
        best_ms = float("inf")
        with self._open_timer(key, room_bytes, stream) as bench:
            for candidate in made:
                if best_ms < float("inf") and time.monotonic() > end_s:
                    break
                took_ms = bench.time_ms(candidate.plan, give_up_ms=_GIVE_UP_RATIO * best_ms)
                log.debug("%s took %.4f ms", candidate.choice.name, took_ms)
                timed.append((took_ms, candidate))
                best_ms = min(best_ms, took_ms)
        best = _best(timed)
        for candidate in made:
            if best is None or candidate is not best[1]:
                candidate.close()
        if best is None:
            return self._candidates.fallback(key)
        took_ms, candidate = best
        return replace(candidate, choice=replace(candidate.choice, tuned_ms=took_ms))

    def _make_candidates(
        self, key: PlanKey, candidates: Iterator[Candidate], end_s: float
    ) -> list[Candidate]:
        """Return candidates, the fallback if there is no other, as many as can be made in time."""
        made = []
        for candidate in self._filter_candidates(key, candidates):
            made.append(candidate)
            if time.monotonic() > end_s:
                break
        return made or [self._candidates.fallback(key)]

    def _filter_candidates(
        self, key: PlanKey, candidates: Iterator[Candidate]
    ) -> Iterator[Candidate]:
        """Yield the candidates that the request's options and limits allow, no plan twice."""
        seen = set()
        for candidate in candidates:
            choice = candidate.choice
            fits = candidate.plan.workspace_bytes <= key.workspace_limit_bytes
            steady = choice.deterministic or not key.options.cudnn_deterministic
            if fits and steady and choice not in seen:
                seen.add(choice)
                yield candidate
            else:
                candidate.close()


def _best(timed: Sequence[tuple[float, Candidate]]) -> tuple[float, Candidate] | None:
    """Return the fastest, or one near it with less of a workspace; None if none ran."""
    best_ms = min((took_ms for took_ms, _ in timed), default=float("inf"))
    if best_ms == float("inf"):
        return None
    near = [one for one in timed if one[0] <= best_ms + _TIE_MS]
    return min(near, key=lambda one: (one[1].plan.workspace_bytes, one[0]))
