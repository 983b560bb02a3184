"""Plans for half-precision problems on the tensor cores, straight from NCHW to NCHW.

A deconvolution is a convolution of stride 1 whose channels are the output's phases (packing.py). That wastes work where
the stride does not divide the filter, and little memory: few channels, filters as large as the stride and huge filters
become products of a good shape.
"""

from __future__ import annotations

import ctypes
import math

from deconvd.model.dtypes import BFLOAT16
from deconvd.model.geometry import MAX_EXTENT, Pair
from deconvd.model.problem import Problem
from deconvd_server.device.cuda.kernels.launch import Kernel, element
from deconvd_server.device.cuda.kernels.packing import Packing, padded
from deconvd_server.device.cuda.kernels.steps import (
    Launch,
    Place,
    Slot,
    Step,
    StepPlan,
    Workspace,
)
from deconvd_server.device.cuda.plan import Prepacking, Product

__all__ = ["tensor_core_plans"]

_STAGES = 4
_DEPTH = 32
_ROWS = 128
_WIDTHS = (16, 32, 64, 128)
"""Columns of a block's tile that the kernels are compiled for."""

_MAX_GRID_YZ = 65535
_STRIDES = {*range(1, 9), 16, 32, 64}
"""Strides that kernels are compiled for: a stranger's requests must not make us compile without end."""

_MAX_TAP_WASTE = 2.5
"""How many times the filter's taps may be multiplied: 1.8 for 3 taps at stride 2."""

_MAX_WASTE = 5.0
"""The same with padded channels."""

_BLOCKS = 132 * 2
"""Blocks that a large card runs at once: gW's sums are cut into parts until there are as many."""

_MIN_STAGES = 16
"""Stages of depth that a part has at least: its beginning and its end take as long as some stages."""

_PARTS_BYTES = 64 << 20
"""A bound on gW's sums of all parts."""


class _Convolution(ctypes.Structure):
    """`Convolution` in convolve.cu."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            *("samples", "groups", "source_h", "source_w", "channels", "domain_h", "domain_w"),
            *("taps_h", "taps_w", "step_h", "step_w", "offset_h", "offset_w", "columns"),
            *("output_h", "output_w", "cut_h", "cut_w", "parts"),
        )
    ]


class _Correlation(ctypes.Structure):
    """`Correlation` in correlate.cu."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            *("samples", "groups", "image_h", "image_w", "rows", "inputs"),
            *("gy_h", "gy_w", "channels"),
            *("taps_h", "taps_w", "step_h", "step_w", "offset_h", "offset_w", "steps"),
        )
    ]


def tensor_core_plans(operation: Product, problem: Problem) -> list[StepPlan]:
    """Return the plans for a problem that has products: one, or none where it is not suited."""
    if not _is_suited(problem):
        return []
    make = {Product.Y: _y_plan, Product.GX: _gx_plan, Product.GW: _gW_plan}[operation]
    return [make(Packing(problem))]


def _is_suited(problem: Problem) -> bool:
    packing, geometry = Packing(problem), problem.geometry
    return (
        problem.x.dtype.name in ("float16", BFLOAT16.name)
        and (geometry.stride == (1, 1) or geometry.dilate == (1, 1))
        and set(geometry.stride) <= _STRIDES
        and _wastes_little(problem, packing)
        and _fits_grids(problem, packing)
        and _fits_integers(problem, packing)
    )


def _wastes_little(problem: Problem, packing: Packing) -> bool:
    """Return whether most of what is multiplied is neither padding of the filter nor of the channels."""
    taps_count = math.prod(packing.taps) * math.prod(problem.geometry.stride)
    in_taps = taps_count / math.prod(problem.kernel)
    in_channels = padded(packing.inputs) / packing.inputs
    return in_taps <= _MAX_TAP_WASTE and in_taps * in_channels <= _MAX_WASTE


def _fits_grids(problem: Problem, packing: Packing) -> bool:
    """Return whether the blocks can be counted along the grids' short axes."""
    columns = max(packing.columns, packing.inputs)
    return problem.groups * -(-columns // 64) <= _MAX_GRID_YZ and packing.inputs <= _MAX_GRID_YZ


def _fits_integers(problem: Problem, packing: Packing) -> bool:
    """Return whether the kernels' 32-bit pixel and depth counters are wide enough."""
    pixels = max(math.prod(problem.image), math.prod(packing.packed_output))
    depth = math.prod(packing.taps) * max(padded(packing.columns), padded(packing.inputs))
    reach = max(packing.taps[i] * problem.geometry.dilate[i] for i in range(2))
    return max(problem.n * pixels, depth, reach, math.prod(problem.output)) < MAX_EXTENT // 4


def _y_plan(packing: Packing, *, W_is_packed: bool = False) -> StepPlan:
    problem, workspace = packing.problem, Workspace()
    itemsize = problem.x.dtype.itemsize
    x = workspace.take(packing.x_elements * itemsize)
    W_bytes = packing.filter_by_output_elements() * itemsize
    W = Place(Slot.B) if W_is_packed else workspace.take(W_bytes)
    dilate = problem.geometry.dilate
    convolution = _Convolution(
        *(problem.n, problem.groups, *problem.image, padded(packing.inputs)),
        *packing.packed_output,
        *packing.taps,
        *(-dilate[0], -dilate[1]),
        *packing.first,
        packing.columns,
        *problem.output,
        *packing.cut,
        1,
    )
    stride = problem.geometry.stride
    pixels = problem.n * math.prod(packing.packed_output)
    convolve = _convolve(packing, pixels, stride, (x, W), convolution)
    if W_is_packed:
        return StepPlan("tensor cores", workspace.size_bytes, (packing.pack_x(x), convolve))

    def prepare() -> Prepacking:
        pack = packing.pack_filter_by_output(Place(Slot.OUT))
        plan = _y_plan(packing, W_is_packed=True)
        return _preparation("by output", packing, W_bytes, pack, plan)

    steps = (packing.pack_x(x), *packing.pack_filter_by_output(W), convolve)
    return StepPlan("tensor cores", workspace.size_bytes, steps, prepare)


def _preparation(
    order: str, packing: Packing, size_bytes: int, pack: list[Step], plan: StepPlan
) -> Prepacking:
    """Return how W is packed.

    Args:
        order: Which order the packed W has.
        pack: The steps that pack it from the place of b to that of the result.
        plan: For W so packed.
    """
    # no more than the packing of a given W depends on
    key = ("tensor cores", order, packing.problem.groups, packing.problem.geometry.stride)

    def make(W: int, form: int, stream: int) -> None:
        for step in pack:
            step.enqueue((0, W, form, 0), stream)

    return Prepacking(key, size_bytes, make, plan)


def _gx_plan(packing: Packing, *, W_is_packed: bool = False) -> StepPlan:
    problem, workspace = packing.problem, Workspace()
    itemsize = problem.x.dtype.itemsize
    gy = workspace.take(packing.gy_elements * itemsize)
    W_bytes = packing.filter_by_input_elements() * itemsize
    W = Place(Slot.B) if W_is_packed else workspace.take(W_bytes)
    parts_count = _gx_parts(packing)
    convolution = _Convolution(
        *(problem.n, problem.groups, *packing.packed_output, padded(packing.columns)),
        *problem.image,
        *packing.taps,
        *problem.geometry.dilate,
        *(-packing.first[0], -packing.first[1]),
        packing.inputs,
        *problem.image,
        *(0, 0, parts_count),
    )
    pixels = problem.n * math.prod(problem.image)
    products: tuple[Step, ...]
    if parts_count == 1:
        products = (_convolve(packing, pixels, (1, 1), (gy, W), convolution),)
    else:
        sums = workspace.take(parts_count * pixels * problem.c_I * 4)
        products = _convolve_parts(packing, pixels, (gy, W, sums), convolution)
    pack_gy = packing.pack_gy(Slot.A, gy)
    if W_is_packed:
        return StepPlan("tensor cores", workspace.size_bytes, (pack_gy, *products))

    def prepare() -> Prepacking:
        pack = packing.pack_filter_by_input(Place(Slot.OUT))
        plan = _gx_plan(packing, W_is_packed=True)
        return _preparation("by input", packing, W_bytes, pack, plan)

    steps = (pack_gy, *packing.pack_filter_by_input(W), *products)
    return StepPlan("tensor cores", workspace.size_bytes, steps, prepare)


def _gx_parts(packing: Packing) -> int:
    """Return how many parts the depth of gx's product is cut into: enough to fill a card."""
    problem = packing.problem
    tiles = -(-problem.n * math.prod(problem.image) // _ROWS) * problem.groups
    tiles *= -(-packing.inputs // _width(packing.inputs))
    stages = -(-math.prod(packing.taps) * padded(packing.columns) // _DEPTH)
    return max(min(_BLOCKS // tiles, stages // _MIN_STAGES, _MAX_GRID_YZ // problem.groups), 1)


def _convolve_parts(
    packing: Packing, pixels: int, places: tuple[Place, Place, Place], convolution: _Convolution
) -> tuple[Step, Step]:
    """Return the steps that sum parts of the depth of gx's product, and add them up."""
    columns, groups = packing.inputs, packing.problem.groups
    width = _width(columns)
    kernel = _convolve_kernel("convolve_parts", packing, width, (1, 1))
    grid = -(-pixels // _ROWS), -(-columns // width), groups * convolution.parts
    add = _convolve_kernel("add_parts", packing, width, (1, 1))
    add_grid = -(-pixels // add.threads), columns, groups
    return (
        Launch(kernel, grid, places, (convolution,)),
        Launch(add, add_grid, (places[2], Place(Slot.OUT)), (convolution,)),
    )


def _convolve(
    packing: Packing,
    pixels: int,
    stride: Pair,
    operands: tuple[Place, Place],
    convolution: _Convolution,
) -> Step:
    columns: int = convolution.columns
    width = _width(columns)
    kernel = _convolve_kernel("convolve", packing, width, stride)
    grid = -(-pixels // _ROWS), -(-columns // width), packing.problem.groups
    return Launch(kernel, grid, (*operands, Place(Slot.OUT)), (convolution,))


def _convolve_kernel(name: str, packing: Packing, width: int, stride: Pair) -> Kernel:
    values = {"BLOCK_COLUMNS": width, "STRIDE_H": stride[0], "STRIDE_W": stride[1]}
    macros = ((macro, str(value)) for macro, value in values.items())
    return Kernel(
        "convolve.cu",
        name,
        (element(packing.problem.x.dtype), *macros),
        threads=128 if width == 128 else 256,
        shared_bytes=_STAGES * (_ROWS + width) * _DEPTH * 2,
    )


def _gW_plan(packing: Packing) -> StepPlan:
    problem, workspace = packing.problem, Workspace()
    itemsize = problem.x.dtype.itemsize
    x = workspace.take(packing.x_elements * itemsize)
    gy = workspace.take(packing.gy_elements * itemsize)
    columns = math.prod(packing.taps) * padded(packing.columns)
    width = _width(columns)
    rows = 64 if packing.inputs <= 64 else 128
    tiles = -(-columns // width), -(-packing.inputs // rows) * problem.groups
    parts_count, steps_count = _parts(packing, math.prod(tiles), columns)
    sums = workspace.take(parts_count * problem.c_I * columns * 4)
    correlation = _Correlation(
        *(problem.n, problem.groups, *problem.image, padded(packing.inputs), packing.inputs),
        *packing.packed_output,
        padded(packing.columns),
        *packing.taps,
        *problem.geometry.dilate,
        *(-packing.first[0], -packing.first[1]),
        steps_count,
    )
    kernel = Kernel(
        "correlate.cu",
        "correlate",
        (
            element(problem.x.dtype),
            ("BLOCK_ROWS", str(rows)),
            ("BLOCK_COLUMNS", str(width)),
        ),
        shared_bytes=_STAGES * (rows + width) * _DEPTH * 2,
    )
    correlate = Launch(kernel, (*tiles, parts_count), (x, gy, sums), (correlation,))
    steps = (
        packing.pack_x(x),
        packing.pack_gy(Slot.B, gy),
        correlate,
        packing.unpack_filter(sums, parts_count),
    )
    return StepPlan("tensor cores", workspace.size_bytes, steps)


def _parts(packing: Packing, tiles_count: int, columns: int) -> tuple[int, int]:
    """Return how many parts gW's sums are cut into, and how many stages of pixels each takes."""
    problem = packing.problem
    stages = -(-problem.n * math.prod(problem.image) // _DEPTH)
    wanted = max(
        _BLOCKS // tiles_count, 1
    )  # rounded down: a block too many takes as long as a full round
    fit = max(_PARTS_BYTES // (problem.c_I * columns * 4), 1)
    steps_count = -(-stages // min(wanted, fit, stages, _MAX_GRID_YZ))
    return -(-stages // steps_count), steps_count


def _width(columns: int) -> int:
    return next((width for width in _WIDTHS if columns <= width), _WIDTHS[-1])
