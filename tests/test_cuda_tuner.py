"""Which plan is taken, and how it is remembered, with candidates that need no card."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deconvd.model.options import Options, UseCudnn, UseCudnnTensorCore
from deconvd_server.device.cuda.cudnn.enums import NumericalNote
from deconvd_server.device.cuda.cudnn.search import EngineRules
from deconvd_server.device.cuda.plans.candidate import Candidate
from deconvd_server.device.cuda.plans.choice import Choice, Provider
from deconvd_server.device.cuda.plans.plan_cache import PlanCache
from deconvd_server.device.cuda.plans.store import PlanStore
from tests.fake_plans import (
    FAILS,
    FakeBuildThreads,
    FakeCandidates,
    FakePlan,
    key_of,
    plan_cache_of,
    tuner_of,
)


def chosen(candidates: FakeCandidates, options: Options) -> Candidate:
    return tuner_of(candidates).choose(key_of(options), FakeBuildThreads.stream)


TUNED = Options(autotune=True)
STEADY = Options(cudnn_deterministic=True)


@pytest.mark.parametrize("options", [Options(), TUNED], ids=["default", "autotune"])
def test_the_fastest_is_taken_and_the_others_are_closed(options: Options) -> None:
    candidates = FakeCandidates(FakePlan("a", 3.0), FakePlan("b", 1.0), FakePlan("c", 2.0))

    best = chosen(candidates, options)

    assert (best.choice.name, best.choice.tuned_ms) == ("b", 1.0)
    assert sorted(candidates.closed) == ["a", "c", "fallback"]


@pytest.mark.parametrize(
    "options", [STEADY, Options(use_cudnn=UseCudnn.ALWAYS)], ids=["deterministic", "always"]
)
def test_the_first_that_runs_is_taken_where_timing_must_not_decide(options: Options) -> None:
    candidates = FakeCandidates(FakePlan("a", FAILS), FakePlan("b", 3.0), FakePlan("c", 1.0))

    best = chosen(candidates, options)

    assert (best.choice.name, best.choice.tuned_ms) == ("b", None)
    assert candidates.closed == ["a"]


@pytest.mark.parametrize("options", [STEADY, replace(STEADY, autotune=True)])
def test_plans_whose_runs_differ_are_not_taken_for_deterministic_results(options: Options) -> None:
    candidates = FakeCandidates(FakePlan("atomic", 1.0, deterministic=False), FakePlan("b", 2.0))
    assert chosen(candidates, options).choice.name == "b"


def test_of_those_that_are_as_fast_the_one_with_the_smallest_workspace_is_taken() -> None:
    candidates = FakeCandidates(
        FakePlan("fastest", 1.0, workspace_bytes=9),
        FakePlan("near", 1.0009, workspace_bytes=1),
        FakePlan("slower", 1.002),
    )
    best = chosen(candidates, TUNED)
    assert (best.choice.name, best.choice.tuned_ms) == ("near", 1.0009)
    assert sorted(candidates.closed) == ["fallback", "fastest", "slower"]


def test_plans_that_want_too_large_a_workspace_are_not_taken() -> None:
    candidates = FakeCandidates(FakePlan("greedy", 1.0, workspace_bytes=101), FakePlan("b", 2.0))
    assert chosen(candidates, TUNED).choice.name == "b"


@pytest.mark.parametrize("options", [Options(), TUNED, STEADY])
def test_the_fallback_is_taken_where_nothing_else_runs(options: Options) -> None:
    candidates = FakeCandidates(FakePlan("a", FAILS), FakePlan("b", 1.0, workspace_bytes=101))
    assert chosen(candidates, options).choice.name == "fallback"


def test_one_candidate_is_timed_however_long_they_took_to_make() -> None:
    candidates = FakeCandidates(FakePlan("a", FAILS), FakePlan("b", 1.0))
    chooser = tuner_of(candidates, tuning_limit_s=0)

    best = chooser.choose(key_of(TUNED), FakeBuildThreads.stream)

    # a is all that there was time to make, and does not run
    assert best.choice.name == "fallback"

    runs = tuner_of(FakeCandidates(FakePlan("b", 1.0)), tuning_limit_s=0)
    assert runs.choose(key_of(TUNED), FakeBuildThreads.stream).choice.name == "b"


def get(book: PlanCache, options: Options = TUNED) -> str:
    return book.get(key_of(options), lambda: None).name


def counts(book: PlanCache) -> tuple[int, int]:
    return book.stats.chosen_count, book.stats.restored_count


def test_a_plan_is_chosen_once() -> None:
    book = plan_cache_of(FakeCandidates(FakePlan("a", 1.0)))
    assert [get(book) for _ in range(3)] == ["a"] * 3
    assert counts(book) == (1, 0)
    book.close()


def test_a_plan_that_was_forgotten_comes_back_the_same() -> None:
    candidates = FakeCandidates(FakePlan("a", 1.0))
    book = plan_cache_of(candidates, limit_bytes=0)
    get(book)
    candidates.plans = (FakePlan("faster by chance", 0.5),)

    assert get(book) == "a"
    assert counts(book) == (1, 1)
    book.close()


def test_the_next_process_takes_what_this_one_chose(tmp_path: Path) -> None:
    candidates = FakeCandidates(FakePlan("a", 1.0))
    for expected in ((1, 0), (0, 1)):
        book = plan_cache_of(candidates, PlanStore(tmp_path, {"cudnn": 91900}))
        assert get(book) == "a"
        assert counts(book) == expected
        book.close()


def test_a_stored_plan_that_cudnn_does_not_take_is_chosen_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    candidates = FakeCandidates(FakePlan("a", 1.0))
    store = PlanStore(tmp_path, {"cudnn": 91900})
    store.save(key_of(TUNED), Choice(Provider.CUDNN_NCHW, "old", True))
    candidates.damaged = True
    book = plan_cache_of(candidates, store)

    with caplog.at_level(logging.WARNING):
        assert get(book) == "a"

    assert "ignored the stored plan old" in caplog.text
    loaded = store.load(key_of(TUNED))
    assert loaded is not None
    assert loaded.name == "a"
    book.close()


def notes(options: Options, dtype: type) -> frozenset[NumericalNote]:
    return EngineRules.of(key_of(options, dtype).problem, options, compiling=False).unwanted


def test_tf32_and_narrower_sums_are_kept_out_of_results_that_promise_more() -> None:
    assert NumericalNote.TENSOR_CORE in notes(Options(), np.float32)
    assert NumericalNote.TENSOR_CORE not in notes(Options(allow_tf32=True), np.float32)
    assert NumericalNote.TENSOR_CORE not in notes(Options(), np.float16)
    assert NumericalNote.TENSOR_CORE not in notes(Options(), np.float64)
    for dtype in (np.float16, np.float32, np.float64):
        always = {NumericalNote.DOWN_CONVERT_INPUTS, NumericalNote.REDUCED_PRECISION_REDUCTION}
        assert always <= notes(Options(allow_tf32=True), dtype)
        assert NumericalNote.NONDETERMINISTIC in notes(STEADY, dtype)
        assert NumericalNote.NONDETERMINISTIC not in notes(Options(), dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_tensor_cores_are_kept_out_of_every_element_type(dtype: type) -> None:
    never = Options(use_cudnn_tensor_core=UseCudnnTensorCore.NEVER, allow_tf32=True)
    assert NumericalNote.TENSOR_CORE in notes(never, dtype)


@pytest.mark.gpu
def test_only_tuning_may_compile() -> None:
    from deconvd_server.device.cuda.api.runtime import current_device, open_card
    from deconvd_server.device.cuda.cudnn import Cudnn
    from deconvd_server.device.cuda.plans.candidates import Candidates

    class Asked(Candidates):
        """Notes which engines it is asked for, and gives none."""

        compiling: set[bool]

        def cudnn_engines(self, *_: object, compiling: bool) -> Iterator[Candidate]:
            self.compiling.add(compiling)
            return iter(())

    asked = Asked(Cudnn(), open_card(0).processors_count)
    asked.compiling = set()
    with current_device(0):
        list(asked.shortlist(key_of(Options()), 0))
        assert asked.compiling == {False}
        list(asked.list_all(key_of(TUNED), 0))
        assert asked.compiling == {False, True}
