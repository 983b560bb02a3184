"""Every kernel that plans launch, compiled for each generation of cards by NVIDIA's compiler, which needs no card."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import pytest

from deconvd_server.device.cuda.kernels.launch import Kernel
from tests.kernel_launches import FILES, launched

PACKAGE = "nvidia-cuda-nvrtc"
CAPABILITIES = (80, 89, 90)
"""Of an A100, an L4 and an H100: what kernels do differs from 90 on."""


@cache
def compiler() -> Any:
    """Return NVIDIA's compiler as a library."""
    try:
        found = files(PACKAGE) or []
    except PackageNotFoundError:
        pytest.skip(f"needs the package {PACKAGE}")
    paths = {Path(file).name.partition(".so")[0]: str(file.locate()) for file in found}
    # the compiler opens this one by its name alone, which finds it if it is loaded already
    ctypes.CDLL(paths["libnvrtc-builtins"], ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(paths["libnvrtc"])


def compile_errors(kernel: Kernel, capability: int) -> str:
    """Return what the compiler says of a kernel's file; nothing if all is well."""
    nvrtc, program = compiler(), ctypes.c_void_p()
    options = [*kernel.options, f"--gpu-architecture=compute_{capability}"]
    arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    text = kernel.source.encode()
    assert not nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, None, 0, None, None)
    status = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    said = log.value.decode().strip()
    return said or ("" if status == 0 else f"status {status}")


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("file", FILES)
def test_a_file_compiles_with_all_constants_that_plans_give_it(file: str, capability: int) -> None:
    modules = {kernel.options: kernel for kernel, _ in launched()[file]}
    for kernel in modules.values():
        assert compile_errors(kernel, capability) == "", kernel
