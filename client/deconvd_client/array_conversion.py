"""Makes numpy arrays of operands that are no arrays of numpy or of a framework, and refuses what is better refused."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import Array, element_type
from deconvd_client.frameworks.framework import is_from_framework

__all__ = ["to_numpy"]

_MAX_NESTING: Final = 64
"""How deeply lists are looked through: numpy's arrays have at most 64 dimensions."""

_REMEDIES: Final = {
    "PIL": (
        "a PIL image",
        "convert it with numpy.asarray({name}, numpy.float32), which has the axes (h, w) or (h, w, c), "
        "and move them to (n, c, h, w)",
    ),
    "chainerx": ("a ChainerX array", "convert it with chainerx.to_numpy({name})"),
    "ideep4py": ("an iDeep array", "convert it with numpy.array({name})"),
}
"""By top-level module: what its values are called, and what to give instead."""


def to_numpy(name: str, value: Any) -> Array:
    """Return the elements of a list, a tuple, a number or an object with ``__array__`` as a numpy array.

    What an object's own ``__array__`` raises comes out as it is, with a note that names the argument.

    Args:
        name: Name of the argument, for errors.

    Raises:
        InvalidArgumentError: It is of another kind, is masked, is ragged, or has elements of no type that operands
            can have.
    """
    _check_kind(name, value)
    try:
        # asarray would make a plain array of a masked one, without its mask
        array: Array = np.asanyarray(value)
    except Exception as error:
        if isinstance(error, ValueError) and isinstance(value, (list, tuple)):
            text = f"{name} must be an array, or nested lists of one shape: {error}"
            raise InvalidArgumentError(text, argument=name) from error
        error.add_note(f"This happened while numpy made an array of the argument {name}.")
        raise
    if isinstance(array, np.ma.MaskedArray):
        raise _mask_error(name)
    _check_elements(name, value, array)
    return array


def _check_kind(name: str, value: Any) -> None:
    """Raise InvalidArgumentError if a value is of a kind that numpy should not make an array of."""
    if isinstance(value, np.ma.MaskedArray):
        raise _mask_error(name)
    if isinstance(value, (list, tuple)):
        _check_members(name, value)
        return
    described, remedy = _describe(name, type(value))
    is_number = isinstance(value, (bool, int, float, complex))
    # the __array__ of a class is that of its instances
    is_array = hasattr(value, "__array__") and not isinstance(value, type)
    if remedy or not (is_number or is_array):
        raise InvalidArgumentError(
            f"{name} must be an array of numpy, cupy, PyTorch, JAX or Chainer, an object with __array__, nested "
            f"lists of numbers, or a RemoteTensor, got {described}{remedy}",
            argument=name,
        )


def _check_members(name: str, values: list[Any] | tuple[Any, ...]) -> None:
    """Raise InvalidArgumentError if lists have arrays in them that would lose what numpy has no word for."""
    for kind in _member_types(values, _MAX_NESTING):
        described, remedy = _describe(name, kind)
        if issubclass(kind, np.ma.MaskedArray):
            raise _mask_error(name)
        if remedy or is_from_framework(kind):
            raise InvalidArgumentError(
                f"{name} must be one array, got a list with {described} in it: stack what it has to one array",
                argument=name,
            )


def _member_types(values: list[Any] | tuple[Any, ...], nesting: int) -> set[type]:
    """Return the types of what is in nested lists and is no list itself."""
    kinds = set(map(type, values))
    nested = {kind for kind in kinds if issubclass(kind, (list, tuple))}
    if nested and nesting:
        for member in values:
            if type(member) in nested:
                kinds |= _member_types(member, nesting - 1)
    return kinds - nested


def _describe(name: str, kind: type) -> tuple[str, str]:
    """Return what values of a type are called, and what to give instead of one; empty if that is not known."""
    for base in kind.__mro__:
        module = base.__module__.partition(".")[0]
        if module in _REMEDIES:
            what, remedy = _REMEDIES[module]
            return f"{what} ({kind.__qualname__})", ": " + remedy.format(name=name)
    prefix = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{prefix}{kind.__qualname__}", ""


def _mask_error(name: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{name} must not be a masked array, as its mask would be lost: give {name}.filled(value), "
        f"or {name}.data for what is below the mask",
        argument=name,
    )


def _check_elements(name: str, value: Any, array: Array) -> None:
    """Raise InvalidArgumentError if an array has elements that operands cannot have."""
    try:
        element_type(name, array.dtype)
    except InvalidArgumentError as error:
        # what else there is loses something if it is made a float: complex numbers, times, text and objects
        is_exact = array.dtype.kind in "biu"
        remedy = f": convert it with numpy.asarray({name}, numpy.float32)" if is_exact else ""
        given = _describe(name, type(value))[0]
        text = f"{error} in {given}{remedy}"
        raise InvalidArgumentError(text, argument=name) from None
