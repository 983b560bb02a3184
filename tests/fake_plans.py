"""Candidates, a bench and builders that need no card, to choose plans with and to keep book of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from deconvd.model.geometry import Geometry
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.device.cuda.cudnn import CudnnError
from deconvd_server.device.cuda.plan import Product
from deconvd_server.device.cuda.plans.candidate import Candidate
from deconvd_server.device.cuda.plans.choice import Choice, Provider
from deconvd_server.device.cuda.plans.key import PlanKey
from deconvd_server.device.cuda.plans.later_searches import LaterSearches
from deconvd_server.device.cuda.plans.plan_cache import PlanCache
from deconvd_server.device.cuda.plans.store import PlanStore
from deconvd_server.device.cuda.plans.tuner import Tuner

__all__ = [
    "FAILS",
    "FakeBuildThreads",
    "FakeCandidates",
    "FakePlan",
    "idle_searches",
    "key_of",
    "open_plan_timer",
    "plan_cache_of",
    "tuner_of",
]

FAILS = float("inf")


@dataclass(frozen=True)
class FakePlan:
    """A plan that takes so long; infinity for one that cannot be executed."""

    name: str
    ms: float
    workspace_bytes: int = 0
    deterministic: bool = True

    def execute(self, a: int, b: int, out: int, workspace: int, stream: int) -> None:
        raise AssertionError("no test executes it")


class FakeCandidates:
    """Offers plans, and notes which were closed. The fallback takes 9 ms."""

    def __init__(self, *plans: FakePlan) -> None:
        self.plans = plans
        self.contending: tuple[FakePlan, ...] = ()
        self.standing_in: FakePlan | None = None
        self.fastest_ms = FAILS  # predicted
        self.closed: list[str] = []
        self.damaged = False

    def contenders(self, key: PlanKey, stream: int) -> Iterator[Candidate]:
        yield from map(self.candidate, self.contending)

    def stand_in(self, key: PlanKey, search_ms: float) -> tuple[FakePlan, float] | None:
        plan = self.standing_in
        return None if plan is None or plan.ms - self.fastest_ms > search_ms else (plan, plan.ms)

    def shortlist(self, key: PlanKey, stream: int) -> Iterator[Candidate]:
        yield from map(self.candidate, self.plans)
        yield self.fallback(key)

    list_all = shortlist

    def fallback(self, key: PlanKey) -> Candidate:
        return self.candidate(FakePlan("fallback", 9.0))

    def restore(self, key: PlanKey, choice: Choice, get_stream: Callable[[], int]) -> Candidate:
        if self.damaged:
            raise CudnnError("cudnnBackendFinalize", 2000, "no plan")
        return self.candidate(FakePlan(choice.name, 0.0))

    def candidate(self, plan: FakePlan) -> Candidate:
        choice = Choice(Provider.CUDNN_NCHW, plan.name, plan.deterministic)
        return Candidate(plan, choice, lambda: self.closed.append(plan.name))


class FakePlanTimer:
    def can_run(self, plan: FakePlan) -> bool:
        return plan.ms < FAILS

    def time_ms(self, plan: FakePlan, *, give_up_ms: float) -> float:
        return plan.ms

    def compare_ms(self, plans: Sequence[FakePlan]) -> list[float]:
        return [plan.ms for plan in plans]


class FakeBuildThreads:
    """A thread without a card."""

    stream: Any = SimpleNamespace(pointer=0)

    def __init__(self, *, card_lost: bool = False) -> None:
        self.card_lost = card_lost
        self._executor = ThreadPoolExecutor(1)

    def executor(self, *, tunes: bool) -> Executor:
        return self._executor

    def is_card_lost(self) -> bool:
        return self.card_lost

    def close(self) -> None:
        self._executor.shutdown()


@contextmanager
def open_plan_timer(key: PlanKey, workspace_bytes: int, stream: Any) -> Iterator[Any]:
    yield FakePlanTimer()


def tuner_of(candidates: Any, tuning_limit_s: float = 5) -> Tuner:
    return Tuner(candidates, open_plan_timer, tuning_limit_s=tuning_limit_s)


def key_of(options: Options, dtype: type = np.float32, width: int = 8) -> PlanKey:
    x = TensorSpec((1, 4, 8, width), np.dtype(dtype))
    problem = Problem(x, TensorSpec((4, 2, 4, 4), np.dtype(dtype)), Geometry())
    return PlanKey.of(Product.Y, problem, options, 100)


def plan_cache_of(
    candidates: Any,
    store: PlanStore | None = None,
    limit_bytes: int = 1 << 20,
    *,
    card_lost: bool = False,
) -> PlanCache:
    builders: Any = FakeBuildThreads(card_lost=card_lost)
    return PlanCache(
        candidates,
        tuner_of(candidates),
        builders,
        idle_searches(),
        limit_bytes=limit_bytes,
        store=store,
    )


def idle_searches(
    count_calls: Callable[[], int] = lambda: 0, is_idle: Callable[[], bool] = lambda: True
) -> LaterSearches:
    """Return the later searches of a card that is idle, or as busy as one says."""
    return LaterSearches("later", count_calls, is_idle, nullcontext)
