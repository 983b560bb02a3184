"""cuBLAS's matrix product as a step of a plan. Its workspace is part of the plan's, so that it can be captured."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any

from deconvd.model.dtypes import BFLOAT16, DType
from deconvd_server.device.cuda.kernels.launch import cuda
from deconvd_server.device.cuda.kernels.steps import BufferOffset, Operands

__all__ = ["BLAS_WORKSPACE_BYTES", "ComputeMode", "Gemm", "Matrices"]

BLAS_WORKSPACE_BYTES = 32 << 20
"""cuBLAS's workspace, of the size that NVIDIA recommends for Hopper."""

_DATA_TYPES = {"float32": 0, "float64": 1, "float16": 2, BFLOAT16.name: 14}
"""`cudaDataType_t`, by the names of element types."""

_DEFAULT_ALGORITHM = -1
"""`CUBLAS_GEMM_DEFAULT`."""

_NO_REDUCED_PRECISION_REDUCTION = 16
"""`CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION`."""


class ComputeMode(IntEnum):
    """The type in which products are computed: values of `cublasComputeType_t`.

    cuBLAS calls the plain modes pedantic. It uses tensor cores wherever it can, in all modes but these.
    """

    FLOAT32 = 68
    PLAIN_FLOAT32 = 69
    TF32 = 77
    FLOAT64 = 70
    PLAIN_FLOAT64 = 71

    @property
    def is_double(self) -> bool:
        """Whether scalars are double."""
        return self in (ComputeMode.FLOAT64, ComputeMode.PLAIN_FLOAT64)


@dataclass(frozen=True, slots=True)
class Matrices:
    """A batch of matrices in BLAS's column-major order.

    Attributes:
        buffer: The first matrix.
        leading: Elements from one column to the next.
        stride: Elements from one matrix to the next.
        transposed: Whether the factors are their transposes.
    """

    buffer: BufferOffset
    dtype: DType
    leading: int
    stride: int
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Gemm:
    """``out = a b``, or ``out += a b`` if it accumulates, for each matrix of a batch.

    Attributes:
        rows, columns, depth: a is rows x depth, b is depth x columns.
        workspace: BLAS_WORKSPACE_BYTES that nothing else uses meanwhile.
    """

    rows: int
    columns: int
    depth: int
    batch: int
    a: Matrices
    b: Matrices
    out: Matrices
    mode: ComputeMode
    accumulate: bool
    workspace: BufferOffset

    def enqueue(self, operands: Operands, stream: int) -> None:
        """Enqueue the product on a stream of the current device.

        Raises:
            RuntimeError: cuBLAS refused the product.
        """
        library, handle = _library(), _handles.get()
        scalar = ctypes.c_double if self.mode.is_double else ctypes.c_float
        alpha, beta = scalar(1), scalar(1 if self.accumulate else 0)
        _check(library.cublasSetStream_v2(handle, ctypes.c_void_p(stream)))
        workspace = ctypes.c_void_p(self.workspace.address(operands))
        # The stream must be set first: setting it resets the workspace to cuBLAS's own.
        _check(
            library.cublasSetWorkspace_v2(handle, workspace, ctypes.c_size_t(BLAS_WORKSPACE_BYTES))
        )
        _check(
            library.cublasGemmStridedBatchedEx_64(
                handle,
                int(self.a.transposed),
                int(self.b.transposed),
                *_int64s(self.rows, self.columns, self.depth),
                ctypes.byref(alpha),
                *_matrix_arguments(self.a, operands),
                *_matrix_arguments(self.b, operands),
                ctypes.byref(beta),
                *_matrix_arguments(self.out, operands),
                *_int64s(self.batch),
                int(self.mode),
                _DEFAULT_ALGORITHM,
            )
        )


class _Handles(threading.local):
    """The calling thread's cuBLAS handles, by device. A handle serves one thread at a time."""

    def __init__(self) -> None:
        self._by_device: dict[int, ctypes.c_void_p] = {}

    def get(self) -> ctypes.c_void_p:
        """Return the handle for the current device."""
        device = cuda().runtime.getDevice()
        if device not in self._by_device:
            handle = ctypes.c_void_p()
            _check(_library().cublasCreate_v2(ctypes.byref(handle)))
            _check(_library().cublasSetMathMode(handle, _NO_REDUCED_PRECISION_REDUCTION))
            self._by_device[device] = handle
        return self._by_device[device]


_handles = _Handles()


@cache
def _library() -> ctypes.CDLL:
    import cupy

    # CuPy finds cuBLAS, even in wheels. Once it has loaded the library, the name is enough.
    cupy.cuda.device.get_cublas_handle()
    major = cuda().runtime.runtimeGetVersion() // 1000
    return ctypes.CDLL(f"libcublas.so.{major}")


def _matrix_arguments(matrices: Matrices, operands: Operands) -> tuple[Any, ...]:
    return (
        ctypes.c_void_p(matrices.buffer.address(operands)),
        _DATA_TYPES[matrices.dtype.name],
        *_int64s(matrices.leading, matrices.stride),
    )


def _int64s(*values: int) -> tuple[ctypes.c_int64, ...]:
    return tuple(map(ctypes.c_int64, values))


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"cuBLAS refused a matrix product: status {status}")
