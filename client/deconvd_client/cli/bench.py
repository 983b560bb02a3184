"""The command `deconvd bench`: measures a server and the network to it, and says where the time of a call goes."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click
import numpy as np

from deconvd.command_line import CliCommand, NamedPath
from deconvd.host.system import processors_count
from deconvd.model.dtypes import ELEMENT_TYPES
from deconvd.model.geometry import Geometry
from deconvd_client.cli.bench_picture import check_picture, draw_picture
from deconvd_client.cli.bench_problems import LAYERS_BY_NAME, BenchLayer
from deconvd_client.cli.bench_rows import BenchRow, measure_rows
from deconvd_client.cli.bench_table import print_table
from deconvd_client.cli.bench_ways import BareMoves, open_ways
from deconvd_client.cli.interrupts import exit_on_signals
from deconvd_client.cli.options import IntOrPair, report_errors, target_option, timeout_option
from deconvd_client.transports.route import TransportName

__all__ = ["bench"]

_DEFAULT_LAYERS: Final = ("tiny", "small", "medium")
_DEFAULT_DTYPES: Final = ("float32", "float16")
_FILE = NamedPath(path_type=Path, dir_okay=False)


class _Extents(click.ParamType):  # type: ignore[type-arg]  # older clicks have no types in it
    """``8,64,32,32``: four extents."""

    name = "N,C,H,W"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Return a shape, which `Problem` checks."""
        try:
            return tuple(map(int, str(value).split(",")))
        except ValueError:
            self.fail(f"must be four integers as in 8,64,32,32, got {value!r}", param, ctx)


@click.command(cls=CliCommand)
@click.option(
    "--layer",
    "names",
    type=click.Choice(list(LAYERS_BY_NAME)),
    multiple=True,
    help=f"Layer to measure; more than one if given more than once. The default is {', '.join(_DEFAULT_LAYERS)}.",
)
@click.option(
    "--shape",
    type=(_Extents(), _Extents()),
    metavar="X W",
    help="Measure a layer of your own: the shapes of x and W, as in --shape 8,64,32,32 64,32,4,4.",
)
@click.option(
    "--stride", type=IntOrPair(), default=1, show_default=True, help="Its stride, with --shape."
)
@click.option(
    "--pad", type=IntOrPair(), default=0, show_default=True, help="Its pad, with --shape."
)
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice([str(dtype) for dtype in ELEMENT_TYPES]),
    multiple=True,
    default=_DEFAULT_DTYPES,
    show_default=True,
    help="Element type; more than one if given more than once.",
)
@click.option(
    "--time-s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    default=8.0,
    show_default=True,
    help="How long to measure, all together. Large layers, and the beginning, take longer.",
)
@click.option("--json", "json_file", type=_FILE, help="File to write the rows to, as JSON.")
@click.option(
    "--picture",
    type=_FILE,
    help="File to draw: .png, .svg or .pdf. It needs pip install 'deconvd[cli]'.",
)
@target_option
@timeout_option
def bench(
    names: Sequence[str],
    shape: tuple[tuple[int, ...], tuple[int, ...]] | None,
    stride: int | Sequence[int],
    pad: int | Sequence[int],
    dtypes: Sequence[str],
    time_s: float,
    json_file: Path | None,
    picture: Path | None,
    target: str,
    timeout_s: float,
) -> None:
    """Measure a server and the network to it, and show where the time of a call goes.

    Calls are made by each way that reaches the server from here: shared memory, a Unix socket, TCP and gRPC. They take
    turns. The table has the milliseconds of a call, and its parts: encode (in this process), there (to the device of
    the server), queue, compute, and back. The server says how long each of its stages took. Calls that move the same
    bytes in one direction alone say how much of the rest is there and how much is back.

    The floor is what nothing is faster than: the smallest call by the same way, the least computing, and the same bytes
    moved by a bare program: a copy in memory of the operands where they go through shared memory, else a socket on this
    host. To a far server, the network itself is not in it. The column floors has the time of a call in floors. Stages
    of a large call overlap: then the parts are shares of the time that they take together.

    Run it while nothing else uses the server: other calls make it slower, and it makes them slower.

    Exit codes: 0 if all was measured; 1 if the server cannot be reached, a call failed, or a file cannot be written;
    2 if an option is wrong; 130 after Ctrl-C.
    """
    with report_errors(), exit_on_signals():
        layers = _choose_layers(names, shape, Geometry.from_arguments(stride, pad))
        for file in (json_file, picture):
            _check_folder(file)
        if picture is not None:
            check_picture(picture)
        cases = [(layer, np.dtype(dtype)) for layer in layers for dtype in dict.fromkeys(dtypes)]
        for layer, dtype in cases:
            layer.problem(dtype)  # checks it
        with open_ways(target, timeout_s) as (ways, obstacles), BareMoves() as bare_moves:
            rows: list[BenchRow] = []
            for layer, dtype in cases:
                with _status(f"measuring {layer.name}, {dtype}"):
                    rows += measure_rows(ways, bare_moves, layer, dtype, time_s / len(cases))
        print_table(rows)
        for name, why_not in obstacles.items():
            click.echo(f"not by {name}: {why_not}")
        if json_file is not None:
            json_file.write_text(_format_json(target, rows, obstacles))
        if picture is not None:
            draw_picture(picture, rows, target)


def _choose_layers(
    names: Sequence[str], shape: tuple[tuple[int, ...], tuple[int, ...]] | None, geometry: Geometry
) -> list[BenchLayer]:
    if shape is None:
        if geometry != Geometry():
            raise click.UsageError("--stride and --pad are those of --shape, which is missing")
        return [LAYERS_BY_NAME[name] for name in dict.fromkeys(names or _DEFAULT_LAYERS)]
    own = BenchLayer("your layer", *shape, geometry)
    return [*(LAYERS_BY_NAME[name] for name in dict.fromkeys(names)), own]


def _check_folder(file: Path | None) -> None:
    """Raise OSError if a file cannot be written, before anything is measured."""
    if file is not None and not os.access(file.absolute().parent, os.W_OK):
        raise OSError(f"cannot write {file}: there is no directory for it that can be written to")


@contextmanager
def _status(text: str) -> Iterator[None]:
    """Show during a block what is done, on a terminal, if rich is there."""
    try:
        from rich.console import Console
    except ImportError:
        yield
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


def _format_json(
    target: str, rows: Sequence[BenchRow], obstacles: Mapping[TransportName, str]
) -> str:
    fields = {
        "target": target,
        "client": f"{platform.machine()}, {processors_count()} processors",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "not_by": obstacles,
        "rows": [asdict(row) for row in rows],
    }
    return f"{json.dumps(fields, indent=1)}\n"
