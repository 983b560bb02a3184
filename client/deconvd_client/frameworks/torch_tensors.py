"""Torch's tensors as arrays of numpy or cupy, and arrays as tensors, without a copy where that is possible."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import Any, Final

import numpy as np
import torch

from deconvd.model.dtypes import BFLOAT16, Array
from deconvd_client.frameworks.framework import UnusableArrayError

__all__ = ["array_of", "tensor_like"]

_NUMPY_TYPES: Final = (torch.float32, torch.float64, torch.float16)
_ELEMENT_TYPES: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def array_of(tensor: torch.Tensor) -> Any:
    """Return the elements of a tensor: a numpy array, or a cupy array if the tensor is on a card that cupy can use.

    The array shares memory with the tensor, unless the tensor is on a device that neither library can read. It takes no
    part in autograd.

    Raises:
        UnusableArrayError: The tensor has another element type, is not dense, or has no elements in memory.
    """
    plain = tensor.detach() if tensor.requires_grad else tensor
    if plain.dtype in _NUMPY_TYPES and plain.is_cpu:
        with suppress(RuntimeError, TypeError):  # what is wrong is told below
            array: Array = plain.numpy()
            return array
    _check_elements(tensor)
    if plain.is_neg():  # a view whose elements are negated when they are read: numpy cannot do that
        plain = plain.resolve_neg()
    if plain.is_cuda and (cupy := _cupy_adapter()) is not None:
        return _without_bfloat16(plain, cupy.array_from_dlpack)
    if not plain.is_cpu:
        plain = plain.cpu()
    try:
        return _without_bfloat16(plain, torch.Tensor.numpy)
    except RuntimeError as error:
        raise UnusableArrayError(
            "must have elements in memory. Tensors inside torch.compile, torch.export and the transforms of torch.func "
            f"have none there: {error}"
        ) from None


def tensor_like(array: Any, like: torch.Tensor) -> torch.Tensor:
    """Return a numpy or cupy array as a tensor on the device of `like`. It shares memory if it is there already."""
    is_bfloat16 = array.dtype == BFLOAT16
    words = array.view(np.int16) if is_bfloat16 else array
    is_on_host = isinstance(array, np.ndarray)
    tensor: torch.Tensor = torch.from_numpy(words) if is_on_host else torch.from_dlpack(words)
    if is_bfloat16:
        tensor = tensor.view(torch.bfloat16)
    return tensor if is_on_host and like.is_cpu else tensor.to(like.device)


def _without_bfloat16(tensor: torch.Tensor, share: Any) -> Array:
    """Return the array that `share` makes of a tensor. Neither numpy nor DLPack between us has torch's bfloat16."""
    if tensor.dtype is torch.bfloat16:
        words: Array = share(tensor.view(torch.int16))
        return words.view(BFLOAT16)
    array: Array = share(tensor)
    return array


def _check_elements(tensor: torch.Tensor) -> None:
    if tensor.dtype not in _ELEMENT_TYPES:
        allowed = ", ".join(str(allowed) for allowed in _ELEMENT_TYPES)
        raise UnusableArrayError(
            f"must have one of the element types {allowed}, got {tensor.dtype}"
        )
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"the layout {tensor.layout}"
        raise UnusableArrayError(f"must be a dense tensor, got {kind}: convert it with to_dense()")
    if tensor.is_meta:
        raise UnusableArrayError("must have elements, got a tensor on the device meta")


@cache
def _cupy_adapter() -> Any:
    """Return our adapter for cupy; None if cupy is not installed, or this torch is not one of CUDA's."""
    if torch.version.cuda is None:
        return None
    try:
        from deconvd_client.frameworks import cupy
    except ImportError:
        return None
    return cupy
