"""CuPy, loaded once for this package; where it is missing, the error says what to install."""

from __future__ import annotations

from deconvd_server.device.faults import DeviceUnavailableError

try:
    import cupy
    from cupy.cuda import runtime as cuda_runtime
    from cupy_backends.cuda.api.runtime import CUDARuntimeError as CudaError
except ImportError as error:
    raise DeviceUnavailableError(
        f"CuPy cannot be loaded ({error}): pip install '.[server,cuda13]' in a checkout of deconvd"
    ) from None

__all__ = ["CudaError", "cuda_runtime", "cupy"]
