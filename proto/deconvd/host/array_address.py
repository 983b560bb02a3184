"""Where arrays lie: of numpy itself it takes longer to learn than to make an array."""

from __future__ import annotations

from ctypes import addressof, c_char
from typing import Any

import numpy as np

from deconvd.model.dtypes import Array

__all__ = ["AddressedArray", "address_of"]


class AddressedArray(np.ndarray[Any, np.dtype[Any]]):
    """An array that is told where it lies.

    Attributes:
        address: Where; None if it is not told, as for views of such an array.
    """

    address: int | None = None


def address_of(array: Array) -> int:
    """Return where the memory of an array's first element begins."""
    if isinstance(array, AddressedArray) and array.address is not None:
        return array.address
    flags = array.flags
    # what Python's buffers know: neither bfloat16 nor, as ctypes has it, what is not to be written
    if array.nbytes and array.dtype.kind == "f" and flags.writeable and flags.c_contiguous:
        return addressof(c_char.from_buffer(array))  # type: ignore[arg-type]  # numpy's stubs lack __buffer__
    address: int = array.__array_interface__["data"][0]
    return address
