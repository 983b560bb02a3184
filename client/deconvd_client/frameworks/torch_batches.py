"""Calls with a batch of operands, as torch.func.vmap makes them, as single calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from deconvd_client.frameworks.torch_calls import Arguments

__all__ = ["map_gradients", "map_y"]


def map_y(
    call: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *inputs: Any
) -> tuple[torch.Tensor, int]:
    """Compute y of many x, W and b at once.

    If only x differs, the batch joins n. Else it joins the groups: each W is for channels of its own.

    Args:
        call: Computes y of the inputs of `deconvolution_2d`.
        info, in_dims, inputs: As of `torch.library.register_vmap`.
    """
    if info.batch_size == 0:
        y, dim = map_y(call, _OneSample, in_dims, *_one_sample(in_dims, inputs))
        return y.narrow(dim, 0, 0), dim
    connection, x, W, b, *geometry = inputs
    _, x_dim, W_dim, b_dim, *_ = in_dims
    arguments, batch = Arguments(*geometry), info.batch_size
    if W_dim is b_dim is None:
        y = call(connection, x.movedim(x_dim, 0).flatten(0, 1), W, b, *arguments)
        return _unflatten(y, 0, batch), 0
    x, W = _into_channels(x, x_dim, batch), _batch_first(W, W_dim, batch).flatten(0, 1)
    if b is not None:
        b = _batch_first(b, b_dim, batch).flatten()
    y = call(connection, x, W, b, *_join_groups(arguments, batch))
    return _unflatten(y, 1, batch), 1


def map_gradients(
    call: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *inputs: Any
) -> tuple[tuple[torch.Tensor | None, ...], tuple[int | None, ...]]:
    """Compute gradients of many x, W and gy at once, as `map_y` does."""
    if info.batch_size == 0:
        results, dims = map_gradients(call, _OneSample, in_dims, *_one_sample(in_dims, inputs))
        return tuple(
            result if dim is None or result is None else result.narrow(dim, 0, 0)
            for result, dim in zip(results, dims, strict=True)
        ), dims
    connection, x, W, gy, *geometry, wanted = inputs
    _, x_dim, W_dim, gy_dim, *_ = in_dims
    arguments, batch = Arguments(*geometry), info.batch_size
    if W_dim is None and tuple(wanted) == (True, False, False):
        x, gy = (_batch_first(o, d, batch).flatten(0, 1) for o, d in ((x, x_dim), (gy, gy_dim)))
        results = call(connection, x, W, gy, *arguments, wanted)
        return _split(results, (0, 0, 0), wanted, batch)
    x, gy = _into_channels(x, x_dim, batch), _into_channels(gy, gy_dim, batch)
    W = _batch_first(W, W_dim, batch).flatten(0, 1)
    results = call(connection, x, W, gy, *_join_groups(arguments, batch), wanted)
    return _split(results, (1, 0, 0), wanted, batch)


class _OneSample:
    """What `torch.library.register_vmap` says of a batch of one."""

    batch_size: Final = 1


def _one_sample(in_dims: tuple[Any, ...], inputs: tuple[Any, ...]) -> list[Any]:
    """Return the inputs for a batch of one in place of an empty one, whose results have no size to be split by."""
    return [
        i.new_zeros((*i.shape[:dim], 1, *i.shape[dim + 1 :])) if isinstance(dim, int) else i
        for i, dim in zip(inputs, in_dims, strict=True)
    ]


def _split(
    results: Sequence[Any], dims: tuple[int, ...], wanted: Sequence[bool], batch: int
) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
    """Return results with the batch as a dimension of its own, and the places of that; None for what is not wanted."""
    triples = [*zip(results, dims, wanted, strict=True)]
    return (
        tuple(_unflatten(r, dim, batch) if is_wanted else r for r, dim, is_wanted in triples),
        tuple(dim if is_wanted else None for _, dim, is_wanted in triples),
    )


def _unflatten(tensor: torch.Tensor, dim: int, batch: int) -> torch.Tensor:
    return tensor.unflatten(dim, (batch, tensor.shape[dim] // batch))


def _batch_first(tensor: torch.Tensor, dim: int | None, batch: int) -> torch.Tensor:
    return tensor.expand(batch, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _into_channels(tensor: torch.Tensor, dim: int | None, batch: int) -> torch.Tensor:
    return _batch_first(tensor, dim, batch).movedim(0, 1).flatten(1, 2)


def _join_groups(arguments: Arguments, batch: int) -> Arguments:
    return arguments._replace(groups=arguments.groups * batch)
