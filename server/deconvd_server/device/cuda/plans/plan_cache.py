"""The plan cache of one card: finds the plan of a key in memory or on disk, or has it chosen."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deconvd.lru import Lru
from deconvd.model.options import UseCudnn
from deconvd_server.device.cuda.cudnn import CudnnError
from deconvd_server.device.cuda.plan import Plan
from deconvd_server.device.cuda.plans.candidate import Candidate
from deconvd_server.device.cuda.plans.choice import Choice, Provider
from deconvd_server.device.cuda.plans.key import PlanKey
from deconvd_server.device.cuda.plans.later_searches import LaterSearches
from deconvd_server.device.cuda.plans.store import PlanStore
from deconvd_server.device.cuda.plans.tuner import Tuner
from deconvd_server.device.cuda.stand_in import RESTORE_MS, SEARCH_MS, StandIn
from deconvd_server.resources.cache import Cache, CacheStats, Resource

if TYPE_CHECKING:  # these need CUDA, the cache does not
    from deconvd_server.device.cuda.plans.build_threads import BuildThreads
    from deconvd_server.device.cuda.plans.candidates import Candidates

__all__ = ["PlanCache", "PlanCacheStats"]

log = logging.getLogger(__name__)

_CUDNN_PLAN_BYTES = 80 << 10
"""Host memory of a cuDNN plan that was made from its serialized form, as measured."""

_OWN_PLAN_BYTES = 4 << 10
"""Host memory of a plan of our own kernels."""

_CHOICES_COUNT = 1 << 14
"""Choices that are remembered, of some 2 KB each. They are far more than the plans in memory.

They are kept for as long as possible: the next timing might choose another plan, and another plan gives other bits.
"""

_MOST_CALLS_COUNT = 16
"""A stand-in that has served so many calls is worth a search, however short they are."""


@dataclass(frozen=True, slots=True)
class PlanCacheStats:
    """The state of the plan cache.

    Attributes:
        cache: The plans in memory.
        chosen_count: Plans that were chosen.
        restored_count: Plans that were made again from an earlier choice, of this process or another one.
    """

    cache: CacheStats
    chosen_count: int
    restored_count: int


class PlanCache:
    """The plans of one card, by key. The first call that needs a plan waits until it is chosen. Thread-safe.

        memory --miss--> choice --ours--> its plan
                                --cuDNN's, or none--> stand-in, and a search later
                                                      --none is good enough--> search

        search: choice --miss--> quarantine --not held--> tuner
                                            --held--> without cuDNN, or the fallback
        choice: in memory, or on disk, where nobody looks if a stand-in is hardly slower than what may be there

    A choice is remembered even if it is the fallback, so a search that finds no engine of cuDNN is made once. A
    stand-in is not remembered, and neither is it counted as chosen. All but a search is done in the calling thread.

    Args:
        later: Makes the searches that stand-ins ask for.
        limit_bytes: Bound on the host memory of plans.
        store: Choices and the quarantine on disk; None to keep none.
    """

    def __init__(
        self,
        candidates: Candidates,
        tuner: Tuner,
        build_threads: BuildThreads,
        later: LaterSearches,
        *,
        limit_bytes: int,
        store: PlanStore | None,
    ) -> None:
        self._candidates = candidates
        self._tuner = tuner
        self._build_threads = build_threads
        self._later = later
        self._store = store
        self._cache: Cache[PlanKey, Plan] = Cache(limit_bytes)
        self._lock = threading.Lock()
        self._choices: Lru[PlanKey, Choice] = Lru(_CHOICES_COUNT)
        self._chosen_count = 0
        self._restored_count = 0

    def get(self, key: PlanKey, check: Callable[[], None]) -> Plan:
        """Return the plan of a key, or a `StandIn`. It stays usable after it is evicted from the cache.

        Args:
            check: Called while this waits for the choice. An error that it raises ends the wait, but not the choice.

        Raises:
            ExhaustedError: The card has no memory to try plans out.
        """
        executor = self._build_threads.executor(tunes=key.options.autotune)
        with self._cache.lease(
            key,
            lambda: _resource_of(self._find_candidate(key)),
            check=check,
            executor=executor,
            build_at_once=lambda: self._build_at_once(key),
        ) as plan:
            return plan

    def search(self, key: PlanKey) -> None:
        """Search the plan of a key that has a stand-in, and have it served from now on.

        The calling thread gets a stream of the card, which must be its device.

        Raises:
            ExhaustedError: The card has no memory to try plans out now.
            CudaError, CudnnError: The card or cuDNN failed.
        """
        resource = _resource_of(self._find_candidate(key))
        self._cache.drop(key)
        # a call that asks in between gets our plan of the same choice again, or a stand-in, which asks once more
        with self._cache.lease(key, lambda: resource):
            pass

    @property
    def stats(self) -> PlanCacheStats:
        """The state of the cache now."""
        with self._lock:
            return PlanCacheStats(self._cache.stats, self._chosen_count, self._restored_count)

    def close(self) -> None:
        """Forget all plans, and end the threads that choose them."""
        self._later.close()
        self._build_threads.close()
        self._cache.close()

    def _build_at_once(self, key: PlanKey) -> Resource[Plan] | None:
        """Return one of our plans that was chosen before, or a stand-in; None if neither would do.

        A good stand-in is made in half of the time that it takes to look into the store. So the store is left to the
        later search.
        """
        with self._lock:
            choice = self._choices.get(key)
        if choice is None and self._store is not None:
            stand_in = self._make_stand_in(key, RESTORE_MS)
            if stand_in is not None:
                return stand_in
            choice = self._store.load(key)
        if choice is not None and choice.provider is Provider.OWN:
            known = self._restore(key, choice)
            if known is not None:
                return _resource_of(known)
        return self._make_stand_in(key, SEARCH_MS if choice is None else RESTORE_MS)

    def _make_stand_in(self, key: PlanKey, search_ms: float) -> Resource[Plan] | None:
        """Return a stand-in that asks for a search once its calls have had the card for as long as that takes.

        None if there is none, or if it would take that much longer than the plan that is predicted to be found.
        """
        found = self._candidates.stand_in(key, search_ms)
        if found is None:
            return None
        plan, predicted_ms = found
        count = min(math.ceil(search_ms / predicted_ms), _MOST_CALLS_COUNT)

        def ask(stand_in: StandIn) -> None:
            self._later.add(key, stand_in, self.search)

        return Resource(StandIn(plan, count, ask), _OWN_PLAN_BYTES)

    def _find_candidate(self, key: PlanKey) -> Candidate:
        """Return the candidate that was chosen before, or choose one."""
        choice = self._find_choice(key)
        known = None if choice is None else self._restore(key, choice)
        return known or self._search(key)

    def _search(self, key: PlanKey) -> Candidate:
        """Choose a candidate by a search that no process has died in."""
        if self._store is None or not self._store.quarantine.holds(key):
            return self._choose(key)
        if key.options.use_cudnn is UseCudnn.NEVER:
            return self._candidates.fallback(key)
        return self._find_candidate(key.without_cudnn())

    def _restore(self, key: PlanKey, choice: Choice) -> Candidate | None:
        """Return the plan of an earlier choice; None if it cannot be made any more."""
        try:
            candidate = self._candidates.restore(
                key, choice, lambda: self._build_threads.stream.pointer
            )
        except (CudnnError, LookupError) as error:
            log.warning(
                "ignored the stored plan %s, which cannot be made again: %s", choice.name, error
            )
            return None
        with self._lock:
            self._restored_count += 1
        return candidate

    def _find_choice(self, key: PlanKey) -> Choice | None:
        """Return the choice that was made before, in this process or another one."""
        with self._lock:
            choice = self._choices.get(key)
        if choice is None and self._store is not None:
            return self._store.load(key)
        return choice

    def _choose(self, key: PlanKey) -> Candidate:
        with self._note_search(key):
            candidate = self._tuner.choose(key, self._build_threads.stream)
        log.info("chose %s for %s of %s", candidate.choice.name, key.product, key.problem)
        if self._store is not None:
            self._store.save(key, candidate.choice)
        with self._lock:
            self._chosen_count += 1
            self._choices.put(key, candidate.choice)
        return candidate

    def _note_search(self, key: PlanKey) -> AbstractContextManager[None]:
        """Note on disk, for the length of a with-block, that a plan is being searched."""
        if self._store is None:
            return nullcontext()
        return self._store.quarantine.note_search(key, self._build_threads.is_card_lost)


def _resource_of(candidate: Candidate) -> Resource[Plan]:
    own = candidate.choice.provider is Provider.OWN
    # The plan is not closed when it is evicted: graphs that it was captured into may still refer to it.
    return Resource(candidate.plan, _OWN_PLAN_BYTES if own else _CUDNN_PLAN_BYTES)
