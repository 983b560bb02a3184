"""The structures of geometry.cuh, field by field, and how to fill them from a problem."""

from __future__ import annotations

import ctypes
import math

from deconvd.model.problem import Problem

__all__ = ["KernelGeometry"]


class _Axis(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            "image",
            "kernel",
            "output",
            "stride",
            "pad",
            "dilate",
            "tap_step",
            "image_step",
        )
    ]


class KernelGeometry(ctypes.Structure):
    """`Geometry` in geometry.cuh."""

    _fields_ = [
        *(
            (name, ctypes.c_int)
            for name in ("samples", "input_channels", "output_channels", "groups")
        ),
        ("h", _Axis),
        ("w", _Axis),
    ]

    @classmethod
    def of(cls, problem: Problem) -> KernelGeometry:
        """Return a problem's geometry."""
        h, w = (_axis(problem, axis) for axis in range(2))
        return cls(problem.n, problem.c_I, problem.c_O, problem.groups, h, w)


def _axis(problem: Problem, axis: int) -> _Axis:
    geometry = problem.geometry
    stride, dilate = geometry.stride[axis], geometry.dilate[axis]
    return _Axis(
        image=problem.image[axis],
        kernel=problem.kernel[axis],
        output=problem.output[axis],
        stride=stride,
        pad=geometry.pad[axis],
        dilate=dilate,
        tap_step=stride // math.gcd(stride, dilate),
        image_step=dilate // math.gcd(stride, dilate),
    )
