"""NVRTC, NVIDIA's compiler of kernels, through ctypes: other threads run while it compiles. Needs no card."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import cache
from pathlib import Path

__all__ = ["CompileError", "compile_cubin", "nvrtc_version"]


class CompileError(Exception):
    """NVRTC refused a text, or is missing."""


def compile_cubin(text: str, options: Iterable[str], capability: int) -> bytes:
    """Return the machine code of a text of CUDA C++ for cards of a compute capability. Thread-safe.

    Args:
        options: NVRTC's, without that for the architecture.
        capability: Compute capability times ten.

    Raises:
        CompileError: The text is wrong, NVRTC does not know the capability, or NVRTC is missing.
    """
    library, program = _library(), ctypes.c_void_p()
    words = [*options, f"--gpu-architecture=sm_{capability}"]
    arguments = (ctypes.c_char_p * len(words))(*map(str.encode, words))
    source = ctypes.c_char_p(text.encode())
    _check("create", library.nvrtcCreateProgram(ctypes.byref(program), source, None, 0, None, None))
    try:
        status = library.nvrtcCompileProgram(program, len(words), arguments)
        if status:
            raise CompileError(_read(program, "ProgramLog").decode(errors="replace").strip("\0\n"))
        return _read(program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def nvrtc_version() -> str:
    """Return NVRTC's version, such as 13.0. Raises CompileError if it is missing."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check("version", _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(what, getattr(_library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    content = ctypes.create_string_buffer(size.value)
    _check(what, getattr(_library(), f"nvrtcGet{what}")(program, content))
    return content.raw


def _check(what: str, status: int) -> None:
    if status:
        raise CompileError(f"NVRTC failed with status {status}: {what}")


@cache
def _library() -> ctypes.CDLL:
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        path = load_nvidia_dynamic_lib("nvrtc").abs_path or "libnvrtc.so.13"
        for builtins in Path(path).parent.glob("libnvrtc-builtins.so*"):
            # NVRTC opens it by its name alone, which finds it if it is loaded already
            ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(path)
    except (ImportError, OSError, RuntimeError) as error:
        raise CompileError(f"NVRTC cannot be loaded: {str(error).splitlines()[0]}") from None
