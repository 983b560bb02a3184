"""PNG images as arrays of shape (1, channels, h, w), with values from 0 to 1."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import BinaryIO, Final

import numpy as np

from deconvd.errors import InvalidArgumentError, UnimplementedError
from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec
from deconvd_client.cli.mapped_file import MappedFile

__all__ = ["PNG_MAGIC", "check_png_result", "read_png", "write_png"]

PNG_MAGIC: Final = b"\x89PNG\r\n\x1a\n"

_MODES: Final = {"L": 1, "RGB": 3}
"""Pillow's names of the images that are taken, and their channels."""

_MAX_VALUE: Final = 255
_MODE_NAMES: Final = {
    "1": "one bit a pixel",
    "P": "a palette",
    "LA": "an alpha channel",
    "RGBA": "an alpha channel",
    "I": "16 bits a channel",
    "I;16": "16 bits a channel",
    "I;16B": "16 bits a channel",
}


def read_png(source: MappedFile, _member: str | None = None) -> Array:
    """Return an image as float32, scaled from 0 … 255 to 0 … 1.

    Raises:
        InvalidArgumentError: It is damaged, too large, or not 8-bit gray or RGB.
        UnimplementedError: Pillow is not installed.
    """
    path = source.path
    Image = _pillow_image()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # not the file: it would allocate whatever size a damaged chunk claims, up to 4 GiB
            with Image.open(source.mapping, formats=["PNG"]) as image:
                _check_mode(path, image.mode, has_transparency="transparency" in image.info)
                pixels = np.asarray(image, np.float32)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidArgumentError(f"{path} is too large an image: {error}") from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(f"{path} is a damaged PNG image: {error}") from None
    planes = pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)
    scaled: Array = np.ascontiguousarray(planes)[np.newaxis] / np.float32(_MAX_VALUE)
    return scaled


def _check_mode(path: str, mode: str, *, has_transparency: bool) -> None:
    if mode in _MODES and not has_transparency:
        return
    found = "a transparent color" if mode in _MODES else _MODE_NAMES.get(mode, f"the mode {mode}")
    raise InvalidArgumentError(
        f"{path} must be an 8-bit gray or RGB image, and has {found}. Convert it first, for example with "
        "Pillow's image.convert('RGB')"
    )


def check_png_result(spec: TensorSpec) -> None:
    """Raise InvalidArgumentError if a tensor is not one image of 1 or 3 channels, or if Pillow is not installed."""
    n, c, h, w = spec.shape
    if n != 1 or c not in _MODES.values() or not h * w:
        raise InvalidArgumentError(
            f"a PNG file holds one image of 1 or 3 channels, and y has the shape {spec.shape}. Write .npy instead"
        )
    _pillow_image()


def write_png(file: BinaryIO, array: Array) -> None:
    """Write an image. Values are clipped to 0 … 1, and scaled to 0 … 255. NaN becomes 0."""
    clipped = np.clip(np.nan_to_num(array[0].astype(np.float32), nan=0.0), 0, 1)
    pixels = np.rint(clipped * _MAX_VALUE).astype(np.uint8).transpose(1, 2, 0)
    _pillow_image().fromarray(pixels if pixels.shape[2] > 1 else pixels[:, :, 0]).save(file, "PNG")


def _pillow_image() -> ModuleType:
    """Import Pillow, which is in the extra ``cli``."""
    try:
        from PIL import Image
    except ImportError:
        raise UnimplementedError("PNG files need Pillow: run pip install 'deconvd[cli]'") from None
    return Image
