"""Tensors in a device's own memory, and places for results: the same bits as from and to new arrays."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from deconvd.errors import (
    CallCancelledError,
    ExhaustedError,
    InvalidArgumentError,
    UnavailableError,
)
from deconvd.model.dtypes import ELEMENT_TYPES, Array, DType
from deconvd.model.geometry import Geometry
from deconvd.model.gradients import Gradients
from deconvd.model.operation import DECONVOLVE, DECONVOLVE_GRAD, spec_of_field
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec, spec_of
from deconvd_server.call.context import CallContext
from deconvd_server.device import Device, DeviceTensor, Tensor
from deconvd_server.device import cuda as cuda_device
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.engine.engine import Engine, Engines
from tests.devices import GradientRequest, deconvolve, gradients

FLOAT32 = np.dtype(np.float32)
STEADY = Options(cudnn_deterministic=True)
MASKS = [GradientRequest(*mask) for mask in itertools.product([False, True], repeat=3) if any(mask)]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    device: Device = CpuDevice(2) if request.param == "cpu" else cuda_device.open_device(0)
    yield device
    device.close()


def problem(n: int = 3, channels: int = 4, image: int = 9, dtype: DType = FLOAT32) -> Problem:
    x = TensorSpec((n, channels, image, image), dtype)
    W = TensorSpec((channels, 3, 4, 4), dtype)
    return Problem(x, W, Geometry(stride=(2, 2), pad=(1, 1)))


SMALL, LARGE = problem(), problem(24, 32, 96)
BOTH_SIZES = pytest.mark.parametrize("problem", [SMALL, LARGE], ids=["small", "large"])


def random_array(spec: TensorSpec, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(spec.shape, np.float32).astype(spec.dtype)


def operands(problem: Problem) -> tuple[Array, Array, Array, Array]:
    """Return x, W, b and gy."""
    specs = (problem.x, problem.W, problem.b, problem.y)
    x, W, b, gy = (random_array(spec, seed) for seed, spec in enumerate(specs))
    return x, W, b, gy


def put(device: Device, array: Array) -> DeviceTensor:
    tensor = device.empty(spec_of(array))
    device.write(tensor, array, CallContext())
    return tensor


def strided(spec: TensorSpec) -> Array:
    """Return a place that is not contiguous."""
    n, *rest = spec.shape
    return np.full((n, 2, *rest), np.nan, spec.dtype)[:, 0]


def unaligned(spec: TensorSpec) -> Array:
    """Return a place at an odd multiple of the element's size."""
    return np.full(spec.nbytes // spec.dtype.itemsize + 1, np.nan, spec.dtype)[1:].reshape(
        spec.shape
    )


def swapped(spec: TensorSpec) -> Array:
    """Return a place of the other byte order."""
    return np.full(spec.shape, np.nan, spec.dtype.newbyteorder())


PLACES: list[Callable[[TensorSpec], Array]] = [
    lambda spec: np.full(spec.shape, np.nan, spec.dtype),
    strided,
    unaligned,
    swapped,
]
PLACE_NAMES = ["contiguous", "strided", "unaligned", "swapped"]


@pytest.mark.parametrize("spec", [SMALL.x, LARGE.x, TensorSpec((0, 3), FLOAT32)], ids=str)
def test_what_is_written_is_read(device: Device, spec: TensorSpec) -> None:
    array = random_array(spec, 0)
    tensor = device.empty(spec)
    out = np.empty_like(array)

    device.write(tensor, array, CallContext())

    np.testing.assert_array_equal(device.read(tensor, CallContext()), array)
    assert device.read(tensor, CallContext(), out) is out
    np.testing.assert_array_equal(out, array)
    assert (tensor.spec, tensor.device_id) == (spec, device.info.id)
    device.free(tensor)


@pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=str)
def test_a_view_of_samples_is_a_part_of_the_tensor(device: Device, dtype: DType) -> None:
    array = random_array(TensorSpec((7, 3, 5), dtype), 0)
    tensor = put(device, array)

    device.write(tensor.samples(1, 3).samples(1, 2), -array[:1], CallContext())

    array[2] = -array[0]
    np.testing.assert_array_equal(device.read(tensor.samples(1, 6), CallContext()), array[1:6])
    assert tensor.samples(4, 4).spec == TensorSpec((0, 3, 5), dtype)
    device.free(tensor)


def test_a_tensor_is_freed_once_and_then_of_no_use(device: Device) -> None:
    tensor = device.empty(SMALL.x)
    view = tensor.samples(0, 1)
    device.free(tensor)
    with pytest.raises(ValueError, match="freed"):
        device.free(tensor)
    with pytest.raises(ValueError, match="freed"):
        device.read(view, CallContext())


class _Foreign:
    spec, device_id = SMALL.W, "cuda:99"

    def samples(self, start: int, stop: int) -> DeviceTensor:
        raise AssertionError("nobody asks for a view")


def test_a_tensor_of_another_device_is_refused(device: Device) -> None:
    x = random_array(SMALL.x, 0)
    with pytest.raises(ValueError, match="the tensor is on cuda:99, and cannot be used on"):
        deconvolve(device, SMALL, x, _Foreign(), None, STEADY, CallContext())


@pytest.mark.parametrize("resident", range(8))
@BOTH_SIZES
def test_y_of_any_mix_of_operands_has_the_same_bits(
    device: Device, problem: Problem, resident: int
) -> None:
    arrays = operands(problem)[:3]
    expected = deconvolve(device, problem, *arrays, STEADY, CallContext())
    given: list[Tensor] = [
        put(device, array) if resident >> bit & 1 else array for bit, array in enumerate(arrays)
    ]
    x, W, b = given

    for _ in range(4):  # the second time it is captured, then launched
        y = deconvolve(device, problem, x, W, b, STEADY, CallContext())
        np.testing.assert_array_equal(y, expected)

    kept = device.empty(problem.y)
    for _ in range(4):
        deconvolve(device, problem, x, W, b, STEADY, CallContext(), kept)
        np.testing.assert_array_equal(device.read(kept, CallContext()), expected)
    free_all(device, kept, *given)


def free_all(device: Device, *tensors: Tensor) -> None:
    for tensor in tensors:
        if not isinstance(tensor, np.ndarray):
            device.free(tensor)


@pytest.mark.parametrize("place", PLACES, ids=PLACE_NAMES)
@BOTH_SIZES
def test_y_is_put_where_it_is_to_be(
    device: Device, problem: Problem, place: Callable[[TensorSpec], Array]
) -> None:
    x, W, b, _ = operands(problem)
    out = place(problem.y)

    deconvolve(device, problem, x, W, b, STEADY, CallContext(), out)

    np.testing.assert_array_equal(out, deconvolve(device, problem, x, W, b, STEADY, CallContext()))


@pytest.mark.parametrize("wanted", MASKS, ids=str)
@BOTH_SIZES
def test_gradients_of_and_in_tensors_have_the_same_bits(
    device: Device, problem: Problem, wanted: GradientRequest
) -> None:
    x, W, _, gy = operands(problem)
    expected = gradients(device, problem, x, W, gy, wanted, STEADY, CallContext())
    tensors = [put(device, array) for array in (x, W, gy)]
    x_tensor, W_tensor, gy_tensor = tensors
    places = {
        field: device.empty(spec_of_field(problem, field)) for field in DECONVOLVE_GRAD.all_results
    }

    found = gradients(device, problem, x_tensor, W_tensor, gy_tensor, wanted, STEADY, CallContext())
    left = gradients(
        device, problem, x_tensor, W_tensor, gy_tensor, wanted, STEADY, CallContext(), places
    )

    assert left == Gradients(None, None, None)
    for array, place, right in zip(found, places.values(), expected, strict=True):
        assert (array is None) == (right is None)
        if array is not None and right is not None:
            np.testing.assert_array_equal(array, right)
            np.testing.assert_array_equal(device.read(place, CallContext()), right)
    free_all(device, *tensors, *places.values())


@pytest.mark.parametrize("place", PLACES, ids=PLACE_NAMES)
def test_gradients_are_put_where_they_are_to_be(
    device: Device, place: Callable[[TensorSpec], Array]
) -> None:
    x, W, _, gy = operands(SMALL)
    places = {"gx": place(SMALL.x), "gb": place(SMALL.b)}

    found = gradients(device, SMALL, x, W, gy, GradientRequest(), STEADY, CallContext(), places)

    expected = gradients(device, SMALL, x, W, gy, GradientRequest(), STEADY, CallContext())
    assert found.gx is places["gx"]
    assert found.gb is places["gb"]
    for array, right in zip(found, expected, strict=True):
        assert array is not None
        assert right is not None
        np.testing.assert_array_equal(array, right)


@pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=str)
def test_samples_of_tensors_are_operands_and_places_wherever_they_begin(
    device: Device, dtype: DType
) -> None:
    """With images of odd sizes most samples begin at no multiple of 16 bytes."""
    whole = problem(5, 3, 5, dtype)
    assert whole.y.shape[2:] == (10, 10)
    odd = Problem(whole.x, whole.W, Geometry(stride=(2, 2), pad=(1, 1), outsize=(9, 9)))
    one = Problem(TensorSpec((1, *odd.x.shape[1:]), dtype), odd.W, odd.geometry)
    x, W, b, _ = operands(odd)
    x_tensor, y_tensor = put(device, x), device.empty(odd.y)

    for n in range(5):
        part = y_tensor.samples(n, n + 1)
        deconvolve(device, one, x_tensor.samples(n, n + 1), W, b, STEADY, CallContext(), part)

    y = device.read(y_tensor, CallContext())
    for n in range(5):
        alone = deconvolve(device, one, x[n : n + 1], W, b, STEADY, CallContext())
        np.testing.assert_array_equal(y[n : n + 1], alone)
    free_all(device, x_tensor, y_tensor)


@pytest.mark.parametrize("n", [0, 2])
def test_empty_operands_may_be_tensors(device: Device, n: int) -> None:
    empty = Problem(
        TensorSpec((n, 0, 3, 4), FLOAT32), TensorSpec((0, 3, 3, 3), FLOAT32), Geometry()
    )
    x, W, b, gy = operands(empty)
    tensors = [put(device, array) for array in (x, W, b, gy)]
    y, gb = device.empty(empty.y), device.empty(empty.b)
    x_tensor, W_tensor, b_tensor, gy_tensor = tensors

    engine = Engine(device, waiting_count=0)
    deconvolve(engine, empty, x_tensor, W_tensor, b_tensor, STEADY, CallContext(), y)
    gradients(
        engine,
        empty,
        x_tensor,
        W_tensor,
        gy_tensor,
        GradientRequest(),
        STEADY,
        CallContext(),
        {"gb": gb},
    )

    np.testing.assert_array_equal(
        device.read(y, CallContext()), np.broadcast_to(b[:, None, None], empty.y.shape)
    )
    np.testing.assert_allclose(device.read(gb, CallContext()), gy.sum((0, 2, 3)), rtol=1e-5)
    free_all(device, y, gb, *tensors)


def test_a_call_that_has_ended_moves_nothing(device: Device) -> None:
    array = random_array(LARGE.x, 0)
    tensor, ended = put(device, array), CallContext()
    ended.cancel()

    with pytest.raises(CallCancelledError):
        device.write(tensor, -array, ended)
    with pytest.raises(CallCancelledError):
        device.read(tensor, ended)

    np.testing.assert_array_equal(device.read(tensor, CallContext()), array)
    device.free(tensor)


def test_what_lies_on_the_device_is_not_counted_for_the_call(device: Device) -> None:
    whole = device.footprint_bytes(DECONVOLVE, LARGE, ("w", "x"), ("y",))
    resident_bytes = LARGE.x.nbytes + LARGE.y.nbytes

    without = device.footprint_bytes(DECONVOLVE, LARGE, ("w", "x"), ("y",), resident_bytes)

    assert without <= whole - resident_bytes * 0.9


# The engine, which counts them


@pytest.fixture
def engine() -> Iterator[Engine]:
    device = CpuDevice(1, memory_limit_bytes=64 << 20)
    yield Engine(device, waiting_count=4)
    device.close()


MIB = TensorSpec((1, 1, 512, 512), FLOAT32)


def test_tensors_take_of_the_engines_budget_until_they_are_freed(engine: Engine) -> None:
    tensors = [engine.empty(MIB) for _ in range(64)]
    assert engine.load.reserved_bytes == 64 << 20
    with pytest.raises(ExhaustedError, match="0 of 67108864 are free"):
        engine.empty(MIB)

    for tensor in tensors:
        engine.free(tensor)

    assert engine.load.reserved_bytes == engine.load.used_bytes == 0


def test_a_tensor_that_cannot_be_made_takes_nothing(engine: Engine) -> None:
    with pytest.raises(ExhaustedError):
        engine.empty(TensorSpec((1 << 50,), FLOAT32))
    assert engine.load.reserved_bytes == 0


def test_what_is_written_by_the_engine_is_read_by_it(engine: Engine) -> None:
    array = random_array(MIB, 0)
    tensor = engine.empty(MIB)
    engine.write(tensor, array, CallContext())
    np.testing.assert_array_equal(engine.read(tensor, CallContext()), array)
    engine.free(tensor)


def test_a_call_goes_where_its_tensors_are() -> None:
    engines = Engines([CpuDevice(1)], waiting_count=1)
    (engine,) = engines.all
    tensor, array = engine.empty(MIB), np.zeros(3, np.float32)

    assert engines.engine_of(array, array) is None
    assert engines.engine_of(array, tensor) is engine
    with pytest.raises(InvalidArgumentError, match="must be on one, got cpu, cuda:99"):
        engines.engine_of(_Foreign(), tensor)

    engine.free(tensor)
    engines.close()


def test_a_call_that_tensors_leave_no_room_is_refused_at_once(engine: Engine) -> None:
    held = [engine.empty(MIB) for _ in range(60)]
    hungry = problem(8, 8, 64)
    x, W, b, _ = operands(hungry)

    with pytest.raises(UnavailableError, match="resident tensors have 62914560 now") as raised:
        deconvolve(engine, hungry, x, W, b, STEADY, CallContext())

    assert raised.value.retry_after_s is not None
    for tensor in held:
        engine.free(tensor)
    deconvolve(engine, hungry, x, W, b, STEADY, CallContext())


def test_a_call_that_tensors_leave_no_room_may_have_some_freed(engine: Engine) -> None:
    held = [engine.empty(MIB) for _ in range(60)]
    hungry = problem(8, 8, 64)
    x, W, b, _ = operands(hungry)
    missing: list[int] = []

    def evict(size_bytes: int, _call: CallContext) -> None:
        missing.append(size_bytes)
        for _ in range(-(-size_bytes // MIB.nbytes)):
            engine.free(held.pop())

    engine.on_shortage = evict
    deconvolve(engine, hungry, x, W, b, STEADY, CallContext())

    assert len(missing) == 1
    assert 0 < len(held) < 60
    assert engine.load.reserved_bytes == len(held) << 20
