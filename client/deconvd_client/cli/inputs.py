"""Reads operands from files of four kinds, recognized by their first bytes. Elements stay in the file until used."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable
from typing import BinaryIO, Final, TypeAlias

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import Array
from deconvd_client.cli.mapped_file import MappedFile
from deconvd_client.cli.npy import NPY_MAGIC, read_npy
from deconvd_client.cli.npz import read_npz
from deconvd_client.cli.png import PNG_MAGIC, read_png
from deconvd_client.cli.safetensors_format import looks_like_safetensors, read_safetensors

__all__ = ["STANDARD_STREAM", "read_array", "split_member"]

STANDARD_STREAM: Final = "-"
"""In place of a file: standard input or output."""

_MEMBER_PATTERN: Final = re.compile(
    r"(?P<path>.+\.(?:npz|safetensors)):(?P<member>[^/]+)", re.DOTALL
)

_HEAD_BYTES: Final = 16
"""How many bytes are read to recognize a format: at least as many as the longest entry below, and WebP's 12."""

_DECODE_HINT: Final = ". Decode it first, for example with Pillow, and write it as PNG"
_OTHER_FORMATS: Final = {
    b"\xff\xd8\xff": f"a JPEG image{_DECODE_HINT}",
    b"GIF8": f"a GIF image{_DECODE_HINT}",
    b"BM": f"a BMP image{_DECODE_HINT}",
    b"II*\x00": f"a TIFF image{_DECODE_HINT}",
    b"MM\x00*": f"a TIFF image{_DECODE_HINT}",
    b"PK\x05\x06": "a zip archive without files. Write the array with numpy.save",
    b"\x1f\x8b": "a gzip file. Unpack it first",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file. Read the array with h5py, and write it with numpy.save",
    b"\x80": "a pickle. Write the array with numpy.save",
    b"%PDF": "a PDF document. Write the array with numpy.save",
}
"""Descriptions of other formats that users may give by mistake, by the first bytes of the file."""

_Reader: TypeAlias = Callable[[MappedFile, str | None], Array]


def split_member(name: str) -> tuple[str, str | None]:
    """Return the path and the member that ``file.npz:member`` names. None for the member if only a path is given."""
    match = _MEMBER_PATTERN.fullmatch(name)
    if match is None or os.path.lexists(name):
        return name, None
    return match["path"], match["member"]


def read_array(name: str) -> Array:
    """Return the array that a file holds. It must not be written to.

    What cannot be mapped into memory, such as a pipe, is copied to a temporary file first.

    Args:
        name: Path of the file, with ``:member`` if it has several arrays, or ``-`` for standard input.

    Raises:
        InvalidArgumentError: It holds no such array.
        OSError: It cannot be read. The message names it.
    """
    path, member = split_member(name)
    try:
        if path == STANDARD_STREAM:
            return _read_file("standard input", sys.stdin.buffer, member)
        with open(path, "rb") as file:
            return _read_file(path, file, member)
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror or error}") from None


def _read_file(path: str, file: BinaryIO, member: str | None) -> Array:
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(file, copy)
            copy.flush()
            return _read_mapped(path, copy, member)
    return _read_mapped(path, file, member)


def _read_mapped(path: str, file: BinaryIO, member: str | None) -> Array:
    if os.fstat(file.fileno()).st_size == 0:
        raise _wrong_format_error(path, "it is empty")
    source = MappedFile.of(path, file)
    head = source.mapping[:_HEAD_BYTES]
    reader = _reader_for(path, head)
    if member is not None and reader not in (read_npz, read_safetensors):
        raise InvalidArgumentError(f"{path} has one array alone, so {path}:{member} names nothing")
    return reader(source, member)


def _reader_for(path: str, head: bytes) -> _Reader:
    """Return the function that reads files with these first bytes."""
    if head.startswith(NPY_MAGIC):
        return read_npy
    if head.startswith(b"PK\x03\x04"):
        return read_npz
    if head.startswith(PNG_MAGIC):
        return read_png
    if looks_like_safetensors(head):
        return read_safetensors
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        raise _wrong_format_error(path, f"it is a WebP image{_DECODE_HINT}")
    for magic, description in _OTHER_FORMATS.items():
        if head.startswith(magic):
            raise _wrong_format_error(path, f"it is {description}")
    raise _wrong_format_error(path, "its format is unknown. Write the array with numpy.save")


def _wrong_format_error(path: str, reason: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{path} is not an .npy, .npz, .safetensors or PNG file: {reason}")
