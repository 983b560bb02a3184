"""Chooses one of a request's candidates: the first one that runs, or the fastest of a few or of all."""

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

if TYPE_CHECKING:  # these need CUDA, choosing does not
    from deconvd_server.device.cuda.api.runtime import Stream
    from deconvd_server.device.cuda.plans.candidates import Candidates
    from deconvd_server.device.cuda.plans.plan_timer import PlanTimer

__all__ = ["Tuner"]

log = logging.getLogger(__name__)

_GIVE_UP_RATIO = 2.0
"""A candidate whose first timing is more than this many times that of the best so far is not timed more precisely."""

_TIE_MS = 0.001
"""A candidate that is slower than the best by at most this much is preferred if its workspace is smaller.

With a small workspace a small call fits in a lane's arena and is captured whole, which saves a hundred times as much.
"""


class Tuner:
    """Chooses one of a request's candidates.

        autotune                the fastest of all
        deterministic results   the first that runs, in the cost model's order: a restarted server gives the same bits
        cuDNN always            the first of cuDNN's that runs
        otherwise               what the cost model picks: one, or the fastest of a few that it cannot tell apart

    Where the cost model has no opinion, or none of its picks can run, a few candidates of each provider are tried: the
    first one that runs is taken, or the fastest.

    Args:
        open_timer: Returns a timer for a key, with a workspace of that many bytes, on a stream.
        tuning_limit_s: How long the candidates of one key are made and timed for `autotune`.
    """

    def __init__(
        self,
        candidates: Candidates,
        open_timer: Callable[[PlanKey, int, Stream], AbstractContextManager[PlanTimer]],
        *,
        tuning_limit_s: float,
    ) -> None:
        self._candidates = candidates
        self._open_timer = open_timer
        self._tuning_limit_s = tuning_limit_s

    def choose(self, key: PlanKey, stream: Stream) -> Candidate:
        """Return the candidate that will serve a key. The others are closed.

        Args:
            stream: Where plans are tried out.

        Raises:
            ExhaustedError: The card has no memory to try any out.
        """
        candidates = self._candidates
        if key.options.autotune:
            found = self._choose_fastest(key, stream, candidates.list_all(key, stream.pointer))
        else:
            found = self._choose_of_few(
                key, stream, candidates.contenders(key, stream.pointer)
            ) or self._choose_of_few(key, stream, candidates.shortlist(key, stream.pointer))
        return found or candidates.fallback(key)

    def _choose_of_few(
        self, key: PlanKey, stream: Stream, candidates: Iterator[Candidate]
    ) -> Candidate | None:
        """Return one of a few candidates; None if none of them runs."""
        allowed = self._filter_candidates(key, candidates)
        if key.options.cudnn_deterministic or key.options.use_cudnn is UseCudnn.ALWAYS:
            return self._choose_first(key, stream, allowed)
        made = list(allowed)
        if len(made) <= 1:
            return self._choose_first(key, stream, iter(made))
        return self._choose_by_comparison(key, stream, made)

    def _choose_first(
        self, key: PlanKey, stream: Stream, candidates: Iterator[Candidate]
    ) -> Candidate | None:
        for candidate in candidates:
            if candidate.always_runs:
                return candidate
            with self._open_timer(key, candidate.plan.workspace_bytes, stream) as timer:
                if timer.can_run(candidate.plan):
                    return candidate
            candidate.close()
        return None

    def _choose_by_comparison(
        self, key: PlanKey, stream: Stream, made: Sequence[Candidate]
    ) -> Candidate | None:
        room_bytes = max(candidate.plan.workspace_bytes for candidate in made)
        with self._open_timer(key, room_bytes, stream) as timer:
            times_ms = timer.compare_ms([candidate.plan for candidate in made])
        return _take_best(list(zip(times_ms, made, strict=True)), made)

    def _choose_fastest(
        self, key: PlanKey, stream: Stream, candidates: Iterator[Candidate]
    ) -> Candidate | None:
        start_s = time.monotonic()
        end_s = start_s + self._tuning_limit_s
        # half of the time is left for timing
        made = self._make_candidates(key, candidates, start_s + self._tuning_limit_s / 2)
        room_bytes = max(candidate.plan.workspace_bytes for candidate in made)
        timed: list[tuple[float, Candidate]] = []
        best_ms = float("inf")
        with self._open_timer(key, room_bytes, stream) as timer:
            for candidate in made:
                if best_ms < float("inf") and time.monotonic() > end_s:
                    break
                took_ms = timer.time_ms(candidate.plan, give_up_ms=_GIVE_UP_RATIO * best_ms)
                log.debug("%s took %.4f ms", candidate.choice.name, took_ms)
                timed.append((took_ms, candidate))
                best_ms = min(best_ms, took_ms)
        return _take_best(timed, made)

    def _make_candidates(
        self, key: PlanKey, candidates: Iterator[Candidate], end_s: float
    ) -> list[Candidate]:
        """Return as many candidates as can be made in time; the fallback if there is no other."""
        made = []
        for candidate in self._filter_candidates(key, candidates):
            made.append(candidate)
            if time.monotonic() > end_s:
                break
        return made or [self._candidates.fallback(key)]

    def _filter_candidates(
        self, key: PlanKey, candidates: Iterator[Candidate]
    ) -> Iterator[Candidate]:
        """Yield the candidates that the request's options and limits allow, each plan once. Close the others."""
        seen = set()
        for candidate in candidates:
            choice = candidate.choice
            fits = candidate.plan.workspace_bytes <= key.workspace_limit_bytes
            is_allowed = choice.deterministic or not key.options.cudnn_deterministic
            if fits and is_allowed and choice not in seen:
                seen.add(choice)
                yield candidate
            else:
                candidate.close()


def _take_best(
    timed: Sequence[tuple[float, Candidate]], made: Sequence[Candidate]
) -> Candidate | None:
    """Return the best of the candidates that were timed, and close all others; None if none ran."""
    best = _best(timed)
    for candidate in made:
        if best is None or candidate is not best[1]:
            candidate.close()
    if best is None:
        return None
    took_ms, candidate = best
    return replace(candidate, choice=replace(candidate.choice, tuned_ms=took_ms))


def _best(timed: Sequence[tuple[float, Candidate]]) -> tuple[float, Candidate] | None:
    """Return the fastest candidate, or one that is nearly as fast with a smaller workspace; None if none ran."""
    best_ms = min((took_ms for took_ms, _ in timed), default=float("inf"))
    if best_ms == float("inf"):
        return None
    near = [one for one in timed if one[0] <= best_ms + _TIE_MS]
    return min(near, key=lambda one: (one[1].plan.workspace_bytes, one[0]))
