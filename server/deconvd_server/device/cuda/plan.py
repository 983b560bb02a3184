"""The protocol of plans: a chosen algorithm for one product on the card, of cuDNN or of our own kernels."""

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
"""Plans need the addresses of operands and results to be multiples of this: kernels move that many bytes at a time."""


class Product(StrEnum):
    """The three products of a deconvolution, by their results."""

    Y = "y"
    """From x and W; cuDNN's dgrad."""

    GX = "gx"
    """From gy and W; cuDNN's fprop."""

    GW = "gW"
    """From x and gy; cuDNN's wgrad."""


PRODUCTS: Final[Mapping[str, Product]] = {"y": Product.Y, "gx": Product.GX, "gw": Product.GW}
"""The products, by the fields of their results. gb is a sum and needs no product."""


class Plan(Protocol):
    """A chosen algorithm for one product of one problem. It is chosen once and executed often.

    The problem has products. All its tensors have one element type, except for the plans of `CastPlan`.
    """

    @property
    def name(self) -> str:
        """Its name in logs and stored choices: ``cudnn nhwc engine 38``, ``depthwise``."""

    @property
    def deterministic(self) -> bool:
        """Whether two executions give the same bits."""

    @property
    def workspace_bytes(self) -> int:
        """Size of the scratch memory on the card that an execution needs."""

    def execute(self, a: int, b: int, out: int, workspace: int, stream: int) -> None:
        """Enqueue the product on a stream, without waiting for it.

        It may be captured into a CUDA graph. It writes every element of `out` and reads none.

        Args:
            a, b: Device pointers to the operands, NCHW, contiguous and aligned to
                `OPERAND_ALIGNMENT_BYTES`: x and W for y, gy and W for gx, x and gy for gW.
            out: Device pointer to the result, likewise.
            workspace: Device pointer to `workspace_bytes` of memory, aligned to 256 bytes.
            stream: The CUDA stream.
        """


@dataclass(frozen=True, slots=True)
class Prepacking:
    """The first step of a plan, which rearranges W, its operand b. The result, a form of W, is kept with a resident W.

    Attributes:
        key: Identifies the form among all forms that any plan makes of the same W.
        size_bytes: Size of the form.
        pack: Enqueues the step on a stream. Takes device pointers to W and to memory for the form, which is aligned to
            256 bytes, and the stream.
        plan: A plan for the same product that takes the form as its operand b.
    """

    key: Hashable
    size_bytes: int
    pack: Callable[[int, int, int], None]
    plan: Plan


@runtime_checkable
class Prepackable(Protocol):
    """A plan that may rearrange W first."""

    def prepacking(self) -> Prepacking | None:
        """Return the prepacking of W; None if the plan takes W as it is, or its operand b is not W."""


def prepacking_of(plan: Plan) -> Prepacking | None:
    """Return a plan's prepacking of W; None if it has no form that can be kept."""
    return plan.prepacking() if isinstance(plan, Prepackable) else None
