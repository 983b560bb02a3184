"""The operations as a table: what each is computed from, and what it gives. Pure.

What differs between two operations is written here and nowhere else: the order of a stream, what is a sum over the
samples, which operands a result needs, and the names of the RPCs follow from it. Operands and results have the names of
their fields in the schema.
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
"""What operands and results are called in Python, by the names of their fields."""


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """What the server computes: one row of the table.

    Attributes:
        name: The name of its RPC. That of its RPC in a stream has "Stream" behind it.
        constants: Operands that all samples have in common. A stream has them first, whole.
        sliced: Operands that have samples. A stream has them slice by slice, in this order.
        results: Results that have samples. A stream has them slice by slice.
        summed: Results that are sums over the samples. A stream has them last, whole.
        needs: The operands that each result is computed from, without those that may be left out.
        optional: Operands that may be left out.
        write_order: The order in which a client writes operands into shared memory during an early call:
            first those that a device can use without the others. See `deconvd.direct.protocol`.
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
        """The name of its RPC in a stream."""
        return f"{self.name}Stream"

    @property
    def operands(self) -> tuple[str, ...]:
        """All its operands, in the order in which they stream."""
        return self.constants + self.batched_operands

    @property
    def all_results(self) -> tuple[str, ...]:
        """All its results, in the order in which they stream."""
        return self.results + self.reduced_results

    def operands_for(
        self, results: Collection[str], optional: Collection[str] = ()
    ) -> tuple[str, ...]:
        """Return the operands that some of its results are computed from, in the order in which they stream.

        Args:
            results: Names of results.
            optional: Names of those optional operands that are given.
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
"""``y``, the deconvolution of ``x`` by ``w``, plus ``b``."""

DECONVOLVE_GRAD: Final = Operation(
    "DeconvolveGrad",
    constants=("w",),
    batched_operands=("x", "gy"),
    results=("gx",),
    reduced_results=("gw", "gb"),
    needs={"gx": ("w", "gy"), "gw": ("x", "gy"), "gb": ("gy",)},
    write_order=("w", "gy", "x"),
)
"""The gradients of a loss with respect to ``x``, ``w`` and ``b``, from ``gy``, that with respect to ``y``."""

OPERATIONS: Final = (DECONVOLVE, DECONVOLVE_GRAD)


def spec_of_field(problem: Problem, name: str) -> TensorSpec:
    """Return the shape and element type that an operand or a result of a problem has, by the name of its field."""
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
