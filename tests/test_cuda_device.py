"""The CUDA device on a card: right whatever is asked, the same again where that is promised."""

from __future__ import annotations

import math
import mmap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks.random_problems import RandomProblem, draw_problem
from deconvd.direct.connection_errors import ConnectionBrokenError
from deconvd.direct.frame_stream import FrameStream, report_progress
from deconvd.errors import CallCancelledError, DeadlineError, ExhaustedError
from deconvd.model.dtypes import ELEMENT_TYPES, Array, DType
from deconvd.model.geometry import Geometry
from deconvd.model.gradients import Gradients
from deconvd.model.operation import DECONVOLVE, DECONVOLVE_GRAD
from deconvd.model.options import Options, UseCudnn, UseCudnnTensorCore
from deconvd.model.problem import Problem, TensorSpec, spec_of
from deconvd.wire.ledger import METADATA_KEY, OVERLAP_ENTRY
from deconvd_server.call.context import CallContext
from deconvd_server.call.ledger import Stage
from deconvd_server.device import Operand
from deconvd_server.device import arriving as device_arriving
from deconvd_server.device.arriving import ArrivalTimeoutError, wait_for
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.device.cuda.plan import Product
from deconvd_server.device.cuda.plans.choice import Choice
from deconvd_server.device.cuda.plans.tuner import Tuner
from deconvd_server.transports.direct.write_progress import WriteProgress
from tests import definition
from tests.devices import GradientRequest, deconvolve, gradients, make_arriving, runner
from tests.golden import GoldenCase, golden_cases, tolerance
from tests.stream_pairs import overlapped_streams

if TYPE_CHECKING:
    from deconvd_server.device.cuda.api.runtime import Graph, Stream
    from deconvd_server.device.cuda.device import CudaDevice, CudaLimits
    from deconvd_server.device.cuda.plans.casting import operands_of
    from deconvd_server.device.cuda.plans.plan_timer import open_plan_timer
else:
    pytest.importorskip("cupy")
    from deconvd_server.device.cuda.api.runtime import Graph, Stream
    from deconvd_server.device.cuda.device import CudaDevice, CudaLimits
    from deconvd_server.device.cuda.plans.casting import operands_of
    from deconvd_server.device.cuda.plans.plan_timer import open_plan_timer

pytestmark = pytest.mark.gpu

ACCEPTED = [case for case in golden_cases() if not case.rejected]
OPTIONS = [
    Options(),
    Options(cudnn_deterministic=True),
    Options(use_cudnn=UseCudnn.ALWAYS),
    Options(use_cudnn=UseCudnn.NEVER),
    Options(use_cudnn_tensor_core=UseCudnnTensorCore.NEVER),
    Options(use_cudnn=UseCudnn.NEVER, use_cudnn_tensor_core=UseCudnnTensorCore.NEVER),
]
EVERY_OPTIONS = pytest.mark.parametrize(
    "options", OPTIONS, ids=["default", "deterministic", "always", "never", "plain", "plain, never"]
)
SOAK_S = 60

ERRORS = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-5, "float64": 1e-12}
"""Largest error over largest element: some roundings of one element; TF32 would exceed float32's."""


@pytest.fixture(scope="module")
def cuda() -> Iterator[CudaDevice]:
    device = CudaDevice(0)
    yield device
    device.close()


@pytest.fixture(scope="module")
def cpu() -> Iterator[CpuDevice]:
    device = CpuDevice()
    yield device
    device.close()


def golden_problem(case: GoldenCase) -> Problem:
    geometry = Geometry.from_arguments(**case.params)
    return Problem(spec_of(case.arrays["x"]), spec_of(case.arrays["W"]), geometry)


@EVERY_OPTIONS
@pytest.mark.parametrize("case", ACCEPTED, ids=str)
def test_results_agree_with_chainer(cuda: CudaDevice, case: GoldenCase, options: Options) -> None:
    a, problem = case.arrays, golden_problem(case)

    by = runner(cuda, problem)
    y = deconvolve(by, problem, a["x"], a["W"], a.get("b"), options, CallContext())
    found = gradients(
        by, problem, a["x"], a["W"], a["gy"], GradientRequest(), options, CallContext()
    )

    np.testing.assert_allclose(y, a["y"], **vars(tolerance(case, 0)))
    expected = Gradients(
        *(
            definition.gradients(problem, a["x"], a["W"], a["gy"])
            if case.gradients_fail
            else (a["gx"], a["gW"], a.get("gb"))
        )
    )
    for result, wide in zip(found, expected, strict=True):
        if wide is not None:
            assert result is not None
            np.testing.assert_allclose(result, wide, **vars(tolerance(case, 1)))


def axis(random: np.random.Generator) -> tuple[int, ...]:
    """Return image, kernel, stride, pad, dilate and outsize: a third of them smaller than natural."""
    while True:
        image, kernel = random.integers(1, 14), random.integers(1, 6)
        stride, pad, dilate = random.integers(1, 5), random.integers(0, 4), random.integers(1, 4)
        natural = stride * (image - 1) + dilate * (kernel - 1) + 1 - 2 * pad
        outsize = natural + random.integers(-(stride - 1), stride)
        if outsize >= 1:
            return tuple(int(v) for v in (image, kernel, stride, pad, dilate, outsize))


def random_problem(seed: int) -> Problem:
    random = np.random.default_rng(seed)
    h, w = axis(random), axis(random)
    groups = int(random.choice([1, 1, 1, 2, 4]))
    ins, outs = (int(random.choice([1, 2, 3, 8, 16, 24])) for _ in range(2))
    x_type = ELEMENT_TYPES[seed % 4]
    W_type = x_type if random.random() < 0.7 else ELEMENT_TYPES[random.integers(4)]
    stride, pad, dilate, outsize = zip(h[2:], w[2:], strict=True)
    return Problem(
        TensorSpec((int(random.integers(1, 5)), groups * ins, h[0], w[0]), x_type),
        TensorSpec((groups * ins, outs, h[1], w[1]), W_type),
        Geometry(stride, pad, outsize, dilate, groups),
    )


def random_array(spec: TensorSpec, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(spec.shape).astype(spec.dtype)


def assert_near(found: Array, expected: Array, problem: Problem) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    narrowest = min((problem.x.dtype, problem.W.dtype, found.dtype), key=lambda t: t.itemsize)
    if narrowest.itemsize == 2 and found.dtype.itemsize > 2:
        narrowest = found.dtype  # products are exact in the compute type
    wide = expected.astype(np.float64)
    error = np.abs(found.astype(np.float64) - wide).max() / max(np.abs(wide).max(), 1e-3)
    assert error < ERRORS[narrowest.name]


@pytest.mark.parametrize("seed", range(320))
def test_results_agree_with_the_cpu(cuda: CudaDevice, cpu: CpuDevice, seed: int) -> None:
    problem, options = random_problem(seed), OPTIONS[seed // 4 % len(OPTIONS)]
    x, W, gy = random_array(problem.x), random_array(problem.W, 1), random_array(problem.y, 2)
    b = random_array(problem.b, 3) if seed % 3 else None

    y = deconvolve(cuda, problem, x, W, b, options, CallContext())
    found = gradients(cuda, problem, x, W, gy, GradientRequest(), options, CallContext())

    assert_near(y, deconvolve(cpu, problem, x, W, b, options, CallContext()), problem)
    expected = gradients(cpu, problem, x, W, gy, GradientRequest(), options, CallContext())
    for result, wanted in zip(found, expected, strict=True):
        assert result is not None
        assert wanted is not None
        assert_near(result, wanted, problem)


@pytest.mark.parametrize("n", [0, 2])
@pytest.mark.parametrize("channels", [(0, 3), (3, 0)])
def test_empty_operands_give_what_the_cpu_gives(
    cuda: CudaDevice, cpu: CpuDevice, n: int, channels: tuple[int, int]
) -> None:
    float32 = np.dtype(np.float32)
    ins, outs = channels
    x_spec, W_spec = TensorSpec((n, ins, 3, 4), float32), TensorSpec((ins, outs, 3, 3), float32)
    problem = Problem(x_spec, W_spec, Geometry())
    x, W, b, gy = (random_array(spec) for spec in (problem.x, problem.W, problem.b, problem.y))

    on_card, on_host = (runner(device, problem) for device in (cuda, cpu))
    y = deconvolve(on_card, problem, x, W, b, Options(), CallContext())
    found = gradients(on_card, problem, x, W, gy, GradientRequest(), Options(), CallContext())

    assert cuda.footprint_bytes(DECONVOLVE, problem, ("w", "x"), ("y",)) == 0
    np.testing.assert_array_equal(
        y, deconvolve(on_host, problem, x, W, b, Options(), CallContext())
    )
    for result, expected in zip(
        found,
        gradients(on_host, problem, x, W, gy, GradientRequest(), Options(), CallContext()),
        strict=True,
    ):
        np.testing.assert_array_equal(result, expected)


def layer(dtype: DType, n: int = 8, ins: int = 64, outs: int = 32, image: int = 32) -> Problem:
    return Problem(
        TensorSpec((n, ins, image, image), dtype),
        TensorSpec((ins, outs, 4, 4), dtype),
        Geometry(stride=(2, 2), pad=(1, 1)),
    )


@pytest.mark.parametrize("autotune", [False, True])
@pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=str)
def test_deterministic_runs_are_equal_bit_by_bit(
    cuda: CudaDevice, dtype: DType, autotune: bool
) -> None:
    problem = layer(dtype)
    options = Options(cudnn_deterministic=True, autotune=autotune)
    x, W, gy = random_array(problem.x), random_array(problem.W, 1), random_array(problem.y, 2)

    def run() -> tuple[bytes, ...]:
        y = deconvolve(cuda, problem, x, W, None, options, CallContext())
        found = gradients(cuda, problem, x, W, gy, GradientRequest(), options, CallContext())
        return tuple(array.tobytes() for array in (y, *found) if array is not None)

    assert len({run() for _ in range(5)}) == 1


def test_status_tells_of_plans_and_buffers(cuda: CudaDevice) -> None:
    caches = {cache.name: cache for cache in cuda.caches}
    assert set(caches) == {"plans", "device buffers", "pinned buffers", "host buffers"}
    for cache in caches.values():
        assert 0 <= cache.size_bytes <= cache.limit_bytes


@pytest.mark.parametrize(
    "wanted",
    [
        GradientRequest(True, False, False),
        GradientRequest(False, True, False),
        GradientRequest(False, False, True),
        GradientRequest(True, False, True),
    ],
    ids=["gx", "gW", "gb", "gx and gb"],
)
def test_only_the_wanted_gradients_are_given(
    cuda: CudaDevice, cpu: CpuDevice, wanted: GradientRequest
) -> None:
    problem = layer(np.dtype(np.float32), n=1)
    x = random_array(problem.x) if wanted.gW else None
    W = random_array(problem.W, 1) if wanted.gx else None
    gy = random_array(problem.y, 2)

    found = gradients(cuda, problem, x, W, gy, wanted, Options(), CallContext())

    expected = gradients(cpu, problem, x, W, gy, wanted, Options(), CallContext())
    for result, right in zip(found, expected, strict=True):
        assert (result is None) == (right is None)
        if result is not None and right is not None:
            assert_near(result, right, problem)


def test_a_large_call_of_strided_read_only_operands_is_right(
    cuda: CudaDevice, cpu: CpuDevice
) -> None:
    problem = layer(np.dtype(np.float32), n=24, image=64)
    x = np.asfortranarray(random_array(problem.x))[:, ::-1]
    W = random_array(problem.W, 1)[::-1, :, :, ::-1]
    x.flags.writeable = W.flags.writeable = False

    y = deconvolve(cuda, problem, x, W, None, Options(), CallContext())

    assert problem.x.nbytes > 16 << 20
    assert_near(y, deconvolve(cpu, problem, x, W, None, Options(), CallContext()), problem)


@pytest.fixture
def registered(cuda: CudaDevice) -> Iterator[Array]:
    """Memory that is shared with clients, as the card knows it."""
    memory = np.frombuffer(mmap.mmap(-1, 96 << 20), np.uint8)
    undo = cuda.register(memory.ctypes.data, memory.nbytes)
    yield memory
    undo()


@contextmanager
def captured(graphs: list[Graph]) -> Iterator[None]:
    """Note the graphs that are captured in the block."""
    capture = Stream.capture

    def noted(stream: Stream, work: Callable[[], None]) -> Graph:
        graphs.append(capture(stream, work))
        return graphs[-1]

    with pytest.MonkeyPatch.context() as noting:
        noting.setattr(Stream, "capture", noted)
        yield


def view_of(memory: Array, begin: int, spec: TensorSpec) -> Array:
    return memory[begin : begin + spec.nbytes].view(spec.dtype).reshape(spec.shape)


@pytest.mark.parametrize("n", [1, 2, 24], ids=["mirrored", "small", "large"])
@pytest.mark.parametrize("where", range(8))
def test_registered_arrays_give_the_same_bits(
    cuda: CudaDevice, registered: Array, n: int, where: int
) -> None:
    """Any of x, W and y lies in registered memory, at no multiple of 16 bytes; calls repeat until they are captured."""
    problem = layer(np.dtype(np.float32), n=n, ins=32, outs=32, image=16 if n == 1 else 64)
    options = Options(cudnn_deterministic=True)
    specs = (problem.x, problem.W, problem.y)
    arrays, begin = [random_array(spec, seed) for seed, spec in enumerate(specs)], 4
    expected = deconvolve(cuda, problem, arrays[0], arrays[1], None, options, CallContext())
    for bit, spec in enumerate(specs):
        if where >> bit & 1:
            place = registered[begin : begin + spec.nbytes].view(spec.dtype).reshape(spec.shape)
            begin += spec.nbytes + 4
            place[...] = arrays[bit]
            arrays[bit] = place
    x, W, y = arrays

    for _ in range(4):
        y[...] = np.nan
        deconvolve(cuda, problem, x, W, None, options, CallContext(), y)
        if n == 24 and where & 5 == 5:  # in parts, for which another plan may be chosen
            assert_near(y, expected, problem)
        else:
            np.testing.assert_array_equal(y, expected)

    gx_place = np.empty(problem.x.shape, problem.x.dtype)
    found = gradients(
        cuda, problem, x, W, y, GradientRequest(), options, CallContext(), {"gx": gx_place}
    )
    x, W, gy = (np.array(array) for array in (x, W, y))
    right = gradients(cuda, problem, x, W, gy, GradientRequest(), options, CallContext())
    for array, expected_array in zip(found, right, strict=True):
        assert array is not None
        assert expected_array is not None
        np.testing.assert_array_equal(array, expected_array)


@pytest.mark.parametrize("W_is_resident", [False, True])
@pytest.mark.parametrize(("n", "count"), [(24, 8), (25, 5), (23, 1)])
def test_a_large_call_of_registered_arrays_is_computed_in_parts_of_its_samples(
    cuda: CudaDevice, registered: Array, n: int, count: int, W_is_resident: bool
) -> None:
    problem = layer(np.dtype(np.float32), n=n, ins=32, outs=32, image=64)
    options = Options(cudnn_deterministic=True)
    x = registered[: problem.x.nbytes].view(np.float32).reshape(problem.x.shape)
    y = registered[-problem.y.nbytes :].view(np.float32).reshape(problem.y.shape)
    x[...], y[...] = random_array(problem.x), np.nan
    W, b = random_array(problem.W, 1), random_array(problem.b, 2)
    W_tensor = cuda.empty(problem.W)
    cuda.write(W_tensor, W, CallContext())

    for _ in range(3):
        deconvolve(cuda, problem, x, W_tensor if W_is_resident else W, b, options, CallContext(), y)

    part = replace_batch(problem, n // count)
    for one in np.split(np.arange(n), count):
        alone = deconvolve(cuda, part, x[one].copy(), W, b, options, CallContext())
        np.testing.assert_array_equal(y[one], alone)
    cuda.free(W_tensor)


def test_a_call_in_parts_reads_and_writes_the_arrays_that_it_was_given(
    cuda: CudaDevice, registered: Array
) -> None:
    """Captured once, and then with other elements there, elsewhere, and with W outside."""
    graphs: list[Graph] = []
    problem = layer(np.dtype(np.float32), n=16, ins=32, outs=32, image=64)
    options = Options(cudnn_deterministic=True)
    xs = [view_of(registered, begin, problem.x) for begin in (0, problem.x.nbytes + 512)]
    end = registered.size - problem.y.nbytes
    ys = [view_of(registered, begin, problem.y) for begin in (end, end - (16 << 20))]
    for seed in range(12):
        x, y = xs[seed // 2 % 2], ys[seed // 3 % 2]
        x[...], W = random_array(problem.x, seed), random_array(problem.W, seed)
        y[...] = np.nan
        call = CallContext()

        with captured(graphs):
            deconvolve(cuda, problem, x, W, None, options, call, y)

        for part in (slice(2), slice(-2, None)):
            alone = deconvolve(
                cuda, replace_batch(problem, 2), x[part].copy(), W, None, options, CallContext()
            )
            np.testing.assert_array_equal(y[part], alone)
        assert not np.isnan(y).any()
        ((_, ledger),) = call.ledger.as_metadata()
        assert all(f"{stage}_us=" in ledger for stage in ("upload", "compute", "download"))
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("n", "wanted", "W_is"),
    [
        (5, GradientRequest(), "registered"),
        (6, GradientRequest(), "outside"),
        (7, GradientRequest(), "resident"),
        (8, GradientRequest(gW=False, gb=False), "registered"),
        (9, GradientRequest(gW=False, gb=False), "outside"),
        (10, GradientRequest(gW=False, gb=False), "resident"),
        (11, GradientRequest(gx=False), "registered"),
        (12, GradientRequest(gx=False, gW=False), "registered"),
    ],
)
def test_large_gradients_of_registered_arrays_are_computed_in_steps(
    cuda: CudaDevice,
    registered: Array,
    n: int,
    wanted: GradientRequest,
    W_is: str,
) -> None:
    """Captured once, and then with other elements there, elsewhere, and with small tensors outside."""
    graphs: list[Graph] = []
    problem = layer(np.dtype(np.float32), n=n, ins=32, outs=32, image=64)
    options = Options(cudnn_deterministic=True)
    W_tensor = cuda.empty(problem.W)
    for seed in range(6):
        x, W, gy = (
            random_array(spec, 10 * seed + number)
            for number, spec in enumerate((problem.x, problem.W, problem.y))
        )
        right = gradients(cuda, problem, x, W, gy, wanted, options, CallContext())
        cuda.write(W_tensor, W, CallContext())
        begin, lent = 4096 * (seed // 3), []
        for spec in (problem.x, problem.y, problem.x, problem.W, problem.W):
            lent.append(view_of(registered, begin, spec))
            begin += spec.nbytes + 512
        lent_x, lent_gy, gx, lent_W, gW = lent
        lent_x[...], lent_gy[...], lent_W[...], gx[...], gW[...] = x, gy, W, np.nan, np.nan
        Ws: dict[str, Operand] = {"registered": lent_W, "outside": W, "resident": W_tensor}
        out = {"gx": gx} | ({"gw": gW} if W_is == "registered" else {})
        call = CallContext()

        with captured(graphs):
            found = gradients(cuda, problem, lent_x, Ws[W_is], lent_gy, wanted, options, call, out)

        for array, expected in zip(found, right, strict=True):
            assert (array is None) == (expected is None)
            if array is not None and expected is not None:
                np.testing.assert_array_equal(array, expected)
        assert (not wanted.gx) or found.gx is gx
        ledger = call.ledger.as_text()
        assert all(f"{stage}_us=" in ledger for stage in ("upload", "compute", "download"))
    cuda.free(W_tensor)
    assert len(graphs) == 1


def test_gradients_whose_arrays_overlap_leave_the_card_in_order(
    cuda: CudaDevice, registered: Array
) -> None:
    problem = layer(np.dtype(np.float32), n=8, ins=32, outs=32, image=64)
    options = Options(cudnn_deterministic=True)
    gy, W = random_array(problem.y), random_array(problem.W, 1)
    wanted = GradientRequest(gW=False, gb=False)
    right = gradients(cuda, problem, None, W, gy, wanted, options, CallContext()).gx
    lent_gy = view_of(registered, 0, problem.y)
    for begin in (1 << 20, 0, problem.y.nbytes):
        for _ in range(3):
            lent_gy[...] = gy
            gx = view_of(registered, begin, problem.x)
            gradients(cuda, problem, None, W, lent_gy, wanted, options, CallContext(), {"gx": gx})
    assert right is not None
    np.testing.assert_array_equal(gx, right)  # where nothing overlaps


def test_a_graph_follows_memory_that_is_registered_anew(cuda: CudaDevice) -> None:
    problem = layer(np.dtype(np.float32), n=24, ins=32, outs=32, image=64)
    W, options = random_array(problem.W), Options(cudnn_deterministic=True)
    memory = np.frombuffer(mmap.mmap(-1, problem.x.nbytes + problem.y.nbytes), np.uint8)
    x, y = view_of(memory, 0, problem.x), view_of(memory, problem.x.nbytes, problem.y)
    for seed in range(4):
        undo = cuda.register(memory.ctypes.data, memory.size)
        for again in range(3):
            x[...], y[...] = random_array(problem.x, 10 * seed + again), np.nan
            deconvolve(cuda, problem, x, W, None, options, CallContext(), y)
            alone = deconvolve(
                cuda, replace_batch(problem, 3), x[-3:].copy(), W, None, options, CallContext()
            )
            np.testing.assert_array_equal(y[-3:], alone)
            assert not np.isnan(y).any()
        undo()


def test_operands_that_overlap_are_read_where_they_are(cuda: CudaDevice, registered: Array) -> None:
    """Whatever is captured for one call must not take W's copy for a part of x, or the other way round."""
    problem = Problem(
        TensorSpec((64, 32, 32, 32), np.dtype(np.float32)),
        TensorSpec((32, 32, 3, 3), np.dtype(np.float32)),
        Geometry(),
    )
    options = Options(cudnn_deterministic=True)
    x, y = view_of(registered, 0, problem.x), view_of(registered, 32 << 20, problem.y)
    x[...] = random_array(problem.x)
    Ws = [view_of(registered, begin, problem.W) for begin in (0, 4096, x.nbytes, 4096, 0)]
    Ws[2][...] = random_array(problem.W, 1)
    for W in (W for W in Ws for _ in range(3)):
        y[...] = np.nan
        deconvolve(cuda, problem, x, W, None, options, CallContext(), y)
        part = replace_batch(problem, 16)
        alone = deconvolve(cuda, part, x[:16].copy(), W.copy(), None, options, CallContext())
        np.testing.assert_array_equal(y[:16], alone)


def write(
    client: FrameStream, x: Array, source: Array, steps_count: int, before_bytes: int = 0
) -> None:
    """Write x in steps, and tell of each."""
    step = len(x) // steps_count
    for end in range(step, len(x) + 1, step):
        x[end - step : end] = source[end - step : end]
        report_progress(client, before_bytes + x[:end].nbytes)


def write_both(client: FrameStream, operands: Sequence[Array], sources: Sequence[Array]) -> None:
    """Write W and then x, and tell of it."""
    (W, x), (W_source, x_source) = operands, sources
    write(client, W, W_source, 4)
    write(client, x, x_source, 8, W.nbytes)


def write_in_turn(client: FrameStream, pairs: Sequence[tuple[Array, Array]]) -> None:
    """Write arrays one behind the other, and tell of it."""
    before_bytes = 0
    for target, source in pairs:
        write(client, target, source, 2, before_bytes)
        before_bytes += target.nbytes


class TestEarlyCalls:
    """Calls whose x is still being written."""

    PROBLEM = layer(np.dtype(np.float32), n=24, ins=32, outs=32, image=64)
    OPTIONS = Options(cudnn_deterministic=True)
    W = random_array(PROBLEM.W, 1)

    @pytest.fixture
    def ends(self) -> Iterator[tuple[FrameStream, FrameStream]]:
        with overlapped_streams() as (client, server):
            yield client, server

    def arrays(self, registered: Array) -> tuple[Array, Array]:
        x = view_of(registered, 0, self.PROBLEM.x)
        y = view_of(registered, registered.size - self.PROBLEM.y.nbytes, self.PROBLEM.y)
        x[...], y[...] = np.nan, np.nan
        return x, y

    def check(self, cuda: CudaDevice, y: Array, source: Array) -> None:
        right = deconvolve(cuda, self.PROBLEM, source, self.W, None, self.OPTIONS, CallContext())
        assert_near(y, right, self.PROBLEM)

    @pytest.mark.parametrize("steps_count", [1, 3, 24])
    @pytest.mark.parametrize("is_written_before", [False, True])
    def test_x_is_followed_while_it_is_written(
        self,
        cuda: CudaDevice,
        registered: Array,
        ends: tuple[FrameStream, FrameStream],
        monkeypatch: pytest.MonkeyPatch,
        steps_count: int,
        is_written_before: bool,
    ) -> None:
        client, server = ends
        x, y = self.arrays(registered)
        deconvolve(
            cuda, self.PROBLEM, x, self.W, None, self.OPTIONS, CallContext(), y
        )  # choose plans
        monkeypatch.setattr(device_arriving, "_GRACE_S", 10)
        for seed in range(4):
            x, y = self.arrays(registered)
            source = random_array(self.PROBLEM.x, seed)
            call = CallContext()
            (late_x,) = make_arriving(WriteProgress(server), x)
            writer = threading.Thread(target=write, args=(client, x, source, steps_count))
            writer.start()
            if is_written_before:
                writer.join()
            deconvolve(cuda, self.PROBLEM, late_x, self.W, None, self.OPTIONS, call, y)
            writer.join()

            self.check(cuda, y, source)
            assert not server.poll(0)  # all that was said was heard
            assert OVERLAP_ENTRY in dict(call.ledger.as_metadata())[METADATA_KEY]

    @pytest.mark.parametrize(
        "problem", [PROBLEM, layer(np.dtype(np.float16), n=64, ins=1024, outs=512, image=4)]
    )
    def test_W_may_be_written_before_x(
        self,
        cuda: CudaDevice,
        registered: Array,
        ends: tuple[FrameStream, FrameStream],
        monkeypatch: pytest.MonkeyPatch,
        problem: Problem,
    ) -> None:
        client, server = ends
        x = view_of(registered, 0, problem.x)
        W = view_of(registered, x.nbytes, problem.W)
        y = view_of(registered, registered.size - problem.y.nbytes, problem.y)
        monkeypatch.setattr(device_arriving, "_GRACE_S", 10)
        for seed in range(4):
            x[...], W[...], y[...] = np.nan, np.nan, np.nan
            sources = random_array(problem.W, seed + 9), random_array(problem.x, seed)
            late_W, late_x = make_arriving(WriteProgress(server), W, x)
            writer = threading.Thread(target=write_both, args=(client, (W, x), sources))
            later = threading.Timer(0.05, writer.start)
            later.start()
            deconvolve(cuda, problem, late_x, late_W, None, self.OPTIONS, CallContext(), y)
            later.join()
            writer.join()

            W_source, x_source = sources
            right = deconvolve(cuda, problem, x_source, W_source, None, self.OPTIONS, CallContext())
            assert_near(y, right, problem)

    @pytest.mark.parametrize(
        "wanted",
        [GradientRequest(), GradientRequest(gW=False, gb=False), GradientRequest(gx=False)],
        ids=["all", "gx", "gW and gb"],
    )
    @pytest.mark.parametrize("W_is_small", [False, True])
    def test_gradients_follow_what_is_written_for_them(
        self,
        cuda: CudaDevice,
        registered: Array,
        ends: tuple[FrameStream, FrameStream],
        monkeypatch: pytest.MonkeyPatch,
        wanted: GradientRequest,
        W_is_small: bool,
    ) -> None:
        client, server = ends
        problem = layer(np.dtype(np.float32), n=14, ins=32, outs=2 if W_is_small else 32, image=64)
        monkeypatch.setattr(device_arriving, "_GRACE_S", 10)
        for seed in range(4):
            sources = [
                random_array(spec, 7 * seed + number)
                for number, spec in enumerate((problem.W, problem.y, problem.x))
            ]
            W, gy, x = sources
            expected = gradients(cuda, problem, x, W, gy, wanted, self.OPTIONS, CallContext())
            begin, lent = 0, []
            for source in (*sources, x):
                lent.append(view_of(registered, begin, spec_of(source)))
                begin += source.nbytes + 512
                lent[-1][...] = np.nan
            lent_W, lent_gy, lent_x, gx = lent
            pairs = {"w": (lent_W, W), "gy": (lent_gy, gy), "x": (lent_x, x)}
            if W_is_small or not wanted.gx:  # W comes with the call, or is not used
                del pairs["w"]
            if not wanted.gW:
                del pairs["x"]
            late: dict[str, Operand] = {"x": lent_x, "w": W, "gy": lent_gy}
            targets = [target for target, _ in pairs.values()]
            late |= dict(zip(pairs, make_arriving(WriteProgress(server), *targets), strict=True))
            call = CallContext()
            writer = threading.Thread(target=write_in_turn, args=(client, [*pairs.values()]))
            later = threading.Timer(0.05, writer.start)
            later.start()
            found = gradients(
                cuda,
                problem,
                late["x"],
                late["w"],
                late["gy"],
                wanted,
                self.OPTIONS,
                call,
                {"gx": gx},
            )
            later.join()
            writer.join()

            for array, right in zip(found, expected, strict=True):
                assert (array is None) == (right is None)
                if array is not None and right is not None:
                    np.testing.assert_array_equal(array, right)
            assert OVERLAP_ENTRY in call.ledger.as_text()

    def test_a_slow_writer_does_not_keep_the_card(
        self, cuda: CudaDevice, registered: Array, ends: tuple[FrameStream, FrameStream]
    ) -> None:
        client, server = ends
        x, y = self.arrays(registered)
        x[...] = source = random_array(self.PROBLEM.x)
        deconvolve(
            cuda, self.PROBLEM, x, self.W, None, self.OPTIONS, CallContext(), y
        )  # choose plans
        (late_x,) = make_arriving(WriteProgress(server), x)
        report_progress(client, x[:5].nbytes)

        begun_s = time.monotonic()
        with pytest.raises(ArrivalTimeoutError):
            deconvolve(cuda, self.PROBLEM, late_x, self.W, None, self.OPTIONS, CallContext(), y)
        assert time.monotonic() - begun_s < 30  # and not for as long as the client is silent

        report_progress(client, x.nbytes)
        call = CallContext()
        there = wait_for(late_x, call)
        deconvolve(cuda, self.PROBLEM, there, self.W, None, self.OPTIONS, call, y)
        self.check(cuda, y, source)
        assert OVERLAP_ENTRY not in dict(call.ledger.as_metadata())[METADATA_KEY]

    def test_a_writer_that_goes_leaves_the_card(
        self, cuda: CudaDevice, registered: Array, ends: tuple[FrameStream, FrameStream]
    ) -> None:
        client, server = ends
        x, y = self.arrays(registered)
        for told_bytes in (0, x[:5].nbytes):
            (late_x,) = make_arriving(WriteProgress(server), x)
            report_progress(client, told_bytes)
            if told_bytes:
                client.shutdown()
                with pytest.raises(ConnectionBrokenError):
                    deconvolve(
                        cuda, self.PROBLEM, late_x, self.W, None, self.OPTIONS, CallContext(), y
                    )
            else:
                with pytest.raises(ArrivalTimeoutError):
                    deconvolve(
                        cuda, self.PROBLEM, late_x, self.W, None, self.OPTIONS, CallContext(), y
                    )

        x[...] = source = random_array(self.PROBLEM.x)
        deconvolve(cuda, self.PROBLEM, x, self.W, None, self.OPTIONS, CallContext(), y)
        self.check(cuda, y, source)

    @pytest.mark.parametrize("is_reached", [False, True])
    def test_x_that_cannot_be_followed_is_waited_for_elsewhere(
        self,
        cuda: CudaDevice,
        registered: Array,
        ends: tuple[FrameStream, FrameStream],
        is_reached: bool,
    ) -> None:
        """It is in memory that the card does not reach, or another call is under way."""
        _, server = ends
        x, y = self.arrays(registered)
        x, y = (x, y) if is_reached else (x.copy(), y.copy())
        (late_x,) = make_arriving(WriteProgress(server), x)

        begun_s = time.monotonic()
        with (
            cuda._lend_lane(CallContext()) if is_reached else nullcontext(),
            pytest.raises(ArrivalTimeoutError),
        ):
            deconvolve(cuda, self.PROBLEM, late_x, self.W, None, self.OPTIONS, CallContext(), y)
        assert time.monotonic() - begun_s < 30


def test_memory_that_is_lent_is_all_zeros_and_none_of_what_calls_use(cuda: CudaDevice) -> None:
    problem = layer(np.dtype(np.float32), n=24)
    for _ in range(2):
        y = deconvolve(
            cuda,
            problem,
            random_array(problem.x),
            random_array(problem.W),
            None,
            Options(),
            CallContext(),
        )
    spec, before = spec_of(np.asarray(y)), cuda.stats

    lent = cuda.lend(spec.nbytes)

    assert not np.any(cuda.read(lent.tensor(spec, 0), CallContext()))
    assert cuda.stats.held_bytes == before.held_bytes + spec.nbytes
    lent.free()
    assert cuda.stats.held_bytes == before.held_bytes


def test_a_kind_of_call_that_comes_again_gives_the_new_operands_results(
    cuda: CudaDevice, cpu: CpuDevice
) -> None:
    problem = layer(np.dtype(np.float32), n=1, ins=4, outs=4, image=8)
    W, b = random_array(problem.W, 1), random_array(problem.b, 2)
    for seed in range(12):
        x = random_array(problem.x, seed)
        y = deconvolve(cuda, problem, x, W, b, Options(), CallContext())
        assert_near(y, deconvolve(cpu, problem, x, W, b, Options(), CallContext()), problem)


def test_tuned_plans_are_right_and_are_chosen_once(cuda: CudaDevice, cpu: CpuDevice) -> None:
    problem = layer(np.dtype(np.float16), n=2)
    x, W, gy = random_array(problem.x), random_array(problem.W, 1), random_array(problem.y, 2)
    options = Options(autotune=True)
    chosen = cuda.stats.plans.chosen_count
    for _ in range(3):
        y = deconvolve(cuda, problem, x, W, None, options, CallContext())
        found = gradients(cuda, problem, x, W, gy, GradientRequest(), options, CallContext())
    assert cuda.stats.plans.chosen_count == chosen + 3
    assert_near(y, deconvolve(cpu, problem, x, W, None, options, CallContext()), problem)
    expected = gradients(cpu, problem, x, W, gy, GradientRequest(), options, CallContext())
    for result, right in zip(found, expected, strict=True):
        assert result is not None
        assert right is not None
        assert_near(result, right, problem)


def test_a_restarted_device_chooses_nothing_that_it_knew(tmp_path: Path) -> None:
    problems = [layer(dtype, n=1) for dtype in ELEMENT_TYPES]

    def run() -> tuple[list[bytes], int, int]:
        device = CudaDevice(0, plan_store=tmp_path)
        results = []
        for problem in problems:
            x, W, gy = (random_array(s) for s in (problem.x, problem.W, problem.y))
            options = Options(cudnn_deterministic=True)
            results.append(
                deconvolve(device, problem, x, W, None, options, CallContext()).tobytes()
            )
            gradients(device, problem, x, W, gy, GradientRequest(), options, CallContext())
        stats = device.stats.plans
        device.close()
        return results, stats.chosen_count, stats.restored_count

    cold, warm = run(), run()

    assert cold[1:] == (12, 0)
    assert warm[1:] == (0, 12)
    assert warm[0] == cold[0]


def test_two_devices_choose_the_same_for_deterministic_results() -> None:
    problems = [draw_problem(number) for number in range(24)]

    def run() -> list[tuple[Choice, bytes]]:
        device = CudaDevice(0)
        try:
            return [steady_result(device, drawn) for drawn in problems]
        finally:
            device.close()

    first, second = run(), run()

    for drawn, one, other in zip(problems, first, second, strict=True):
        assert one == other, drawn
        assert one[0].deterministic
        assert one[0].tuned_ms is None


def steady_result(device: CudaDevice, drawn: RandomProblem) -> tuple[Choice, bytes]:
    """Return the choice for a problem with deterministic results, and the bits of its result."""
    options = replace(drawn.options, cudnn_deterministic=True)
    result = product_of(device, drawn, random_operands(drawn), options)
    stream = device.make_stream()
    with device.activate():
        key = device.plan_key(drawn.product, drawn.problem, options)
        open_timer = partial(open_plan_timer, device.memory)
        choice = Tuner(device.candidates, open_timer, tuning_limit_s=5).choose(key, stream).choice
    device.release_stream(stream.pointer)
    return choice, result.tobytes()


def random_operands(drawn: RandomProblem) -> list[Array]:
    specs = operands_of(drawn.product, drawn.problem)
    return [random_array(spec, seed) for seed, spec in enumerate(specs)]


@pytest.mark.parametrize("number", range(24))
@pytest.mark.parametrize("is_steady", [False, True], ids=["default", "deterministic"])
def test_plans_that_the_cost_model_picks_are_right(
    cuda: CudaDevice, cpu: CpuDevice, number: int, is_steady: bool
) -> None:
    drawn = draw_problem(number)
    if drawn.flops > 3e8 or drawn.type_name == "tf32":
        pytest.skip("slow on a processor, or of another precision")
    operands = random_operands(drawn)
    options = replace(drawn.options, cudnn_deterministic=is_steady)
    found = product_of(cuda, drawn, operands, options)
    expected = product_of(cpu, drawn, operands, options).astype(np.float64)
    error = np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max()
    # the roundings of long sums add up
    assert error < ERRORS[found.dtype.name] * max(1.0, math.sqrt(terms_count(drawn) / 1000))


def terms_count(drawn: RandomProblem) -> int:
    """Return how many products each element of the result is a sum of, at most."""
    problem, taps = drawn.problem, math.prod(drawn.problem.kernel)
    return {
        Product.Y: problem.c_I // problem.groups * taps,
        Product.GX: problem.W.shape[1] * taps,
        Product.GW: problem.n * math.prod(problem.image),
    }[drawn.product]


def product_of(
    device: CudaDevice | CpuDevice,
    drawn: RandomProblem,
    operands: Sequence[Array],
    options: Options,
) -> Array:
    """Return a problem's one product, of the operands of its plan."""
    problem, (a, b) = drawn.problem, operands
    if drawn.product is Product.Y:
        return deconvolve(device, problem, a, b, None, options, CallContext())
    by_gx = drawn.product is Product.GX
    x = np.zeros(problem.x.shape, problem.x.dtype) if by_gx else a
    W = b if by_gx else np.zeros(problem.W.shape, problem.W.dtype)
    found = gradients(
        *(device, problem, x, W, a if by_gx else b),
        *(GradientRequest(), options, CallContext()),
    )
    result = found.gx if by_gx else found.gW
    assert result is not None
    return result


def test_a_damaged_blob_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    problem = layer(np.dtype(np.float32), n=1)
    x, W = random_array(problem.x), random_array(problem.W)
    for expected in (1, 1, 0):
        device = CudaDevice(0, plan_store=tmp_path)
        deconvolve(device, problem, x, W, None, Options(cudnn_deterministic=True), CallContext())
        assert device.stats.plans.chosen_count == expected
        device.close()
        (path,) = tmp_path.rglob("*.json")
        if not caplog.records:
            path.write_bytes(path.read_bytes().replace(b"checksum", b"chequesum"))
            caplog.clear()


def test_a_call_beyond_the_memory_fails_alone() -> None:
    device = CudaDevice(0, memory_limit_bytes=160 << 20)
    small, large = layer(np.dtype(np.float32), n=1), layer(np.dtype(np.float32), n=64, image=64)
    steady = Options(cudnn_deterministic=True)
    x, W = random_array(small.x), random_array(small.W)
    before = deconvolve(device, small, x, W, None, steady, CallContext())

    with pytest.raises(ExhaustedError, match="bytes"):
        deconvolve(device, large, random_array(large.x), W, None, steady, CallContext())

    assert device.footprint_bytes(DECONVOLVE, large, ("w", "x"), ("y",)) > device.info.budget_bytes
    np.testing.assert_array_equal(
        deconvolve(device, small, x, W, None, steady, CallContext()), before
    )
    device.close()


def test_a_call_that_has_ended_is_not_computed(cuda: CudaDevice) -> None:
    problem, call = layer(np.dtype(np.float32), n=1), CallContext()
    call.cancel()
    with pytest.raises(CallCancelledError):
        deconvolve(
            cuda, problem, random_array(problem.x), random_array(problem.W), None, Options(), call
        )


class ExpiringCall(CallContext):
    """A call whose deadline passes when it is asked for it for the n-th time."""

    def __init__(self, expires_at: int) -> None:
        super().__init__()
        self._expires_at = expires_at
        self.checks_count = 0

    def check(self) -> None:
        self.checks_count += 1
        if self.checks_count >= self._expires_at:
            raise DeadlineError("the call's deadline passed before its work was done")


def test_a_deadline_is_looked_at_before_upload_launch_and_download(cuda: CudaDevice) -> None:
    problem = layer(np.dtype(np.float32), n=1)
    x, W = random_array(problem.x), random_array(problem.W)
    steady = Options(cudnn_deterministic=True)
    deconvolve(
        cuda, problem, x, W, None, steady, CallContext()
    )  # a first call also looks for a plan
    whole = ExpiringCall(expires_at=10**9)
    expected = deconvolve(cuda, problem, x, W, None, steady, whole)

    assert whole.checks_count >= 3
    for expires_at in range(1, whole.checks_count + 1):
        call = ExpiringCall(expires_at)
        with pytest.raises(DeadlineError):
            deconvolve(cuda, problem, x, W, None, steady, call)
        assert call.checks_count == expires_at
        assert Stage.DOWNLOAD not in call.ledger.times_us
    y = deconvolve(cuda, problem, x, W, None, steady, CallContext())
    np.testing.assert_array_equal(y, expected)


def test_a_call_whose_time_is_up_does_not_wait_for_tuning(cuda: CudaDevice) -> None:
    problem = layer(np.dtype(np.float16), n=3, image=33)
    x, W = random_array(problem.x), random_array(problem.W)
    options = Options(autotune=True)
    start_s = time.monotonic()
    with pytest.raises(DeadlineError):
        deconvolve(cuda, problem, x, W, None, options, CallContext(timeout_s=0.1))
    assert time.monotonic() - start_s < 0.5

    deconvolve(cuda, problem, x, W, None, options, CallContext())


def test_the_footprint_bounds_what_calls_take() -> None:
    for seed in range(40):
        device = CudaDevice(0, limits=CudaLimits(lanes_count=1))
        problem = replace_batch(random_problem(seed), 400)
        x, W, gy = (random_array(spec) for spec in (problem.x, problem.W, problem.y))
        deconvolve(device, problem, x, W, None, Options(), CallContext())
        assert device.stats.memory.peak_bytes <= device.footprint_bytes(
            DECONVOLVE, problem, ("w", "x"), ("y",)
        )
        gradients(device, problem, x, W, gy, GradientRequest(), Options(), CallContext())
        assert device.stats.memory.peak_bytes <= max(
            device.footprint_bytes(
                DECONVOLVE_GRAD, problem, DECONVOLVE_GRAD.operands, DECONVOLVE_GRAD.all_results
            ),
            device.footprint_bytes(DECONVOLVE, problem, ("w", "x"), ("y",)),
        )
        device.close()


def replace_batch(problem: Problem, n: int) -> Problem:
    x = replace(problem.x, shape=(n, *problem.x.shape[1:]))
    return Problem(x, problem.W, problem.geometry)


@pytest.mark.timeout(SOAK_S + 120)
def test_threads_with_mixed_shapes_get_right_results_and_memory_stays_flat(
    cuda: CudaDevice, cpu: CpuDevice
) -> None:
    work = []
    for seed in range(24):
        problem = random_problem(seed) if seed % 4 else layer(np.dtype(np.float32), n=seed + 1)
        x, W, gy = (random_array(spec) for spec in (problem.x, problem.W, problem.y))
        options = Options(cudnn_deterministic=True)
        y = deconvolve(cuda, problem, x, W, None, options, CallContext())
        right = gradients(cuda, problem, x, W, gy, GradientRequest(), options, CallContext())
        work.append((problem, x, W, gy, y, right))
    end_s = time.monotonic() + SOAK_S
    held: list[int] = []

    def soak(thread: int) -> int:
        random, calls_count = np.random.default_rng(thread), 0
        while time.monotonic() < end_s:
            problem, x, W, gy, y, all_right = work[random.integers(len(work))]
            options = Options(cudnn_deterministic=True)
            found = deconvolve(cuda, problem, x, W, None, options, CallContext())
            np.testing.assert_array_equal(found, y)
            found_gradients = gradients(
                cuda, problem, x, W, gy, GradientRequest(), options, CallContext()
            )
            for result, right in zip(found_gradients, all_right, strict=True):
                np.testing.assert_array_equal(result, right)
            calls_count += 2
            if thread == 0:
                held.append(cuda.stats.held_bytes)
        return calls_count

    with ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(soak, range(8)))

    assert min(counts) > 0
    assert cuda.stats.memory.used_bytes == 0
    assert held[-1] <= 1.2 * max(held[: len(held) // 4])
