"""The demo: it starts a server, enlarges a photograph and trains a decoder with it, and saves pictures.

Run it with ``python -m examples.demo``. The picture in the README is a copy of its ``demo.png``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click
from PIL import Image

from examples import enlarge_photograph, train_decoder
from examples.command_line import open_connection, output_option, report_errors
from examples.local_server import local_server
from examples.pictures import Array, add_caption, column, from_grey_levels, magnify, row, save

__all__ = ["main"]

_FACTOR: Final = 4
_DETAIL: Final = (slice(28, 88), slice(152, 230))
"""Rows and columns of the detail that the picture shows."""


@click.command()
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="cpu|cuda[:N]|auto",
    help="The device on which the server computes. auto: a GPU if the host has one, otherwise the processor.",
)
@output_option
@train_decoder.steps_option
def main(device: str, folder: Path, steps_count: int) -> None:
    """Show deconvd at work, with a server process that the demo starts on a Unix socket."""
    with report_errors(), local_server(device) as target, open_connection(target) as F:
        enlarged = enlarge_photograph.run(F, folder)[_FACTOR]
        digits = train_decoder.run(F, folder, steps_count)
        click.echo("\nBoth, before and after")
        save(demo_picture(enlarged, digits), folder / "demo.png")
    click.echo(f"\nThe pictures are in {folder.resolve()}")


def demo_picture(enlarged: Array, digits: Image.Image) -> Image.Image:
    """Return one picture of a detail of the photograph, before and after, and of the digits."""
    rows, columns = _DETAIL
    detail = from_grey_levels(enlarge_photograph.load_photograph()[rows, columns])
    before = magnify(detail, _FACTOR)
    after = from_grey_levels(enlarged[_scale(rows), _scale(columns)])
    photograph = row(
        [
            add_caption(before, "before (photo: danielbuechele, CC BY 2.0)"),
            add_caption(after, f"deconvolution_2d, stride={_FACTOR}"),
        ]
    )
    return column(
        [
            photograph,
            add_caption(
                digits,
                "digits not trained on, and what the decoder makes of their codes",
            ),
        ]
    )


def _scale(part: slice) -> slice:
    return slice(_FACTOR * part.start, _FACTOR * part.stop)


if __name__ == "__main__":
    main()
