"""Shapes of results, without a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, SupportsIndex

import numpy as np

from deconvd.errors import InvalidArgumentError
from deconvd.model.geometry import Geometry, IntOrPair, parse_sizes, shorten
from deconvd.model.problem import TensorSpec, problem_of
from deconvd_client.keywords import reject_unknown_keywords

__all__ = ["output_shape"]

_ANY_TYPE: Final = np.dtype(np.float16)
"""The narrowest element type: sizes in bytes are limited, too."""

_MAX_SIZE_BITS: Final = 63
"""Larger sizes are too long to be shown, perhaps."""


@reject_unknown_keywords
def output_shape(
    x_shape: Sequence[SupportsIndex],
    W_shape: Sequence[SupportsIndex],
    stride: IntOrPair = 1,
    pad: IntOrPair = 0,
    outsize: Sequence[SupportsIndex | None] | None = None,
    *,
    dilate: IntOrPair = 1,
    groups: SupportsIndex = 1,
) -> tuple[int, int, int, int]:
    """Return the shape ``(n, c_O, h_O, w_O)`` of a deconvolution's result. No server is asked.

    Args:
        x_shape: Shape ``(n, c_I, h_I, w_I)`` of the images.
        W_shape: Shape ``(c_I, c_O / groups, h_K, w_K)`` of the filter.
        stride, pad, outsize, dilate, groups: As in `Connection.deconvolution_2d`.

    Raises:
        InvalidArgumentError: `Connection.deconvolution_2d` would refuse operands of these shapes (a ValueError).
        TypeError: A keyword is unknown.
    """
    geometry = Geometry.from_arguments(stride, pad, outsize, dilate, groups)
    x = _parse_four("x_shape", x_shape, "(n, c_I, h_I, w_I)")
    W = _parse_four("W_shape", W_shape, "(c_I, c_O / groups, h_K, w_K)")
    problem = problem_of(TensorSpec(x, _ANY_TYPE), TensorSpec(W, _ANY_TYPE), geometry)
    return (problem.n, problem.c_O, *problem.output)


def _parse_four(name: str, shape: object, form: str) -> tuple[int, ...]:
    sizes = parse_sizes(shape)
    if (
        sizes is None
        or len(sizes) != 4
        or any(size.bit_length() > _MAX_SIZE_BITS for size in sizes)
    ):
        raise InvalidArgumentError(
            f"{name} must be four ints, {form}, got {shorten(shape)}", argument=name
        )
    return sizes
