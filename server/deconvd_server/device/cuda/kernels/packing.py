"""Packed operands for the tensor cores: the layout of images and filters, and the steps of packing.cu that make it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from deconvd.model.geometry import Pair
from deconvd.model.problem import Problem
from deconvd_server.device.cuda.kernels.launch import (
    THREADS,
    Kernel,
    constants,
    element,
    integer,
)
from deconvd_server.device.cuda.kernels.steps import (
    BufferOffset,
    BufferSlot,
    Clear,
    Launch,
    PlanStep,
)
from deconvd_server.device.cuda.kernels.structs import PackedFilter, PackedImage

__all__ = ["Packing", "padded_channels_count"]

_MAX_CHANNELS = 64
"""The most packed channels of a tile, if the stride is not larger."""

_FILTER_TILE = 32
"""Rows and columns of W that a block packs at once."""


class _ImageTile(NamedTuple):
    """The part of an image that is packed at once, for a stride along w.

    Attributes:
        in_registers: Whether a thread packs it in its registers; else a block packs it through shared memory.
        pixels: Packed pixels of a row.
        rows: Pairs (channel, phase along h) of each packed pixel.
        channels: Packed channels of these rows: whole vectors of 8.
    """

    in_registers: bool
    pixels: int
    rows: int
    channels: int

    @classmethod
    def of(cls, stride_w: int) -> _ImageTile:
        """Return the tile for a stride."""
        if stride_w in (1, 2, 4, 8):
            return cls(True, 8, 8 // stride_w, 8)
        rows = 8 * (8 // stride_w) if stride_w < 8 else max(_MAX_CHANNELS // stride_w, 1)
        return cls(False, 32, rows, rows * stride_w)


def padded_channels_count(channels: int) -> int:
    """Return the number of packed channels: a multiple of 8, which one copy of 16 bytes moves."""
    return -(-channels // 8) * 8


@dataclass(frozen=True, slots=True)
class Packing:
    """A problem as a convolution of stride 1 by a filter of ``ceil(kernel / stride)`` taps.

    The output pixels are grouped into packed pixels, whose phases are like channels. On one axis, with stride 3 and pad
    1, where ``|`` separates packed pixels:

        phase           0 1 2 | 0 1 2 | 0 1 2
        output pixel    - 0 1 | 2 3 4 | 5 6 7      (- is cut)

    Output pixel ``o`` is phase ``(o + pad) mod stride`` of packed pixel ``(o + pad) div stride``. Packed pixels are
    counted from `first`, the first one that has an output pixel.
    """

    problem: Problem

    @property
    def inputs(self) -> int:
        """Input channels of a group."""
        return self.problem.c_I // self.problem.groups

    @property
    def outputs(self) -> int:
        """Output channels of a group."""
        return self.problem.W.shape[1]

    @property
    def columns(self) -> int:
        """Output channels of a group, each counted once for every phase."""
        return self.outputs * math.prod(self.problem.geometry.stride)

    @property
    def taps(self) -> Pair:
        """Taps of the convolution."""
        geometry, (h, w) = self.problem.geometry, self.problem.kernel
        return -(-h // geometry.stride[0]), -(-w // geometry.stride[1])

    @property
    def first(self) -> Pair:
        """The first packed pixel of the output image."""
        pad, stride = self.problem.geometry.pad, self.problem.geometry.stride
        return pad[0] // stride[0], pad[1] // stride[1]

    @property
    def cut(self) -> Pair:
        """Phases of the first packed pixel that are before the output image."""
        pad, stride = self.problem.geometry.pad, self.problem.geometry.stride
        return pad[0] % stride[0], pad[1] % stride[1]

    @property
    def packed_output(self) -> Pair:
        """Size of the output image in packed pixels."""
        h, w = (
            (output + cut - 1) // stride + 1
            for output, cut, stride in zip(
                self.problem.output, self.cut, self.problem.geometry.stride, strict=True
            )
        )
        return h, w

    @property
    def x_elements(self) -> int:
        """Elements of packed x."""
        return (
            self.problem.n
            * math.prod(self.problem.image)
            * self.problem.groups
            * padded_channels_count(self.inputs)
        )

    @property
    def gy_elements(self) -> int:
        """Elements of packed gy."""
        pixels = self.problem.n * math.prod(self.packed_output)
        return pixels * self.problem.groups * padded_channels_count(self.columns)

    def pack_x(self, target: BufferOffset) -> PlanStep:
        """Return the step that packs x, the first operand."""
        row = 1, math.prod(self.problem.image)  # without a stride, the image is packed like one row
        return self._pack(self.inputs, row, (1, 1), (0, 0), row, BufferSlot.A, target)

    def pack_gy(self, slot: BufferSlot, target: BufferOffset) -> PlanStep:
        """Return the step that packs gy, by phases."""
        stride = self.problem.geometry.stride
        return self._pack(
            self.outputs, self.problem.output, stride, self.cut, self.packed_output, slot, target
        )

    def _pack(
        self,
        channels: int,
        image: Pair,
        stride: Pair,
        cut: Pair,
        packed: Pair,
        slot: BufferSlot,
        target: BufferOffset,
    ) -> PlanStep:
        groups, n = self.problem.groups, self.problem.n
        packed_channels = padded_channels_count(channels * math.prod(stride))
        layout = PackedImage(n, groups, channels, *image, cut[0], *packed, packed_channels)
        rows = packed[0] * n * groups
        lanes = _lanes(packed_channels)
        tile = _ImageTile.of(stride[1])
        runs = rows * -(-packed[1] // tile.pixels)
        if tile.in_registers:
            blocks = -(-runs // (THREADS // lanes))
            grid = blocks, -(-packed_channels // (tile.channels * lanes)), 1
        else:
            grid = runs, -(-packed_channels // tile.channels), 1
        kernel = self._kernel("pack_image", stride, cut[1])
        return Launch(kernel, grid, (BufferOffset(slot), target), (layout, integer(lanes)))

    def filter_by_output_elements(self) -> int:
        """Return the elements of W packed for y."""
        rows = self.problem.groups * self.columns
        return rows * math.prod(self.taps) * padded_channels_count(self.inputs)

    def filter_by_input_elements(self) -> int:
        """Return the elements of W packed for gx."""
        return self.problem.c_I * math.prod(self.taps) * padded_channels_count(self.columns)

    def pack_filter_by_output(self, target: BufferOffset) -> list[PlanStep]:
        """Return the steps that pack W for y."""
        rows = self.outputs * math.prod(self.problem.kernel)
        grid = -(-rows // _FILTER_TILE), -(-self.inputs // _FILTER_TILE), self.problem.groups
        launch = Launch(
            self._kernel("pack_filter_by_output"),
            grid,
            (BufferOffset(BufferSlot.B), target),
            (self._filter(padded_channels_count(self.inputs)),),
        )
        full = self._has_every_tap and self.inputs == padded_channels_count(self.inputs)
        return self._clear_then_launch(launch, target, self.filter_by_output_elements(), full=full)

    def pack_filter_by_input(self, target: BufferOffset) -> list[PlanStep]:
        """Return the steps that pack W for gx."""
        launch = Launch(
            self._kernel("pack_filter_by_input"),
            self._grid_of_W,
            (BufferOffset(BufferSlot.B), target),
            (self._filter(padded_channels_count(self.columns)),),
        )
        full = self._has_every_tap and self.columns == padded_channels_count(self.columns)
        return self._clear_then_launch(launch, target, self.filter_by_input_elements(), full=full)

    def unpack_filter(self, sums: BufferOffset, parts_count: int) -> PlanStep:
        """Return the step that adds up the parts of gW's sums and writes gW."""
        constants = (self._filter(padded_channels_count(self.columns)), integer(parts_count))
        return Launch(
            self._kernel("unpack_filter"),
            self._grid_of_W,
            (sums, BufferOffset(BufferSlot.OUT)),
            constants,
        )

    @property
    def _has_every_tap(self) -> bool:
        """Whether every phase of every tap of the convolution is a tap of the filter."""
        pairs = zip(self.problem.kernel, self.problem.geometry.stride, strict=True)
        return all(kernel % stride == 0 for kernel, stride in pairs)

    @property
    def _grid_of_W(self) -> tuple[int, int, int]:
        return -(-math.prod(self.problem.W.shape) // THREADS), 1, 1

    def _clear_then_launch(
        self, launch: Launch, target: BufferOffset, elements: int, *, full: bool
    ) -> list[PlanStep]:
        # Padding, and taps that the filter does not have, must be zeros: the launch writes neither.
        clear = Clear(target, elements * self.problem.W.dtype.itemsize)
        return [launch] if full else [clear, launch]

    def _filter(self, packed_channels: int) -> PackedFilter:
        return PackedFilter(
            self.problem.groups,
            self.inputs,
            self.outputs,
            *self.problem.kernel,
            *self.taps,
            packed_channels,
        )

    def _kernel(self, name: str, stride: Pair | None = None, cut_w: int = 0) -> Kernel:
        h, w = stride or self.problem.geometry.stride
        tile = _ImageTile.of(w)
        macros = constants(
            STRIDE_H=h,
            STRIDE_W=w,
            CUT_W=cut_w,
            FILTER_TILE=_FILTER_TILE,
            IN_REGISTERS=tile.in_registers,
            PIXELS=tile.pixels,
            ROWS=tile.rows,
        )
        return Kernel("packing.cu", name, (element(self.problem.x.dtype), *macros))


def _lanes(packed_channels: int) -> int:
    """Return the number of neighbouring threads that pack neighbouring channels: a power of two, at most 8."""
    return next(lanes for lanes in (8, 4, 2, 1) if packed_channels >= 8 * lanes)
