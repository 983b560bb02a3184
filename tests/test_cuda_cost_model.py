"""The cost model: how good its picks are over the problems that were measured, and that any problem has one."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from typing import Any

import pytest

from benchmarks.fit_cost_model import MeasuredProblem, fit, load_problems, picks
from benchmarks.random_problems import RandomProblem, draw_problem
from deconvd.model.options import Options, UseCudnn, UseCudnnTensorCore
from deconvd_server.device.cuda import kernels
from deconvd_server.device.cuda.plans.candidate import Candidate
from deconvd_server.device.cuda.plans.candidates import Candidates
from deconvd_server.device.cuda.plans.cost_model import (
    Family,
    cost_model,
    order_families,
    worth_trying,
)
from deconvd_server.device.cuda.plans.key import PlanKey
from tests.fake_plans import FAILS, FakeBuildThreads, FakeCandidates, FakePlan, key_of, tuner_of

PROCESSORS_COUNT = 132


@pytest.fixture(scope="module")
def measured() -> list[MeasuredProblem]:
    return load_problems()


def ratios(measured: list[MeasuredProblem], pick: str) -> list[float]:
    return [picks(cost_model(), problem)[pick] / problem.tuned_ms for problem in measured]


@pytest.mark.parametrize(
    ("pick", "mean", "near", "most"),
    [("those worth a try", 1.10, 0.92, 8.0), ("one, untimed", 1.25, 0.75, 20.0)],
)
def test_its_picks_take_little_more_than_the_fastest_of_all_plans(
    measured: list[MeasuredProblem], pick: str, mean: float, near: float, most: float
) -> None:
    found = ratios(measured, pick)
    assert math.exp(statistics.fmean(map(math.log, found))) <= mean
    assert sum(ratio <= 1.3 for ratio in found) / len(found) >= near
    assert max(found) <= most


def test_its_picks_are_far_better_than_what_cudnn_proposes_first(
    measured: list[MeasuredProblem],
) -> None:
    def mean(pick: str) -> float:
        return statistics.geometric_mean(ratios(measured, pick))

    assert 1.5 * mean("one, untimed") < mean("cuDNN's first")


def test_it_is_what_the_kept_measurements_give(measured: list[MeasuredProblem]) -> None:
    text = files("deconvd_server.device.cuda.plans").joinpath("cost_model.json").read_text()
    kept = json.loads(text)["coefficients"]
    fitted = fit(measured)
    assert kept.keys() == fitted.keys()
    for family, of_products in fitted.items():
        for product, of_arithmetics in of_products.items():
            for arithmetic, coefficients in of_arithmetics.items():
                assert kept[family][product][arithmetic] == pytest.approx(coefficients, abs=1e-3)


def test_every_problem_has_a_pick_among_the_plans_that_there_are() -> None:
    for number in range(300):
        drawn = draw_problem(number)
        plans = kernels.candidates(drawn.product, drawn.problem, drawn.options, PROCESSORS_COUNT)
        families = {Family(plan.name) for plan in plans} | {Family.FALLBACK, Family.CUDNN}
        predicted = cost_model().predict_ms(drawn.product, drawn.problem, drawn.options, families)
        assert predicted.keys() == families
        assert all(1e-5 < ms < 1e5 for ms in predicted.values()), (number, predicted)
        assert set(worth_trying(predicted)) <= families == set(order_families(predicted))


def test_only_what_may_be_the_fastest_is_worth_a_try() -> None:
    short = {Family.FALLBACK: 0.03, Family.CUDNN: 0.05, Family.TENSOR_CORES: 0.01}
    assert worth_trying(short) == [Family.TENSOR_CORES]
    assert worth_trying({**short, Family.FALLBACK: 0.019}) == [
        Family.TENSOR_CORES,
        Family.FALLBACK,
    ]
    # of long plans, the better one saves more than the try costs
    assert worth_trying({family: 100 * ms for family, ms in short.items()}) == [
        Family.TENSOR_CORES,
        Family.FALLBACK,
        Family.CUDNN,
    ]


def test_where_nothing_is_timed_ours_is_taken_before_a_plan_of_cudnn_that_is_hardly_better() -> (
    None
):
    assert order_families({Family.CUDNN: 0.95, Family.FALLBACK: 1.0})[0] is Family.FALLBACK
    assert order_families({Family.CUDNN: 0.8, Family.FALLBACK: 1.0})[0] is Family.CUDNN


class AskedCandidates(Candidates):
    """Gives plans of our own kernels for a card that was measured. Counts how often cuDNN is asked, and gives none."""

    def __init__(self) -> None:
        no_cudnn: Any = None
        super().__init__(no_cudnn, PROCESSORS_COUNT, cost_model())
        self.asked_count = 0

    def cudnn_engines(self, *_: object, **__: object) -> Iterator[Candidate]:
        self.asked_count += 1
        return iter(())


def contenders(
    drawn: RandomProblem, *, limit_bytes: int = 1 << 30, **options: Any
) -> tuple[list[str], int]:
    """Return the names of the plans that are picked for a problem, and how often cuDNN was asked."""
    candidates = AskedCandidates()
    changed = replace(drawn.options, **options)
    key = PlanKey.of(drawn.product, drawn.problem, changed, limit_bytes)
    names = [candidate.choice.name for candidate in candidates.contenders(key, 0)]
    return names, candidates.asked_count


def test_cudnn_is_not_asked_where_it_cannot_win_nor_where_it_must_not_be_used() -> None:
    asked = [contenders(draw_problem(number))[1] for number in range(200)]
    assert 20 < asked.count(0) < 180
    assert not any(
        contenders(draw_problem(number), use_cudnn=UseCudnn.NEVER)[1] for number in range(200)
    )


def test_for_deterministic_results_all_of_ours_and_the_fallback_are_there_in_some_order() -> None:
    for number in range(100):
        drawn = draw_problem(number)
        names, asked_count = contenders(drawn, cudnn_deterministic=True)
        assert asked_count == 2  # by mode A, which gave nothing, and by the fallback mode
        plans = kernels.candidates(drawn.product, drawn.problem, drawn.options, PROCESSORS_COUNT)
        assert sorted(names) == sorted(["gemm columns", *(plan.name for plan in plans)])


@pytest.mark.parametrize(
    "options",
    [
        {"use_cudnn": UseCudnn.ALWAYS},
        {"use_cudnn_tensor_core": UseCudnnTensorCore.NEVER},
    ],
    ids=["cuDNN must be used", "tensor cores were not measured"],
)
def test_it_has_no_opinion_on_what_it_does_not_know(options: dict[str, Any]) -> None:
    assert contenders(draw_problem(0), **options) == ([], 0)


def test_plans_whose_workspace_is_too_large_are_no_picks() -> None:
    names = {
        name
        for number in range(100)
        for name in contenders(draw_problem(number), limit_bytes=0, use_cudnn=UseCudnn.NEVER)[0]
    }
    assert names <= {"depthwise"}


def chosen(candidates: FakeCandidates, options: Options) -> tuple[str, float | None]:
    choice = tuner_of(candidates).choose(key_of(options), FakeBuildThreads.stream).choice
    return choice.name, choice.tuned_ms


STEADY = Options(cudnn_deterministic=True)


@pytest.mark.parametrize("options", [Options(), STEADY, Options(use_cudnn=UseCudnn.NEVER)])
def test_a_single_pick_is_taken_untimed_and_nothing_else_is_asked_for(options: Options) -> None:
    candidates = FakeCandidates(FakePlan("better by far", 0.1))
    candidates.contending = (FakePlan("picked", 1.0),)
    assert chosen(candidates, options) == ("picked", None)
    assert candidates.closed == []


def test_of_several_picks_the_fastest_is_taken_and_of_steady_ones_the_first() -> None:
    candidates = FakeCandidates()
    candidates.contending = (FakePlan("a", 2.0), FakePlan("b", 1.0), FakePlan("c", 3.0))
    assert chosen(candidates, Options()) == ("b", 1.0)
    assert sorted(candidates.closed) == ["a", "c"]
    assert chosen(candidates, STEADY) == ("a", None)


@pytest.mark.parametrize("options", [Options(), STEADY])
@pytest.mark.parametrize(
    "contending",
    [
        (FakePlan("broken", FAILS),),
        (FakePlan("broken", FAILS), FakePlan("too large", 1.0, workspace_bytes=101)),
        (FakePlan("broken", FAILS), FakePlan("broken too", FAILS)),
    ],
    ids=["one", "too large", "several"],
)
def test_where_no_pick_can_run_the_others_are_searched(
    options: Options, contending: tuple[FakePlan, ...]
) -> None:
    candidates = FakeCandidates(FakePlan("found", 1.0))
    candidates.contending = contending
    assert chosen(candidates, options)[0] == "found"
    assert {plan.name for plan in contending} <= set(candidates.closed)
