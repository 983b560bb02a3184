"""The processor as a device. It computes matrix products by numpy's BLAS.

    device          cuts a problem into tasks, and runs them
      team          on the threads that all calls share
      products      the tasks: matrix products of blocks
        blocking    the sizes of blocks
        columns     how a block's product is added to y, or gathered from gy
      pace          a bound below the time of a call

An indented module serves the one above it.
"""

from deconvd_server.device.cpu.device import CpuDevice

__all__ = ["CpuDevice"]
