"""The layers that are timed: those where deconvolutions are used, and what lies between them."""

from __future__ import annotations

from dataclasses import dataclass

from deconvd.model.dtypes import DType
from deconvd.model.geometry import Geometry
from deconvd.model.problem import Problem, TensorSpec

__all__ = ["LAYERS", "Layer"]


@dataclass(frozen=True, slots=True)
class Layer:
    """A deconvolution with a square image and a square filter.

    Attributes:
        name: As in the tables.
        n, c_I, c_O: Batch size and channels.
        image: Height and width of x, in pixels.
        kernel: Height and width of the filter, in taps.
    """

    name: str
    n: int
    c_I: int
    c_O: int
    image: int
    kernel: int
    stride: int = 1
    pad: int = 0
    dilate: int = 1
    groups: int = 1

    def problem(self, dtype: DType) -> Problem:
        """Return it for an element type."""
        x = TensorSpec((self.n, self.c_I, self.image, self.image), dtype)
        W = TensorSpec((self.c_I, self.c_O // self.groups, self.kernel, self.kernel), dtype)
        geometry = Geometry.from_arguments(
            self.stride, self.pad, dilate=self.dilate, groups=self.groups
        )
        return Problem(x, W, geometry)

    @property
    def flops(self) -> int:
        """Operations of one product, those at the edges that meet no output pixel included."""
        products = self.c_I * (self.c_O // self.groups) * self.kernel**2
        return 2 * self.n * self.image**2 * products

    def nbytes(self, dtype: DType) -> int:
        """Size of x, W and y together, in bytes."""
        problem = self.problem(dtype)
        return sum(spec.nbytes for spec in (problem.x, problem.W, problem.y))


LAYERS = (
    # a generator of images, from 4 x 4 to 128 x 128
    Layer("generator 1024-512 4", 64, 1024, 512, 4, 4, 2, 1),
    Layer("generator 512-256 8", 64, 512, 256, 8, 4, 2, 1),
    Layer("generator 256-128 16", 64, 256, 128, 16, 4, 2, 1),
    Layer("generator 128-64 32", 64, 128, 64, 32, 4, 2, 1),
    Layer("generator 64-3 64", 64, 64, 3, 64, 4, 2, 1),
    # a U-net's way up: the filter is as large as the stride
    Layer("unet 1024-512 32 k2 s2", 8, 1024, 512, 32, 2, 2),
    Layer("unet 128-64 256 k2 s2", 8, 128, 64, 256, 2, 2),
    # segmentation: one step up to the full size
    Layer("segmentation 21-21 16 k64 s32", 4, 21, 21, 16, 64, 32, 16),
    Layer("superresolution 64-32 128 k9 s2", 8, 64, 32, 128, 9, 2, 4),
    Layer("same size 256-256 32 k3", 32, 256, 256, 32, 3, 1, 1),
    Layer("depthwise 64 64 k4 s2", 16, 64, 64, 64, 4, 2, 1, groups=64),
    Layer("groups 128-128/4 32 k4 s2", 16, 128, 128, 32, 4, 2, 1, groups=4),
    Layer("dilated 64-64 32 k3 s2 d2", 8, 64, 64, 32, 3, 2, 2, dilate=2),
    Layer("odd channels 37-29 33 k3 s2", 16, 37, 29, 33, 3, 2, 1),
    Layer("tiny 8-4 8 k4 s2", 1, 8, 4, 8, 4, 2, 1),
)
