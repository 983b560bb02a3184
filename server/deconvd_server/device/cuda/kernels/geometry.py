"""A problem's extents, in the structure that kernels take."""

from __future__ import annotations

import math

from deconvd.model.problem import Problem
from deconvd_server.device.cuda.kernels.structs import Axis, KernelGeometry

__all__ = ["kernel_geometry"]


def kernel_geometry(problem: Problem) -> KernelGeometry:
    """Return a problem's extents for kernels."""
    h, w = (_axis(problem, axis) for axis in range(2))
    return KernelGeometry(problem.n, problem.c_O, problem.groups, h, w)


def _axis(problem: Problem, axis: int) -> Axis:
    geometry = problem.geometry
    stride, dilate = geometry.stride[axis], geometry.dilate[axis]
    return Axis(
        image=problem.image[axis],
        kernel=problem.kernel[axis],
        output=problem.output[axis],
        stride=stride,
        pad=geometry.pad[axis],
        dilate=dilate,
        tap_step=stride // math.gcd(stride, dilate),
        image_step=dilate // math.gcd(stride, dilate),
    )
