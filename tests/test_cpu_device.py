"""The CPU device: what it computes against the definition, what it takes for it, and how it ends early."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deconvd.errors import CallCancelledError, DeadlineError, ExhaustedError
from deconvd.model.dtypes import BFLOAT16, ELEMENT_TYPES, Array, DType
from deconvd.model.geometry import Geometry
from deconvd.model.gradients import Gradients
from deconvd.model.operation import DECONVOLVE
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec, spec_of
from deconvd_server.call.context import CallContext
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.device.cpu import device as cpu_device
from deconvd_server.device.cpu.blocking import is_small
from deconvd_server.device.cpu.products import BlockProducts
from deconvd_server.device.cpu.team import Task
from tests import definition
from tests.devices import GradientRequest, deconvolve, gradients, runner
from tests.processes import wait_until
from tests.strategies import FLOAT64, Operands, operands

TIMEOUT_S = 60
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
ALL = GradientRequest()
MASKS = [GradientRequest(*mask) for mask in itertools.product([False, True], repeat=3) if any(mask)]


@pytest.fixture(scope="module", params=[1, 3], ids=["alone", "three threads"])
def device(request: pytest.FixtureRequest) -> Iterator[CpuDevice]:
    """A device whose calls have one thread, and one whose calls have more than there may be processors.

    They have them for small problems too, which would else be computed by one.
    """
    device = CpuDevice(request.param)
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(cpu_device, "is_small", lambda _: False)
        yield device
    device.close()


def y_of(
    device: CpuDevice,
    o: Operands,
    *,
    call: CallContext | None = None,
    options: Options | None = None,
) -> Array:
    by = runner(device, o.problem)
    return deconvolve(by, o.problem, o.x, o.W, o.b, options or Options(), call or CallContext())


def gradients_of(
    device: CpuDevice,
    o: Operands,
    *,
    wanted: GradientRequest = ALL,
    call: CallContext | None = None,
) -> Gradients:
    by = runner(device, o.problem)
    return gradients(by, o.problem, o.x, o.W, o.gy, wanted, Options(), call or CallContext())


def results_of(device: CpuDevice, o: Operands) -> list[Array]:
    """Return y, gx, gW and gb."""
    return [y_of(device, o), *_all(gradients_of(device, o))]


def defined(o: Operands) -> list[Array]:
    """Return y, gx, gW and gb by their definition, in float64."""
    y = definition.deconvolve(o.problem, o.x, o.W, o.b)
    return [y, *definition.gradients(o.problem, o.x, o.W, o.gy)]


def _all(gradients: Gradients) -> list[Array]:
    arrays = [array for array in gradients if array is not None]
    assert len(arrays) == 3
    return arrays


def drawn(problem: Problem, *, with_b: bool = True, seed: int = 0) -> Operands:
    """Return normally distributed operands."""
    random = np.random.default_rng(seed)

    def array(spec: TensorSpec) -> Array:
        return random.standard_normal(spec.shape).astype(spec.dtype)

    b = array(problem.b) if with_b else None
    return Operands(problem, array(problem.x), array(problem.W), b, array(problem.y))


def problem_of(
    x: Sequence[int],
    W: Sequence[int],
    geometry: Geometry = Geometry(),  # noqa: B008 - frozen
    *,
    types: tuple[DType, DType] = (F32, F32),
) -> Problem:
    return Problem(TensorSpec(tuple(x), types[0]), TensorSpec(tuple(W), types[1]), geometry)


def several_blocks(types: tuple[DType, DType] = (F32, F32)) -> Problem:
    """A problem whose samples, groups, channels and image pixels each make several blocks."""
    geometry = Geometry(stride=(2, 1), pad=(1, 2), dilate=(1, 2), groups=2)
    return problem_of((3, 4, 20, 60), (4, 50, 2, 3), geometry, types=types)


def assert_agrees(given: Array, wanted: Array, compute_type: DType) -> None:
    """Compare a result with its definition on the same, already rounded operands.

    The tolerances are those of Chainer's own tests (reference.md), by what rounds the result: the
    sum in the compute type and the one rounding to the result's type.
    """
    if given.dtype.itemsize == 2:
        atol, rtol = 5e-3, 5e-2
    elif given.dtype == compute_type == F64:
        atol, rtol = 1e-12, 1e-10
    else:
        atol, rtol = 1e-5, 1e-4
    np.testing.assert_allclose(given.astype(np.float64), wanted, atol=atol, rtol=rtol)


# What it computes


@settings(max_examples=150)
@given(o=operands())
def test_results_agree_with_the_definition(device: CpuDevice, o: Operands) -> None:
    for result, wanted in zip(results_of(device, o), defined(o), strict=True):
        assert_agrees(result, wanted, o.problem.compute_type)


LARGE_KERNELS = {
    "of one pixel": problem_of((2, 4, 1, 1), (4, 3, 13, 17), Geometry(groups=2)),
    "dilated": problem_of((1, 2, 2, 3), (2, 3, 14, 15), Geometry(dilate=(2, 3), stride=(3, 2))),
    "of which few taps reach a pixel": problem_of(
        (3, 2, 2, 2), (2, 2, 41, 40), Geometry(pad=(18, 19), stride=(7, 5))
    ),
    "on one axis": problem_of((1, 2, 9, 1), (2, 2, 3, 60), Geometry(pad=(1, 20))),
    "whose rows are cut": problem_of((1, 1, 1, 256), (1, 1, 1, 1100), Geometry(pad=(0, 500))),
    "of halves": problem_of((1, 2, 3, 2), (2, 2, 20, 21), types=(BFLOAT16, BFLOAT16)),
}


@pytest.mark.parametrize("name", LARGE_KERNELS)
def test_results_of_kernels_larger_than_the_image_agree_with_the_definition(
    device: CpuDevice, name: str
) -> None:
    o = drawn(LARGE_KERNELS[name])

    for result, wanted in zip(results_of(device, o), defined(o), strict=True):
        assert_agrees(result, wanted, o.problem.compute_type)


@settings(max_examples=100)
@given(o=operands(integers=True))
def test_results_are_rounded_once_to_the_types_that_the_contract_says(
    device: CpuDevice, o: Operands
) -> None:
    p = o.problem
    types = [p.x.dtype, p.x.dtype, p.W.dtype, p.x.dtype]

    for result, exact, dtype in zip(results_of(device, o), defined(o), types, strict=True):
        assert result.dtype == dtype
        assert result.flags.c_contiguous
        assert result.flags.writeable
        np.testing.assert_array_equal(result, exact.astype(dtype))  # sums of integers are exact


@pytest.mark.parametrize("x", ELEMENT_TYPES, ids=str)
@pytest.mark.parametrize("W", ELEMENT_TYPES, ids=str)
def test_results_of_several_blocks_agree_with_the_definition(
    device: CpuDevice, x: DType, W: DType
) -> None:
    o = drawn(several_blocks((x, W)))

    for result, wanted in zip(results_of(device, o), defined(o), strict=True):
        # sums of thousands of products have errors in proportion to the largest, also near 0
        scale = np.abs(wanted).max()
        scaled = result.astype(np.float64) / scale
        assert_agrees(scaled.astype(result.dtype), wanted / scale, o.problem.compute_type)


def test_results_of_several_blocks_of_taps_agree_with_the_definition(device: CpuDevice) -> None:
    # 35 rows of taps, of which pad leaves the one where the first block of taps ends
    o = drawn(problem_of((1, 1, 1, 1000), (1, 2, 35, 15), Geometry(pad=(17, 0)), types=(F64, F64)))

    for result, wanted in zip(results_of(device, o), defined(o), strict=True):
        assert_agrees(result, wanted, F64)


@pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=str)
def test_sums_keep_their_digits_whatever_the_element_type(device: CpuDevice, dtype: DType) -> None:
    # 4096 ones: float16 alone would not count beyond 2048, nor bfloat16 beyond 256
    inside = problem_of((1, 4096, 1, 1), (4096, 1, 1, 1), types=(dtype, dtype))
    batch = problem_of((4096, 1, 1, 1), (1, 1, 1, 1), types=(dtype, dtype))
    ones = [
        Operands(p, *(np.ones(spec.shape, dtype) for spec in (p.x, p.W, p.b, p.y)))
        for p in (inside, batch)
    ]

    y = y_of(device, ones[0])
    _, gW, gb = _all(gradients_of(device, ones[1]))

    rounded = np.array(4097).astype(dtype)
    assert y.item() == rounded
    assert (gW.item(), gb.item()) == (4096, 4096)


@pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=str)
def test_what_is_out_of_an_element_types_range_is_infinite_and_no_fault(
    device: CpuDevice, dtype: DType
) -> None:
    p = problem_of((1, 2, 1, 1), (2, 1, 1, 1), types=(dtype, dtype))
    huge = np.array([1e4 if dtype == np.float16 else 1e38 if dtype != F64 else 1e308], dtype)
    x, W = np.full(p.x.shape, huge), np.full(p.W.shape, 10, dtype)
    gy = np.full(p.y.shape, huge)

    o = Operands(p, x, W, np.zeros(p.b.shape, dtype), gy)

    assert np.isposinf(y_of(device, o).astype(np.float64)).all()
    gx, gW, _ = _all(gradients_of(device, o))
    assert np.isposinf(gx.astype(np.float64)).all()
    assert np.isposinf(gW.astype(np.float64)).all()


@pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=str)
def test_nan_and_infinity_reach_the_pixels_that_they_are_linked_to_and_no_others(
    device: CpuDevice, dtype: DType
) -> None:
    p = problem_of((1, 1, 1, 3), (1, 1, 1, 1), types=(dtype, dtype))
    x = np.array([np.nan, np.inf, 1], dtype).reshape(p.x.shape)
    o = Operands(p, x, np.ones(p.W.shape, dtype), None, x)

    y, gx, _, _ = (result.astype(np.float64) for result in results_of(device, o))
    np.testing.assert_array_equal(y.ravel(), [np.nan, np.inf, 1])
    np.testing.assert_array_equal(gx.ravel(), [np.nan, np.inf, 1])


@settings(max_examples=40)
@given(o=operands(FLOAT64), seed=st.integers(0, 99))
def test_y_is_linear_in_x_and_in_W(device: CpuDevice, o: Operands, seed: int) -> None:
    p, other = o.problem, drawn(o.problem, with_b=False, seed=seed)

    def y(x: Array, W: Array) -> Array:
        return deconvolve(runner(device, p), p, x, W, None, Options(), CallContext())

    in_x = 3 * y(o.x, o.W) + y(other.x, o.W)
    assert_agrees(y(3 * o.x + other.x, o.W), in_x, F64)
    in_W = 3 * y(o.x, o.W) + y(o.x, other.W)
    assert_agrees(y(o.x, 3 * o.W + other.W), in_W, F64)


@settings(max_examples=60)
@given(o=operands(FLOAT64))
def test_the_gradients_are_adjoint_to_y(device: CpuDevice, o: Operands) -> None:
    y = deconvolve(runner(device, o.problem), o.problem, o.x, o.W, None, Options(), CallContext())
    gx, gW, _ = _all(gradients_of(device, o))

    wanted = np.vdot(o.gy, y)

    # sums of some thousand terms of about 1, in float64 and in different orders
    assert np.vdot(gx, o.x) == pytest.approx(wanted, rel=1e-10, abs=1e-10)
    assert np.vdot(gW, o.W) == pytest.approx(wanted, rel=1e-10, abs=1e-10)


@settings(max_examples=40)
@given(o=operands(FLOAT64), seed=st.integers(0, 99))
def test_the_gradients_are_what_small_steps_show(device: CpuDevice, o: Operands, seed: int) -> None:
    p, step = o.problem, drawn(o.problem, seed=seed)
    b = np.zeros(p.b.shape) if o.b is None else o.b
    gx, gW, gb = _all(gradients_of(device, o))
    assert step.b is not None

    def loss(x: Array, W: Array, b: Array) -> float:
        return float(
            np.vdot(o.gy, deconvolve(runner(device, p), p, x, W, b, Options(), CallContext()))
        )

    half = 0.5  # no need for less: y is linear in each operand, so that only rounding makes errors
    slopes = [
        loss(o.x + half * step.x, o.W, b) - loss(o.x - half * step.x, o.W, b),
        loss(o.x, o.W + half * step.W, b) - loss(o.x, o.W - half * step.W, b),
        loss(o.x, o.W, b + half * step.b) - loss(o.x, o.W, b - half * step.b),
    ]

    along = [float(np.vdot(*pair)) for pair in ((gx, step.x), (gW, step.W), (gb, step.b))]
    assert slopes == pytest.approx(along, rel=1e-9, abs=1e-9)


def test_of_an_empty_batch_gW_and_gb_are_zeros(device: CpuDevice) -> None:
    o = drawn(problem_of((0, 4, 3, 5), (4, 2, 3, 3), Geometry(groups=2)))

    y, gx, gW, gb = results_of(device, o)

    assert (y.shape, gx.shape) == ((0, 4, 5, 7), (0, 4, 3, 5))
    np.testing.assert_array_equal(gW, np.zeros((4, 2, 3, 3)))
    np.testing.assert_array_equal(gb, np.zeros(4))


@pytest.mark.parametrize("wanted", MASKS, ids=str)
def test_only_the_gradients_wanted_are_given_and_only_what_they_need_is_asked_for(
    device: CpuDevice, wanted: GradientRequest
) -> None:
    o = drawn(several_blocks())
    every = gradients_of(device, o)

    x, W = (o.x if wanted.gW else None), (o.W if wanted.gx else None)
    some = gradients(
        runner(device, o.problem), o.problem, x, W, o.gy, wanted, Options(), CallContext()
    )

    for name, gradient in every._asdict().items():
        if getattr(wanted, name):
            np.testing.assert_array_equal(getattr(some, name), gradient)
        else:
            assert getattr(some, name) is None


# What it does to its operands: nothing


def _strided(a: Array) -> Array:
    gaps = np.repeat(a, 3, axis=-1)[..., ::3]
    return np.repeat(gaps, 2, axis=0)[::2]


def _reversed(a: Array) -> Array:
    backwards = (slice(None, None, -1),) * a.ndim
    return a[backwards].copy()[backwards]


def _channels_last(a: Array) -> Array:
    return np.moveaxis(np.moveaxis(a, min(1, a.ndim - 1), -1).copy(), -1, min(1, a.ndim - 1))


def _unaligned(a: Array) -> Array:
    return np.frombuffer(b"." + a.tobytes(), a.dtype, offset=1).reshape(a.shape)


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "Fortran": np.asfortranarray,
    "reversed": _reversed,
    "strided": _strided,
    "channels last": _channels_last,
    "unaligned": _unaligned,
}


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), F32, F64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operands_may_lie_in_memory_in_any_way_and_are_never_written_to(
    device: CpuDevice, layout: str, dtype: DType
) -> None:
    plain = drawn(several_blocks((dtype, dtype)))

    def laid_out(a: Array) -> Array:
        other = LAYOUTS[layout](a)
        other.flags.writeable = False
        np.testing.assert_array_equal(other, a)
        return other

    assert plain.b is not None
    other = Operands(plain.problem, *map(laid_out, (plain.x, plain.W, plain.b, plain.gy)))

    # numpy has other kernels for other layouts, whose sums have another order
    for result, wanted in zip(results_of(device, other), results_of(device, plain), strict=True):
        scale = np.abs(wanted).max()
        assert_agrees(result / scale, wanted / scale, plain.problem.compute_type)


def test_one_element_may_stand_for_a_whole_operand(device: CpuDevice) -> None:
    p = several_blocks()
    repeated = [np.broadcast_to(np.float32(2), spec.shape) for spec in (p.x, p.W, p.b, p.y)]

    results = results_of(device, Operands(p, *repeated))

    for result, wanted in zip(results, defined(Operands(p, *repeated)), strict=True):
        np.testing.assert_array_equal(result, wanted)


# Two runs give the same bits


@pytest.mark.parametrize("x", ELEMENT_TYPES, ids=str)
def test_two_runs_give_the_same_bits(device: CpuDevice, x: DType) -> None:
    o = drawn(several_blocks((x, F32)))
    first = [result.tobytes() for result in results_of(device, o)]

    for _ in range(5):
        assert [result.tobytes() for result in results_of(device, o)] == first


def test_calls_from_many_threads_give_the_bits_that_each_would_give_alone() -> None:
    device, callers_count = CpuDevice(3), 8
    calls = [drawn(several_blocks(), seed=seed) for seed in range(callers_count)]
    alone = [[result.tobytes() for result in results_of(device, o)] for o in calls]
    start = threading.Barrier(callers_count)

    def run(o: Operands) -> list[bytes]:
        start.wait(TIMEOUT_S)
        return [result.tobytes() for result in results_of(device, o)]

    with ThreadPoolExecutor(callers_count) as pool:
        together = list(pool.map(run, calls))
    device.close()

    assert together == alone


# How it ends early


class WatchedCall(CallContext):
    """Counts how often it is asked, and ends when it has been asked so often."""

    def __init__(self, end_at: int) -> None:
        super().__init__()
        self._counting = threading.Lock()
        self._end_at = end_at
        self.checks_count = 0

    def check(self) -> None:
        with self._counting:
            self.checks_count += 1
            if self.checks_count == self._end_at:
                self.cancel()
        super().check()


Run = Callable[[CpuDevice, Operands, CallContext], object]

RUNS: dict[str, Run] = {
    "y": lambda device, o, call: y_of(device, o, call=call),
    "gx": lambda device, o, call: gradients_of(
        device, o, wanted=GradientRequest(gW=False, gb=False), call=call
    ),
    "gW": lambda device, o, call: gradients_of(
        device, o, wanted=GradientRequest(gx=False, gb=False), call=call
    ),
}


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest) -> Run:
    """A function that runs one of the three products."""
    return RUNS[request.param]


def test_a_cancelled_call_ends_before_each_thread_begins_another_block(
    device: CpuDevice, run: Run
) -> None:
    o = drawn(several_blocks())
    whole, cut = WatchedCall(end_at=10**9), WatchedCall(end_at=2)
    run(device, o, whole)
    assert whole.checks_count > 2 + device.info.threads_count, "the problem is too small to tell"

    with pytest.raises(CallCancelledError, match="the caller gave the call up"):
        run(device, o, cut)

    assert cut.checks_count <= 2 + device.info.threads_count


def test_a_call_past_its_deadline_computes_nothing(device: CpuDevice, run: Run) -> None:
    with pytest.raises(DeadlineError, match="deadline passed"):
        run(device, drawn(several_blocks()), CallContext(timeout_s=0))


@pytest.mark.parametrize(
    ("call", "error"),
    [(WatchedCall(end_at=2), CallCancelledError), (CallContext(timeout_s=0), DeadlineError)],
    ids=["cancelled", "expired"],
)
def test_after_a_call_that_ended_early_the_device_works_as_before(
    device: CpuDevice, call: CallContext, error: type[Exception]
) -> None:
    o = drawn(several_blocks())
    before = y_of(device, o)
    with pytest.raises(error):
        y_of(device, o, call=call)

    np.testing.assert_array_equal(y_of(device, o), before)


# What it takes


def test_what_no_memory_holds_is_an_error_and_the_device_works_on(device: CpuDevice) -> None:
    # y has 2^62 bytes, beyond any address space, and its place must have another layout meanwhile
    p = problem_of((1, 1, 2, 2), (1, 1, 1, 1), Geometry(stride=(2**30 - 1, 2**30 - 1)))
    one = np.ones((1, 1, 1, 1), F32)
    place = np.broadcast_to(np.ones((), F32), p.y.shape)

    with pytest.raises(ExhaustedError, match=r"has no memory for x .*, y float32 of shape"):
        device.run(
            DECONVOLVE,
            p,
            {"x": np.ones(p.x.shape, F32), "w": one},
            {"y": place},
            Options(),
            CallContext(),
        )

    small = drawn(several_blocks())
    assert y_of(device, small).shape == small.problem.y.shape


def test_operands_without_bytes_take_no_time_whatever_they_declare(device: CpuDevice) -> None:
    k = 2**29  # a loop over the filter's 2^58 taps would not end
    geometry = Geometry(pad=(k // 2 - 1, k // 2 - 1))
    p = problem_of((2, 0, 3, 3), (0, 2, k, k), geometry)
    b = np.array([5, 7], np.float32)
    o = Operands(p, np.zeros(p.x.shape, F32), np.zeros(p.W.shape, F32), b, np.ones(p.y.shape, F32))

    y, gx, gW, gb = results_of(device, o)

    assert p.output == (4, 4)
    np.testing.assert_array_equal(y, np.broadcast_to(b[:, None, None], p.y.shape))
    assert (gx.shape, gW.shape) == (p.x.shape, p.W.shape)
    np.testing.assert_array_equal(gb, [32, 32])


# What it is


def test_small_calls_are_computed_by_the_thread_that_makes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: set[int] = set()
    set_y = BlockProducts.set_y

    def noted(products: BlockProducts, *task: Any) -> Task:
        threads.add(threading.get_ident())
        if is_alone:
            time.sleep(0.01)  # so that helpers had the time to take a task
        else:
            wait_until(lambda: len(threads) > 1)
        yield from set_y(products, *task)

    monkeypatch.setattr(BlockProducts, "set_y", noted)
    monkeypatch.setattr(cpu_device, "is_small", is_small)
    device = CpuDevice(3)
    for image, is_alone in ((8, True), (100, False)):
        x, W = np.ones((1, 4, image, image), np.float32), np.ones((4, 8, 3, 3), np.float32)
        problem = Problem(spec_of(x), spec_of(W), Geometry())
        threads.clear()
        y = deconvolve(device, problem, x, W, None, Options(), CallContext())
        np.testing.assert_allclose(y, definition.deconvolve(problem, x, W))
        assert (threads == {threading.get_ident()}) == is_alone
    device.close()


def test_a_device_says_what_it_is() -> None:
    device = CpuDevice(3)

    info = device.info

    assert (info.id, info.threads_count, info.calls_count) == ("cpu", 3, 3)
    assert info.name
    assert 0 < info.budget_bytes <= info.memory_bytes
    device.close()


def test_a_device_has_a_thread_for_each_processor_unless_told() -> None:
    device = CpuDevice()

    assert device.info.threads_count >= 1
    device.close()


def test_a_closed_device_leaves_no_thread_behind() -> None:
    before = set(threading.enumerate())
    device = CpuDevice(4)
    y_of(device, drawn(several_blocks()))

    device.close()

    assert set(threading.enumerate()) == before


def test_each_options_value_gives_the_same_result(device: CpuDevice) -> None:
    o = drawn(several_blocks())
    deterministic = Options(cudnn_deterministic=True, autotune=True, allow_tf32=True)

    y = y_of(device, o, options=deterministic)

    np.testing.assert_array_equal(y, y_of(device, o))
    assert math.prod(y.shape) > 0
