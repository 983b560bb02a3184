"""The interface to array libraries: turns their arrays into operands, and results into their arrays.

The rest of the client knows two kinds of array: numpy's, and cupy's for the memory of cards. To add a library,
implement `Framework` in a module of its own and `register` it here. A library that differentiates or compiles functions
implements `TracingFramework`. A library's adapter is imported only after a caller has given one of its arrays.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from importlib import import_module
from typing import Any, Final, Protocol, SupportsIndex, cast, runtime_checkable

import numpy as np

from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry, IntOrPair
from deconvd.model.gradients import Gradients
from deconvd.model.options import Options

__all__ = [
    "Framework",
    "Functions",
    "TracingFramework",
    "UnusableArrayError",
    "arrays_like",
    "framework_of",
    "host_array",
    "is_from_framework",
    "register",
    "tracing_framework",
]

_TYPE_CACHE_SIZE: Final = 256
"""For how many types the framework is remembered."""


class Framework(Protocol):
    """A library whose arrays callers can give instead of numpy's."""

    def owns(self, value: object) -> bool:
        """Return whether a value is one of its arrays. The value's type is from this library."""

    def to_array(self, value: Any) -> Any:
        """Return the operand for an array: a numpy array, or a cupy array if the elements are on a card.

        The operand shares memory with `value` if possible, for example through DLPack. If the framework would record
        what is done with `value`, it does not record this.

        Raises:
            UnusableArrayError: The elements of `value` cannot be had.
        """

    def from_array(self, array: Array, value: Any) -> Any:
        """Return a result as one of its arrays, on the device of `value`.

        Args:
            array: A numpy or cupy array. Nobody else refers to it, so its memory can be reused.
            value: An array that `to_array` has accepted.
        """


class UnusableArrayError(Exception):
    """An array of a framework has no elements now. The message goes on after the argument's name: "must not be ..."."""


class Functions(Protocol):
    """The functions of a connection that a framework may call. `deconvd_client.Connection` describes them."""

    def deconvolution_2d(
        self,
        x: Any,
        W: Any,
        b: Any = None,
        stride: IntOrPair = 1,
        pad: IntOrPair = 0,
        outsize: Sequence[SupportsIndex | None] | None = None,
        *,
        dilate: IntOrPair = 1,
        groups: SupportsIndex = 1,
    ) -> Any: ...

    def deconvolution_2d_grad(
        self,
        x: Any,
        W: Any,
        b: Any,
        gy: Any,
        stride: IntOrPair = 1,
        pad: IntOrPair = 0,
        outsize: Sequence[SupportsIndex | None] | None = None,
        *,
        dilate: IntOrPair = 1,
        groups: SupportsIndex = 1,
        wanted: Collection[str] = ...,
    ) -> Gradients: ...

    def vjp(
        self,
        x: Any,
        W: Any,
        b: Any = None,
        stride: IntOrPair = 1,
        pad: IntOrPair = 0,
        outsize: Sequence[SupportsIndex | None] | None = None,
        *,
        dilate: IntOrPair = 1,
        groups: SupportsIndex = 1,
    ) -> tuple[Any, Callable[..., Gradients]]: ...

    def using_defaults(self, options: Mapping[str, object]) -> AbstractContextManager[None]: ...
    @property
    def options(self) -> Options: ...

    def using_config(self, name: str, value: object) -> AbstractContextManager[None]: ...


@runtime_checkable
class TracingFramework(Framework, Protocol):
    """A framework that records what is done with its arrays, to differentiate or to compile it.

    A connection hands a call over if one of its operands is traced. The framework records the call, and makes it by
    the same functions of the connection, with operands that are not traced.
    """

    def is_traced(self, value: Any) -> bool:
        """Return whether a call with this operand must be recorded. `owns` is true for it."""

    def deconvolution_2d(
        self, connection: Functions, x: Any, W: Any, b: Any, geometry: Geometry
    ) -> Any:
        """Return y of a call of which an operand is traced. The other operands can be of any kind; b can be None.

        `Geometry.arguments` has the keyword arguments for the connection's functions.
        """

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
        """Return the gradients of a call of which an operand is traced. `wanted` has names of `Gradients`."""


_openers: Final[dict[str, Callable[[], Framework]]] = {}
"""By the name of a top-level module: the function that opens its framework."""


def register(module: str, open_framework: Callable[[], Framework]) -> None:
    """Add a framework.

    Args:
        module: The top-level module that defines the types of its arrays.
        open_framework: Called at the first array of each such type. It may import the library.
    """
    _openers[module] = open_framework
    _framework_of_type.cache_clear()


def framework_of(value: object) -> Framework | None:
    """Return the framework of an array. None for a numpy array, and for a value of no known framework."""
    kind: object = type(value)
    # the cache needs a hash, which a type with a metaclass of the caller's may lack
    framework = _framework_of_type(kind) if isinstance(kind, Hashable) else None
    return framework if framework is not None and framework.owns(value) else None


def is_from_framework(kind: type) -> bool:
    """Return whether a type is of a framework whose arrays callers can give. It may be no array's type."""
    return isinstance(kind, Hashable) and _framework_of_type(kind) is not None


def tracing_framework(*operands: object) -> TracingFramework | None:
    """Return the framework that must record a call with these operands: that of the first one that is traced."""
    for operand in operands:
        if type(operand) is np.ndarray or operand is None:
            continue  # for most calls this is all
        framework = framework_of(operand)
        if framework is not None and _can_trace(type(framework)):
            tracing = cast("TracingFramework", framework)
            if tracing.is_traced(operand):
                return tracing
    return None


def arrays_like(like: object, arrays: dict[str, Array]) -> dict[str, Array]:
    """Return results as arrays of the same framework and on the same device as `like`."""
    framework = None if type(like) is np.ndarray else framework_of(like)
    if framework is None:
        return arrays
    return {name: framework.from_array(array, like) for name, array in arrays.items()}


def host_array(array: Any) -> Array:
    """Return an operand as a numpy array: itself, or a copy of what is on a card."""
    return array if isinstance(array, np.ndarray) else array.get()


@lru_cache(_TYPE_CACHE_SIZE)
def _framework_of_type(kind: type) -> Framework | None:
    for base in kind.__mro__:  # also for the caller's own subclasses
        module = base.__module__.partition(".")[0]
        # a type can claim any module; only a library that is imported can have made its arrays
        if module in _openers and module in sys.modules:
            return _openers[module]()
    return None


@lru_cache(_TYPE_CACHE_SIZE)  # because issubclass with a protocol takes microseconds
def _can_trace(kind: type[Framework]) -> bool:
    return issubclass(kind, TracingFramework)


def _open_cupy() -> Framework:
    from deconvd_client.frameworks.cupy import CupyFramework

    return CupyFramework()


def _open_chainer() -> Framework:
    # by name, since the adapter imports this module
    adapter: Any = import_module("deconvd_client.frameworks.chainer")
    framework: Framework = adapter.ChainerFramework()
    return framework


register("cupy", _open_cupy)
register("chainer", _open_chainer)


def _open_torch() -> Framework:
    # by name, since the adapter imports this module
    adapter: Any = import_module("deconvd_client.frameworks.torch")
    framework: Framework = adapter.TorchFramework()
    return framework


register("torch", _open_torch)


def _open_jax() -> Framework:
    # by name, since the adapter imports this module
    adapter: Any = import_module("deconvd_client.frameworks.jax")
    framework: Framework = adapter.JaxFramework()
    return framework


register("jax", _open_jax)  # tracers
register("jaxlib", _open_jax)  # arrays
