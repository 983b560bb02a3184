"""Compiles the common kernels ahead: ``python -m deconvd_server.device.cuda.kernels.build_archive``. Needs no card."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

from deconvd.host.machine import processors_count
from deconvd_server.device.cuda.api.nvrtc import compile_cubin, nvrtc_version
from deconvd_server.device.cuda.kernels.archive import CAPABILITIES, FOLDER, pack, read_cubins
from deconvd_server.device.cuda.kernels.catalog import common_kernels
from deconvd_server.device.cuda.kernels.launch import Kernel

__all__ = ["main"]


def main() -> None:
    """Write a file for each capability. Cubins that are up to date are kept."""
    FOLDER.mkdir(exist_ok=True)
    kernels = common_kernels()
    for capability in CAPABILITIES:
        known = read_cubins(capability)

        def cubin_of(kernel: Kernel, capability: int = capability) -> bytes:
            return compile_cubin(kernel.source, kernel.options, capability)

        with ThreadPoolExecutor(processors_count()) as threads:
            made = {
                kernel.digest: threads.submit(cubin_of, kernel)
                for kernel in kernels
                if kernel.digest not in known
            }
            cubins = {
                kernel.digest: made[kernel.digest].result()
                if kernel.digest in made
                else known[kernel.digest]
                for kernel in kernels
            }
        content = pack(cubins, nvrtc_version())
        (FOLDER / f"sm_{capability}.xz").write_bytes(content)
        sys.stdout.write(
            f"sm_{capability}: {len(cubins)} modules, {len(made)} of them compiled, {len(content)} bytes\n"
        )


if __name__ == "__main__":
    main()
