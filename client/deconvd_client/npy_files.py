"""Reads and writes arrays in .npy and .npz files, including arrays of bfloat16."""

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
"""The element type of bfloat16 arrays in files: the format has no name for bfloat16 itself."""

_NPY_MAGIC: Final = b"\x93NUMPY"

_MAGIC_BYTES: Final = 16
"""How many bytes are read to recognize a format: at least as many as the longest entry below, and WebP's 12."""

_DECODE_HINT: Final = (
    ". Decode it first, for example with Pillow, and write the array with numpy.save"
)
_FORMATS_BY_MAGIC: Final = {
    b"\x89PNG\r\n\x1a\n": f"a PNG image{_DECODE_HINT}",
    b"\xff\xd8\xff": f"a JPEG image{_DECODE_HINT}",
    b"GIF8": f"a GIF image{_DECODE_HINT}",
    b"BM": f"a BMP image{_DECODE_HINT}",
    b"II*\x00": f"a TIFF image{_DECODE_HINT}",
    b"MM\x00*": f"a TIFF image{_DECODE_HINT}",
    b"PK\x03\x04": "a zip archive, as .npz files are. Write a single array with numpy.save",
    b"PK\x05\x06": "a zip archive without files. Write the array with numpy.save",
    b"\x1f\x8b": "a gzip file. Unpack it first",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file. Read the array with h5py, and write it with numpy.save",
    b"\x80": "a pickle. Write the array with numpy.save",
    b"%PDF": "a PDF document. Write the array with numpy.save",
}
"""Descriptions of other formats that users may give by mistake, by the first bytes of the file."""


def load(path: Path) -> Array:
    """Return the array in an .npy file. Its element type ``V2`` becomes bfloat16.

    Raises:
        InvalidArgumentError: It is not an .npy file, has no numbers, or does not fit into memory.
        OSError: It cannot be read.
    """
    with _open_seekable(path) as file:
        first_bytes = file.read(_MAGIC_BYTES)
        if not first_bytes.startswith(_NPY_MAGIC):
            raise InvalidArgumentError(
                f"{path} is not an .npy file of numbers: {_describe_format(first_bytes)}"
            )
        file.seek(0)
        try:
            array = np.lib.format.read_array(file, allow_pickle=False)
        except OSError:
            raise
        except MemoryError as error:
            raise InvalidArgumentError(
                f"{path} is too large for this machine's memory: {error}"
            ) from None
        except Exception as error:  # noqa: BLE001 - numpy raises many types for a damaged header
            raise InvalidArgumentError(
                f"{path} is not an .npy file of numbers: {_damage_reason(error)}"
            ) from None
    return array.view(BFLOAT16) if array.dtype == _VOID_OF_BFLOAT16 else array


@contextmanager
def _open_seekable(path: Path) -> Iterator[BinaryIO]:
    """Open a file that can seek. A file that cannot, such as a pipe, is read into memory as a whole."""
    with path.open("rb") as file:
        yield file if file.seekable() else BytesIO(file.read())


def _describe_format(first_bytes: bytes) -> str:
    """Say what kind of file begins with these bytes, and what to do with it."""
    if not first_bytes:
        return "it is empty"
    if first_bytes.startswith(b"RIFF") and first_bytes[8:12] == b"WEBP":
        return f"it is a WebP image{_DECODE_HINT}"
    for magic, description in _FORMATS_BY_MAGIC.items():
        if first_bytes.startswith(magic):
            return f"it is {description}"
    return "its format is unknown. Write the array with numpy.save"


def _damage_reason(error: Exception) -> str:
    """Return numpy's error without its advice to allow pickles: they could run any code."""
    text = str(error)
    if text.startswith("Object arrays"):
        return "it has Python objects. Convert the array to float32 before you save it"
    if "pickle" in text:
        return "its header is too long"
    return text


def save(path: Path, array: Array) -> None:
    """Write an array to an .npy file. An existing file is replaced only once the new one is complete.

    A pipe or a device is written to. For a symbolic link, the file that it points to is replaced.

    Raises:
        OSError: It cannot be written. The message names it.
    """
    _replace(path, lambda file: np.save(file, array))


def save_all(path: Path, by_name: Mapping[str, Array | None]) -> None:
    """Write the arrays that are not None to an .npz file, as `save` writes an .npy file."""
    present = {name: array for name, array in by_name.items() if array is not None}
    # the type checker objects to numpy's keyword `allow_pickle`, which `present` never has
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
    # in the same folder, because only a rename inside a file system is atomic
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write_in_place(path: Path, write: Callable[[BinaryIO], None]) -> None:
    buffer = BytesIO()  # numpy calls `tell`, which pipes do not have
    write(buffer)
    with path.open("wb") as file:
        file.write(buffer.getbuffer())
