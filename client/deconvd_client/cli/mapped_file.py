"""A file, mapped into memory: its pages are read when they are used, and are not memory of the process."""

from __future__ import annotations

import mmap
from typing import BinaryIO, NamedTuple

__all__ = ["MappedFile"]


class MappedFile(NamedTuple):
    """A file that is not empty.

    Attributes:
        path: What errors call it.
        file: Open for reading.
        mapping: All of its bytes. It must not be written to.
    """

    path: str
    file: BinaryIO
    mapping: mmap.mmap

    @classmethod
    def of(cls, path: str, file: BinaryIO) -> MappedFile:
        """Map a file."""
        return cls(path, file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
