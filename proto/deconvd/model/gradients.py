"""The gradients of a deconvolution."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy.typing as npt

__all__ = ["Gradients"]


class Gradients(NamedTuple):
    """The gradients with respect to x, W and b. None for a gradient that was not requested."""

    gx: npt.NDArray[Any] | None
    gW: npt.NDArray[Any] | None
    gb: npt.NDArray[Any] | None
