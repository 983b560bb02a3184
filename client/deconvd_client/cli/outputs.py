"""Writes results to files of four kinds: checked before the call, filled by it, and in place once complete."""

from __future__ import annotations

import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec
from deconvd_client.cli.inputs import STANDARD_STREAM, split_member
from deconvd_client.cli.npy import npy_header
from deconvd_client.cli.npz import write_npz
from deconvd_client.cli.png import check_png_result, write_png
from deconvd_client.cli.safetensors_format import safetensors_header

__all__ = ["FileFormat", "Output"]

_ARGUMENT: Final = "output"


class FileFormat(StrEnum):
    """The format of an output. Its value is the file's extension, too."""

    NPY = "npy"
    NPZ = "npz"
    SAFETENSORS = "safetensors"
    PNG = "png"


_SINGLE_FORMATS: Final = (FileFormat.NPY, FileFormat.PNG)
"""Formats whose files hold one array."""

_LAID_OUT_FORMATS: Final = (FileFormat.NPY, FileFormat.SAFETENSORS)
"""Formats whose files are a header and then the elements: the results arrive there, in the file."""


@dataclass(frozen=True, slots=True)
class Output:
    """Where results go. All its methods raise InvalidArgumentErrors about ``output``.

    Attributes:
        path: A file; None for standard output.
        format: The format to write.
        member: The name for y in the file, if one was given.
    """

    path: Path | None
    format: FileFormat
    member: str | None

    @classmethod
    def parse(cls, name: str, stream_format: FileFormat) -> Output:
        """Return the output that a user names, if it is one that can be written.

        Args:
            name: Path of the file, with ``:member`` if the format has names, or ``-`` for standard output.
            stream_format: The format where no extension tells it: of standard output, pipes and devices.
        """
        text, member = split_member(name)
        if text == STANDARD_STREAM:
            return cls(None, stream_format, None)
        path = Path(text)
        if path.is_dir():
            raise _error(f"{text} is a directory")
        if path.exists() and not path.is_file():  # a pipe or a device
            _check_writable(path)
            return cls(path, stream_format, None)
        suffix = path.suffix.removeprefix(".").lower()
        if suffix not in list(FileFormat):
            allowed = ", ".join(f".{each}" for each in FileFormat)
            raise _error(f"{text} must end in {allowed}, or be - for standard output")
        folder = Path(os.path.realpath(path)).parent
        if not folder.is_dir():
            raise _error(f"there is no directory {folder} for {text}")
        _check_writable(folder)
        return cls(path, FileFormat(suffix), member)

    @property
    def is_stream(self) -> bool:
        """Whether it is written in place: standard output, a pipe or a device."""
        return self.path is None or (self.path.exists() and not self.path.is_file())

    def __str__(self) -> str:
        if self.path is None:
            return "standard output"
        return f"{self.path}" if self.member is None else f"{self.path}:{self.member}"

    def check_inputs(self, names: Iterable[str]) -> None:
        """Check that none of the files that are read is the one that is written."""
        for name in names:
            source = Path(split_member(name)[0])
            if self.is_stream or self.path is None or not self.path.exists():
                return
            if source.exists() and source.samefile(self.path):
                raise _error(f"{self.path} is read as well: write to another file")

    def check_results(self, specs: Mapping[str, TensorSpec], *, are_gradients: bool) -> None:
        """Check that the format can hold the results."""
        if are_gradients and self.format in _SINGLE_FORMATS:
            raise _error(
                f"a .{self.format} file holds one array, and --grad has several: write .npz or .safetensors"
            )
        if are_gradients and self.member is not None:
            raise _error("the gradients are called gx, gW and gb: give the file without a name")
        if self.format is FileFormat.PNG:
            try:
                check_png_result(specs["y"])
            except InvalidArgumentError as error:
                raise _error(str(error)) from None

    @contextmanager
    def write(self, specs: Mapping[str, TensorSpec]) -> Iterator[dict[str, Array]]:
        """Yield memory for the results, by name. After the block the file is complete and in its place.

        If the block raises, there is no new file, and one that was there before stays.

        Raises:
            OSError: It cannot be written, or there is no space. The message names it.
        """
        names = {name: self.member or name if name == "y" else name for name in specs}
        renamed = {names[name]: spec for name, spec in specs.items()}
        with (
            self._report_os_errors(),
            self._open() as file,
            _lay_out(file, self.format, renamed) as memory,
        ):
            yield {name: memory[names[name]] for name in specs}

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        """Yield an empty file. After the block its content is where it belongs."""
        if self.path is None or self.is_stream:
            with tempfile.TemporaryFile() as file:
                yield file
                file.seek(0)
                if self.path is None:
                    shutil.copyfileobj(file, sys.stdout.buffer)
                    sys.stdout.buffer.flush()
                else:
                    with self.path.open("wb") as stream:
                        shutil.copyfileobj(file, stream)
            return
        path = Path(os.path.realpath(self.path))
        # in the same folder, because only a rename inside a file system is atomic
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with part.open("w+b") as file:
                yield file
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    @contextmanager
    def _report_os_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno is None:
                raise  # an error of the call, whose message is its own
            raise OSError(f"cannot write {self}: {error.strerror}") from None


@contextmanager
def _lay_out(
    file: BinaryIO, file_format: FileFormat, specs: Mapping[str, TensorSpec]
) -> Iterator[dict[str, Array]]:
    """Yield memory for arrays. After the block the file has them in a format."""
    if file_format in _LAID_OUT_FORMATS:
        header = (
            safetensors_header(specs)
            if file_format is FileFormat.SAFETENSORS
            else npy_header(*specs.values())
        )
        file.write(header)
        yield _map_arrays(file, len(header), specs)
        return
    with tempfile.TemporaryFile() as scratch:
        memory = _map_arrays(scratch, 0, specs)
        yield memory
        if file_format is FileFormat.PNG:
            write_png(file, *memory.values())
        else:
            write_npz(file, memory)
    file.flush()


def _map_arrays(file: BinaryIO, begin: int, specs: Mapping[str, TensorSpec]) -> dict[str, Array]:
    """Return arrays whose elements are in a file, one after the other."""
    end = begin + sum(spec.nbytes for spec in specs.values())
    file.flush()
    if end:
        os.posix_fallocate(
            file.fileno(), 0, end
        )  # without space, a write to the mapping would kill the process
    mapping = mmap.mmap(file.fileno(), end) if end > begin else b""
    arrays: dict[str, Array] = {}
    for name, spec in specs.items():
        flat = np.frombuffer(mapping, np.uint8, spec.nbytes, begin if spec.nbytes else 0)
        arrays[name] = flat.view(spec.dtype).reshape(spec.shape)
        begin += spec.nbytes
    return arrays


def _check_writable(path: Path) -> None:
    if not os.access(path, os.W_OK):
        raise _error(f"{path} is not writable")


def _error(text: str) -> InvalidArgumentError:
    return InvalidArgumentError(text, argument=_ARGUMENT)
