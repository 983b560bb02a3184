"""How much a call may take of a card, known before anything is allocated. No card is needed."""

from __future__ import annotations

import numpy as np

from deconvd.model.geometry import Geometry
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.device.cuda.memory_estimate import MemoryEstimate
from deconvd_server.device.cuda.plan import Product

FLOAT32 = np.dtype(np.float32)
MIB = 1 << 20


def problem(n: int = 4) -> Problem:
    """x of n MiB, W of 4 KiB, y of n MiB and 12 bytes of b, more or less."""
    x = TensorSpec((n, 1, 512, 512), FLOAT32)
    return Problem(x, TensorSpec((1, 1, 3, 3), FLOAT32), Geometry(pad=(1, 1)))


def sizing(
    budget_bytes: int, *, fallback_bytes: int = 0, workspace_bytes: int = MIB
) -> MemoryEstimate:
    return MemoryEstimate(
        budget_bytes, 4, workspace_bytes, lambda operation, problem: fallback_bytes
    )


def test_a_footprint_holds_operands_results_and_a_workspace() -> None:
    small = sizing(1000 * MIB)
    tensors_bytes = 2 * (4 + 4) * MIB  # x and y, and as much again for gradients
    assert 0 <= small.footprint_bytes(problem(), {"y"}) - (2 * tensors_bytes + MIB) < 10_000
    assert small.footprint_bytes(problem(), {"y"}) == small.footprint_bytes(
        problem(), {"gx", "gw", "gb"}
    )


def test_the_only_plan_that_there_is_counts_even_beyond_the_limit() -> None:
    needy = sizing(1000 * MIB, fallback_bytes=500 * MIB)
    assert needy.footprint_bytes(problem(), {"y"}) > 500 * MIB


def test_plans_are_confined_to_what_the_budget_leaves() -> None:
    tight = sizing(20 * MIB, workspace_bytes=100 * MIB)
    assert 0 < tight.workspace_limit_bytes(problem(4)) < 4 * MIB
    assert tight.workspace_limit_bytes(problem(40)) == 0


def test_a_problem_without_products_takes_nothing() -> None:
    assert sizing(1000 * MIB).footprint_bytes(problem(0), {"gx", "gw", "gb"}) == 0


def test_only_the_wanted_gradients_workspaces_count() -> None:
    def fallback(operation: Product, problem: Problem) -> int:
        return 300 * MIB if operation is Product.GW else 0

    split = MemoryEstimate(1000 * MIB, 4, MIB, fallback)
    assert split.footprint_bytes(problem(), {"gx", "gb"}) < 100 * MIB
    assert split.footprint_bytes(problem(), {"gw", "gb"}) > 300 * MIB


def test_a_little_more_or_less_free_memory_changes_no_limit() -> None:
    limits = {
        MemoryEstimate(budget, 4, None, lambda operation, problem: 0).workspace_limit_bytes(
            problem()
        )
        for budget in (7000 * MIB, 7001 * MIB, 7100 * MIB)
    }
    assert len(limits) == 1
