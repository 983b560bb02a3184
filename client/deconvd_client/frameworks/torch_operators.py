"""The operators ``deconvd::deconvolution_2d`` and ``deconvd::deconvolution_2d_grad`` of torch.

They are what torch.compile, torch.export, torch.func and dispatch modes see of a call. The first operand is the name of
the connection (see `torch_connections`). Importing this module registers them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import torch

from deconvd_client.frameworks.torch_batches import map_gradients, map_y
from deconvd_client.frameworks.torch_calls import (
    Arguments,
    cast_for_autocast,
    compute_gradients,
    compute_y,
    natural_size,
)
from deconvd_client.frameworks.torch_functions import (
    differentiate_gradients,
    differentiate_y,
    save_for_gradients,
    save_for_y,
)

__all__: list[str] = []

_Y: Final = "deconvd::deconvolution_2d"
_GRADIENTS: Final = "deconvd::deconvolution_2d_grad"

_GEOMETRY: Final = (
    "SymInt[] stride, SymInt[] pad, SymInt[]? outsize, SymInt[] dilate, SymInt groups"
)

_library: Final = torch.library.Library("deconvd", "DEF")
_library.define(
    f"deconvolution_2d(str connection, Tensor x, Tensor W, Tensor? b, {_GEOMETRY}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"deconvolution_2d_grad(str connection, Tensor x, Tensor W, Tensor gy, {_GEOMETRY}, bool[3] wanted) "
    "-> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _compute_y(connection: str, x: Any, W: Any, b: Any, *arguments: Any) -> torch.Tensor:
    return compute_y(connection, x, W, b, Arguments(*arguments))


def _compute_gradients(
    connection: str, x: Any, W: Any, gy: Any, *arguments: Any
) -> tuple[torch.Tensor, ...]:
    *geometry, wanted = arguments
    gradients = compute_gradients(connection, x, W, gy, Arguments(*geometry), tuple(wanted))
    # an operator returns a tensor for each result: an empty one for what is not wanted
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _fake_y(*inputs: Any) -> torch.Tensor:
    _, x, W, _, stride, pad, outsize, dilate, groups = inputs
    for name, operand in (("x", x), ("W", W)):
        torch._check(operand.dim() == 4, lambda name=name: f"{name} must have 4 dimensions")
    torch._check(
        x.shape[1] == W.shape[0],
        lambda: "W must have as many input channels, W.shape[0], as x has, x.shape[1]",
    )
    if outsize is None:
        outsize = natural_size(x.shape[2:], W.shape[2:], stride, pad, dilate)
    y: torch.Tensor = x.new_empty((x.shape[0], W.shape[1] * groups, *outsize))
    return y


def _fake_gradients(*inputs: Any) -> tuple[torch.Tensor, ...]:
    _, x, W, gy, *_, wanted = inputs
    results = (x.new_empty(x.shape), W.new_empty(W.shape), gy.new_empty(gy.shape[1]))
    return tuple(
        result if is_wanted else x.new_empty(0)
        for result, is_wanted in zip(results, wanted, strict=True)
    )


def _autocast_y(connection: str, x: Any, W: Any, b: Any, *arguments: Any) -> torch.Tensor:
    x, W, b = cast_for_autocast(x, W, b)
    with torch.autocast(x.device.type, enabled=False):
        y: torch.Tensor = torch.ops.deconvd.deconvolution_2d(connection, x, W, b, *arguments)
    return y


_library.impl("deconvolution_2d", _compute_y, "CompositeExplicitAutograd")
_library.impl("deconvolution_2d_grad", _compute_gradients, "CompositeExplicitAutograd")
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("deconvolution_2d", _autocast_y, _key)
torch.library.register_fake(_Y, _fake_y, lib=_library)
torch.library.register_fake(_GRADIENTS, _fake_gradients, lib=_library)
torch.library.register_autograd(_Y, differentiate_y, setup_context=save_for_y, lib=_library)
torch.library.register_autograd(
    _GRADIENTS, differentiate_gradients, setup_context=save_for_gradients, lib=_library
)
torch.library.register_vmap(_Y, partial(map_y, torch.ops.deconvd.deconvolution_2d), lib=_library)
torch.library.register_vmap(
    _GRADIENTS, partial(map_gradients, torch.ops.deconvd.deconvolution_2d_grad), lib=_library
)
