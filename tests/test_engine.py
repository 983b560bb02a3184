"""When an engine lets a call begin whose operands are still being written."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from deconvd.geometry import Geometry
from deconvd.gradients import Wanted
from deconvd.line import Line, tell_written
from deconvd.options import Options
from deconvd.problem import Problem, TensorSpec
from deconvd_server.call import Call
from deconvd_server.device import DeviceInfo
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.engine import Engine
from deconvd_server.writing import Writing
from tests.devices import deconvolve, gradients
from tests.line_pairs import early_ends

F32 = np.dtype(np.float32)


class EagerDevice(CpuDevice):
    """Takes calls early and reads what is there, written or not."""

    @property
    def info(self) -> DeviceInfo:
        """See `Device`."""
        return replace(super().info, takes_early=True)


@pytest.fixture
def ends() -> Iterator[tuple[Line, Line]]:
    with early_ends() as (client, server):
        yield client, server


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(EagerDevice(), waiting_count=1)
    yield made
    made.close()


def problem_of(c_I: int) -> Problem:
    return Problem(TensorSpec((3, c_I, 4, 4), F32), TensorSpec((c_I, 2, 3, 3), F32), Geometry())


def written_late(client: Line, server: Line, target: np.ndarray, source: np.ndarray) -> Call:
    """Return a call whose only operand in shared memory is written a little later."""
    target[...] = np.nan
    call = Call()
    call.writing = Writing(server)
    call.writing.total_bytes = target.nbytes

    def write() -> None:
        target[...] = source
        tell_written(client, target.nbytes)

    threading.Timer(0.1, write).start()
    return call


def test_a_device_that_takes_early_calls_has_them_at_once(
    engine: Engine, ends: tuple[Line, Line]
) -> None:
    problem = problem_of(1)
    x, W = np.empty(problem.x.shape, F32), np.ones(problem.W.shape, F32)
    call = written_late(*ends, x, np.ones_like(x))
    assert np.isnan(deconvolve(engine, problem, x, W, None, Options(), call)).all()
    call.wait_until_written()


def test_results_without_products_are_not_computed_of_what_is_not_written(
    engine: Engine, ends: tuple[Line, Line]
) -> None:
    problem = problem_of(0)
    x, W = np.empty(problem.x.shape, F32), np.empty(problem.W.shape, F32)

    gy, source = np.empty(problem.y.shape, F32), np.ones(problem.y.shape, F32)
    call = written_late(*ends, gy, source)
    found = gradients(engine, problem, x, W, gy, Wanted(), Options(), call)
    np.testing.assert_array_equal(found.gb, source.sum((0, 2, 3)))

    b, bias = np.empty(2, F32), np.arange(2, dtype=F32)
    call = written_late(*ends, b, bias)
    y = deconvolve(engine, problem, x, W, b, Options(), call)
    np.testing.assert_array_equal(y, np.broadcast_to(bias[:, None, None], problem.y.shape))
