"""Plans on a card with W prepared beforehand: the same results as without."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import pytest

from deconvd.model.dtypes import BFLOAT16, Array, DType
from deconvd.model.geometry import Geometry
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.call.context import CallContext
from deconvd_server.device.cuda.plan import Plan, Product, prepacking_of
from tests.devices import GradientRequest, deconvolve, gradients

if TYPE_CHECKING:
    from deconvd_server.device.cuda.api.runtime import Stream, open_card
    from deconvd_server.device.cuda.device import CudaDevice
    from deconvd_server.device.cuda.plans.candidates import Candidates
    from deconvd_server.device.cuda.tensors.tensor import CudaTensor
else:
    pytest.importorskip("cupy")
    from deconvd_server.device.cuda.api.runtime import open_card
    from deconvd_server.device.cuda.device import CudaDevice
    from deconvd_server.device.cuda.plans.candidates import Candidates

from deconvd_server.device.cuda.cudnn import Cudnn
from deconvd_server.device.cuda.cudnn.enums import HeuristicMode
from deconvd_server.device.cuda.plans.choice import Provider

pytestmark = pytest.mark.gpu

FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)
ERRORS = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-5}
"""Largest error over largest element, as in test_cuda_device: for sums in another order."""


def problem(
    x_type: DType,
    W_type: DType | None = None,
    *,
    kernel: int = 4,
    groups: int = 1,
    outsize: tuple[int, int] | None = None,
) -> Problem:
    return Problem(
        TensorSpec((4, 32, 12, 10), x_type),
        TensorSpec((32, 16 // groups, kernel, kernel), W_type or x_type),
        Geometry(stride=(2, 2), pad=(1, 1), groups=groups, outsize=outsize or (None, None)),
    )


PROBLEMS = {
    "float16": problem(FLOAT16),
    "float16, taps missing": problem(FLOAT16, kernel=3),
    "float16, groups": problem(FLOAT16, groups=2),
    "bfloat16": problem(BFLOAT16),
    "float32": problem(FLOAT32),
    "smaller outsize": problem(FLOAT32, outsize=(23, 19)),
    "x wider": problem(FLOAT32, FLOAT16),
    "W wider": problem(FLOAT16, FLOAT32),
}
EVERY_PROBLEM = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
EVERY_OPERATION = pytest.mark.parametrize("operation", [Product.Y, Product.GX], ids=str)


@pytest.fixture(scope="module")
def cuda() -> Iterator[CudaDevice]:
    device = CudaDevice(0)
    yield device
    device.close()


@pytest.fixture
def stream(cuda: CudaDevice) -> Iterator[Stream]:
    stream = cuda.make_stream()
    yield stream
    cuda.release_stream(stream.pointer)


def random_array(spec: TensorSpec, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(spec.shape).astype(spec.dtype)


def put(cuda: CudaDevice, array: Array) -> CudaTensor:
    tensor = cuda.empty(TensorSpec(array.shape, array.dtype))
    cuda.write(tensor, array, CallContext())
    return tensor


def execute(
    cuda: CudaDevice, plan: Plan, a: CudaTensor, b: int, out: TensorSpec, stream: Stream
) -> Array:
    result = put(cuda, np.full(out.shape, np.nan, out.dtype))
    with cuda.activate(), cuda.memory.lease(max(plan.workspace_bytes, 1)) as workspace:
        plan.execute(a.pointer, b, result.pointer, workspace, stream.pointer)
        stream.wait()
    array = cuda.read(result, CallContext())
    cuda.free(result)
    return array


def plans(cuda: CudaDevice, operation: Product, problem: Problem, stream: Stream) -> list[Plan]:
    """Return a few plans of each kind that there is for a problem."""
    candidates = Candidates(Cudnn(), open_card(0).processors_count)
    key = cuda.plan_key(operation, problem, Options())
    with cuda.activate():
        found = [*candidates.own_kernels(key), candidates.fallback(key)]
        for provider in (Provider.CUDNN_NCHW, Provider.CUDNN_NHWC):
            some = candidates.cudnn_engines(
                key, stream.pointer, provider, (HeuristicMode.A,), compiling=False
            )
            found += islice(some, 2)
    return [candidate.plan for candidate in found]


def assert_same(found: Array, expected: Array, plan: Plan) -> None:
    if plan.deterministic:
        np.testing.assert_array_equal(found, expected, err_msg=plan.name)
        return
    wide = expected.astype(np.float64)
    error = np.abs(found.astype(np.float64) - wide).max() / np.abs(wide).max()
    assert error < ERRORS[expected.dtype.name], plan.name


@EVERY_PROBLEM
@EVERY_OPERATION
def test_a_plan_for_a_prepared_W_gives_what_the_plan_for_W_gives(
    cuda: CudaDevice, stream: Stream, operation: Product, problem: Problem
) -> None:
    a_spec, out = (problem.x, problem.y) if operation is Product.Y else (problem.y, problem.x)
    a, W = put(cuda, random_array(a_spec, 1)), put(cuda, random_array(problem.W, 2))
    prepared_count = 0
    for plan in plans(cuda, operation, problem, stream):
        preparation = prepacking_of(plan)
        if preparation is None:
            continue
        prepared_count += 1
        expected = execute(cuda, plan, a, W.pointer, out, stream)
        assert preparation.plan.workspace_bytes <= plan.workspace_bytes
        # what is not written must not matter
        form = put(cuda, np.full(preparation.size_bytes, 0xFF, np.uint8))
        with cuda.activate():
            preparation.pack(W.pointer, form.pointer, stream.pointer)
            stream.wait()

        found = execute(cuda, preparation.plan, a, form.pointer, out, stream)

        assert_same(found, expected, plan)
        cuda.free(form)
    for tensor in (a, W):
        cuda.free(tensor)
    assert prepared_count > 0  # every problem here has a plan that transposes, packs or casts W


@EVERY_PROBLEM
@pytest.mark.parametrize("autotune", [False, True])
def test_calls_with_a_W_that_stays_give_what_calls_with_W_give(
    cuda: CudaDevice, problem: Problem, autotune: bool
) -> None:
    options = Options(cudnn_deterministic=True, autotune=autotune)
    x, W, gy = (
        random_array(spec, seed) for seed, spec in enumerate((problem.x, problem.W, problem.y))
    )
    held_bytes = cuda.memory.stats.used_bytes
    there = put(cuda, W)
    grown: list[int] = []

    def may_grow(size_bytes: int) -> bool:
        grown.append(size_bytes)
        return True

    there.may_grow = may_grow
    y = deconvolve(cuda, problem, x, W, None, options, CallContext())
    right = gradients(cuda, problem, x, W, gy, GradientRequest(), options, CallContext())

    for seed in range(5):
        np.testing.assert_array_equal(
            deconvolve(cuda, problem, x, there, None, options, CallContext()), y
        )
        found = gradients(cuda, problem, x, there, gy, GradientRequest(), options, CallContext())
        for result, expected in zip(found, right, strict=True):
            np.testing.assert_array_equal(result, expected)
        other = random_array(problem.x, 10 + seed)  # the same kind of call, from its graph
        np.testing.assert_array_equal(
            deconvolve(cuda, problem, other, there, None, options, CallContext()),
            deconvolve(cuda, problem, other, W, None, options, CallContext()),
        )

    assert all(size_bytes > 0 for size_bytes in grown)
    assert cuda.memory.stats.used_bytes == held_bytes + W.nbytes + sum(grown)
    cuda.free(there)
    assert cuda.memory.stats.used_bytes == held_bytes


def test_another_W_at_the_same_place_is_not_taken_for_the_last(cuda: CudaDevice) -> None:
    problem, options = PROBLEMS["float16"], Options(cudnn_deterministic=True)
    x = random_array(problem.x, 0)
    for seed in range(6):
        W = random_array(problem.W, seed)
        there = put(cuda, W)
        there.may_grow = lambda _: True
        expected = deconvolve(cuda, problem, x, W, None, options, CallContext())
        for _ in range(4):
            found = deconvolve(cuda, problem, x, there, None, options, CallContext())
            np.testing.assert_array_equal(found, expected)
        cuda.free(there)
