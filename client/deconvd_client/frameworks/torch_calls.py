"""Calls of a connection with torch's tensors, which nothing records.

Operands can also be constants of other kinds: numpy arrays and RemoteTensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch.autograd import forward_ad

from deconvd.errors import ExhaustedError, InvalidArgumentError
from deconvd_client.frameworks.framework import UnusableArrayError
from deconvd_client.frameworks.torch_connections import find_connection
from deconvd_client.frameworks.torch_tensors import array_of, tensor_like

__all__ = [
    "Arguments",
    "Wanted",
    "cast_for_autocast",
    "compute_gradients",
    "compute_y",
    "compute_y_and_keep",
    "first_tensor",
    "is_recorded",
    "may_have_autocast",
    "natural_size",
    "needs_operator",
]

_PLAIN_TYPES: Final = (torch.Tensor, torch.nn.Parameter, np.ndarray, type(None))

_BACKEND: Final = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
_VIEWS: Final = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
_PLAIN_MODES: Final = frozenset({_BACKEND.raw_repr(), (_BACKEND | _VIEWS).raw_repr()})
"""The sets of dispatch keys that a thread has if nothing but autograd watches it: with inference mode, and without."""

_GRADIENT_NAMES: Final = ("gx", "gW", "gb")

_MIN_KEPT_BYTES: Final = 1 << 20
"""From this size of x on, the server keeps x and W between forward and backward if it lends no memory.

Below, to keep a tensor costs more than to send it again, also through 10 Gbit/s: about half a millisecond.
"""

Wanted = tuple[bool, bool, bool]
"""Which of gx, gW and gb to compute."""


class Arguments(NamedTuple):
    """The geometry in the order of the operators' schemas.

    No outsize, for both axes or for one, means the natural size. Only `needs_operator` calls have one for both or none.
    """

    stride: Sequence[int]
    pad: Sequence[int]
    outsize: Sequence[int | None] | None
    dilate: Sequence[int]
    groups: int


def natural_size(
    image: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    pad: Sequence[int],
    dilate: Sequence[int],
) -> list[int]:
    """Return the size of the output for an outsize of None. Sizes can be torch's symbols."""
    axes = zip(image, kernel, stride, pad, dilate, strict=True)
    return [s * (i - 1) + d * (k - 1) + 1 - 2 * p for i, k, s, p, d in axes]


def compute_y(connection: Any, x: Any, W: Any, b: Any, arguments: Arguments) -> torch.Tensor:
    """Return y, computed by the server. Nothing is recorded."""
    stride, pad, outsize, dilate, groups = arguments
    y = _find(connection).deconvolution_2d(
        _array("x", x),
        _array("W", W),
        _array("b", b),
        stride,
        pad,
        outsize,
        dilate=dilate,
        groups=groups,
    )
    return tensor_like(y, first_tensor(x, W, b))


def compute_gradients(
    connection: Any,
    x: Any,
    W: Any,
    gy: Any,
    arguments: Arguments,
    wanted: Wanted,
    pullback: Any = None,
) -> tuple[torch.Tensor | None, ...]:
    """Return gx, gW and gb, computed by the server. Nothing is recorded."""
    names = [name for name, is_wanted in zip(_GRADIENT_NAMES, wanted, strict=True) if is_wanted]
    gradient = _array("gy", gy)
    if pullback is not None:
        gradients = pullback(gradient, wanted=names)
    else:
        stride, pad, outsize, dilate, groups = arguments
        # only the shape and the element type of b matter
        b = np.empty(gradient.shape[1:2], gradient.dtype)
        gradients = _find(connection).deconvolution_2d_grad(
            _array("x", x),
            _array("W", W),
            b,
            gradient,
            stride,
            pad,
            outsize,
            dilate=dilate,
            groups=groups,
            wanted=names,
        )
    like = first_tensor(x, W, gy)
    return tuple(None if array is None else tensor_like(array, like) for array in gradients)


def compute_y_and_keep(
    connection: Any, x: Any, W: Any, b: Any, arguments: Arguments, ctx: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return y, and a token that has the pullback for x and W if the server keeps them.

    Autograd saves the token like x and W. So it lives exactly as long as they do: until backward without retain_graph,
    until the graph goes, or, in a checkpoint, from the second forward on.
    """
    found = _find(connection)
    is_large = isinstance(x, torch.Tensor) and x.numel() * x.element_size() >= _MIN_KEPT_BYTES
    if not (is_large and ctx.needs_input_grad[2]) or x.is_cuda or found.shares_memory:
        return compute_y(connection, x, W, b, arguments), None
    stride, pad, outsize, dilate, groups = arguments
    try:
        array, pullback = found.vjp(
            _array("x", x),
            _array("W", W),
            _array("b", b),
            stride,
            pad,
            outsize,
            dilate=dilate,
            groups=groups,
        )
    except ExhaustedError:  # the server has no room to keep them
        return compute_y(connection, x, W, b, arguments), None
    token: Any = torch.empty(0)
    token.pullback = pullback
    return tensor_like(array, x), token


def cast_for_autocast(*operands: Any) -> tuple[Any, ...]:
    """Return the operands in the type of the current autocast block, as torch's own convolutions take them."""
    if not may_have_autocast():
        return operands
    device = first_tensor(*operands).device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        operand.to(dtype) if _is_cast(operand, device) else operand for operand in operands
    )


def may_have_autocast() -> bool:
    """Return whether an autocast block is active for some device. Always True while torch compiles."""
    is_on: bool = torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()
    return is_on


def needs_operator(*operands: object) -> bool:
    """Return whether something other than autograd records what is done with these operands."""
    if torch.compiler.is_compiling():
        return True
    # one question for transforms of torch.func, dispatch modes, torch.jit.trace and `is_grads_batched`: after the wait
    # for a server, each function of torch takes microseconds
    if torch._C._dispatch_tls_local_include_set().raw_repr() not in _PLAIN_MODES:
        return True
    return any(
        type(operand) not in _PLAIN_TYPES and isinstance(operand, torch.Tensor)
        for operand in operands
    )


def is_recorded(*operands: Any) -> bool:
    """Return whether autograd records what is done with these operands."""
    if torch.is_grad_enabled():
        for operand in operands:
            if isinstance(operand, torch.Tensor) and operand.requires_grad:
                return True
    # forward mode is not supported, but its tangents must not be lost: autograd.Function says so
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(operand).tangent is not None
        for operand in operands
        if isinstance(operand, torch.Tensor)
    )


def _is_cast(operand: Any, device: str) -> bool:
    return (
        isinstance(operand, torch.Tensor)
        and operand.is_floating_point()
        and operand.dtype is not torch.float64
        and operand.device.type == device
    )


def first_tensor(*operands: Any) -> torch.Tensor:
    return next(operand for operand in operands if isinstance(operand, torch.Tensor))


def _array(name: str, operand: Any) -> Any:
    if not isinstance(operand, torch.Tensor):
        return operand
    try:
        return array_of(operand)
    except UnusableArrayError as error:
        raise InvalidArgumentError(f"{name} {error}", argument=name) from error


def _find(connection: Any) -> Any:
    return find_connection(connection) if isinstance(connection, str) else connection
