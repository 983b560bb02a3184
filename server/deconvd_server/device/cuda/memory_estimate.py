"""How much of the card's memory a call may take, known before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache

from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.device.cuda.execution.device_layout import DeviceLayout
from deconvd_server.device.cuda.plan import PRODUCTS, Product

__all__ = ["MemoryEstimate"]

_WORKSPACE_BYTES = 1 << 30
"""What plans may take where the card has plenty: cuDNN's fastest rarely want more."""

_LRU_ENTRIES_COUNT = 4096


class MemoryEstimate:
    """Bounds on what calls take of one card's memory.

    Args:
        budget_bytes: What all calls may take together.
        calls_count: How many calls run at once.
        workspace_bytes: What a plan may take beside its operands and as much again; None for 1 GiB
            or what the budget allows.
        fallback_bytes: Returns the workspace of the plan that takes any problem.
    """

    def __init__(
        self,
        budget_bytes: int,
        calls_count: int,
        workspace_bytes: int | None,
        fallback_bytes: Callable[[Product, Problem], int],
    ) -> None:
        self._budget_bytes = budget_bytes
        self._workspace_bytes = workspace_bytes or _workspace_share(budget_bytes, calls_count)
        self._fallback_bytes = fallback_bytes
        # every request is asked for its footprint, and most have come before
        self._sizes = lru_cache(_LRU_ENTRIES_COUNT)(self._count_bytes)

    def workspace_limit_bytes(self, problem: Problem) -> int:
        """Return what a plan may take beside its operands, unless it is the only one there is."""
        tensors_bytes = _tensors_bytes(problem)
        spare_bytes = max(self._budget_bytes - tensors_bytes, 0)
        return min(self._workspace_bytes + tensors_bytes, spare_bytes)

    def footprint_bytes(
        self, problem: Problem, results: Collection[str], resident_bytes: int = 0
    ) -> int:
        """Return a bound on what a call takes, trying plans included.

        Args:
            results: The names of those that it computes.
            resident_bytes: What those of its tensors take that lie on the card already. Plans are
                tried on others all the same: on one set of operands and results.
        """
        tensors_bytes, workspace_bytes = self._sizes(problem, tuple(results))
        return max(tensors_bytes - resident_bytes, tensors_bytes // 2) + workspace_bytes

    def _count_bytes(self, problem: Problem, results: tuple[str, ...]) -> tuple[int, int]:
        """Return what a call's tensors take, and what its plans."""
        if not problem.has_products:
            return 0, 0
        workspaces = [
            self._fallback_bytes(PRODUCTS[field], problem) for field in results if field in PRODUCTS
        ]
        limit_bytes = self.workspace_limit_bytes(problem)
        return _tensors_bytes(problem), max([limit_bytes, *workspaces])


def _workspace_share(budget_bytes: int, calls_count: int) -> int:
    """Return a call's share of the budget: a power of two, so that a restart finds its plans."""
    share_bytes = max(budget_bytes // (2 * calls_count), 1)
    return min(_WORKSPACE_BYTES, 1 << (share_bytes.bit_length() - 1))


def _tensors_bytes(problem: Problem) -> int:
    """Return what all operands and all gradients take together, aligned."""
    specs: Sequence[TensorSpec] = (problem.x, problem.W, problem.y, problem.b)
    return DeviceLayout(specs, specs, 0).total_bytes
