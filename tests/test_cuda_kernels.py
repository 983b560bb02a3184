"""Our kernels against the CPU device and numpy, on the card."""

import importlib
import random
from typing import Any

import numpy as np
import pytest

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import BFLOAT16, ELEMENT_TYPES, Array, DType
from deconvd.model.geometry import Geometry
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.call.context import CallContext
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.device.cuda.plan import Product
from tests.devices import GradientRequest, deconvolve, gradients

cupy: Any = pytest.importorskip("cupy")
kernels: Any = pytest.importorskip("deconvd_server.device.cuda.kernels")
fallback: Any = importlib.import_module("deconvd_server.device.cuda.kernels.fallback")

pytestmark = pytest.mark.gpu

EVERY_DTYPE = pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=str)
EVERY_OFFSET = pytest.mark.parametrize("offset", [0, 1, 3], ids="offset{}".format)

TOLERANCES = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 2e-6, "float64": 1e-13}
"""Relative errors of norms: a few times the rounding of one element."""


def random_array(shape: tuple[int, ...], dtype: DType) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


class OnCard:
    """An array on the card, so many elements behind a boundary of 256 bytes; NaN lies around it."""

    def __init__(self, array: Array, offset: int = 0) -> None:
        self._shape, self._dtype, self._offset = array.shape, array.dtype, offset * array.itemsize
        self._memory = cupy.full(self._offset + array.nbytes + 256, 0xFF, cupy.uint8)
        self._inside().set(np.frombuffer(array.tobytes(), np.uint8))

    @classmethod
    def poisoned(cls, shape: tuple[int, ...], dtype: DType, offset: int = 0) -> "OnCard":
        return cls(np.full(shape, np.nan, dtype), offset)

    @property
    def pointer(self) -> int:
        return int(self._memory.data.ptr) + self._offset

    def get(self) -> Array:
        """Return what it holds, after checking that nothing was written around it."""
        host: Array = self._memory.get()
        end = self._offset + self._inside().size
        assert (host[: self._offset] == 0xFF).all()
        assert (host[end:] == 0xFF).all()
        inside: Array = host[self._offset : end].copy().view(self._dtype)
        return inside.reshape(self._shape)

    def _inside(self) -> Any:
        count = int(np.prod(self._shape, dtype=np.int64)) * self._dtype.itemsize
        return self._memory[self._offset : self._offset + count]


def error(result: Array, reference: Array) -> float:
    wide = reference.astype(np.float64)
    norm = np.linalg.norm(wide)
    return float(np.linalg.norm(result.astype(np.float64) - wide) / (norm or 1))


@EVERY_DTYPE
@EVERY_OFFSET
@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (2, 64, 16, 16), (1, 1, 1, 1), (4, 300, 2, 3)])
def test_bias_is_added_to_its_channel_and_nowhere_else(
    shape: tuple[int, ...], dtype: DType, offset: int
) -> None:
    y, b = random_array(shape, dtype), random_array(shape[1:2], dtype)
    y_on_card, b_on_card = OnCard(y, offset), OnCard(b)

    kernels.add_bias(y_on_card.pointer, b_on_card.pointer, TensorSpec(shape, dtype), 0)

    wide = np.float64 if dtype == np.float64 else np.float32
    sums: Array = np.add(y.astype(wide), b.astype(wide)[:, None, None])
    expected = sums.astype(dtype)
    np.testing.assert_array_equal(y_on_card.get(), expected)


@EVERY_DTYPE
@EVERY_OFFSET
@pytest.mark.parametrize(
    "shape", [(3, 5, 7, 9), (2, 3, 64, 64), (0, 4, 5, 5), (2, 300, 4, 4), (64, 1, 3, 3)]
)
def test_gb_is_the_sum_over_samples_and_pixels(
    shape: tuple[int, ...], dtype: DType, offset: int
) -> None:
    gy = random_array(shape, dtype)
    gy_on_card, gb = OnCard(gy, offset), OnCard.poisoned(shape[1:2], dtype)

    kernels.sum_gb(gy_on_card.pointer, gb.pointer, TensorSpec(shape, dtype), 0)

    expected = gy.sum(axis=(0, 2, 3), dtype=np.float64)
    assert error(gb.get(), expected) < TOLERANCES[dtype.name]


@pytest.mark.parametrize("source", ELEMENT_TYPES, ids=str)
@pytest.mark.parametrize("target", ELEMENT_TYPES, ids=str)
@EVERY_OFFSET
@pytest.mark.parametrize("count", [1, 1000, 100_003])
def test_casts_round_to_the_nearest(source: DType, target: DType, offset: int, count: int) -> None:
    array = random_array((count,), source)
    source_on_card, target_on_card = OnCard(array, offset), OnCard.poisoned((count,), target, 1)

    kernels.cast(source_on_card.pointer, source, target_on_card.pointer, target, count, 0)

    through = np.float32 if BFLOAT16 in (source, target) else np.float64
    np.testing.assert_array_equal(target_on_card.get(), array.astype(through).astype(target))


@EVERY_DTYPE
@EVERY_OFFSET
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 5, 7), (2, 64, 16, 16), (1, 130, 9, 15), (3, 8, 1, 1), (2, 3, 8, 16), (2, 2, 4, 6)],
)
def test_transposes_move_every_element(
    shape: tuple[int, int, int, int], dtype: DType, offset: int
) -> None:
    array = random_array(shape, dtype)
    n, c, h, w = shape
    first = OnCard(array, offset)
    last, again = OnCard.poisoned((n, h, w, c), dtype, offset), OnCard.poisoned(shape, dtype)

    kernels.transpose_to_nhwc(first.pointer, last.pointer, n, c, h, w, dtype, 0)
    kernels.transpose_to_nchw(last.pointer, again.pointer, n, c, h, w, dtype, 0)

    np.testing.assert_array_equal(last.get(), array.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(again.get(), array)


def random_problem(seed: int, dtype: DType) -> Problem:
    """Return a small problem with everything odd: axes that differ, outsize both ways, groups, dilation."""
    rng = random.Random(seed)
    while True:
        groups = rng.choice([1, 1, 1, 2, 3, 8])
        inputs, outputs = rng.choice([1, 1, 2, 3, 8, 16]), rng.choice([1, 1, 2, 3, 8, 16])
        kernel = rng.choice([1, 2, 3, 4, 5, 9]), rng.choice([1, 2, 3, 4, 5, 7])
        stride = rng.choice([1, 1, 2, 2, 3, 4]), rng.choice([1, 1, 2, 2, 3, 5])
        dilate = rng.choice([1, 1, 1, 2, 3]), rng.choice([1, 1, 1, 2, 4])
        if rng.random() < 0.6:  # most users' filters are square
            kernel, stride, dilate = (kernel[0],) * 2, (stride[0],) * 2, (dilate[0],) * 2
        pad = rng.randint(0, 3), rng.randint(0, 3)
        image = rng.choice([1, 3, 8, 17]), rng.choice([1, 4, 7, 16])
        x = TensorSpec((rng.choice([1, 2, 5]), inputs * groups, *image), dtype)
        W = TensorSpec((inputs * groups, outputs, *kernel), dtype)
        natural = Geometry(stride, pad, (None, None), dilate, groups).natural_size(image, kernel)
        h, w = (
            rng.choice([None, None, max(size + rng.randint(1 - s, s - 1), 1)])
            for size, s in zip(natural, stride, strict=True)
        )
        try:
            return Problem(x, W, Geometry(stride, pad, (h, w), dilate, groups))
        except InvalidArgumentError:
            continue


def reference(problem: Problem, operation: Product, x: Array, W: Array, gy: Array) -> Array:
    """Return the CPU device's result in float64."""
    x, W, gy = (array.astype(np.float64) for array in (x, W, gy))
    wide = Problem(TensorSpec(x.shape, x.dtype), TensorSpec(W.shape, W.dtype), problem.geometry)
    device = CpuDevice(1)
    if operation == Product.Y:
        return deconvolve(device, wide, x, W, None, Options(), CallContext())
    found = gradients(device, wide, x, W, gy, GradientRequest(), Options(), CallContext())
    result = found.gx if operation == Product.GX else found.gW
    assert result is not None
    return result


def run(plan: Any, operation: Product, x: Array, W: Array, gy: Array) -> Array:
    a, b, like = {"y": (x, W, gy), "gx": (gy, W, x), "gW": (x, gy, W)}[operation]
    operands = OnCard(a), OnCard(b)
    out = OnCard.poisoned(like.shape, like.dtype)
    workspace = cupy.full(plan.workspace_bytes + 256, 0xFF, cupy.uint8)
    aligned = -(-workspace.data.ptr // 256) * 256
    plan.execute(operands[0].pointer, operands[1].pointer, out.pointer, aligned, 0)
    return out.get()


@EVERY_DTYPE
@pytest.mark.parametrize("operation", Product)
@pytest.mark.parametrize("seed", range(60))
def test_every_plan_agrees_with_the_processor_and_with_itself(
    operation: Product, dtype: DType, seed: int
) -> None:
    problem = random_problem(seed, dtype)
    x, W, gy = (random_array(t.shape, dtype) for t in (problem.x, problem.W, problem.y))
    expected = reference(problem, operation, x, W, gy)

    plans = kernels.candidates(operation, problem, Options())
    for plan in (*plans, kernels.fallback(operation, problem, Options())):
        result = run(plan, operation, x, W, gy)
        assert error(result, expected) < TOLERANCES[dtype.name], plan.name
        np.testing.assert_array_equal(result, run(plan, operation, x, W, gy), plan.name)


@pytest.mark.parametrize("dtype", [ELEMENT_TYPES[0], ELEMENT_TYPES[2]], ids=str)
@pytest.mark.parametrize("operation", Product)
@pytest.mark.parametrize("columns_bytes", [1, 3000, 20_000])
@pytest.mark.parametrize("seed", range(15))
def test_fallback_is_right_however_small_its_chunks_are(
    operation: Product,
    dtype: DType,
    columns_bytes: int,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fallback, "_COLUMNS_BYTES", columns_bytes)
    problem = random_problem(seed, dtype)
    x, W, gy = (random_array(t.shape, dtype) for t in (problem.x, problem.W, problem.y))

    plan = kernels.fallback(operation, problem, Options())
    result = run(plan, operation, x, W, gy)

    assert error(result, reference(problem, operation, x, W, gy)) < TOLERANCES[dtype.name]
    np.testing.assert_array_equal(result, run(plan, operation, x, W, gy))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)])
def test_fallback_of_empty_operands_gives_zeros(shape: tuple[int, ...]) -> None:
    dtype = np.dtype(np.float32)
    problem = Problem(TensorSpec(shape, dtype), TensorSpec((shape[1], 2, 3, 3), dtype), Geometry())
    x, W, gy = (random_array(t.shape, dtype) for t in (problem.x, problem.W, problem.y))

    for operation in Product:
        assert not run(kernels.fallback(operation, problem, Options()), operation, x, W, gy).any()
