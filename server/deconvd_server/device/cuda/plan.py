"""A way to compute one product on the card, whoever provides it: cuDNN or our own kernels."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

__all__ = ["OPERAND_ALIGNMENT_BYTES", "Operation", "Plan"]

OPERAND_ALIGNMENT_BYTES = 16
"""What plans count on of the addresses of operands and results: kernels move so many bytes at a time."""


class Operation(StrEnum):
    """The three products of a deconvolution, by what they give."""

    Y = "y"
    """From x and W; cuDNN's dgrad."""

    GX = "gx"
    """From gy and W; cuDNN's fprop."""

    GW = "gW"
    """From x and gy; cuDNN's wgrad."""


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
