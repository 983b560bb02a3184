"""Stand-ins serve at once, and make room for the plans that searches find later."""

from __future__ import annotations

import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.random_problems import draw_problem
from deconvd.errors import ExhaustedError
from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd.model.options import Options, UseCudnn
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.call.context import CallContext
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.device.cuda.api.nvrtc import CompileError
from deconvd_server.device.cuda.plan import Plan, Product
from deconvd_server.device.cuda.plans import candidates, later_searches
from deconvd_server.device.cuda.plans.candidates import Candidates
from deconvd_server.device.cuda.plans.choice import Choice, Provider
from deconvd_server.device.cuda.plans.cost_model import Family, cost_model
from deconvd_server.device.cuda.plans.key import PlanKey
from deconvd_server.device.cuda.plans.later_searches import LaterSearches
from deconvd_server.device.cuda.plans.plan_cache import PlanCache
from deconvd_server.device.cuda.plans.store import PlanStore
from deconvd_server.device.cuda.stand_in import SEARCH_MS, StandIn
from tests.devices import GradientRequest, deconvolve, gradients
from tests.fake_plans import FakeCandidates, FakePlan, idle_searches, key_of, plan_cache_of
from tests.processes import wait_until

KEY = key_of(Options())


def candidates_of(standing_in: FakePlan) -> FakeCandidates:
    candidates = FakeCandidates(FakePlan("found", 1.0))
    candidates.standing_in = standing_in
    return candidates


def get(cache: PlanCache, key: PlanKey = KEY) -> Plan:
    return cache.get(key, lambda: None)


def stand_in_of(cache: PlanCache, key: PlanKey = KEY) -> StandIn:
    plan = get(cache, key)
    assert isinstance(plan, StandIn)
    return plan


def test_a_stand_in_serves_at_once_and_the_plan_that_is_found_later_takes_its_place() -> None:
    cache = plan_cache_of(candidates_of(FakePlan("ours", 0.01, workspace_bytes=7)))

    stand_in = stand_in_of(cache)
    assert (stand_in.name, stand_in.workspace_bytes, stand_in.deterministic) == ("ours", 7, True)
    for _ in range(15):
        stand_in.note_call()
    assert cache.stats.chosen_count == 0
    assert get(cache) is stand_in

    stand_in.note_call()
    wait_until(lambda: stand_in.is_replaced)

    assert get(cache).name == "found"
    assert cache.stats.chosen_count == 1
    cache.close()


def test_long_calls_are_worth_a_search_soon() -> None:
    cache = plan_cache_of(candidates_of(FakePlan("ours", 4.0)))
    stand_in = stand_in_of(cache)
    stand_in.note_call()
    stand_in.note_call()
    assert get(cache) is stand_in
    stand_in.note_call()
    wait_until(lambda: stand_in.is_replaced)
    cache.close()


def test_what_was_found_is_stored_and_a_stand_in_is_not(tmp_path: Path) -> None:
    candidates = candidates_of(FakePlan("ours", 10.0))
    store = PlanStore(tmp_path, {})
    cache = plan_cache_of(candidates, store)
    stand_in = stand_in_of(cache)
    assert store.load(KEY) is None
    stand_in.note_call()
    wait_until(lambda: stand_in.is_replaced)
    cache.close()

    again = plan_cache_of(candidates, PlanStore(tmp_path, {}))
    stand_in = stand_in_of(again)  # it is made sooner than the store is read
    assert again.stats.restored_count == 0
    stand_in.note_call()
    wait_until(lambda: stand_in.is_replaced)
    assert get(again).name == "found"
    assert (again.stats.restored_count, again.stats.chosen_count) == (1, 0)
    again.close()


@pytest.mark.parametrize("provider", [Provider.OWN, Provider.CUDNN_NCHW])
def test_a_stored_plan_is_served_at_once_if_a_stand_in_is_much_slower(
    tmp_path: Path, provider: Provider
) -> None:
    store, candidates = PlanStore(tmp_path, {}), candidates_of(FakePlan("ours", 10.0))
    candidates.fastest_ms = 7.0  # less than a search would take, and more than to make a known plan
    store.save(KEY, Choice(provider, "known", deterministic=True))
    cache = plan_cache_of(candidates, store)
    assert get(cache).name == "known"
    assert (cache.stats.restored_count, cache.stats.chosen_count) == (1, 0)
    assert stand_in_of(cache, key_of(Options(), width=9)).name == "ours"  # not known
    cache.close()


def test_a_stand_in_serves_without_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = candidates_of(FakePlan("ours", 0.01))
    threads = []
    make = candidates.stand_in

    def stand_in(key: PlanKey, search_ms: float) -> tuple[FakePlan, float] | None:
        threads.append(threading.current_thread())
        return make(key, search_ms)

    monkeypatch.setattr(candidates, "stand_in", stand_in)
    cache = plan_cache_of(candidates)
    stand_in_of(cache)
    assert threads == [threading.current_thread()]
    cache.close()


def test_a_stand_in_that_no_search_replaces_asks_again() -> None:
    asked: list[StandIn] = []
    stand_in = StandIn(FakePlan("ours", 1.0), 3, asked.append)
    for _ in range(7):
        stand_in.note_call()
    assert asked == [stand_in, stand_in]


class Searches:
    """Searches that are noted, and may be held or fail."""

    def __init__(self) -> None:
        self.made: list[PlanKey] = []
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.error: Exception | None = None

    def search(self, key: PlanKey) -> None:
        error = self.error  # before anyone sees that the search is made, and changes it
        self.made.append(key)
        assert self.goes_on.wait(60)
        if error is not None:
            raise error

    def add(self, later: LaterSearches, *widths: int) -> list[StandIn]:
        stand_ins = [StandIn(FakePlan("ours", 1.0), 1, lambda _: None) for _ in widths]
        for width, stand_in in zip(widths, stand_ins, strict=True):
            later.add(key_of(Options(), width=width), stand_in, self.search)
        return stand_ins


def test_searches_wait_until_the_card_is_idle_and_no_longer_than_that_is_worth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(later_searches, "_LONGEST_WAIT_S", 3600.0)
    searches, is_idle = Searches(), threading.Event()
    later = idle_searches(is_idle=is_idle.is_set)
    (stand_in,) = searches.add(later, 8)
    assert not is_idle.wait(0.2)
    assert searches.made == []
    is_idle.set()
    wait_until(lambda: stand_in.is_replaced)
    later.close()

    monkeypatch.setattr(later_searches, "_LONGEST_WAIT_S", 0.1)
    busy = idle_searches(is_idle=lambda: False)
    (stand_in,) = searches.add(busy, 8)
    wait_until(lambda: stand_in.is_replaced)
    busy.close()


def test_a_card_between_two_calls_is_not_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(later_searches, "_LONGEST_WAIT_S", 3600.0)
    searches, counted, is_busy = Searches(), iter(range(1 << 30)), threading.Event()
    is_busy.set()
    later = idle_searches(count_calls=lambda: next(counted) if is_busy.is_set() else -1)
    (stand_in,) = searches.add(later, 8)
    assert not threading.Event().wait(0.2)
    assert searches.made == []
    is_busy.clear()
    wait_until(lambda: stand_in.is_replaced)
    later.close()


def test_a_search_that_fails_is_made_again_when_it_is_asked_for_again() -> None:
    searches, later = Searches(), idle_searches()
    searches.error = ExhaustedError("no memory")
    failed, fails_too = searches.add(later, 8, 9)
    wait_until(lambda: len(searches.made) == 2)
    searches.error = None
    (found,) = searches.add(later, 8)
    wait_until(lambda: found.is_replaced)
    assert not failed.is_replaced
    assert not fails_too.is_replaced
    later.close()


def test_a_kernel_that_cannot_be_compiled_costs_others_no_search() -> None:
    searches, later = Searches(), idle_searches()
    searches.error = CompileError("NVRTC cannot be loaded")
    (failed,) = searches.add(later, 8)
    wait_until(lambda: len(searches.made) == 1)
    searches.error = None
    (found,) = searches.add(later, 9)
    wait_until(lambda: found.is_replaced)
    assert not failed.is_replaced
    later.close()


def test_a_search_that_is_asked_for_again_while_it_is_made_is_made_once() -> None:
    searches, later = Searches(), idle_searches()
    searches.goes_on.clear()
    (stand_in,) = searches.add(later, 8)
    wait_until(lambda: len(searches.made) == 1)
    later.add(KEY, stand_in, searches.search)
    (other,) = searches.add(later, 9)
    searches.goes_on.set()
    wait_until(lambda: other.is_replaced)
    assert len(searches.made) == 2
    later.close()


def test_the_searches_that_wait_are_bounded_and_are_forgotten_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(later_searches, "_PENDING_COUNT", 2)
    searches, later = Searches(), idle_searches()
    searches.goes_on.clear()
    searches.add(later, 8)
    wait_until(lambda: len(searches.made) == 1)
    first, second, third = searches.add(later, 9, 10, 11)
    searches.goes_on.set()
    wait_until(lambda: third.is_replaced)
    assert second.is_replaced
    assert not first.is_replaced

    searches.goes_on.clear()
    searches.add(later, 12)
    wait_until(lambda: len(searches.made) == 4)
    (dropped,) = searches.add(later, 13)
    closing = threading.Thread(target=later.close)
    closing.start()
    searches.goes_on.set()
    closing.join(60)
    assert not closing.is_alive()
    searches.add(later, 14)
    assert len(searches.made) == 4
    assert not dropped.is_replaced


class NoCudnn(Candidates):
    """Our own kernels for a card that was measured."""

    def __init__(self) -> None:
        no_cudnn: Any = None
        super().__init__(no_cudnn, 132, cost_model())


def layer(dtype: Any = np.float32, n: int = 2, channels: int = 64) -> Problem:
    x, W = TensorSpec((n, channels, 40, 50), np.dtype(dtype)), (channels, 32, 4, 4)
    return Problem(x, TensorSpec(W, np.dtype(dtype)), Geometry((2, 2), (1, 1)))


def stands_in(problem: Problem, limit_bytes: int = 1 << 30, **options: Any) -> bool:
    key = PlanKey.of(Product.Y, problem, Options(**options), limit_bytes)
    return NoCudnn().stand_in(key, SEARCH_MS) is not None


def test_there_is_a_stand_in_where_a_search_would_ask_cudnn_and_results_may_change() -> None:
    assert stands_in(layer())
    assert not stands_in(layer(), cudnn_deterministic=True)
    assert not stands_in(layer(), autotune=True)
    assert not stands_in(layer(), use_cudnn=UseCudnn.ALWAYS)
    assert not stands_in(layer(), use_cudnn=UseCudnn.NEVER)  # one plan is left
    assert not stands_in(layer(), limit_bytes=1 << 20)  # it has no room


def test_a_plan_that_must_be_compiled_first_has_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "worth_trying", lambda _: [Family.TENSOR_CORES])
    assert not stands_in(layer(np.float16))
    unusual = Geometry((6, 5), (2, 1))
    assert stands_in(replace(layer(np.float16), geometry=unusual))


def test_no_stand_in_takes_longer_than_a_search() -> None:
    for number in range(300):
        drawn = draw_problem(number)
        key = PlanKey.of(drawn.product, drawn.problem, drawn.options, 1 << 30)
        found = NoCudnn().stand_in(key, SEARCH_MS)
        if found is not None:
            _, predicted_ms = NoCudnn()._predict(key)
            assert found[1] <= min(predicted_ms.values()) + SEARCH_MS


def products(device: Any, problem: Problem, options: Options) -> list[Array]:
    """Return y and the gradients of operands that are the same each time."""
    random = np.random.default_rng(5)
    x, W, gy = (
        random.standard_normal(spec.shape).astype(spec.dtype)
        for spec in (problem.x, problem.W, problem.y)
    )
    call = CallContext()
    y = deconvolve(device, problem, x, W, None, options, call)
    found = gradients(device, problem, x, W, gy, GradientRequest(gb=False), options, call)
    assert found.gx is not None
    assert found.gW is not None
    return [y, found.gx, found.gW]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_calls_are_right_while_better_plans_are_found_and_deterministic_ones_stay_the_same(
    dtype: Any,
) -> None:
    from deconvd_server.device.cuda.device import CudaDevice

    problem, steady = layer(dtype), Options(cudnn_deterministic=True)
    with closing(CudaDevice(0)) as card, closing(CpuDevice()) as cpu:
        right = products(cpu, problem, Options())
        keys = [card.plan_key(product, problem, Options()) for product in Product]
        first = products(card, problem, steady)
        steady_count = card.stats.plans.chosen_count
        products(card, problem, Options())
        stand_ins = [plan for key in keys if isinstance(plan := get(card.plans, key), StandIn)]
        assert stand_ins
        assert card.stats.plans.chosen_count + len(stand_ins) == steady_count + len(keys)

        def is_found() -> bool:
            tolerance = 5e-3 if dtype is np.float16 else 1e-5
            for found, expected in zip(products(card, problem, Options()), right, strict=True):
                np.testing.assert_allclose(
                    found, expected, rtol=0, atol=tolerance * np.abs(expected).max()
                )
            for found, expected in zip(products(card, problem, steady), first, strict=True):
                np.testing.assert_array_equal(found, expected)
            return all(stand_in.is_replaced for stand_in in stand_ins)

        wait_until(is_found)
        assert is_found()
        assert card.stats.plans.chosen_count == steady_count + len(keys)
        assert not any(isinstance(get(card.plans, key), StandIn) for key in keys)
