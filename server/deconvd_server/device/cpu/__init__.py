"""The processor as a device. It computes matrix products by numpy's BLAS.

device      cuts a problem into tasks, and runs them
team          on the threads that all calls share
products    the tasks, made of matrix products of blocks
blocking      the blocks' sizes
columns       what a block's product is added to y by, or gathered from gy by
pace        a bound below the time of a call
"""

from deconvd_server.device.cpu.device import CpuDevice

__all__ = ["CpuDevice"]
