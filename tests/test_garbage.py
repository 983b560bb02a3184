"""What a call held is free once it has failed, on both sides, whether or not the garbage collector comes by."""

from __future__ import annotations

import gc
from types import FrameType

import numpy as np
import pytest

import deconvd_client
from deconvd.model.dtypes import Array
from deconvd_client import DeadlineError
from deconvd_server.device.cpu import CpuDevice
from tests.test_service import served_by

# A message and a stream, each with work for longer than the deadline.
W = np.ones((32, 32, 21, 21), np.float32)
MESSAGE = np.ones((1, 32, 64, 64), np.float32)
STREAM = np.ones((64, 32, 64, 64), np.float32)


@pytest.mark.parametrize("x", [MESSAGE, STREAM], ids=["message", "stream"])
def test_a_failed_call_leaves_nothing_to_the_garbage_collector(x: Array) -> None:
    gc.collect()
    gc.disable()
    try:
        with served_by(CpuDevice(2), max_message_bytes=1 << 30) as F:
            for _ in range(4):
                _call_in_vain(F.target, x)
        left = _frames_left()
    finally:
        gc.enable()

    assert left == []


@pytest.mark.parametrize("transport", ["grpc", "tcp"])
def test_calls_leave_no_circles(transport: str) -> None:
    x, filters = np.ones((1, 4, 64, 64), np.float32), np.ones((4, 1, 2, 2), np.float32)
    with served_by(CpuDevice(2), max_message_bytes=1 << 30) as F:
        with deconvd_client.connect(F.target, transport=transport) as connection:
            connection.deconvolution_2d(x, filters)
            gc.collect()
            gc.disable()
            try:
                for _ in range(4):
                    connection.deconvolution_2d(x, filters)
                left = _of_calls_left()
            finally:
                gc.enable()

    assert left == []


def _of_calls_left() -> list[str]:
    """Collect the garbage, and return the types of what the server has for each call and left to it."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        types = [type(thing) for thing in gc.garbage]
        return [kind.__qualname__ for kind in types if kind.__module__.startswith("deconvd_server")]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


def _call_in_vain(target: str, x: Array) -> None:
    with deconvd_client.connect(target, timeout_s=0.05, transport="tcp") as hasty:
        try:
            hasty.deconvolution_2d(x, W)
        except DeadlineError:
            return
    pytest.fail("the work was done in time")


def _frames_left() -> list[str]:
    """Collect the garbage, and return which functions of calls were in it: they hold their arrays."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        frames = [thing for thing in gc.garbage if isinstance(thing, FrameType)]
        ours = [frame.f_code for frame in frames if "deconvd" in frame.f_globals["__name__"]]
        return [code.co_qualname for code in ours if code.co_name != "_heard"]  # it holds none
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
