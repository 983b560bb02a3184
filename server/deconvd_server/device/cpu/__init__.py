"""The processor as a device: matrix products by numpy's BLAS."""

from deconvd_server.device.cpu.device import CpuDevice

__all__ = ["CpuDevice"]
