"""Plans for half-precision problems on the tensor cores, directly from NCHW to NCHW.

A deconvolution becomes a convolution of stride 1 whose result has the output's phases as channels (packing.py). Few
channels, filters as large as the stride and huge filters then become matrix products of a good shape. It wastes
products if the stride does not divide the filter, but little memory.
"""

from __future__ import annotations

import math

from deconvd.model.dtypes import BFLOAT16
from deconvd.model.geometry import MAX_EXTENT, Pair
from deconvd.model.problem import Problem
from deconvd_server.device.cuda.kernels.launch import (
    THREADS,
    Kernel,
    Macro,
    constants,
    element,
)
from deconvd_server.device.cuda.kernels.packing import Packing, padded_channels_count
from deconvd_server.device.cuda.kernels.steps import (
    BufferOffset,
    BufferSlot,
    Launch,
    PlanStep,
    StepPlan,
    Workspace,
)
from deconvd_server.device.cuda.kernels.structs import Convolution, Correlation
from deconvd_server.device.cuda.plan import Product

__all__ = ["tensor_core_plans"]

_STAGES = 4
"""Stages that a block has in shared memory at once: one is multiplied while the others are loaded."""

_DEPTH = 32
"""Depth of a stage: the terms of each sum that it adds."""

_ROWS = 128
"""Rows of a block's tile."""

_WIDTHS = (16, 32, 64, 128)
"""Columns of a block's tile that the kernels are compiled for."""

_MAX_GRID_YZ = 65535
"""The most blocks of a grid along y or z, by CUDA."""

_STRIDES = {*range(1, 9), 16, 32, 64}
"""Strides that kernels are compiled for. A client must not be able to make the server compile again and again."""

_MAX_TAP_WASTE = 2.5
"""Bound on the taps that are multiplied, over the filter's taps. It is 1.8 for 3 taps at stride 2."""

_MAX_WASTE = 5.0
"""Bound on the same ratio if padded channels are counted too."""

_BLOCKS_PER_PROCESSOR = 2
"""Blocks that a multiprocessor runs at once. Sums are cut into parts until each multiprocessor has as many blocks."""

_MIN_STAGES = 16
"""The fewest stages of a part: its start and its end take as long as some stages."""

_PARTS_BYTES = 64 << 20
"""Bound on the size of gW's sums of all parts."""


def tensor_core_plans(product: Product, problem: Problem, processors_count: int) -> list[StepPlan]:
    """Return the plans for a problem that has products: one, or none if the problem is not suited."""
    if not _is_suited(problem):
        return []
    packing = Packing(problem)
    if product is Product.Y:
        return [_y_plan(packing)]
    make = _gx_plan if product is Product.GX else _gW_plan
    return [make(packing, processors_count * _BLOCKS_PER_PROCESSOR)]


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
    """Return whether few enough of the products are with padding, of the filter or of the channels."""
    taps_count = math.prod(packing.taps) * math.prod(problem.geometry.stride)
    in_taps = taps_count / math.prod(problem.kernel)
    in_channels = padded_channels_count(packing.inputs) / packing.inputs
    return in_taps <= _MAX_TAP_WASTE and in_taps * in_channels <= _MAX_WASTE


def _fits_grids(problem: Problem, packing: Packing) -> bool:
    """Return whether the grids are small enough along y and z."""
    columns = max(packing.columns, packing.inputs)
    return problem.groups * -(-columns // 64) <= _MAX_GRID_YZ and packing.inputs <= _MAX_GRID_YZ


def _fits_integers(problem: Problem, packing: Packing) -> bool:
    """Return whether the kernels' 32-bit pixel and depth counters are wide enough."""
    pixels = max(math.prod(problem.image), math.prod(packing.packed_output))
    depth = math.prod(packing.taps) * max(
        padded_channels_count(packing.columns), padded_channels_count(packing.inputs)
    )
    reach = max(packing.taps[i] * problem.geometry.dilate[i] for i in range(2))
    return max(problem.n * pixels, depth, reach, math.prod(problem.output)) < MAX_EXTENT // 4


def _y_plan(packing: Packing) -> StepPlan:
    problem, workspace = packing.problem, Workspace()
    itemsize = problem.x.dtype.itemsize
    x = workspace.take(packing.x_elements * itemsize)
    W = workspace.take(packing.filter_by_output_elements() * itemsize)
    dilate = problem.geometry.dilate
    convolution = Convolution(
        *(problem.n, problem.groups, *problem.image, padded_channels_count(packing.inputs)),
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
    steps = (packing.pack_x(x), *packing.pack_filter_by_output(W), convolve)
    return StepPlan("tensor cores", workspace.size_bytes, steps)


def _gx_plan(packing: Packing, blocks_count: int) -> StepPlan:
    problem, workspace = packing.problem, Workspace()
    itemsize = problem.x.dtype.itemsize
    gy = workspace.take(packing.gy_elements * itemsize)
    W = workspace.take(packing.filter_by_input_elements() * itemsize)
    parts_count = _gx_parts(packing, blocks_count)
    convolution = Convolution(
        *(
            problem.n,
            problem.groups,
            *packing.packed_output,
            padded_channels_count(packing.columns),
        ),
        *problem.image,
        *packing.taps,
        *problem.geometry.dilate,
        *(-packing.first[0], -packing.first[1]),
        packing.inputs,
        *problem.image,
        *(0, 0, parts_count),
    )
    pixels = problem.n * math.prod(problem.image)
    products: tuple[PlanStep, ...]
    if parts_count == 1:
        products = (_convolve(packing, pixels, (1, 1), (gy, W), convolution),)
    else:
        sums = workspace.take(parts_count * pixels * problem.c_I * 4)
        products = _convolve_parts(packing, pixels, (gy, W, sums), convolution)
    steps = (
        packing.pack_gy(BufferSlot.A, gy),
        *packing.pack_filter_by_input(W),
        *products,
    )
    return StepPlan("tensor cores", workspace.size_bytes, steps)


def _gx_parts(packing: Packing, blocks_count: int) -> int:
    """Return the number of parts of the depth of gx's product: enough to fill the card."""
    problem = packing.problem
    tiles = -(-problem.n * math.prod(problem.image) // _ROWS) * problem.groups
    tiles *= -(-packing.inputs // _width(packing.inputs))
    stages = -(-math.prod(packing.taps) * padded_channels_count(packing.columns) // _DEPTH)
    return max(min(blocks_count // tiles, stages // _MIN_STAGES, _MAX_GRID_YZ // problem.groups), 1)


def _convolve_parts(
    packing: Packing,
    pixels: int,
    places: tuple[BufferOffset, BufferOffset, BufferOffset],
    convolution: Convolution,
) -> tuple[PlanStep, PlanStep]:
    """Return the steps that sum the parts of the depth of gx's product, and add the parts up."""
    columns, groups = packing.inputs, packing.problem.groups
    width = _width(columns)
    kernel = _convolve_kernel("convolve_parts", packing, width, (1, 1))
    grid = -(-pixels // _ROWS), -(-columns // width), groups * convolution.parts
    add = _convolve_kernel("add_parts", packing, width, (1, 1))
    add_grid = -(-pixels // add.threads), columns, groups
    return (
        Launch(kernel, grid, places, (convolution,)),
        Launch(add, add_grid, (places[2], BufferOffset(BufferSlot.OUT)), (convolution,)),
    )


def _convolve(
    packing: Packing,
    pixels: int,
    stride: Pair,
    operands: tuple[BufferOffset, BufferOffset],
    convolution: Convolution,
) -> PlanStep:
    columns: int = convolution.columns
    width = _width(columns)
    kernel = _convolve_kernel("convolve", packing, width, stride)
    grid = -(-pixels // _ROWS), -(-columns // width), packing.problem.groups
    return Launch(kernel, grid, (*operands, BufferOffset(BufferSlot.OUT)), (convolution,))


def _convolve_kernel(name: str, packing: Packing, width: int, stride: Pair) -> Kernel:
    strides = constants(STRIDE_H=stride[0], STRIDE_W=stride[1])
    return Kernel(
        "convolve.cu",
        name,
        (element(packing.problem.x.dtype), *_tile_macros(_ROWS, width), *strides),
        threads=128
        if width == 128
        else THREADS,  # fewer, larger warp tiles read less shared memory
        shared_bytes=_STAGES * _stage_bytes(_ROWS, width),
    )


def _tile_macros(rows: int, columns: int) -> tuple[Macro, ...]:
    """Return the macros of a block's tile: its size, and how it is loaded."""
    return constants(
        ROWS=rows,
        COLUMNS=columns,
        DEPTH=_DEPTH,
        STAGES=_STAGES,
        STAGE_BYTES=_stage_bytes(rows, columns),
        BLOCKS_PER_PROCESSOR=_BLOCKS_PER_PROCESSOR,
    )


def _stage_bytes(rows: int, columns: int) -> int:
    """Return the shared memory of a stage of both operands."""
    return (rows + columns) * _DEPTH * 2


def _gW_plan(packing: Packing, blocks_count: int) -> StepPlan:
    problem, workspace = packing.problem, Workspace()
    itemsize = problem.x.dtype.itemsize
    x = workspace.take(packing.x_elements * itemsize)
    gy = workspace.take(packing.gy_elements * itemsize)
    columns = math.prod(packing.taps) * padded_channels_count(packing.columns)
    width = _width(columns)
    rows = 64 if packing.inputs <= 64 else 128
    tiles = -(-columns // width), -(-packing.inputs // rows) * problem.groups
    parts_count, steps_count = _parts(packing, blocks_count // math.prod(tiles), columns)
    sums = workspace.take(parts_count * problem.c_I * columns * 4)
    correlation = Correlation(
        *(
            problem.n,
            problem.groups,
            *problem.image,
            padded_channels_count(packing.inputs),
            packing.inputs,
        ),
        *packing.packed_output,
        padded_channels_count(packing.columns),
        *packing.taps,
        *problem.geometry.dilate,
        *(-packing.first[0], -packing.first[1]),
        steps_count,
    )
    kernel = Kernel(
        "correlate.cu",
        "correlate",
        (element(problem.x.dtype), *_tile_macros(rows, width)),
        shared_bytes=_STAGES * _stage_bytes(rows, width),
    )
    correlate = Launch(kernel, (*tiles, parts_count), (x, gy, sums), (correlation,))
    steps = (
        packing.pack_x(x),
        packing.pack_gy(BufferSlot.B, gy),
        correlate,
        packing.unpack_filter(sums, parts_count),
    )
    return StepPlan("tensor cores", workspace.size_bytes, steps)


def _parts(packing: Packing, wanted_count: int, columns: int) -> tuple[int, int]:
    """Return the number of parts of gW's sums, and the stages of pixels in each.

    Args:
        wanted_count: Parts that fill the card. It is rounded down: one more block would take another full round.
    """
    problem = packing.problem
    stages = -(-problem.n * math.prod(problem.image) // _DEPTH)
    fit = max(_PARTS_BYTES // (problem.c_I * columns * 4), 1)
    steps_count = -(-stages // min(max(wanted_count, 1), fit, stages, _MAX_GRID_YZ))
    return -(-stages // steps_count), steps_count


def _width(columns: int) -> int:
    return next((width for width in _WIDTHS if columns <= width), _WIDTHS[-1])
