"""The adapter for torch. It is imported only after a caller has given a tensor, or by ``deconvd_client.torch``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd.model.gradients import Gradients
from deconvd_client.frameworks import torch_operators as torch_operators  # registers the operators
from deconvd_client.frameworks.torch_calls import (
    Arguments,
    is_recorded,
    may_have_autocast,
    needs_operator,
)
from deconvd_client.frameworks.torch_functions import deconvolve, differentiate
from deconvd_client.frameworks.torch_tensors import array_of, tensor_like

__all__ = ["TorchFramework"]


class TorchFramework:
    """Shares the memory of tensors with calls, and hands calls that torch records to `torch_functions`."""

    def owns(self, value: object) -> bool:
        return isinstance(value, torch.Tensor)

    def to_array(self, value: Any) -> Any:
        return array_of(value)

    def from_array(self, array: Array, value: Any) -> Any:
        return tensor_like(array, value)

    def is_traced(self, value: Any) -> bool:
        return is_recorded(value) or may_have_autocast() or needs_operator(value)

    def deconvolution_2d(self, connection: Any, x: Any, W: Any, b: Any, geometry: Geometry) -> Any:
        return deconvolve(connection, x, W, b, _arguments(geometry))

    def deconvolution_2d_grad(
        self,
        connection: Any,
        x: Any,
        W: Any,
        b: Any,
        gy: Any,
        geometry: Geometry,
        wanted: Collection[str],
    ) -> Gradients:
        _check_b(b, W, geometry)
        chosen = ("gx" in wanted, "gW" in wanted, "gb" in wanted and b is not None)
        return Gradients(*differentiate(connection, x, W, gy, _arguments(geometry), chosen))


def _arguments(geometry: Geometry) -> Arguments:
    outsize = None if geometry.outsize == (None, None) else geometry.outsize
    return Arguments(geometry.stride, geometry.pad, outsize, geometry.dilate, geometry.groups)


def _check_b(b: Any, W: Any, geometry: Geometry) -> None:
    """Raise InvalidArgumentError unless b fits. Its elements take no part."""
    if b is not None and tuple(b.shape) != (W.shape[1] * geometry.groups,):
        raise InvalidArgumentError(
            f"b must have c_O elements: {W.shape[1] * geometry.groups}, got the shape {tuple(b.shape)}",
            argument="b",
        )
