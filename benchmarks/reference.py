"""What results must be: operands drawn at random, and PyTorch's answer in float64, whatever the geometry."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from deconvd.model.dtypes import DType
from deconvd.model.problem import Problem
from deconvd_server.device.cuda.plan import Product

__all__ = ["ReferenceOperands", "draw", "reference_result", "relative_error", "tolerance"]

_TOLERANCES = {"float16": 2e-3, "bfloat16": 1e-2, "float32": 2e-6, "float64": 1e-13}
"""Relative errors, of norms: a few times the rounding of one element."""


@dataclass(frozen=True, slots=True)
class ReferenceOperands:
    """A problem's x, W and gy on the card."""

    problem: Problem
    x: torch.Tensor
    W: torch.Tensor
    gy: torch.Tensor

    def of(self, operation: Product) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the two that an operation takes, in a plan's order."""
        pairs = {
            Product.Y: (self.x, self.W),
            Product.GX: (self.gy, self.W),
            Product.GW: (self.x, self.gy),
        }
        return pairs[operation]

    def make_nan_output(self, operation: Product) -> torch.Tensor:
        """Return a place for an operation's result, full of NaN."""
        like = {Product.Y: self.gy, Product.GX: self.x, Product.GW: self.W}
        return torch.full_like(like[operation], float("nan"))


def draw(problem: Problem) -> ReferenceOperands:
    """Return random operands for a problem."""
    shapes = problem.x.shape, problem.W.shape, problem.y.shape
    dtype = torch_type(problem.x.dtype)
    x, W, gy = (torch.randn(shape, device="cuda").to(dtype) for shape in shapes)
    return ReferenceOperands(problem, x, W, gy)


def torch_type(dtype: DType) -> torch.dtype:
    """Return PyTorch's name for an element type."""
    found = getattr(torch, dtype.name)
    assert isinstance(found, torch.dtype)
    return found


def reference_result(operands: ReferenceOperands, operation: Product) -> torch.Tensor:
    """Return an operation's result in float64."""
    x, W = (t.double().requires_grad_() for t in (operands.x, operands.W))
    y = _deconvolve(operands.problem, x, W)
    if operation is Product.Y:
        return y.detach()
    y.backward(operands.gy.double())
    gradient = x.grad if operation is Product.GX else W.grad
    assert gradient is not None
    return gradient


def _deconvolve(problem: Problem, x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """Return y: PyTorch's result without pad, cut or filled up with zeros to the output size."""
    g = problem.geometry
    whole = F.conv_transpose2d(x, W, stride=g.stride, dilation=g.dilate, groups=g.groups)
    (h, w), (p_h, p_w) = problem.output, g.pad
    missing_h, missing_w = (
        max(p + o - size, 0)
        for p, o, size in zip(g.pad, problem.output, whole.shape[2:], strict=True)
    )
    return F.pad(whole, (0, missing_w, 0, missing_h))[:, :, p_h : p_h + h, p_w : p_w + w]


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of the reference; NaN stays NaN."""
    norm = float(reference.norm())
    error = float((result.double() - reference).norm())
    return error / norm if norm else error


def tolerance(dtype: DType) -> float:
    """Return the relative error that a correct result stays below."""
    return _TOLERANCES[np.dtype(dtype).name]
