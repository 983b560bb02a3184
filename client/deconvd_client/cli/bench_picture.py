"""Draws where the time of calls goes: a bar for each way, made of the parts of its time, beside its floor."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Final

from deconvd.errors import InvalidArgumentError, UnimplementedError
from deconvd_client.cli.bench_rows import BenchRow
from deconvd_client.cli.bench_table import describe_case
from deconvd_client.cli.call_times import PARTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["check_picture", "draw_picture"]

_FORMATS: Final = ("png", "svg", "pdf")
_COLORS: Final = ("#999999", "#2166ac", "#f1a340", "#5aae61", "#67a9cf")
"""Of the parts, in their order. Colors that the color-blind can tell apart."""

_BAR_HEIGHT_IN: Final = 0.32
_PANEL_HEIGHT_IN: Final = 0.85
_WIDTH_IN: Final = 9.0


def check_picture(path: Path) -> None:
    """Raise an error if no picture can be drawn there, before anything is measured.

    Raises:
        InvalidArgumentError: The file has another extension.
        UnimplementedError: matplotlib is not installed.
    """
    if path.suffix.removeprefix(".").lower() not in _FORMATS:
        allowed = ", ".join(f".{each}" for each in _FORMATS)
        raise InvalidArgumentError(f"{path} must end in {allowed}", argument="picture")
    try:
        import matplotlib.figure  # noqa: F401 - only whether it is there
    except ImportError:
        raise UnimplementedError(
            "--picture needs matplotlib: run pip install 'deconvd[cli]'"
        ) from None


def draw_picture(path: Path, rows: Sequence[BenchRow], target: str) -> None:
    """Write a picture of rows. Raises OSError if it cannot be written."""
    from matplotlib.figure import Figure

    groups = [(title, list(each)) for title, each in groupby(rows, describe_case)]
    heights = [_PANEL_HEIGHT_IN + _BAR_HEIGHT_IN * len(each) for _, each in groups]
    # an opaque ground, so that it can be read on dark pages too
    figure = Figure(
        figsize=(_WIDTH_IN, sum(heights) + _PANEL_HEIGHT_IN),
        layout="constrained",
        facecolor="white",
    )
    panels = figure.subplots(len(groups), squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (title, each) in zip(panels[:, 0], groups, strict=True):
        _draw_panel(axes, title, each)
    figure.suptitle(f"Where the time of a call goes: {target}", fontsize=10)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path)


def _draw_panel(axes: Axes, title: str, rows: Sequence[BenchRow]) -> None:
    names = [row.way for row in rows]
    left = [0.0] * len(rows)
    for part, color in zip(PARTS, _COLORS, strict=True):
        widths = [row.parts_ms[part] for row in rows]
        axes.barh(names, widths, left=left, color=color, label=part, height=0.7)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    for index, row in enumerate(rows):
        axes.plot(
            [row.floor_ms] * 2,
            [index - 0.45, index + 0.45],
            color="black",
            linestyle=":",
            label=None if index else "floor",
        )
        axes.annotate(
            f" {row.ms:.3g} ms, {row.floors:.2f} floors",
            (max(row.ms, row.floor_ms), index),
            va="center",
        )
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlim(left=0)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("ms")
