"""Operations on the card's own arrays, and what becomes of a card that fails."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import ELEMENT_TYPES, Array, DType
from deconvd.model.geometry import Geometry
from deconvd.model.options import Options, UseCudnn, UseCudnnTensorCore
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.call.context import CallContext
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.device.cuda.plan import Product
from tests.devices import GradientRequest, deconvolve, gradients

if TYPE_CHECKING:
    from benchmarks.cuda_operator import Operator
    from deconvd_server.device.cuda.device import CudaDevice

    cupy: Any
else:
    cupy = pytest.importorskip("cupy")
    from benchmarks.cuda_operator import Operator
    from deconvd_server.device.cuda.device import CudaDevice

pytestmark = pytest.mark.gpu

ERRORS = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-5, "float64": 1e-12}
STEADY = Options(cudnn_deterministic=True)


@pytest.fixture(scope="module")
def cuda() -> Iterator[CudaDevice]:
    device = CudaDevice(0)
    yield device
    device.close()


def problem_of(dtype: DType, image: int = 12) -> Problem:
    return Problem(
        TensorSpec((2, 16, image, image), dtype),
        TensorSpec((16, 8, 4, 4), dtype),
        Geometry(stride=(2, 2), pad=(1, 1)),
    )


def random_array(spec: TensorSpec, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(spec.shape).astype(spec.dtype)


def on_card(array: Array) -> Any:
    return cupy.asarray(array.view(np.uint16) if array.dtype.itemsize == 2 else array)


def assert_near(found: Any, expected: Array) -> None:
    host = found.get().view(expected.dtype).astype(np.float64)
    wide = expected.astype(np.float64)
    assert np.abs(host - wide).max() / np.abs(wide).max() < ERRORS[expected.dtype.name]


@pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=str)
def test_operations_that_come_again_use_what_the_arrays_hold_then(
    cuda: CudaDevice, dtype: DType
) -> None:
    problem, cpu = problem_of(dtype), CpuDevice()
    specs = (problem.x, problem.W, problem.y, problem.x, problem.W, problem.y, problem.b)
    x, W, gy, gx, gW, y, gb = (on_card(np.zeros(s.shape, s.dtype)) for s in specs)
    stream = cupy.cuda.Stream(non_blocking=True)
    operator = Operator(cuda, stream.ptr)
    for seed in range(4):
        host = [random_array(spec, seed + i) for i, spec in enumerate(specs[:3])]
        for array, values in zip((x, W, gy), host, strict=True):
            array.set(on_card(values).get())

        operator.run(Product.Y, problem, x, W, y, STEADY)
        operator.run_gradients(problem, x, W, gy, gx, gW, gb, STEADY)
        stream.synchronize()

        assert_near(y, deconvolve(cpu, problem, host[0], host[1], None, STEADY, CallContext()))
        expected = gradients(
            cpu, problem, host[0], host[1], host[2], GradientRequest(), STEADY, CallContext()
        )
        for found, right in zip((gx, gW, gb), expected, strict=True):
            assert right is not None
            assert_near(found, right)
    operator.close()


def test_an_array_that_is_not_aligned_is_refused(cuda: CudaDevice) -> None:
    problem = problem_of(np.dtype(np.float32))
    x, W, y = (
        cupy.zeros(int(np.prod(spec.shape)) + 1, np.float32)[1:]
        for spec in (problem.x, problem.W, problem.y)
    )
    with pytest.raises(InvalidArgumentError, match="aligned"):
        Operator(cuda, 0).run(Product.Y, problem, x, W, y, Options())


def test_building_plans_stalls_no_other_call(cuda: CudaDevice) -> None:
    problem = problem_of(np.dtype(np.float32))
    x, W = random_array(problem.x, 0), random_array(problem.W, 1)
    ends_s: list[float] = []
    done = threading.Event()

    def call() -> None:
        while not done.is_set():
            deconvolve(cuda, problem, x, W, None, STEADY, CallContext())
            ends_s.append(time.perf_counter())

    deconvolve(cuda, problem, x, W, None, STEADY, CallContext())
    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.5)
    begin_s = time.perf_counter()
    for image in range(13, 43):
        new = problem_of(np.dtype(np.float32), image)
        options = Options(use_cudnn=UseCudnn.ALWAYS)
        deconvolve(cuda, new, random_array(new.x, 0), W, None, options, CallContext())
    end_s = time.perf_counter()
    done.set()
    thread.join()

    # a build that held the others up would leave gaps of its own length, which fill this time
    alone_per_s = sum(end < begin_s for end in ends_s) / 0.5
    beside_per_s = sum(begin_s <= end < end_s for end in ends_s) / (end_s - begin_s)
    assert beside_per_s > alone_per_s / 10


LOST = """
import cupy
from deconvd_server.device.cuda import DeviceLostError, open_device

lost = []
device = open_device(0, on_lost=lost.append)
write = cupy.RawKernel('extern "C" __global__ void write(int *p) { *p = 1; }', 'write')
try:
    with device.activate():
        write((1,), (1,), (cupy.uint64(64),))
        cupy.cuda.runtime.deviceSynchronize()
except DeviceLostError as error:
    print("lost:", error, lost == [error])
import os
os._exit(0)
"""


def test_a_card_that_must_be_reset_is_told_from_a_call_that_failed() -> None:
    run = subprocess.run(
        [sys.executable, "-c", LOST], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.stdout.startswith("lost: cuda:0 must be reset")
    assert run.stdout.rstrip().endswith("True")


def plain_rate() -> float:
    """Return the half-precision operations that this card can do in a second without tensor cores, at most.

    Each of a multiprocessor's 128 lanes multiplies and adds two pairs of halves in a cycle.
    """
    attributes = cupy.cuda.Device().attributes
    return float(attributes["MultiProcessorCount"] * attributes["ClockRate"] * 1e3 * 128 * 4)


@pytest.mark.parametrize("autotune", [False, True])
@pytest.mark.parametrize("use_cudnn", UseCudnn)
@pytest.mark.parametrize("operation", Product)
@pytest.mark.parametrize("dtype", ELEMENT_TYPES[:2], ids=str)
def test_no_product_is_faster_than_the_card_without_tensor_cores_where_they_are_kept_out(
    cuda: CudaDevice, dtype: DType, operation: Product, use_cudnn: UseCudnn, autotune: bool
) -> None:
    problem = Problem(
        TensorSpec((32, 512, 32, 32), dtype),
        TensorSpec((512, 512, 3, 3), dtype),
        Geometry(stride=(2, 2), pad=(1, 1)),  # with stride 1 Winograd's way needs fewer operations
    )
    operands = {
        Product.Y: (problem.x, problem.W, problem.y),
        Product.GX: (problem.y, problem.W, problem.x),
        Product.GW: (problem.x, problem.y, problem.W),
    }
    a, b, out = (on_card(np.zeros(spec.shape, spec.dtype)) for spec in operands[operation])
    stream = cupy.cuda.Stream(non_blocking=True)
    operator = Operator(cuda, stream.ptr)

    options = Options(
        use_cudnn=use_cudnn, autotune=autotune, use_cudnn_tensor_core=UseCudnnTensorCore.NEVER
    )
    operator.run(operation, problem, a, b, out, options)
    stream.synchronize()
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    begin.record(stream)
    for _ in range(10):
        operator.run(operation, problem, a, b, out, options)
    end.record(stream)
    end.synchronize()
    operations = 10 * 2 * 32 * 32 * 32 * 512 * 512 * 9
    rate = float(operations / cupy.cuda.get_elapsed_time(begin, end) * 1e3)

    assert rate < plain_rate()  # with tensor cores, it is three times as much on an H200
    operator.close()
