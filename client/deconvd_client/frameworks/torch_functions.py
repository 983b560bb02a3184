"""The deconvolution and its gradients as functions of torch's tensors, which autograd can differentiate in any order.

A call takes one of four ways:

    the operators of `torch_operators`    torch compiles or exports the call, or a dispatch mode watches it
    `_TransformedY`, and `...Gradients`   torch.func transforms it, which such operators do not let it differentiate
    `_RecordedY`, `_RecordedGradients`    autograd records it. That costs half of what an operator costs
    `compute_y`, `compute_gradients`      nobody records it

All of them save their operands by the same functions, and have the same formulas for backward and for batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from deconvd.errors import InvalidArgumentError
from deconvd_client.calls.tracing import adopted_context, capture_context
from deconvd_client.frameworks.double_backward import (
    DOUBLE_GRADIENT_NAMES,
    differentiate_twice,
)
from deconvd_client.frameworks.torch_batches import map_gradients, map_y
from deconvd_client.frameworks.torch_calls import (
    Arguments,
    Wanted,
    cast_for_autocast,
    compute_gradients,
    compute_y,
    compute_y_and_keep,
    first_tensor,
    is_recorded,
    natural_size,
    needs_operator,
)
from deconvd_client.frameworks.torch_connections import name_of
from deconvd_client.frameworks.torch_tensors import tensor_like

__all__ = [
    "deconvolve",
    "differentiate",
    "differentiate_gradients",
    "differentiate_y",
    "save_for_gradients",
    "save_for_y",
]


def deconvolve(connection: Any, x: Any, W: Any, b: Any, arguments: Arguments) -> torch.Tensor:
    """Return y, recorded by whatever records torch's own operators.

    Args:
        connection: A connection, or its name.
        x, W, b: At least one tensor. Other operands are constants: numpy arrays and RemoteTensors.
        arguments: The geometry.
    """
    x, W, b = cast_for_autocast(x, W, b)
    if needs_operator(x, W, b):
        if _is_transformed():
            transformed: torch.Tensor = _TransformedY.apply(connection, x, W, b, *arguments)
            return transformed
        operands = _operator_operands(x=x, W=W, b=b)
        y: torch.Tensor = torch.ops.deconvd.deconvolution_2d(
            _name(connection), *operands, *_operator_arguments(arguments, *operands)
        )
        return y
    if is_recorded(x, W, b):
        recorded: torch.Tensor = _RecordedY.apply(connection, x, W, b, *arguments)
        return recorded
    return compute_y(connection, x, W, b, arguments)


def differentiate(
    connection: Any,
    x: Any,
    W: Any,
    gy: Any,
    arguments: Arguments,
    wanted: Wanted,
    pullback: Any = None,
) -> tuple[torch.Tensor | None, ...]:
    """Return gx, gW and gb, recorded as `deconvolve` does; None for those that are not wanted.

    Args:
        connection: A connection, or its name.
        x, W, gy: At least one tensor. Other operands are constants.
        arguments: The geometry.
        wanted: Which gradients to compute.
        pullback: That of x and W, if the server keeps them.
    """
    if needs_operator(x, W, gy):
        if _is_transformed():
            transformed: tuple[torch.Tensor | None, ...] = _TransformedGradients.apply(
                connection, x, W, gy, *arguments, wanted
            )
            return transformed
        operands = _operator_operands(x=x, W=W, gy=gy)
        results = torch.ops.deconvd.deconvolution_2d_grad(
            _name(connection), *operands, *_operator_arguments(arguments, *operands), wanted
        )
        return tuple(
            result if is_wanted else None for result, is_wanted in zip(results, wanted, strict=True)
        )
    if is_recorded(x, W, gy):
        recorded: tuple[torch.Tensor | None, ...] = _RecordedGradients.apply(
            connection, x, W, gy, *arguments, wanted, pullback
        )
        return recorded
    return compute_gradients(connection, x, W, gy, arguments, wanted, pullback)


def save_for_y(
    ctx: Any,
    inputs: tuple[Any, ...],
    output: object,  # noqa: ARG001 - torch gives it
    token: Any = None,
) -> None:
    """Save what `differentiate_y` needs. An operand whose elements no gradient needs is replaced by its shape."""
    connection, x, W, _, *arguments = inputs
    _, needs_x, needs_W, *_ = ctx.needs_input_grad
    _save(
        ctx,
        connection,
        arguments,
        x if needs_W else _shape_of(x),
        W if needs_x else _shape_of(W),
        token,
    )


def differentiate_y(ctx: Any, gy: Any) -> tuple[Any, ...]:
    """Return the gradients with respect to the inputs of `deconvolution_2d`."""
    x, W, token = _operands(ctx)
    _, needs_x, needs_W, needs_b, *rest = ctx.needs_input_grad
    with adopted_context(ctx.trace_context):
        gx, gW, gb = differentiate(
            ctx.connection,
            x,
            W,
            gy,
            ctx.arguments,
            (needs_x, needs_W, needs_b),
            getattr(token, "pullback", None),
        )
    return None, gx, gW, gb, *(None for _ in rest)


def save_for_gradients(
    ctx: Any,
    inputs: tuple[Any, ...],
    output: object,  # noqa: ARG001 - torch gives it
) -> None:
    """Save what `differentiate_gradients` needs."""
    connection, x, W, gy, *arguments = inputs
    ctx.wanted = tuple(arguments[5])
    ctx.set_materialize_grads(False)  # a gradient that nobody used costs nothing
    _save(ctx, connection, arguments[:5], x, W, gy)


def differentiate_gradients(ctx: Any, ggx: Any, ggW: Any, ggb: Any) -> tuple[Any, ...]:
    """Return the gradients with respect to the inputs of `deconvolution_2d_grad`."""
    x, W, gy = _operands(ctx)
    ggx, ggW, ggb = (
        gradient if is_wanted else None
        for gradient, is_wanted in zip((ggx, ggW, ggb), ctx.wanted, strict=True)
    )
    needs = ctx.needs_input_grad[1:4]
    wanted = [
        name for name, is_needed in zip(DOUBLE_GRADIENT_NAMES, needs, strict=True) if is_needed
    ]
    connection, arguments = ctx.connection, ctx.arguments

    def call(x: Any, W: Any, b: Any) -> torch.Tensor:
        return deconvolve(connection, x, W, b, arguments)

    def call_gradient(x: Any, W: Any, gy: Any, name: str) -> torch.Tensor | None:
        gx, gW, _ = differentiate(
            connection, x, W, gy, arguments, (name == "gx", name == "gW", False)
        )
        return gx if name == "gx" else gW

    with adopted_context(ctx.trace_context):
        dx, dW, dgy = differentiate_twice(call, call_gradient, x, W, gy, ggx, ggW, ggb, wanted)
    if dgy is None and ggb is not None and "ggy" in wanted:
        dgy = ggb.view(1, -1, 1, 1).expand_as(gy)
    return None, dx, dW, dgy, *(None for _ in ctx.needs_input_grad[4:])


class _RecordedY(torch.autograd.Function):
    """Computes y in eager mode, and lets the server keep x and W for backward where that pays."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        connection, x, W, b, *arguments = inputs
        y, token = compute_y_and_keep(connection, x, W, b, Arguments(*arguments), ctx)
        save_for_y(ctx, inputs, y, token)
        return y

    backward = staticmethod(differentiate_y)


class _RecordedGradients(torch.autograd.Function):
    """Computes gx, gW and gb in eager mode."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor | None, ...]:
        connection, x, W, gy, *arguments, wanted, pullback = inputs
        save_for_gradients(ctx, inputs, None)
        return compute_gradients(connection, x, W, gy, Arguments(*arguments), wanted, pullback)

    backward = staticmethod(differentiate_gradients)


class _TransformedY(torch.autograd.Function):
    """Computes y under the transforms of torch.func, which take the context apart from the computation."""

    @staticmethod
    def forward(*inputs: Any) -> torch.Tensor:
        connection, x, W, b, *arguments = inputs
        return deconvolve(connection, x, W, b, Arguments(*arguments))

    setup_context = staticmethod(save_for_y)
    backward = staticmethod(differentiate_y)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[torch.Tensor, int]:
        return map_y(_TransformedY.apply, info, in_dims, *inputs)


class _TransformedGradients(torch.autograd.Function):
    """Computes gx, gW and gb under the transforms of torch.func."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor | None, ...]:
        connection, x, W, gy, *arguments, wanted = inputs
        return differentiate(connection, x, W, gy, Arguments(*arguments), wanted)

    setup_context = staticmethod(save_for_gradients)
    backward = staticmethod(differentiate_gradients)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        return map_gradients(_TransformedGradients.apply, info, in_dims, *inputs)


def _save(ctx: Any, connection: Any, arguments: Sequence[Any], *operands: Any) -> None:
    """Save operands. Tensors are saved by autograd, which notices if they are changed in place."""
    ctx.connection = connection
    ctx.trace_context = capture_context()  # autograd has threads of its own for backward
    ctx.arguments = Arguments(*arguments)
    ctx.constants = [None if isinstance(o, torch.Tensor) else o for o in operands]
    ctx.save_for_backward(*(o if isinstance(o, torch.Tensor) else None for o in operands))


def _operands(ctx: Any) -> list[Any]:
    return [
        constant if tensor is None else tensor
        for tensor, constant in zip(ctx.saved_tensors, ctx.constants, strict=True)
    ]


def _shape_of(operand: Any) -> Any:
    """Return a tensor of the same shape and type that holds one element. Other operands are returned as they are."""
    if not isinstance(operand, torch.Tensor):
        return operand
    return operand.new_empty(()).expand(operand.shape)


def _operator_operands(**operands: Any) -> list[torch.Tensor | None]:
    """Return operands as operators take them: tensors alone."""
    like = first_tensor(*operands.values())
    return [_operator_operand(name, operand, like) for name, operand in operands.items()]


def _operator_arguments(arguments: Arguments, x: Any, W: Any, *_: Any) -> Arguments:
    """Return the arguments with an outsize for both axes or for none."""
    stride, pad, outsize, dilate, groups = arguments
    if outsize is None or None not in outsize:
        return arguments
    for name, operand in (("x", x), ("W", W)):
        if operand.dim() != 4:
            raise InvalidArgumentError(
                f"{name} must have 4 dimensions, got {operand.dim()}", argument=name
            )
    natural = natural_size(x.shape[2:], W.shape[2:], stride, pad, dilate)
    outsize = [n if o is None else o for n, o in zip(natural, outsize, strict=True)]
    return Arguments(stride, pad, outsize, dilate, groups)


def _operator_operand(name: str, operand: Any, like: torch.Tensor) -> torch.Tensor | None:
    if isinstance(operand, torch.Tensor):
        if operand.is_nested:
            raise InvalidArgumentError(
                f"{name} must be a dense tensor, got a nested tensor: convert it with to_padded_tensor(0)",
                argument=name,
            )
        return operand
    if operand is None and name == "b":
        return None
    if torch.compiler.is_compiling() and isinstance(operand, np.ndarray):
        tensor: torch.Tensor = torch.as_tensor(operand, device=like.device)
        return tensor
    if isinstance(operand, np.ndarray):
        return tensor_like(np.array(operand, operand.dtype.newbyteorder("=")), like)
    raise InvalidArgumentError(
        f"{name} must be a torch tensor or a numpy array where torch compiles or transforms the call, got "
        f"{type(operand).__qualname__}",
        argument=name,
    )


def _is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()


def _name(connection: Any) -> str:
    return connection if isinstance(connection, str) else name_of(connection)
