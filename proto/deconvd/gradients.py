"""The gradients of a deconvolution, and which of them are wanted."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import numpy.typing as npt

from deconvd.errors import InvalidArgumentError

__all__ = ["Gradients", "Wanted"]


class Gradients(NamedTuple):
    """The gradients with respect to x, W and b; None for one that was not wanted."""

    gx: npt.NDArray[Any] | None
    gW: npt.NDArray[Any] | None
    gb: npt.NDArray[Any] | None


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which gradients are wanted: at least one.

    Raises:
        InvalidArgumentError: None is.
    """

    gx: bool = True
    gW: bool = True
    gb: bool = True

    def __post_init__(self) -> None:
        if not any(astuple(self)):
            raise InvalidArgumentError(
                "wanted must name at least one of gx, gW and gb, got none", argument="wanted"
            )
