"""When an engine lets a call begin whose operands are still being written."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from deconvd.direct.frame_stream import FrameStream, report_progress
from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd.model.operation import Operation
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.call.context import CallContext
from deconvd_server.device import DeviceInfo, Operand, Place
from deconvd_server.device.arriving import Arriving, peek_tensor, wait_for
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.engine.engine import Engine
from deconvd_server.transports.direct.write_progress import WriteProgress
from tests.devices import (
    GradientRequest,
    OverlappingCpuDevice,
    deconvolve,
    gradients,
    make_arriving,
)
from tests.stream_pairs import overlapped_streams

F32 = np.dtype(np.float32)


class EagerDevice(OverlappingCpuDevice):
    """Takes operands that are arriving and reads what is there."""

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
        read = {field: peek_tensor(operand) for field, operand in operands.items()}
        super().run(operation, problem, read, places, options, call)


class FollowingDevice(OverlappingCpuDevice):
    """Notes of each call whether it has operands that are arriving; the first call waits until it is let go."""

    def __init__(self) -> None:
        super().__init__(2)
        self.followed: list[bool] = []
        self.has_begun = threading.Event()
        self.let_go = threading.Event()

    @property
    def info(self) -> DeviceInfo:
        """See `Device`."""
        return replace(super().info, calls_count=2)

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
        self.followed.append(any(isinstance(operand, Arriving) for operand in operands.values()))
        if len(self.followed) == 1:
            self.has_begun.set()
            assert self.let_go.wait(30)
        read = {field: peek_tensor(operand) for field, operand in operands.items()}
        super().run(operation, problem, read, places, options, call)


class ArrivedProgress:
    """All operands have arrived, as whoever asks is told."""

    def wait_for(self, size_bytes: int, timeout_s: float) -> bool:
        """See `ArrivalProgress`."""
        return True


@pytest.fixture
def ends() -> Iterator[tuple[FrameStream, FrameStream]]:
    with overlapped_streams() as (client, server):
        yield client, server


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(EagerDevice(), waiting_count=1)
    yield made
    made.close()


def problem_of(c_I: int) -> Problem:
    return Problem(TensorSpec((3, c_I, 4, 4), F32), TensorSpec((c_I, 2, 3, 3), F32), Geometry())


def written_late(
    client: FrameStream, server: FrameStream, target: Array, source: Array
) -> Arriving:
    """Return an operand in shared memory, which is written a little later."""
    target[...] = np.nan

    def write() -> None:
        target[...] = source
        report_progress(client, target.nbytes)

    threading.Timer(0.1, write).start()
    (operand,) = make_arriving(WriteProgress(server), target)
    return operand


def test_a_device_that_takes_what_is_arriving_has_it_at_once(
    engine: Engine, ends: tuple[FrameStream, FrameStream]
) -> None:
    problem = problem_of(1)
    x, W = np.empty(problem.x.shape, F32), np.ones(problem.W.shape, F32)
    late_x = written_late(*ends, x, np.ones_like(x))
    assert np.isnan(deconvolve(engine, problem, late_x, W, None, Options(), CallContext())).all()
    wait_for(late_x, CallContext())


@pytest.mark.parametrize(
    "device", [CpuDevice(1), OverlappingCpuDevice(1)], ids=["takes none", "is left"]
)
def test_a_device_has_what_it_does_not_take_or_wait_for_once_all_is_there(
    device: CpuDevice, ends: tuple[FrameStream, FrameStream]
) -> None:
    engine, problem = Engine(device, waiting_count=1), problem_of(1)
    W, source = np.ones(problem.W.shape, F32), np.ones(problem.x.shape, F32)
    late_x = written_late(*ends, np.empty_like(source), source)
    y = deconvolve(engine, problem, late_x, W, None, Options(), CallContext())
    np.testing.assert_array_equal(
        y, deconvolve(engine, problem, source, W, None, Options(), CallContext())
    )
    assert engine.load.running_count == 0
    engine.close()


def test_results_without_products_are_not_computed_of_what_is_not_written(
    engine: Engine, ends: tuple[FrameStream, FrameStream]
) -> None:
    problem = problem_of(0)
    x, W = np.empty(problem.x.shape, F32), np.empty(problem.W.shape, F32)

    gy, source = np.empty(problem.y.shape, F32), np.ones(problem.y.shape, F32)
    late_gy = written_late(*ends, gy, source)
    found = gradients(engine, problem, x, W, late_gy, GradientRequest(), Options(), CallContext())
    np.testing.assert_array_equal(found.gb, source.sum((0, 2, 3)))

    b, bias = np.empty(2, F32), np.arange(2, dtype=F32)
    late_b = written_late(*ends, b, bias)
    y = deconvolve(engine, problem, x, W, late_b, Options(), CallContext())
    np.testing.assert_array_equal(y, np.broadcast_to(bias[:, None, None], problem.y.shape))


def test_a_device_follows_one_call_alone() -> None:
    device, problem = FollowingDevice(), problem_of(1)
    engine = Engine(device, waiting_count=1)
    x, W = np.ones(problem.x.shape, F32), np.ones(problem.W.shape, F32)

    def call() -> Array:
        (arriving_x,) = make_arriving(ArrivedProgress(), x)
        return deconvolve(engine, problem, arriving_x, W, None, Options(), CallContext())

    with ThreadPoolExecutor() as executor:
        first = executor.submit(call)
        assert device.has_begun.wait(30)
        second = call()
        device.let_go.set()
        np.testing.assert_array_equal(second, first.result())
    third = call()
    np.testing.assert_array_equal(third, second)
    assert device.followed == [True, False, True]
    engine.close()
