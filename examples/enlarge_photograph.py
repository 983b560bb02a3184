"""Enlarges a photograph by deconvolution, and compares the result with Pillow's bilinear enlargement.

Run it with ``python -m examples.enlarge_photograph --target HOST:PORT``.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final, NamedTuple

import click
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from deconvd_client import Connection
from examples.command_line import open_connection, output_option, report_errors, target_option
from examples.pictures import Array, from_grey_levels, save

__all__ = [
    "FACTORS",
    "Difference",
    "Operands",
    "bilinear_kernel",
    "difference",
    "enlarge",
    "enlarge_with_pillow",
    "load_photograph",
    "main",
    "run",
]

FACTORS: Final = (2, 4)


def load_photograph() -> Array:
    """Return a photograph of a Chinese pavilion: uint8, of shape ``(427, 640, 3)``.

    It is scikit-learn's "china.jpg", by danielbuechele, under the licence CC BY 2.0:
    https://www.flickr.com/photos/danielbuechele/6061409035/
    """
    photograph: Array = load_sample_image("china.jpg")
    return photograph


def bilinear_kernel(factor: int) -> Array:
    """Return the filter with which a deconvolution of stride `factor` interpolates linearly.

    It is a pyramid as wide as two strides, of shape ``(k, k)`` with ``k = 2 s - s % 2``: the outer
    product with itself of ``1 - |i - (k - 1) / 2| / s``, so that at each pixel of the output the
    weights of the nearest pixels of the input add up to 1. From J. Long, E. Shelhamer, T. Darrell,
    "Fully convolutional networks for semantic segmentation" (CVPR 2015), section 3.3 and its code.
    """
    size = 2 * factor - factor % 2
    distance = np.abs(np.arange(size) - (size - 1) / 2)
    ramp = (1 - distance / factor).astype(np.float32)
    kernel: Array = np.outer(ramp, ramp)
    return kernel


class Operands(NamedTuple):
    """What a deconvolution needs to enlarge an image. `x` has a channel for each of W's groups."""

    x: Array
    W: Array
    pad: int

    @classmethod
    def of(cls, image: Array, factor: int) -> Operands:
        """Return them for an image of shape ``(h, w, c)``.

        Each channel is a group of its own. The image first gets a border of one pixel that repeats its edge, because
        the deconvolution takes pixels beyond the edge as black. `pad` cuts the enlarged border off, together with half
        of the kernel's excess over the stride, so that the centres of pixels stay where they were.
        """
        rimmed = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge").astype(np.float32)
        kernel = bilinear_kernel(factor)
        W = np.repeat(kernel[np.newaxis, np.newaxis], image.shape[2], axis=0)
        pad = factor + (len(kernel) - factor) // 2
        return cls(rimmed.transpose(2, 0, 1)[np.newaxis], W, pad)


def enlarge(F: Connection, image: Array, factor: int) -> Array:
    """Return an image `factor` times as high and as wide, by a deconvolution on the server.

    Args:
        F: Connection to the server.
        image: Of shape ``(h, w, c)``.
        factor: How many times larger.

    Returns:
        Grey levels, float32, of shape ``(factor * h, factor * w, c)``.
    """
    x, W, pad = Operands.of(image, factor)
    y = F.deconvolution_2d(x, W, stride=factor, pad=pad, groups=len(W))
    enlarged: Array = y[0].transpose(1, 2, 0)
    return enlarged


class Difference(NamedTuple):
    """The difference of two images, in grey levels from 0 to 255."""

    largest: float
    mean: float


def difference(image: Array, other: Array) -> Difference:
    """Return the difference of two images of the same shape."""
    distance = np.abs(image.astype(np.float64) - other)
    return Difference(float(distance.max()), float(distance.mean()))


def enlarge_with_pillow(image: Array, factor: int) -> Array:
    """Return an image enlarged by Pillow's bilinear resize.

    Args:
        image: Of shape ``(h, w, c)``. Pillow enlarges one axis after the other. If the image is uint8, it rounds to
            whole grey levels both times. If it is float32, it does not round.
        factor: How many times larger.

    Returns:
        An image of shape ``(factor * h, factor * w, c)`` and the same element type.

    In effect Pillow repeats the edge, too: it ignores pixels beyond the edge, and scales the other weights so that
    their sum is 1.
    """
    height, width, channels_count = image.shape
    size = (factor * width, factor * height)
    channels = (Image.fromarray(image[:, :, c]) for c in range(channels_count))
    resized = [channel.resize(size, Image.Resampling.BILINEAR) for channel in channels]
    return np.stack([np.asarray(channel) for channel in resized], axis=2)


def run(F: Connection, folder: Path) -> dict[int, Array]:
    """Enlarge the photograph by each factor, print times and differences, and save all pictures.

    Returns:
        The enlarged photographs by factor, as `enlarge` returns them.
    """
    photograph = load_photograph()
    height, width = photograph.shape[:2]
    click.echo(f"\nEnlarging a photograph of {width} x {height} pixels")
    save(from_grey_levels(photograph), folder / "photograph.png")
    return {factor: _run_once(F, photograph, factor, folder) for factor in FACTORS}


def _run_once(F: Connection, photograph: Array, factor: int, folder: Path) -> Array:
    start_s = time.perf_counter()
    enlarged = enlarge(F, photograph, factor)
    click.echo(f"  {factor} times larger, in {time.perf_counter() - start_s:.2f} s")
    _report_difference(photograph, enlarged, factor)
    save(from_grey_levels(enlarged), folder / f"photograph-{factor}x.png")
    return enlarged


def _report_difference(photograph: Array, enlarged: Array, factor: int) -> None:
    rounded = difference(np.rint(enlarged), enlarge_with_pillow(photograph, factor))
    exact = difference(enlarged, enlarge_with_pillow(photograph.astype(np.float32), factor))
    click.echo(
        f"    differs from Pillow's bilinear enlargement by at most {rounded.largest:.0f} grey level "
        f"of 255 ({rounded.mean:.3f} on average),\n"
        f"    and by at most {exact.largest:.2g} where Pillow computes without rounding"
    )


@click.command()
@target_option
@output_option
def main(target: str, folder: Path) -> None:
    """Enlarge a photograph two- and fourfold by deconvolution, and compare with Pillow."""
    with report_errors(), open_connection(target) as F:
        run(F, folder)


if __name__ == "__main__":
    main()
