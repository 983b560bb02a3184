"""Loads the .cu files of this folder, once for each device and set of macros, and launches kernels.

Their machine code came with deconvd, or is compiled at run time: see cubins.py.

Structures and constants that a .cu file shares with Python are written in Python alone. Structures become declarations
before the file's text, see structs.py; constants become macros. CuPy is imported when a kernel is first loaded or
launched: plans are made without it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from deconvd.model.dtypes import BFLOAT16, DType
from deconvd_server.device.cuda.kernels.archive import digest_of
from deconvd_server.device.cuda.kernels.cubin_cache import CubinCache
from deconvd_server.device.cuda.kernels.cubins import Cubins
from deconvd_server.device.cuda.kernels.structs import STRUCTS, declaration

__all__ = [
    "THREADS",
    "Argument",
    "Grid",
    "Kernel",
    "Macro",
    "compile_kernels",
    "constants",
    "cuda",
    "element",
    "index",
    "integer",
    "is_shipped",
    "keep_compiled",
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

THREADS = 256
"""Threads of a block, if a kernel does not set another number."""

_FOLDER = Path(__file__).parent
_HEADERS = ("element.cuh", "geometry.cuh", "tensor_cores.cuh")

_NAMES: dict[str, str] = {
    "float16": "f16",
    BFLOAT16.name: "bf16",
    "float32": "f32",
    "float64": "f64",
}


@cache  # the name of a dtype takes NumPy some microseconds, and plans ask for it in each step
def element(dtype: DType, macro: str = "ELEMENT") -> Macro:
    """Return the macro that makes `dtype` the element type of a .cu file."""
    return macro, _NAMES[dtype.name]


def constants(**values: int) -> tuple[Macro, ...]:
    """Return the macros that define constants of a .cu file, by their names there."""
    return tuple((name, str(int(value))) for name, value in values.items())


class Cuda(NamedTuple):
    """The modules of CuPy that enqueue work."""

    driver: Any
    runtime: Any


@cache
def cuda() -> Cuda:
    """Return CuPy's modules, which are imported when work is first enqueued."""
    from cupy.cuda import driver, runtime

    return Cuda(driver, runtime)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel. It is loaded for a device when it is first launched there. Thread-safe.

    Attributes:
        file: The .cu file that has the kernel.
        name: The kernel's name in the file.
        macros: The macros with which the file is compiled, such as element types and tile sizes, without THREADS.
        threads: Threads of a block. The file has the number as the macro THREADS.
        shared_bytes: Dynamic shared memory of a block.
    """

    file: str
    name: str
    macros: tuple[Macro, ...]
    threads: int = THREADS
    shared_bytes: int = 0

    @property
    def options(self) -> tuple[str, ...]:
        """The compiler's options for the file."""
        macros = (*self.macros, *constants(THREADS=self.threads))
        return ("-std=c++17", "-ftz=true", *(f"-D{name}={value}" for name, value in macros))

    @property
    def source(self) -> str:
        """The text to compile: declarations of structures, headers, and the file."""
        return _source(self.file)

    @property
    def digest(self) -> str:
        """The digest of all that its machine code depends on, other than the card and the compiler."""
        return digest_of(self.source, self.options)

    def launch(self, grid: Grid, arguments: Iterable[Argument], stream: int) -> None:
        """Enqueue the kernel on a stream of the current device.

        Raises:
            CUDADriverError: The launch was refused, or an earlier one has failed.
        """
        held = list(arguments)  # kept alive: the driver reads them through their addresses
        addresses = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))
        cuda().driver.launchKernel(
            _functions.get(self),
            *grid,
            *(self.threads, 1, 1),
            self.shared_bytes,
            stream,
            ctypes.addressof(addresses),
            0,
        )


def keep_compiled(folder: Path) -> None:
    """Keep what is compiled from now on in a folder, for later processes too."""
    _cubins.cache = CubinCache(folder)


def compile_kernels(kernels: Iterable[Kernel]) -> None:
    """Load kernels for the current device now, not at their first launch. Raises CompileError."""
    for kernel in kernels:
        _functions.get(kernel)


@lru_cache(1024)
def is_shipped(kernel: Kernel, capability: int) -> bool:
    """Return whether a kernel's machine code for cards of a capability came with deconvd."""
    return _cubins.is_shipped(kernel.source, kernel.options, capability)


class _LoadedKernels:
    """The kernels of all devices. Each module is loaded once. Thread-safe."""

    def __init__(self, cubins: Cubins) -> None:
        self._cubins = cubins
        self._lock = threading.Lock()
        self._modules: dict[tuple[int, str, tuple[str, ...]], _Module] = {}
        self._pointers: dict[tuple[int, Kernel], int] = {}

    def get(self, kernel: Kernel) -> int:
        """Return the driver's pointer to a kernel of the current device."""
        key = (cuda().runtime.getDevice(), kernel)
        pointer = self._pointers.get(key)
        if pointer is None:  # looked up without a lock: launches do not wait for kernels of others
            pointer = self._pointers[key] = self._load(key[0], kernel)
        return pointer

    def _load(self, device: int, kernel: Kernel) -> int:
        with self._lock:
            module = self._modules.setdefault((device, kernel.file, kernel.options), _Module())
        function = module.function(kernel, self._cubins)
        if kernel.shared_bytes:
            driver = cuda().driver
            driver.funcSetAttribute(
                function,
                driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                kernel.shared_bytes,
            )
        return function


class _Module:
    """A file of kernels on a device. A thread that needs it while it is compiled waits for this one alone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._module: Any = None

    def function(self, kernel: Kernel, cubins: Cubins) -> int:
        """Return the driver's pointer to a kernel of the file, on the current device."""
        import cupy

        with self._lock:
            if self._module is None:
                capability = int(cupy.cuda.Device().compute_capability)
                module = cupy.cuda.function.Module()
                module.load(cubins.find(kernel.source, kernel.options, capability))
                self._module = module
        return int(self._module.get_function(kernel.name).ptr)


_cubins = Cubins()
_functions = _LoadedKernels(_cubins)


@cache
def _source(file: str) -> str:
    declarations = map(declaration, STRUCTS)
    return "\n".join([*declarations, *((_FOLDER / part).read_text() for part in (*_HEADERS, file))])
