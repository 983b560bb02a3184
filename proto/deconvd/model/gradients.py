"""The gradients of a deconvolution."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy.typing as npt

__all__ = ["DoubleGradients", "Gradients"]


class Gradients(NamedTuple):
    """The gradients with respect to x, W and b. None for a gradient that was not requested."""

    gx: npt.NDArray[Any] | None
    gW: npt.NDArray[Any] | None
    gb: npt.NDArray[Any] | None


class DoubleGradients(NamedTuple):
    """The gradients of a loss with respect to x, W and gy, if the loss depends on the gradients gx, gW and gb.

    None for a gradient that was not requested, or is zero because the loss does not depend on what it needs.
    """

    gx: npt.NDArray[Any] | None
    gW: npt.NDArray[Any] | None
    ggy: npt.NDArray[Any] | None
