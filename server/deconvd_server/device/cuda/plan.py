"""The protocol of plans: a chosen algorithm for one product on the card, of cuDNN or of our own kernels."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, Protocol

__all__ = ["OPERAND_ALIGNMENT_BYTES", "PRODUCTS", "Plan", "Product"]

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
