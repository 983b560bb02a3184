"""The interface to array libraries: turns their arrays into operands, and results into their arrays.

The rest of the client knows two kinds of array: numpy's, and cupy's for the memory of cards. To add a library,
implement `Framework` in a module of its own and `register` it here. A library's adapter is imported only after a
caller has given one of its arrays.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, Final, Protocol

import numpy as np

from deconvd.model.dtypes import Array

__all__ = ["Framework", "arrays_like", "framework_of", "host_array", "register"]

_TYPE_CACHE_SIZE: Final = 256
"""For how many types the framework is remembered."""


class Framework(Protocol):
    """A library whose arrays callers can give instead of numpy's."""

    def owns(self, value: object) -> bool:
        """Return whether a value is one of its arrays. The value's type is from this library."""

    def to_array(self, value: Any) -> Any:
        """Return the operand for an array: a numpy array, or a cupy array if the elements are on a card.

        The operand shares memory with `value` if possible, for example through DLPack.
        """

    def from_array(self, array: Array, value: Any) -> Any:
        """Return a result as one of its arrays, on the device of `value`.

        Args:
            array: A numpy or cupy array. Nobody else refers to it, so its memory can be reused.
            value: An array that `to_array` has accepted.
        """


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


def _open_cupy() -> Framework:
    from deconvd_client.frameworks.cupy import CupyFramework

    return CupyFramework()


register("cupy", _open_cupy)
