"""The format .npz: a zip archive of .npy files."""

from __future__ import annotations

import errno
import mmap
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from typing import BinaryIO, Final

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import Array
from deconvd.model.problem import spec_of
from deconvd.wire.stream_parts import elements_parts
from deconvd_client.cli.mapped_file import MappedFile
from deconvd_client.cli.npy import npy_header, read_npy, read_npy_at

__all__ = ["choose_member", "read_npz", "write_npz"]

_SUFFIX: Final = ".npy"

_LOCAL_HEADER_BYTES: Final = 30
"""Size of the header before a member, without its name and extra field, whose sizes are its last four bytes."""

_DAMAGE_ERRNOS: Final = (None, errno.EINVAL)
"""Those of an OSError for a damaged archive: of a decompressor, and of a seek to a negative position."""

_NUMPY_METHODS: Final = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED: Final = 1
_CHUNK_BYTES: Final = 8 << 20
_MAX_NAMES_SHOWN: Final = 8


def read_npz(source: MappedFile, member: str | None) -> Array:
    """Return one array of an .npz file. One that is compressed is unpacked into a temporary file.

    Raises:
        InvalidArgumentError: There is no such array, or the file is damaged.
    """
    path, file, mapping = source
    try:
        with zipfile.ZipFile(file) as archive:
            infos = {
                info.filename.removesuffix(_SUFFIX): info
                for info in archive.infolist()
                if not info.is_dir()
            }
            name = choose_member(path, member, list(infos))
            info = infos[name]
            if info.flag_bits & _ENCRYPTED:
                raise InvalidArgumentError(f"{path}:{name} is encrypted. Write it with numpy.savez")
            if info.compress_type not in _NUMPY_METHODS:  # a few bytes of LZMA can ask for 4 GiB
                raise InvalidArgumentError(
                    f"{path}:{name} is compressed by another method than numpy's. Write it with "
                    "numpy.savez_compressed"
                )
            if info.compress_type == zipfile.ZIP_STORED:
                begin = _data_begin(mapping, info)
                return read_npy_at(f"{path}:{name}", mapping, begin, begin + info.file_size)
            return _read_compressed(f"{path}:{name}", archive, info)
    except (InvalidArgumentError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in _DAMAGE_ERRNOS:
            raise  # the file itself, or the temporary one
        raise InvalidArgumentError(f"{path} is a damaged .npz file: {error}") from None


def choose_member(path: str, member: str | None, names: list[str]) -> str:
    """Return the name of the array to read: the one asked for, or the only one. Raises InvalidArgumentError."""
    if member in names:
        return member
    if member is None and len(names) == 1:
        return names[0]
    listed = ", ".join(sorted(names)[:_MAX_NAMES_SHOWN]) or "none"
    more = ", ..." if len(names) > _MAX_NAMES_SHOWN else ""
    if member is None:
        raise InvalidArgumentError(
            f"{path} has {len(names)} arrays. Name one of them, as in {path}:NAME: {listed}{more}"
        )
    raise InvalidArgumentError(f"{path} has no array {member!r}, only these: {listed}{more}")


def write_npz(file: BinaryIO, arrays: Mapping[str, Array]) -> None:
    """Write an .npz file. It is not compressed."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}{_SUFFIX}", "w", force_zip64=True) as member:
                member.write(npy_header(spec_of(array)))
                for part in elements_parts(array):
                    for piece in part.pieces(_CHUNK_BYTES):
                        member.write(piece.data)


def _data_begin(mapping: mmap.mmap, info: zipfile.ZipInfo) -> int:
    """Return where the elements of a member begin, after a header whose size is known only there."""
    end = info.header_offset + _LOCAL_HEADER_BYTES
    name_and_extra = mapping[end - 4 : end]
    if (
        len(name_and_extra) != 4
        or mapping[info.header_offset : info.header_offset + 4] != b"PK\x03\x04"
    ):
        raise zipfile.BadZipFile("a member has no header")
    return end + sum(int.from_bytes(name_and_extra[i : i + 2], "little") for i in (0, 2))


def _read_compressed(path: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    if not info.file_size:
        raise InvalidArgumentError(f"{path} is not an .npy file of numbers: it is empty")
    with archive.open(info) as member, tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(member, copy, _CHUNK_BYTES)
        copy.flush()
        return read_npy(MappedFile.of(path, copy))
