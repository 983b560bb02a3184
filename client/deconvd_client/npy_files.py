"""Arrays in .npy and .npz files, bfloat16 among them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import BFLOAT16, Array

__all__ = ["load", "save", "save_all"]

_VOID_OF_BFLOAT16 = np.dtype("V2")
"""What the format, which has no name for bfloat16, makes of it."""

_NPY_MAGIC: Final = b"\x93NUMPY"
_MAGIC_BYTES: Final = 16
_DECODE_HINT: Final = (
    ": decode it first, as Pillow does, and write what comes of it with numpy.save"
)
_FORMATS_BY_MAGIC: Final = {
    b"\x89PNG\r\n\x1a\n": f"a PNG image{_DECODE_HINT}",
    b"\xff\xd8\xff": f"a JPEG image{_DECODE_HINT}",
    b"GIF8": f"a GIF image{_DECODE_HINT}",
    b"BM": f"a BMP image{_DECODE_HINT}",
    b"II*\x00": f"a TIFF image{_DECODE_HINT}",
    b"MM\x00*": f"a TIFF image{_DECODE_HINT}",
    b"PK\x03\x04": "a zip archive, as .npz files are: write the array that is meant with numpy.save",
    b"PK\x05\x06": "a zip archive without files",
    b"\x1f\x8b": "a gzip file: unpack it first",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x80": "a pickle: write the array that is meant with numpy.save",
    b"%PDF": "a PDF document",
}
"""What other files begin with that may be given instead."""


def load(path: Path) -> Array:
    """Return the array in an .npy file; two-byte voids are taken for bfloat16.

    Raises:
        InvalidArgumentError: It is no such file, holds no numbers, or is larger than memory.
        OSError: It cannot be read.
    """
    with _open_seekable(path) as file:
        begin = file.read(_MAGIC_BYTES)
        if not begin.startswith(_NPY_MAGIC):
            raise InvalidArgumentError(
                f"{path} is not an .npy file of numbers: {_describe_format(begin)}"
            )
        file.seek(0)
        try:
            array = np.lib.format.read_array(file, allow_pickle=False)
        except OSError:
            raise
        except MemoryError as error:
            raise InvalidArgumentError(f"{path} is too large: {error}") from None
        except Exception as error:  # noqa: BLE001 - whatever a damaged header makes numpy do
            raise InvalidArgumentError(
                f"{path} is not an .npy file of numbers: {_damage_reason(error)}"
            ) from None
    return array.view(BFLOAT16) if array.dtype == _VOID_OF_BFLOAT16 else array


@contextmanager
def _open_seekable(path: Path) -> Iterator[BinaryIO]:
    """Open a file; of one without positions, as a pipe is, read all there is."""
    with path.open("rb") as file:
        yield file if file.seekable() else BytesIO(file.read())


def _describe_format(begin: bytes) -> str:
    """Say what a file is that begins like this."""
    if not begin:
        return "it is empty"
    if begin.startswith(b"RIFF") and begin[8:12] == b"WEBP":
        return f"it is a WebP image{_DECODE_HINT}"
    kinds = (kind for magic, kind in _FORMATS_BY_MAGIC.items() if begin.startswith(magic))
    return f"it is {next(kinds, 'something else')}"


def _damage_reason(error: Exception) -> str:
    """Return what numpy says of a file, less its advice to trust it, which would run what is in it."""
    text = str(error)
    if text.startswith("Object arrays"):
        return "it holds Python objects"
    if "pickle" in text:
        return "its header is too long"
    return text


def save(path: Path, array: Array) -> None:
    """Write an array to an .npy file; a file that is there is replaced only by a whole one.

    A pipe or a device is written to, and stays. So does a link: the file that it leads to is replaced.

    Raises:
        OSError: It cannot be written; the message names it.
    """
    _replace(path, lambda file: np.save(file, array))


def save_all(path: Path, by_name: Mapping[str, Array | None]) -> None:
    """Write those arrays that are not None to an .npz file, in the manner of `save`."""
    present = {name: array for name, array in by_name.items() if array is not None}
    # numpy 1.26 takes every keyword for an array, and later ones have one that is none
    _replace(path, lambda file: np.savez(file, **present))  # type: ignore[arg-type]


def _replace(path: Path, write: Callable[[BinaryIO], None]) -> None:
    try:
        if path.exists() and not path.is_file():
            _write_in_place(path, write)
        else:
            _write_atomically(Path(os.path.realpath(path)), write)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None


def _write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write_in_place(path: Path, write: Callable[[BinaryIO], None]) -> None:
    whole = BytesIO()  # numpy asks a file for positions, which this may not have
    write(whole)
    with path.open("wb") as file:
        file.write(whole.getbuffer())
