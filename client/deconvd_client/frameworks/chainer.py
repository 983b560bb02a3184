"""The adapter for Chainer: Variables in and out, differentiable to any order. It is imported only after Chainer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import chainer
import numpy as np

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd.model.gradients import Gradients
from deconvd_client.frameworks.double_backward import DOUBLE_GRADIENT_NAMES, double_backward
from deconvd_client.frameworks.framework import Functions, UnusableArrayError

__all__ = ["ChainerArgumentError", "ChainerFramework", "raise_as_chainer"]


if TYPE_CHECKING:

    class InvalidType(Exception):
        """Chainer's own, for type checkers: Chainer has no types."""

        expect: str
        actual: str

        def __init__(self, expect: str, actual: str, msg: str) -> None: ...

else:
    from chainer.utils.type_check import InvalidType


class ChainerArgumentError(InvalidArgumentError, InvalidType):
    """An argument is invalid. Chainer's own exception for that is one of its base classes.

    Attributes:
        expect, actual: What the argument must be, and what was given, as in Chainer's InvalidType. Both are text.
            `actual` is empty if the message does not tell the two apart.
    """

    def __init__(self, message: str, *, argument: str = "") -> None:
        expect, *actual = re.split("[,:] got ", message, maxsplit=1)
        InvalidType.__init__(self, expect, "".join(actual), message)
        self.argument = argument

    def __reduce__(self) -> tuple[Any, ...]:
        # Chainer's own makes an InvalidType alone
        return type(self), self.args, self.__dict__


@contextmanager
def raise_as_chainer() -> Iterator[None]:
    """Raise ChainerArgumentError in place of the block's InvalidArgumentError."""
    try:
        yield
    except ChainerArgumentError:
        raise
    except InvalidArgumentError as error:
        raise ChainerArgumentError(str(error), argument=error.argument) from error


class ChainerFramework:
    """Takes Variables and Parameters. See `TracingFramework`.

    A call of them is a FunctionNode. Its backward is a call of the same kind, so gradients of any order are calls to
    the server. Arrays that are not numpy's (iDeep's, and those on a card, of Chainer's own CuPy) go through the host.
    Chainer itself does the same for ChainerX's.
    """

    def owns(self, value: object) -> bool:
        return isinstance(value, chainer.Variable)

    def to_array(self, value: Any) -> Array:
        if value.array is None:
            raise UnusableArrayError("must not be a Parameter without elements: initialize it")
        return _host_array(value.array)

    def from_array(self, array: Array, value: Any) -> Any:
        return chainer.Variable(_move_to(value.array, array))

    def is_traced(self, value: object) -> bool:
        return self.owns(value)

    def deconvolution_2d(
        self, connection: Functions, x: Any, W: Any, b: Any, geometry: Geometry
    ) -> Any:
        inputs = {"x": x, "W": W} | ({} if b is None else {"b": b})
        return _apply(_Deconvolution2D(connection, geometry), inputs)[0]

    def deconvolution_2d_grad(
        self,
        connection: Functions,
        x: Any,
        W: Any,
        b: Any,
        gy: Any,
        geometry: Geometry,
        wanted: tuple[str, ...],
    ) -> Gradients:
        if b is not None:
            _check_operand("b", b)
            b = _host_array(chainer.as_array(b))
        return _differentiate(_Deconvolution2DGrad(connection, geometry, b, wanted), x, W, gy)


class _Deconvolution2D(chainer.FunctionNode):
    """Computes y of x, W and perhaps b."""

    def __init__(self, connection: Functions, geometry: Geometry) -> None:
        super().__init__()
        self._connection = connection
        self._geometry = geometry

    @property
    def label(self) -> str:
        return "deconvolution_2d of deconvd"

    def forward(self, inputs: tuple[Any, ...]) -> tuple[Any]:
        self.retain_inputs((0, 1))
        x, W, *rest = map(_host_array, inputs)
        b = rest[0] if rest else None
        with _read_config(self._connection):
            y = self._connection.deconvolution_2d(x, W, b, **self._geometry.arguments)
        return (_move_to(inputs[0], y),)

    def backward(self, indexes: tuple[int, ...], grad_outputs: tuple[Any]) -> tuple[Any, ...]:
        x, W = self.get_retained_inputs()
        (gy,) = grad_outputs
        wanted = tuple(Gradients._fields[index] for index in indexes)
        b = np.broadcast_to(np.zeros((), x.dtype), gy.shape[1:2]) if 2 in indexes else None
        node = _Deconvolution2DGrad(self._connection, self._geometry, b, wanted)
        gradients = _differentiate(node, x, W, gy)
        return tuple(gradients[index] for index in indexes)


class _Deconvolution2DGrad(chainer.FunctionNode):
    """Computes those of gx, gW and gb that are wanted, of x, W and gy.

    Args:
        b: None if there is none. Only its shape and its element type matter, so nothing is differentiated by it.
        wanted: Names of gradients, in the order of `Gradients`.
    """

    def __init__(
        self, connection: Functions, geometry: Geometry, b: Array | None, wanted: tuple[str, ...]
    ) -> None:
        super().__init__()
        self._connection = connection
        self._geometry = geometry
        self._b = b
        self.wanted = wanted

    @property
    def label(self) -> str:
        return "deconvolution_2d_grad of deconvd"

    def forward(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        self.retain_inputs((0, 1, 2))
        x, W, gy = map(_host_array, inputs)
        with _read_config(self._connection):
            gradients = self._connection.deconvolution_2d_grad(
                x, W, self._b, gy, **self._geometry.arguments, wanted=self.wanted
            )
        return tuple(_move_to(inputs[0], getattr(gradients, name)) for name in self.wanted)

    def backward(
        self, indexes: tuple[int, ...], grad_outputs: tuple[Any, ...]
    ) -> tuple[Any | None, ...]:
        x, W, gy = self.get_retained_inputs()
        given = dict(zip(self.wanted, grad_outputs, strict=True))
        ggx, ggW, ggb = (given.get(name) for name in Gradients._fields)
        wanted = [DOUBLE_GRADIENT_NAMES[index] for index in indexes]
        # of Variables, so these calls are nodes like this one
        gradients = double_backward(
            self._connection, x, W, gy, ggx, ggW, ggb, self._geometry, wanted
        )
        return tuple(gradients[index] for index in indexes)


def _apply(node: Any, inputs: dict[str, Any]) -> tuple[Any, ...]:
    """Return a node's outputs, as Variables."""
    with raise_as_chainer():
        for name, value in inputs.items():
            _check_operand(name, value)
        outputs: tuple[Any, ...] = node.apply(tuple(inputs.values()))
        return outputs


def _differentiate(node: _Deconvolution2DGrad, x: Any, W: Any, gy: Any) -> Gradients:
    gradients = dict.fromkeys(Gradients._fields)
    outputs = _apply(node, {"x": x, "W": W, "gy": gy})
    return Gradients(**gradients | dict(zip(node.wanted, outputs, strict=True)))


def _check_operand(name: str, value: object) -> None:
    """Raise a ChainerArgumentError if an operand is nothing that Chainer's functions take."""
    if isinstance(value, chainer.Variable):
        kind = "a Parameter without elements: initialize it" if value.array is None else ""
    elif isinstance(value, chainer.get_array_types()):
        kind = ""
    else:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if kind:
        raise ChainerArgumentError(
            f"{name} must be a Variable or an array that Chainer takes, as another operand is a Variable, got {kind}",
            argument=name,
        )


def _host_array(array: Any) -> Array:
    host: Array = (
        array if isinstance(array, np.ndarray) else chainer.backend.CpuDevice().send(array)
    )
    return host


def _move_to(like: Any, array: Array) -> Any:
    """Return a result on the device of an array."""
    if isinstance(like, np.ndarray):
        return array
    return chainer.backend.get_device_from_array(like).send(array)


def _read_config(connection: Functions) -> AbstractContextManager[None]:
    """Return a with-block in which Chainer's configuration decides what no `using_config` of the connection has set."""
    config = chainer.config
    return connection.using_defaults(
        {
            "cudnn_deterministic": bool(config.cudnn_deterministic),
            "autotune": bool(config.autotune),
            "use_cudnn": config.use_cudnn,
            "use_cudnn_tensor_core": config.use_cudnn_tensor_core,
        }
    )
