"""Compiles the .cu files beside it at run time, once for each device and set of macros, and launches their kernels."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cupy
from cupy.cuda import driver, runtime

from deconvd.model.dtypes import BFLOAT16, DType

__all__ = [
    "Argument",
    "Grid",
    "Kernel",
    "Macro",
    "compile_kernels",
    "element",
    "index",
    "integer",
    "pointer",
]

Grid = tuple[int, int, int]
"""Blocks along x, y and z."""

Macro = tuple[str, str]
"""A preprocessor macro: its name and its value."""

Argument = ctypes.c_int | ctypes.c_longlong | ctypes.c_void_p | ctypes.Structure

integer = ctypes.c_int
index = ctypes.c_longlong
pointer = ctypes.c_void_p

_FOLDER = Path(__file__).parent
_HEADERS = ("element.cuh", "geometry.cuh", "tensor_cores.cuh")

_NAMES: dict[str, str] = {
    "float16": "f16",
    BFLOAT16.name: "bf16",
    "float32": "f32",
    "float64": "f64",
}


def element(dtype: DType, macro: str = "ELEMENT") -> Macro:
    """Return the macro that makes `dtype` the element type of a .cu file."""
    return macro, _NAMES[dtype.name]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel, compiled for a device when it is first launched there. May be used from many threads.

    Attributes:
        file: The .cu file that it is in.
        name: Its name there.
        macros: What the file is compiled with: its element types, its tile sizes.
        threads: Threads of a block.
        shared_bytes: Dynamic shared memory of a block.
    """

    file: str
    name: str
    macros: tuple[Macro, ...]
    threads: int = 256
    shared_bytes: int = 0

    def launch(self, grid: Grid, arguments: Iterable[Argument], stream: int) -> None:
        """Enqueue the kernel on a stream of the current device.

        Raises:
            CUDADriverError: The launch was refused, or an earlier one has failed.
        """
        held = list(arguments)  # the driver reads them through their addresses
        addresses = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))
        driver.launchKernel(
            _functions.get(self),
            *grid,
            *(self.threads, 1, 1),
            self.shared_bytes,
            stream,
            ctypes.addressof(addresses),
            0,
        )


def compile_kernels(kernels: Iterable[Kernel]) -> None:
    """Compile kernels for the current device, so that their first launch need not."""
    for kernel in kernels:
        _functions.get(kernel)


class _Functions:
    """The compiled kernels of every device, each compiled once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._modules: dict[tuple[int, str, tuple[Macro, ...]], cupy.RawModule] = {}
        self._pointers: dict[tuple[int, Kernel], int] = {}

    def get(self, kernel: Kernel) -> int:
        """Return the driver's pointer to a kernel of the current device."""
        key = (runtime.getDevice(), kernel)
        pointer = self._pointers.get(key)
        if pointer is None:
            with self._lock:
                pointer = self._pointers[key] = self._load(key[0], kernel)
        return pointer

    def _load(self, device: int, kernel: Kernel) -> int:
        key = (device, kernel.file, kernel.macros)
        if key not in self._modules:
            self._modules[key] = _module(kernel)
        function = self._modules[key].get_function(kernel.name).kernel
        if kernel.shared_bytes:
            driver.funcSetAttribute(
                function.ptr,
                driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                kernel.shared_bytes,
            )
        return int(function.ptr)


_functions = _Functions()


def _module(kernel: Kernel) -> cupy.RawModule:
    macros = tuple(f"-D{name}={value}" for name, value in kernel.macros)
    # CuPy's cache on disk is keyed by the text alone: headers must be part of it.
    return cupy.RawModule(code=_text(kernel.file), options=("-std=c++17", *macros))


@cache
def _text(file: str) -> str:
    return "\n".join((_FOLDER / part).read_text() for part in (*_HEADERS, file))
