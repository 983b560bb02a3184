"""The options that benchmarks of whole calls share: which layers and element types, how many clients, for how long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import click
import numpy as np

from benchmarks.layers import LAYERS, Layer
from deconvd.model.dtypes import DType

__all__ = [
    "clients_option",
    "layer_option",
    "processes_option",
    "time_option",
    "type_option",
    "warm_up_option",
]

_Decorator: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]


def layer_option(default: Sequence[Layer]) -> _Decorator:
    """Return the option ``--layer``, given once for each layer: a sequence of Layers, in the order of all."""
    return click.option(
        "--layer",
        "layers",
        type=click.Choice([layer.name for layer in LAYERS]),
        multiple=True,
        default=[layer.name for layer in default],
        callback=_layers,
    )


def _layers(_context: click.Context, _option: click.Parameter, names: Sequence[str]) -> list[Layer]:
    return [layer for layer in LAYERS if layer.name in names]


def _dtypes(_context: click.Context, _option: click.Parameter, names: Sequence[str]) -> list[DType]:
    return [np.dtype(name) for name in names]


type_option = click.option(
    "--type",
    "dtypes",
    type=click.Choice(["float32", "float16"]),
    multiple=True,
    default=("float32", "float16"),
    callback=_dtypes,
    help="Element types.",
)
"""Given once for each element type: a sequence of DTypes."""

clients_option = click.option(
    "--clients",
    "clients_counts",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 4, 8, 16),
    help="Numbers of client processes.",
)

time_option = click.option(
    "--time-s",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="How long the calls of a row count.",
)


def processes_option(default: int) -> _Decorator:
    """Return the option ``--processes``, as of deconvd-server."""
    return click.option(
        "--processes",
        type=click.IntRange(min=0),
        default=default,
        show_default=True,
        help="As of deconvd-server: for each card; 0 for one for all cards.",
    )


def warm_up_option(default_s: float) -> _Decorator:
    """Return the option ``--warm-up-s``, for the calls of each client before those that count."""
    return click.option(
        "--warm-up-s",
        type=click.FloatRange(min=0),
        default=default_s,
        show_default=True,
        help="How long each client calls before, at most.",
    )
