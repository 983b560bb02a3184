"""A card whose kernel never ends, and how a server gets it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any
from unittest import mock

import cupy
import numpy as np

from deconvd_server.device.arriving import Operand, peek_tensor
from deconvd_server.device.cuda.execution.lane import Lane
from tests.hung_device import HUNG_SAMPLES_COUNT

__all__ = ["install"]

_SOURCE = """
extern "C" __global__ void wait_for(const volatile int* flag) {
    while (*flag == 0) {}
}
"""

_run: Callable[..., None] = Lane.run


class _LaneStream:
    """A lane's stream, as CuPy takes those of others."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._lane.stream.pointer


@cache
def _flag() -> Any:
    """Return memory of the card that is 0 for good."""
    flag = cupy.zeros(1, cupy.int32)
    cupy.cuda.Device().synchronize()  # the lanes' streams do not wait for CuPy's
    return flag


def _run_or_hang(self: Lane, key: Any, work: Any, operands: Sequence[Operand], *rest: Any) -> None:
    x = peek_tensor(operands[0])
    if isinstance(x, np.ndarray) and x.shape[0] == HUNG_SAMPLES_COUNT:
        flag = _flag()
        kernel = cupy.RawKernel(_SOURCE, "wait_for")
        with cupy.cuda.Stream.from_external(_LaneStream(self)):
            kernel((1,), (1,), (flag,))
    _run(self, key, work, operands, *rest)


def install() -> None:
    """Have the cards of this process hang in calls of `HUNG_SAMPLES_COUNT` samples."""
    mock.patch.object(Lane, "run", _run_or_hang).start()
