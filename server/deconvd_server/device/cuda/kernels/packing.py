"""Operands packed for the tensor cores: how images and filters are laid out by packing.cu, and the steps that do it."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

from deconvd.model.geometry import Pair
from deconvd.model.problem import Problem
from deconvd_server.device.cuda.kernels.launch import Kernel, element, integer
from deconvd_server.device.cuda.kernels.steps import Clear, Launch, Place, Slot, Step

__all__ = ["Packing", "padded"]

_PIXELS = 32
_MAX_CHANNELS = 64
_THREADS = 256


class _PackedImage(ctypes.Structure):
    """`PackedImage` in packing.cu."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            *("samples", "groups", "channels"),
            *("image_h", "image_w", "cut_h"),
            *("packed_h", "packed_w", "packed_channels"),
        )
    ]


class _PackedFilter(ctypes.Structure):
    """`PackedFilter` in packing.cu."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            *("groups", "inputs", "outputs", "kernel_h", "kernel_w"),
            *("taps_h", "taps_w", "packed_channels"),
        )
    ]


def padded(channels: int) -> int:
    """Return the number of packed channels: a multiple of what one copy moves."""
    return -(-channels // 8) * 8


@dataclass(frozen=True, slots=True)
class Packing:
    """A problem as a convolution of stride 1 by a filter of ``ceil(kernel / stride)`` taps.

    Output pixel ``o`` is phase ``(o + pad) mod stride`` of packed pixel ``(o + pad) div stride``,
    counted from the first that has an output pixel, `first`.
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
        """Phases of the first packed pixel that lie before the output image."""
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
            * padded(self.inputs)
        )

    @property
    def gy_elements(self) -> int:
        """Elements of packed gy."""
        pixels = self.problem.n * math.prod(self.packed_output)
        return pixels * self.problem.groups * padded(self.columns)

    def pack_x(self, target: Place) -> Step:
        """Return the step that packs x, the first operand."""
        row = 1, math.prod(self.problem.image)  # without a stride, rows need not be told apart
        return self._pack(self.inputs, row, (1, 1), (0, 0), row, Slot.A, target)

    def pack_gy(self, slot: Slot, target: Place) -> Step:
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
        slot: Slot,
        target: Place,
    ) -> Step:
        groups, n = self.problem.groups, self.problem.n
        packed_channels = padded(channels * math.prod(stride))
        layout = _PackedImage(n, groups, channels, *image, cut[0], *packed, packed_channels)
        rows = packed[0] * n * groups
        lanes = _lanes(packed_channels)
        if stride[1] in (1, 2, 4, 8):
            blocks = -(-rows * -(-packed[1] // 8) // (_THREADS // lanes))
            grid = blocks, -(-packed_channels // (8 * lanes)), 1
        else:
            parts = -(-packed_channels // _tile_channels(stride[1]))
            grid = rows * -(-packed[1] // _PIXELS), parts, 1
        kernel = self._kernel("pack_image", stride, cut[1])
        return Launch(kernel, grid, (Place(slot), target), (layout, integer(lanes)))

    def filter_by_output_elements(self) -> int:
        """Return the elements of W packed for y."""
        rows = self.problem.groups * self.columns
        return rows * math.prod(self.taps) * padded(self.inputs)

    def filter_by_input_elements(self) -> int:
        """Return the elements of W packed for gx."""
        return self.problem.c_I * math.prod(self.taps) * padded(self.columns)

    def pack_filter_by_output(self, target: Place) -> list[Step]:
        """Return the steps that pack W for y."""
        rows = self.outputs * math.prod(self.problem.kernel)
        grid = -(-rows // 32), -(-self.inputs // 32), self.problem.groups
        launch = Launch(
            self._kernel("pack_filter_by_output"),
            grid,
            (Place(Slot.B), target),
            (self._filter(padded(self.inputs)),),
        )
        full = self._has_every_tap and self.inputs == padded(self.inputs)
        return self._cleared(launch, target, self.filter_by_output_elements(), full=full)

    def pack_filter_by_input(self, target: Place) -> list[Step]:
        """Return the steps that pack W for gx."""
        launch = Launch(
            self._kernel("pack_filter_by_input"),
            self._grid_of_W,
            (Place(Slot.B), target),
            (self._filter(padded(self.columns)),),
        )
        full = self._has_every_tap and self.columns == padded(self.columns)
        return self._cleared(launch, target, self.filter_by_input_elements(), full=full)

    def unpack_filter(self, sums: Place, parts_count: int) -> Step:
        """Return the step that adds up the parts of gW's sums and puts them in their places."""
        constants = (self._filter(padded(self.columns)), integer(parts_count))
        return Launch(
            self._kernel("unpack_filter"), self._grid_of_W, (sums, Place(Slot.OUT)), constants
        )

    @property
    def _has_every_tap(self) -> bool:
        """Whether every phase of every tap of the convolution is a tap of the filter."""
        pairs = zip(self.problem.kernel, self.problem.geometry.stride, strict=True)
        return all(kernel % stride == 0 for kernel, stride in pairs)

    @property
    def _grid_of_W(self) -> tuple[int, int, int]:
        return -(-math.prod(self.problem.W.shape) // _THREADS), 1, 1

    def _cleared(self, launch: Launch, target: Place, elements: int, *, full: bool) -> list[Step]:
        clear = Clear(target, elements * self.problem.W.dtype.itemsize)
        return [launch] if full else [clear, launch]

    def _filter(self, packed_channels: int) -> _PackedFilter:
        return _PackedFilter(
            self.problem.groups,
            self.inputs,
            self.outputs,
            *self.problem.kernel,
            *self.taps,
            packed_channels,
        )

    def _kernel(self, name: str, stride: Pair | None = None, cut_w: int = 0) -> Kernel:
        h, w = stride or self.problem.geometry.stride
        values = {"STRIDE_H": h, "STRIDE_W": w, "CUT_W": cut_w}
        macros = ((macro, str(value)) for macro, value in values.items())
        return Kernel("packing.cu", name, (element(self.problem.x.dtype), *macros))


def _lanes(packed_channels: int) -> int:
    """Return how many neighbouring threads take neighbouring channels: a power of two, at most 8."""
    return next(lanes for lanes in (8, 4, 2, 1) if packed_channels >= 8 * lanes)


def _tile_channels(stride_w: int) -> int:
    """Return how many packed channels a block takes where it packs through shared memory."""
    if stride_w <= 8:
        return 8 * (8 // stride_w) * stride_w
    return max(_MAX_CHANNELS // stride_w, 1) * stride_w
