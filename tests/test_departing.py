"""Results that leave while they are computed: told of what is final, of all of it in the end, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from deconvd.errors import CallCancelledError
from deconvd.model.dtypes import ELEMENT_TYPES, Array, DType
from deconvd.model.geometry import Geometry
from deconvd.model.operation import DECONVOLVE, DECONVOLVE_GRAD, Operation, spec_of_field
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.call.context import CallContext
from deconvd_server.device import Departing, Operand, Place
from deconvd_server.device.arriving import ArrivalTimeoutError, Arriving, peek_tensor
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.device.departing import note_all_written, target_of, targets_of
from deconvd_server.engine.engine import Engine, Engines
from tests.devices import Departure, OverlappingCpuDevice, make_arriving

F32 = np.dtype(np.float32)


def problem_of(c_I: int = 3, dtype: DType = F32) -> Problem:
    return Problem(TensorSpec((4, c_I, 5, 4), dtype), TensorSpec((c_I, 2, 3, 3), dtype), Geometry())


def random_array(spec: TensorSpec, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(spec.shape).astype(spec.dtype)


def departure_of(spec: TensorSpec) -> Departure:
    return Departure(np.full(spec.shape, 77, spec.dtype))


class OverlappingDevice(OverlappingCpuDevice):
    """Notes two samples of y before it fails as it is told to, and leaves the rest to the engine."""

    def __init__(self, fail: Callable[[], None] = lambda: None) -> None:
        super().__init__(1)
        self.fail = fail
        self.places: list[Place] = []

    def run(
        self,
        operation: Operation,
        problem: Problem,
        operands: Mapping[str, Operand],
        places: Mapping[str, Place],
        options: Options,
        call: CallContext,
    ) -> None:
        """See `Device`."""
        self.places += places.values()
        there = {field: peek_tensor(operand) for field, operand in operands.items()}
        super().run(operation, problem, there, places, options, call)
        for place in places.values():
            if isinstance(place, Departing):
                place.note_written(place.array[:2].nbytes)
        self.fail()


class ArrivesLater:
    """Operands of which nothing is there at first, and all once a call waits for them without a place."""

    def __init__(self) -> None:
        self.waits_count = 0

    def wait_for(self, _size_bytes: int, timeout_s: float) -> bool:
        self.waits_count += timeout_s > 0
        return timeout_s > 0


def test_only_more_bytes_than_before_are_told() -> None:
    departure = departure_of(problem_of().y)
    for size_bytes in (8, 8, 4, 0, 12):
        departure.place.note_written(size_bytes)
    assert departure.sizes_bytes == [8, 12]
    assert not departure.place.is_written
    note_all_written([departure.place, departure.array])
    assert departure.sizes_bytes == [8, 12, departure.array.nbytes]
    assert departure.place.is_written


def test_a_place_is_its_array_where_nothing_leaves_early() -> None:
    departure = departure_of(problem_of().y)
    assert target_of(departure.place) is target_of(departure.array) is departure.array
    assert targets_of({"y": departure.place}) == {"y": departure.array}


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4), F32)[:, 1:], np.zeros(4, F32.newbyteorder())], ids=["gaps", "order"]
)
def test_an_array_whose_bytes_are_not_those_of_the_wire_is_refused(array: Array) -> None:
    with pytest.raises(ValueError, match="C-contiguous and in native byte order"):
        Departing(array, lambda _: None)


@pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=str)
@pytest.mark.parametrize("device_type", [CpuDevice, OverlappingDevice])
def test_every_departing_result_has_left_in_full_once_the_call_has_ended(
    dtype: DType, device_type: type[CpuDevice]
) -> None:
    problem, engine = problem_of(dtype=dtype), Engine(device_type(), waiting_count=1)
    operands = {
        field: random_array(spec_of_field(problem, field), seed)
        for seed, field in enumerate(("w", "b", "gy", "x"))
    }
    for operation in (DECONVOLVE, DECONVOLVE_GRAD):
        given = {f: operands[f] for f in operation.operands_for(operation.all_results, ("b",))}
        specs = {field: spec_of_field(problem, field) for field in operation.all_results}
        departures = {field: departure_of(spec) for field, spec in specs.items()}
        places = {field: departure.place for field, departure in departures.items()}

        new = engine.run(operation, problem, given, places, Options(), CallContext())

        assert new == {}
        expected = engine.run(operation, problem, given, specs, Options(), CallContext())
        for field, departure in departures.items():
            assert departure.sizes_bytes[-1] == departure.array.nbytes
            assert departure.seen == expected[field].tobytes()
    engine.close()


def test_a_device_has_departing_results_only_if_it_overlaps_transfers() -> None:
    problem = problem_of()
    operands = {"x": random_array(problem.x), "w": random_array(problem.W)}
    overlapping = OverlappingDevice()
    departure = departure_of(problem.y)
    engine = Engine(overlapping, waiting_count=1)
    engine.run(DECONVOLVE, problem, operands, {"y": departure.place}, Options(), CallContext())
    assert overlapping.places == [departure.place]
    assert departure.sizes_bytes == [departure.array[:2].nbytes, departure.array.nbytes]
    engine.close()


def test_departing_results_choose_no_engine() -> None:
    engines = Engines([CpuDevice(1)], waiting_count=1)
    departure, tensor = departure_of(problem_of().y), engines.all[0].empty(problem_of().x)
    assert engines.engine_of(departure.place) is None
    assert engines.engine_of(departure.place, tensor) is engines.all[0]
    engines.all[0].free(tensor)
    engines.close()


@pytest.mark.parametrize("device_type", [CpuDevice, OverlappingDevice])
def test_results_without_products_leave_too(device_type: type[CpuDevice]) -> None:
    problem, engine = problem_of(0), Engine(device_type(), waiting_count=1)
    operands = {field: random_array(spec_of_field(problem, field)) for field in ("x", "w", "b")}
    departure = departure_of(problem.y)
    engine.run(DECONVOLVE, problem, operands, {"y": departure.place}, Options(), CallContext())
    assert departure.seen == departure.array.tobytes()
    assert (departure.array == operands["b"][:, None, None]).all()
    engine.close()


def test_a_call_that_fails_has_told_nothing_but_what_is_final() -> None:
    def fail() -> None:
        raise CallCancelledError("gone")

    problem, engine = problem_of(), Engine(OverlappingDevice(fail), waiting_count=1)
    operands = {"x": random_array(problem.x), "w": random_array(problem.W)}
    departure = departure_of(problem.y)
    with pytest.raises(CallCancelledError):
        engine.run(DECONVOLVE, problem, operands, {"y": departure.place}, Options(), CallContext())
    assert departure.sizes_bytes == [departure.array[:2].nbytes]
    assert engine.load.running_count == 0
    engine.close()


def test_a_call_that_is_repeated_tells_the_rest() -> None:
    device = OverlappingDevice()

    def fail() -> None:
        if len(device.places) == 1:
            raise ArrivalTimeoutError

    device.fail = fail
    problem, engine = problem_of(), Engine(device, waiting_count=1)
    x, W = random_array(problem.x), random_array(problem.W)
    progress, departure = ArrivesLater(), departure_of(problem.y)
    late_W, late_x = make_arriving(progress, W, x)
    operands: dict[str, Operand] = {"x": late_x, "w": late_W}
    assert isinstance(late_x, Arriving)

    engine.run(DECONVOLVE, problem, operands, {"y": departure.place}, Options(), CallContext())

    assert progress.waits_count == 2
    assert device.places == [departure.place] * 2
    assert departure.sizes_bytes == [departure.array[:2].nbytes, departure.array.nbytes]
    assert departure.seen == departure.array.tobytes()
    engine.close()
