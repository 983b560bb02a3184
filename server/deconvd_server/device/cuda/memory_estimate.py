"""Estimates the card's memory that a call takes, before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache

from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.device.cuda.execution.device_layout import DeviceLayout
from deconvd_server.device.cuda.plan import PRODUCTS, Product

__all__ = ["MemoryEstimate"]

_WORKSPACE_BYTES = 1 << 30
"""The largest default of `workspace_bytes`. cuDNN's fastest plans rarely need more."""

_LRU_ENTRIES_COUNT = 4096


class MemoryEstimate:
    """Bounds on the memory that calls take of one card.

    Args:
        budget_bytes: Bound on the memory of all calls together.
        calls_count: How many calls run at once.
        workspace_bytes: A plan's workspace may have this size, plus that of the problem's tensors; None for 1 GiB, or
            less if the budget is small.
        fallback_bytes: Returns the workspace of the fallback, the plan that takes any problem.
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
        # every call needs its footprint, and most problems come again
        self._sizes = lru_cache(_LRU_ENTRIES_COUNT)(self._count_bytes)

    def workspace_limit_bytes(self, problem: Problem) -> int:
        """Return the largest workspace that a plan may have. It does not bind the fallback."""
        tensors_bytes = _tensors_bytes(problem)
        spare_bytes = max(self._budget_bytes - tensors_bytes, 0)
        return min(self._workspace_bytes + tensors_bytes, spare_bytes)

    def footprint_bytes(
        self, problem: Problem, results: Collection[str], resident_bytes: int = 0
    ) -> int:
        """Return a bound on the memory that a call takes, including what it takes to try plans out.

        Args:
            results: The names of the results that it computes.
            resident_bytes: Size of its tensors that are on the card already. Plans are tried out on scratch tensors
                even so: on the operands and the result of one product, which are at most half of all tensors.
        """
        tensors_bytes, workspace_bytes = self._sizes(problem, tuple(results))
        return max(tensors_bytes - resident_bytes, tensors_bytes // 2) + workspace_bytes

    def _count_bytes(self, problem: Problem, results: tuple[str, ...]) -> tuple[int, int]:
        """Return the sizes of a call's tensors and of its largest workspace."""
        if not problem.has_products:
            return 0, 0
        workspaces = [
            self._fallback_bytes(PRODUCTS[field], problem) for field in results if field in PRODUCTS
        ]
        limit_bytes = self.workspace_limit_bytes(problem)
        return _tensors_bytes(problem), max([limit_bytes, *workspaces])


def _workspace_share(budget_bytes: int, calls_count: int) -> int:
    """Return the default of `workspace_bytes`.

    It is a power of two: the size is part of a plan's key, and the free memory is a little different at each restart.
    """
    share_bytes = max(budget_bytes // (2 * calls_count), 1)
    return min(_WORKSPACE_BYTES, 1 << (share_bytes.bit_length() - 1))


def _tensors_bytes(problem: Problem) -> int:
    """Return the size of all operands and all gradients together, aligned."""
    specs: Sequence[TensorSpec] = (problem.x, problem.W, problem.y, problem.b)
    return DeviceLayout(specs, specs, 0).total_bytes
