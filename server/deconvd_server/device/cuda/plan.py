"""A way to compute one product on the card, whoever provides it: cuDNN or our own kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol, runtime_checkable

__all__ = [
    "OPERAND_ALIGNMENT_BYTES",
    "PRODUCTS",
    "Plan",
    "Prepackable",
    "Prepacking",
    "Product",
    "prepacking_of",
]

OPERAND_ALIGNMENT_BYTES = 16
"""What plans count on of the addresses of operands and results: kernels move so many bytes at a time."""


class Product(StrEnum):
    """The three products of a deconvolution, by what they give."""

    Y = "y"
    """From x and W; cuDNN's dgrad."""

    GX = "gx"
    """From gy and W; cuDNN's fprop."""

    GW = "gW"
    """From x and gy; cuDNN's wgrad."""


PRODUCTS: Final[Mapping[str, Product]] = {"y": Product.Y, "gx": Product.GX, "gw": Product.GW}
"""The products, by the names of the fields of their results. gb is a sum, and needs none."""


class Plan(Protocol):
    """A way to compute one operation of one problem, picked once and executed often.

    The problem has products, and its x and W share one element type; gy, y, gx and gW have it too.
    """

    @property
    def name(self) -> str:
        """What it is, for logs and stored choices: ``cudnn nhwc engine 38``, ``depthwise``."""

    @property
    def deterministic(self) -> bool:
        """Whether two executions give the same bits."""

    @property
    def workspace_bytes(self) -> int:
        """Device memory that an execution scribbles on, apart from its operands."""

    def execute(self, a: int, b: int, out: int, workspace: int, stream: int) -> None:
        """Enqueue the operation on a stream, without waiting for it.

        It may be captured into a CUDA graph. Every element of `out` is written, and nothing is read from it.

        Args:
            a, b: Device pointers to the operands, NCHW, contiguous and aligned to
                `OPERAND_ALIGNMENT_BYTES`: x and W for y, gy and W for gx, x and gy for gW.
            out: Device pointer to the result, likewise.
            workspace: Device pointer to `workspace_bytes` of memory, aligned to 256 bytes.
            stream: The CUDA stream.
        """


@dataclass(frozen=True, slots=True)
class Prepacking:
    """What a plan makes of its operand b, W, before all else: worth keeping with a W that stays.

    Attributes:
        key: Tells the form from other forms of the same W, by whatever plan.
        size_bytes: What the form takes.
        make: Enqueues its making, given device pointers to b and to memory for the form, which is
            aligned to 256 bytes, and a stream.
        plan: A plan for the same, of which b is the form.
    """

    key: Hashable
    size_bytes: int
    pack: Callable[[int, int, int], None]
    plan: Plan


@runtime_checkable
class Prepackable(Protocol):
    """A plan that may make something of its operand b first."""

    def prepacking(self) -> Prepacking | None:
        """Return what that is; None if it takes b as it is, or b is no W."""


def prepacking_of(plan: Plan) -> Prepacking | None:
    """Return what a plan makes of its operand b before all else; None if nothing that can be kept."""
    return plan.prepacking() if isinstance(plan, Prepackable) else None
