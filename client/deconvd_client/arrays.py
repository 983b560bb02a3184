"""Arrays in .npy and .npz files, bfloat16 among them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from deconvd.dtypes import BFLOAT16
from deconvd.errors import InvalidArgumentError
from deconvd.tensor import Array

__all__ = ["load", "save", "save_all"]

_VOID_OF_BFLOAT16 = np.dtype("V2")
"""What the format, which has no name for bfloat16, makes of it."""


def load(path: Path) -> Array:
    """Return the array in an .npy file; two-byte voids are taken for bfloat16.

    Raises:
        InvalidArgumentError: It is no such file, or holds objects.
        OSError: It cannot be read.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InvalidArgumentError(f"{path} is not an .npy file of numbers: {error}") from None
    if not isinstance(array, np.ndarray):
        raise InvalidArgumentError(f"{path} holds several arrays, and must be an .npy file of one")
    return array.view(BFLOAT16) if array.dtype == _VOID_OF_BFLOAT16 else array


def save(path: Path, array: Array) -> None:
    """Write an array to an .npy file; a file that is there is replaced only by a whole one."""
    _replace(path, lambda file: np.save(file, array))


def save_all(path: Path, by_name: Mapping[str, Array | None]) -> None:
    """Write those arrays that are not None to an .npz file, in the manner of `save`."""
    present = {name: array for name, array in by_name.items() if array is not None}
    # numpy 1.26 takes every keyword for an array, and later ones have one that is none
    _replace(path, lambda file: np.savez(file, **present))  # type: ignore[arg-type]


def _replace(path: Path, write: Callable[[BinaryIO], None]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
