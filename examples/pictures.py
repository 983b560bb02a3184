"""Pictures from arrays and from other pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

__all__ = ["Array", "add_caption", "column", "from_grey_levels", "magnify", "row", "save"]

Array = npt.NDArray[Any]

_GAP: Final = 8
_CAPTION_HEIGHT: Final = 24
_PAPER: Final = "white"
_INK: Final = "black"


def from_grey_levels(values: Array) -> Image.Image:
    """Return a picture from grey levels, rounded to integers from 0 to 255.

    Args:
        values: Of shape ``(h, w)``, or ``(h, w, 3)`` for red, green and blue.
    """
    return Image.fromarray(np.rint(np.clip(values, 0, 255)).astype(np.uint8))


def magnify(picture: Image.Image, factor: int) -> Image.Image:
    """Return a picture in which each pixel has become a square of `factor` by `factor` pixels."""
    size = (factor * picture.width, factor * picture.height)
    return picture.resize(size, Image.Resampling.NEAREST)


def row(pictures: Sequence[Image.Image]) -> Image.Image:
    """Return pictures side by side."""
    width = sum(picture.width + _GAP for picture in pictures) - _GAP
    paper = Image.new("RGB", (width, max(picture.height for picture in pictures)), _PAPER)
    left = 0
    for picture in pictures:
        paper.paste(picture, (left, 0))
        left += picture.width + _GAP
    return paper


def column(pictures: Sequence[Image.Image]) -> Image.Image:
    """Return pictures below each other."""
    turned = [picture.transpose(Image.Transpose.TRANSPOSE) for picture in pictures]
    return row(turned).transpose(Image.Transpose.TRANSPOSE)


def add_caption(picture: Image.Image, caption: str) -> Image.Image:
    """Return a picture with a line of text below it."""
    paper = Image.new("RGB", (picture.width, picture.height + _CAPTION_HEIGHT), _PAPER)
    paper.paste(picture)
    middle = (picture.width / 2, picture.height + _CAPTION_HEIGHT / 2)
    font = ImageFont.load_default(size=14)
    ImageDraw.Draw(paper).text(middle, caption, _INK, font, anchor="mm")
    return paper


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture to a file, creating its folder if necessary, and print the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    click.echo(f"    saved {path}")
