"""Transposed convolution by a server, as a layer for torch.

::

    import deconvd_client.torch

    layer = deconvd_client.torch.ConvTranspose2d(64, 32, 4, stride=2, padding=1, connection=F)
    y = layer(x)

A connection's own functions take torch's tensors, too. Autograd, autocast, torch.func, torch.compile and torch.export
work through both. For torch.compile and torch.export this module must be imported. An exported program connects by
itself, in any process that has imported this module. Forward mode is refused, so use `torch.func.jacrev` twice in place
of `hessian`. `torch.compile` does not take a `torch.func.grad` around a call of ours.
"""

from __future__ import annotations

import inspect
import os
from typing import Any, TypeVar

import torch

from deconvd.errors import InvalidArgumentError
from deconvd.model.gradients import Gradients
from deconvd_client.arguments import parse_wanted
from deconvd_client.connection import Connection
from deconvd_client.connector import connect
from deconvd_client.frameworks import torch_operators as torch_operators  # registers the operators
from deconvd_client.frameworks.torch_calls import Arguments, natural_size
from deconvd_client.frameworks.torch_connections import (
    name_of,
    register_connect,
    shared_connection,
)
from deconvd_client.frameworks.torch_functions import (
    deconvolve,
    differentiate,
)

__all__ = ["ConvTranspose2d", "replace_layers"]

register_connect(connect)

_Module = TypeVar("_Module", bound=torch.nn.Module)


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d`, computed by a server. It has the same arguments, parameters and results.

    Layers can be pickled, copied and saved. A copy by `copy.deepcopy` has the same connection. A pickled layer connects
    by itself, as a pickled `Connection` does.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode,
            device, dtype: As of `torch.nn.ConvTranspose2d`.
        connection: The connection to the server. None, the default, means the connection to the target in the
            environment variable DECONVD_TARGET. All layers of a process share it, and the first call opens it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Any = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        connection: Connection | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        self._link = _LayerConnection(connection)

    @property
    def connection(self) -> Connection:
        """The connection to the server."""
        given = self._link.connection
        return _default_connection() if given is None else given

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:  # noqa: A002 - torch's name
        """Return the transposed convolution of `input`, as `torch.nn.ConvTranspose2d` does.

        Args:
            input: Images of shape ``(n, c_I, h_I, w_I)`` or ``(c_I, h_I, w_I)``.
            output_size: Size ``(h_O, w_O)`` of the output, in place of `output_padding`.

        Raises:
            DeconvdError: The call failed.
        """
        if not isinstance(input, torch.Tensor):
            raise InvalidArgumentError(
                f"input must be a torch tensor, got {type(input).__qualname__}", argument="input"
            )
        extra = self._output_padding(
            input,
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            2,
            self.dilation,
        )
        if input.dim() == 3:
            return self._deconvolve(input.unsqueeze(0), extra).squeeze(0)
        y = self._deconvolve(input, extra)
        if _is_channels_last(input) or _is_channels_last(self.weight):
            return y.contiguous(memory_format=torch.channels_last)
        return y

    def _deconvolve(self, x: torch.Tensor, extra: list[int]) -> torch.Tensor:
        """Return y with some more rows and columns than its natural size.

        The server adds fewer than a stride. If more are asked for (which torch allows for less than the dilation), y is
        computed with a smaller pad, which adds them at the far end, and cut at the near end.
        """
        if all(e < s for e, s in zip(extra, self.stride, strict=True)):
            return self._call(x, self.bias, self.padding, extra)
        cuts = [min(e, p) for e, p in zip(extra, self.padding, strict=True)]
        pad = [p - c for p, c in zip(self.padding, cuts, strict=True)]
        y = self._call(x, None, pad, [0, 0])
        (h, w), (top, left) = (
            natural_size(x.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation),
            cuts,
        )
        height, width = h + extra[0], w + extra[1]
        y = y[:, :, top : top + height, left : left + width]
        missing = [0, width - y.shape[3], 0, height - y.shape[2]]
        y = torch.nn.functional.pad(y, missing)  # no tap reaches them
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)

    def _call(
        self, x: torch.Tensor, b: torch.Tensor | None, pad: Any, extra: list[int]
    ) -> torch.Tensor:
        outsize = None
        if any(extra):
            outsize = [
                n + e
                for n, e in zip(
                    natural_size(x.shape[2:], self.kernel_size, self.stride, pad, self.dilation),
                    extra,
                    strict=True,
                )
            ]
        arguments = Arguments(self.stride, pad, outsize, self.dilation, self.groups)
        if torch.compiler.is_compiling():
            connection: Any = self._link.name or _default_name()
        else:
            connection = self.connection
        return deconvolve(connection, x, self.weight, b, arguments)


def replace_layers(module: _Module, connection: Connection | None = None) -> _Module:
    """Replace all `torch.nn.ConvTranspose2d` of a module by layers of ours with the same parameters.

    Args:
        module: A module. It is changed, unless it is itself such a layer. Classes derived from
            `torch.nn.ConvTranspose2d` stay as they are. A layer has such a class once it has a parametrization, such
            as ``spectral_norm``: add these after the replacement.
        connection: As of `ConvTranspose2d`.

    Returns:
        The module, or the layer that takes its place.
    """
    if not isinstance(module, torch.nn.Module):
        raise InvalidArgumentError(
            f"module must be a torch.nn.Module, got {type(module).__qualname__}", argument="module"
        )
    replaced: _Module = _replace_layers(module, _LayerConnection(connection), {})
    return replaced


def _replace_layers(module: Any, link: _LayerConnection, seen: dict[int, Any]) -> Any:
    """Return what takes the place of a module: the same for all the places that it has."""
    if id(module) not in seen:
        is_layer = type(module) is torch.nn.ConvTranspose2d
        seen[id(module)] = _remote_layer(module, link) if is_layer else module
        for name, child in module._modules.items():
            if child is not None:
                setattr(module, name, _replace_layers(child, link, seen))
    return seen[id(module)]


def _remote_layer(layer: Any, link: _LayerConnection) -> ConvTranspose2d:
    """Return a layer with the same parameters, hooks and attributes."""
    remote = ConvTranspose2d.__new__(ConvTranspose2d)
    # the hooks are the same dictionaries, so that the handles of hooks still remove them
    remote.__dict__.update(layer.__dict__)
    for registry in ("_parameters", "_buffers", "_modules"):
        remote.__dict__[registry] = layer.__dict__[registry].copy()
    remote._link = link
    return remote


def _is_channels_last(tensor: torch.Tensor) -> bool:
    if tensor.is_contiguous() or torch._C._are_functorch_transforms_active():  # vmap cannot tell
        return False
    is_last: bool = tensor.is_contiguous(memory_format=torch.channels_last)
    return is_last


class _LayerConnection:
    """What a layer has of its connection. Copies of the layer share it.

    Attributes:
        connection: The connection; None for that of DECONVD_TARGET.
        name: Its name in compiled graphs; empty for that of DECONVD_TARGET.
    """

    def __init__(self, connection: Connection | None) -> None:
        if connection is not None and not isinstance(connection, Connection):
            raise InvalidArgumentError(
                "connection must be a Connection, as connect() returns it, or None, got "
                f"{type(connection).__qualname__}",
                argument="connection",
            )
        self.connection = connection
        self.name: str = "" if connection is None else name_of(connection)

    def __deepcopy__(self, memo: object) -> _LayerConnection:
        return self

    def __reduce__(self) -> tuple[type[_LayerConnection], tuple[Connection | None]]:
        return _LayerConnection, (self.connection,)


def _default_connection() -> Connection:
    target = os.environ.get("DECONVD_TARGET", "")
    if not target:
        raise InvalidArgumentError(
            "the layer has no connection: give it one, or set DECONVD_TARGET in the environment to the server's "
            "target, as in unix:deconvd.sock",
            argument="connection",
        )
    connection: Connection = shared_connection(target)
    return connection


@torch.compiler.substitute_in_graph(inspect.unwrap(Connection.deconvolution_2d))  # type: ignore[untyped-decorator]  # no torch for checkers
def _traceable_deconvolution_2d(
    self: Connection,
    x: Any,
    W: Any,
    b: Any = None,
    stride: Any = 1,
    pad: Any = 0,
    outsize: Any = None,
    *,
    dilate: Any = 1,
    groups: Any = 1,
) -> Any:
    arguments = _arguments(stride, pad, outsize, dilate, groups)
    return deconvolve(_constant_name(self), x, W, b, arguments)


@torch.compiler.substitute_in_graph(inspect.unwrap(Connection.deconvolution_2d_grad))  # type: ignore[untyped-decorator]  # no torch for checkers
def _traceable_deconvolution_2d_grad(
    self: Connection,
    x: Any,
    W: Any,
    b: Any,
    gy: Any,
    stride: Any = 1,
    pad: Any = 0,
    outsize: Any = None,
    *,
    dilate: Any = 1,
    groups: Any = 1,
    wanted: Any = ("gx", "gW", "gb"),
) -> Any:
    arguments = _arguments(stride, pad, outsize, dilate, groups)
    names = parse_wanted(wanted, has_b=b is not None)
    chosen = ("gx" in names, "gW" in names, "gb" in names)
    return Gradients(*differentiate(_constant_name(self), x, W, gy, arguments, chosen))


def _arguments(stride: Any, pad: Any, outsize: Any, dilate: Any, groups: Any) -> Arguments:
    """Return the arguments of a connection's functions in normal form, by code that torch.compile can follow."""
    pairs = _pair("stride", stride), _pair("pad", pad), _pair("dilate", dilate)
    if outsize is not None:
        outsize = _check_pair("outsize", outsize)
    return Arguments(pairs[0], pairs[1], outsize, pairs[2], groups)


def _pair(name: str, value: Any) -> Any:
    return (value, value) if isinstance(value, int | torch.SymInt) else _check_pair(name, value)


def _check_pair(name: str, value: Any) -> Any:
    if isinstance(value, tuple | list) and len(value) == 2:
        return tuple(value)
    raise InvalidArgumentError(
        f"{name} must be an int or a pair of ints where torch compiles the call, got {value!r}",
        argument=name,
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # no torch for checkers
def _constant_name(connection: Connection) -> str:
    return name_of(connection)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # no torch for checkers
def _default_name() -> str:
    return name_of(_default_connection())
