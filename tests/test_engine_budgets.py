"""Which budget an engine counts what calls hold in: the device's, or the host's where the device has its own memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from deconvd.errors import ExhaustedError
from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd.model.operation import DECONVOLVE
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.call.context import CallContext
from deconvd_server.device import DeviceInfo
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.engine.admission import Admission
from deconvd_server.engine.engine import Engine

MIB = 1 << 20
F32 = np.dtype(np.float32)
PROBLEM = Problem(TensorSpec((1, 1, 512, 1024), F32), TensorSpec((1, 1, 1, 1), F32), Geometry())
EMPTY = Problem(TensorSpec((1, 0, 512, 1024), F32), TensorSpec((0, 1, 1, 1), F32), Geometry())
"""Of both y has 2 MiB."""


class Card(CpuDevice):
    """A device that says that its memory is apart from the host's."""

    @property
    def info(self) -> DeviceInfo:
        """See `Device`."""
        return replace(super().info, has_own_memory=True)


@pytest.fixture
def messages() -> Admission:
    return Admission(8, 100 * MIB, 1)


@pytest.fixture(params=[CpuDevice, Card], ids=["the processor", "a card"])
def engine(request: pytest.FixtureRequest, messages: Admission) -> Iterator[Engine]:
    device = request.param(1, memory_limit_bytes=100 * MIB)
    made = Engine(device, waiting_count=1, messages=messages)
    yield made
    made.close()


def y_of(
    engine: Engine, call: CallContext, problem: Problem = PROBLEM, *, brought_bytes: int = 2 * MIB
) -> Array:
    operands = {"x": np.ones(problem.x.shape, F32), "w": np.ones(problem.W.shape, F32)}
    new = engine.run(
        DECONVOLVE,
        problem,
        operands,
        {"y": problem.y},
        Options(),
        call,
        brought_bytes=brought_bytes,
        sent_bytes=problem.y.nbytes,
    )
    return new["y"]


def test_what_is_received_and_sent_counts_in_the_hosts_memory(
    engine: Engine, messages: Admission
) -> None:
    call, budgets = CallContext(), [engine.load, messages.load]
    has_own_memory = engine.info.has_own_memory

    np.testing.assert_array_equal(y_of(engine, call), np.ones(PROBLEM.y.shape))

    kept_bytes = 2 * MIB + 2 * PROBLEM.y.nbytes  # its request, y and y encoded
    used = [engine.load.used_bytes, messages.load.used_bytes]
    assert used == ([0, kept_bytes] if has_own_memory else [kept_bytes, 0])
    call.end()
    assert [engine.load, messages.load] == budgets


def test_what_does_not_fit_is_refused_before_it_is_made(engine: Engine) -> None:
    with pytest.raises(ExhaustedError, match=f"of which calls may take {100 * MIB}"):
        y_of(engine, CallContext(), brought_bytes=99 * MIB)
    assert not engine.load.used_bytes


def test_results_without_products_count_too(engine: Engine, messages: Admission) -> None:
    call = CallContext()

    np.testing.assert_array_equal(y_of(engine, call, EMPTY), np.zeros(EMPTY.y.shape))

    kept_bytes = 2 * MIB + 2 * EMPTY.y.nbytes
    assert {engine.load.used_bytes, messages.load.used_bytes} == {0, kept_bytes}
    call.end()
    assert engine.load.used_bytes == messages.load.used_bytes == 0
