"""Frameworks stand at the edge: what callers hand over becomes what calls take, and results become what callers have.

Calls know numpy arrays, and arrays of cupy's for memory of cards. A framework is touched, and what is known of it is
imported, only once a caller has handed over one of its arrays.
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
"""Of how many types it is remembered what framework they are of."""


class Framework(Protocol):
    """A library whose arrays callers hand over in place of numpy's."""

    def owns(self, value: object) -> bool:
        """Return whether a value, of a type of this library's, is one of its arrays."""

    def to_array(self, value: Any) -> Any:
        """Return what calls take: a numpy array, or one of cupy's where the elements are on a card.

        It shares memory with `value` where that can be, as by DLPack.
        """

    def from_array(self, array: Array, value: Any) -> Any:
        """Return a result as one of this library's arrays, on the device that `value` is on.

        Args:
            array: One of numpy's or cupy's, which nobody else has.
            value: An array that `to_array` has taken.
        """


_openers: Final[dict[str, Callable[[], Framework]]] = {}


def register(module: str, open_framework: Callable[[], Framework]) -> None:
    """Make a framework known.

    Args:
        module: The top-level module that its arrays' types are from.
        open_framework: Called, perhaps more than once, when such an array comes: may import the framework.
    """
    _openers[module] = open_framework
    _framework_of_type.cache_clear()


def framework_of(value: object) -> Framework | None:
    """Return the framework whose array a value is; None if it is numpy's, or no array that is known here."""
    kind: object = type(value)
    # a metaclass of the caller's may leave a type without a hash
    framework = _framework_of_type(kind) if isinstance(kind, Hashable) else None
    return framework if framework is not None and framework.owns(value) else None


def arrays_like(like: object, arrays: dict[str, Array]) -> dict[str, Array]:
    """Return results as arrays of the kind of `like`, on its device."""
    framework = None if type(like) is np.ndarray else framework_of(like)
    if framework is None:
        return arrays
    return {name: framework.from_array(array, like) for name, array in arrays.items()}


def host_array(array: Any) -> Array:
    """Return an array that calls take as one of numpy's: itself, or a copy of what is on a card."""
    return array if isinstance(array, np.ndarray) else array.get()


@lru_cache(_TYPE_CACHE_SIZE)
def _framework_of_type(kind: type) -> Framework | None:
    for base in kind.__mro__:  # callers may have derived it
        module = base.__module__.partition(".")[0]
        if module in _openers and module in sys.modules:
            return _openers[module]()
    return None


def _open_cupy() -> Framework:
    from deconvd_client.frameworks.cupy import CupyFramework

    return CupyFramework()


register("cupy", _open_cupy)
