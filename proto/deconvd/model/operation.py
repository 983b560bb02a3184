"""The table of operations: the operands and results of each. Pure.

All differences between the operations are in this table: the order of a stream, which results are sums over the
samples, which operands each result needs, and the names of the RPCs. Operands and results
have the names of their fields in the schema.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from deconvd.model.problem import Problem, TensorSpec

__all__ = [
    "ARGUMENTS",
    "DECONVOLVE",
    "DECONVOLVE_GRAD",
    "OPERATIONS",
    "Operation",
    "spec_of_field",
]

ARGUMENTS: Final = {name.lower(): name for name in ("x", "W", "b", "y", "gx", "gW", "gb", "gy")}
"""The Python names of operands and results, by the names of their fields."""


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """One row of the table.

        order of a request stream    constants, then for each slice of samples: batched_operands
        order of a response stream   for each slice of samples: results, then reduced_results

    Attributes:
        name: The name of its unary RPC.
        constants: Operands that are the same for all samples.
        batched_operands: Operands whose first axis is the samples.
        results: Results whose first axis is the samples.
        needs: For each result, the operands from which it is computed, without optional ones.
        write_order: The order in which a client writes operands to shared memory during an overlapped call: first
            those that a device can use without the others. See `deconvd.direct.protocol`.
        reduced_results: Results that are sums over the samples.
        optional: Operands that a request may omit.
    """

    name: str
    constants: tuple[str, ...]
    batched_operands: tuple[str, ...]
    results: tuple[str, ...]
    needs: Mapping[str, tuple[str, ...]]
    write_order: tuple[str, ...]
    reduced_results: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    @property
    def stream_name(self) -> str:
        """The name of its streaming RPC."""
        return f"{self.name}Stream"

    @property
    def operands(self) -> tuple[str, ...]:
        """All operands, in the order of a stream."""
        return self.constants + self.batched_operands

    @property
    def all_results(self) -> tuple[str, ...]:
        """All results, in the order of a stream."""
        return self.results + self.reduced_results

    def operands_for(
        self, results: Collection[str], optional: Collection[str] = ()
    ) -> tuple[str, ...]:
        """Return the operands from which some results are computed, in the order of a stream.

        Args:
            results: Names of results.
            optional: Names of the optional operands that the request has.
        """
        needed = {operand for result in results for operand in self.needs[result]}
        needed.update(optional)
        return tuple(operand for operand in self.operands if operand in needed)


DECONVOLVE: Final = Operation(
    "Deconvolve",
    constants=("w", "b"),
    batched_operands=("x",),
    results=("y",),
    needs={"y": ("w", "x")},
    optional=("b",),
    write_order=("w", "b", "x"),
)
"""``y``: the deconvolution of ``x`` by ``w``, plus ``b``."""

DECONVOLVE_GRAD: Final = Operation(
    "DeconvolveGrad",
    constants=("w",),
    batched_operands=("x", "gy"),
    results=("gx",),
    reduced_results=("gw", "gb"),
    needs={"gx": ("w", "gy"), "gw": ("x", "gy"), "gb": ("gy",)},
    write_order=("w", "gy", "x"),
)
"""The gradients of a loss with respect to ``x``, ``w`` and ``b``, from ``gy``, its gradient with respect to ``y``."""

OPERATIONS: Final = (DECONVOLVE, DECONVOLVE_GRAD)


def spec_of_field(problem: Problem, name: str) -> TensorSpec:
    """Return the shape and element type of an operand or a result of a problem, by the name of its field."""
    match name:
        case "x" | "gx":
            return problem.x
        case "w" | "gw":
            return problem.W
        case "b" | "gb":
            return problem.b
        case "y" | "gy":
            return problem.y
    raise ValueError(f"a problem has no tensor {name!r}")
