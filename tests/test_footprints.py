"""What calls take of a device's memory is at most what they say first, whichever tensors they have."""

from __future__ import annotations

import tracemalloc
from itertools import combinations

import numpy as np
import pytest

from deconvd.model.dtypes import BFLOAT16, Array
from deconvd.model.geometry import Geometry
from deconvd.model.operation import OPERATIONS, Operation, spec_of_field
from deconvd.model.options import Options
from deconvd.model.problem import TensorSpec
from deconvd_server.call.context import CallContext
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.device.cuda.execution.device_layout import DeviceLayout
from deconvd_server.device.cuda.memory_estimate import MemoryEstimate
from deconvd_server.engine.engine import Engine
from tests.test_cpu_device import problem_of

F16, F32, F64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)


HUNGRY = {
    # the columns of all pixels and taps at once would have 42 MB
    "many taps": problem_of((1, 8, 128, 128), (8, 8, 9, 9), Geometry(pad=(4, 4), stride=(1, 2))),
    "half precision": problem_of((4, 64, 48, 48), (64, 32, 3, 3), types=(BFLOAT16, BFLOAT16)),
    "one output channel": problem_of((8, 512, 2, 2), (512, 1, 40, 40)),
    "one pixel, many samples": problem_of((128, 512, 1, 1), (512, 16, 4, 4)),
    "many groups": problem_of((2, 256, 40, 40), (256, 1, 5, 5), Geometry(groups=256)),
    "columns of 2 MB": problem_of((1, 1, 32, 32), (1, 16, 4, 4), types=(F64, F64)),
    "mixed": problem_of((2, 64, 64, 64), (64, 16, 3, 3), types=(F16, F64)),
    "much W": problem_of((9, 64, 1, 1), (64, 512, 9, 9)),
    "much b": problem_of((1, 1, 1, 1), (1, 1 << 21, 1, 1), types=(F16, BFLOAT16)),
    "an empty batch": problem_of((0, 0, 4, 4), (0, 1 << 22, 3, 3)),
    "no samples": problem_of((0, 8, 4, 4), (8, 1 << 12, 9, 9)),
    "no input channels": problem_of((4, 0, 256, 256), (0, 8, 3, 3), types=(BFLOAT16, F64)),
    "no pixels": problem_of((4, 8, 0, 0), (8, 64, 64, 64), types=(F64, BFLOAT16)),
}

_PYTHON_BYTES = 1 << 20
"""What Python's own objects may take besides: tasks, futures, views."""


@pytest.mark.parametrize("threads_count", [1, 8])
@pytest.mark.parametrize("name", HUNGRY)
def test_a_call_takes_no_more_memory_than_its_footprint(name: str, threads_count: int) -> None:
    problem = HUNGRY[name]
    device = CpuDevice(threads_count)
    engine = Engine(device, waiting_count=0)
    over = {}
    for operation, wanted, optional in kinds_of_call():
        fields = operation.operands_for(wanted, optional)
        operands = {field: unaligned(spec_of_field(problem, field)) for field in fields}
        places = {field: spec_of_field(problem, field) for field in wanted}
        allowed = device.footprint_bytes(operation, problem, fields, wanted)
        allowed -= sum(operand.nbytes for operand in operands.values())
        tracemalloc.start()
        try:
            engine.run(operation, problem, operands, places, Options(), CallContext())
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        if peak > allowed + _PYTHON_BYTES:
            over[wanted, optional] = peak, allowed
    engine.close()
    assert not over


def kinds_of_call() -> list[tuple[Operation, tuple[str, ...], tuple[str, ...]]]:
    """Return each operation with each choice of its results and of its optional operands."""
    return [
        (operation, wanted, optional)
        for operation in OPERATIONS
        for wanted in choices(operation.all_results)
        for optional in ((), *choices(operation.optional))
    ]


def choices(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return all choices of at least one of some names."""
    return [c for count in range(1, len(names) + 1) for c in combinations(names, count)]


def unaligned(spec: TensorSpec) -> Array:
    """Return ones that lie as elements may lie in a message."""
    data = memoryview(bytearray(spec.nbytes + 1))[1:]
    array = np.ndarray(spec.shape, spec.dtype, data)
    array[...] = 1
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("name", HUNGRY)
def test_a_call_takes_no_more_of_a_card_than_its_footprint(name: str) -> None:
    problem = HUNGRY[name]
    sizing = MemoryEstimate(1 << 40, 4, 1 << 20, lambda _product, _problem: 0)
    for operation, wanted, optional in kinds_of_call():
        operands = operation.operands_for(wanted, optional)
        operand_specs = [spec_of_field(problem, field) for field in operands]
        result_specs = [spec_of_field(problem, field) for field in wanted]
        frame = DeviceLayout(operand_specs, result_specs, 1 << 20)
        needed_bytes = frame.total_bytes if problem.has_products else 0
        assert needed_bytes <= sizing.footprint_bytes(problem, wanted)
