"""The format .npy: a header in Python's notation, then the elements."""

from __future__ import annotations

import io
import math
import mmap
from typing import BinaryIO, Final

import numpy as np

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import BFLOAT16, Array
from deconvd.model.problem import TensorSpec
from deconvd_client.cli.mapped_file import MappedFile

__all__ = ["NPY_MAGIC", "map_elements", "npy_header", "read_npy", "read_npy_at"]

NPY_MAGIC: Final = b"\x93NUMPY"

_VOID_OF_BFLOAT16: Final = np.dtype("V2")
"""The element type of bfloat16 arrays in files: the format has no name for bfloat16 itself."""


def read_npy(source: MappedFile, _member: str | None = None) -> Array:
    """Return the array in an .npy file. Its element type ``V2`` becomes bfloat16.

    Raises:
        InvalidArgumentError: It is damaged, or has no numbers.
    """
    return read_npy_at(source.path, source.mapping, 0, len(source.mapping))


def read_npy_at(path: str, mapping: mmap.mmap, begin: int, end: int) -> Array:
    """Return the array of the .npy file that is between two bytes of a file. Raises as `read_npy` does."""
    # a header of more than 10000 bytes is refused, so the elements are not copied
    header = io.BytesIO(mapping[begin : min(end, begin + (1 << 16))])
    try:
        shape, is_fortran, dtype = _read_header(header)
        if dtype.hasobject:
            raise ValueError(
                "it has Python objects. Convert the array to float32 before you save it"
            )
        dtype = BFLOAT16 if dtype == _VOID_OF_BFLOAT16 else dtype
        array = map_elements(
            mapping, begin + header.tell(), end, TensorSpec(shape, dtype), is_fortran
        )
    except Exception as error:  # noqa: BLE001 - numpy raises many types for a damaged header
        raise InvalidArgumentError(
            f"{path} is not an .npy file of numbers: {_damage_reason(error)}"
        ) from None
    return array


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"version {version} of the format is for structures, not for numbers")


def map_elements(
    mapping: mmap.mmap, begin: int, end: int, spec: TensorSpec, is_fortran: bool = False
) -> Array:
    """Return an array of the elements that begin at a byte of a file. Raises ValueError if they end after `end`."""
    size_bytes = math.prod(spec.shape) * spec.dtype.itemsize
    if size_bytes < 0 or begin + size_bytes > end:
        raise ValueError(
            f"its header promises {size_bytes} bytes of elements, and {max(end - begin, 0)} follow"
        )
    if not size_bytes:
        return np.empty(spec.shape, spec.dtype)
    flat = np.frombuffer(mapping, np.uint8, size_bytes, begin).view(spec.dtype)
    return flat.reshape(spec.shape, order="F" if is_fortran else "C")


def _damage_reason(error: Exception) -> str:
    """Return numpy's error without its advice to allow pickles: they could run any code."""
    text = str(error)
    if "allow_pickle" in text or "max_header_size" in text:
        return "its header is too long"
    return text


def npy_header(spec: TensorSpec) -> bytes:
    """Return what comes before the elements of an array in an .npy file."""
    file = io.BytesIO()
    fields = {
        "descr": np.lib.format.dtype_to_descr(spec.dtype),
        "fortran_order": False,
        "shape": spec.shape,
    }
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue()
