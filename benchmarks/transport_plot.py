"""Draws what transports took: ``python -m benchmarks.transport_plot RESULTS.json -o PLOT.svg``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter


@dataclass(frozen=True, slots=True)
class _Style:
    """How the line of a path looks: ours are thick, those of peers thin, of floors dotted."""

    label: str
    color: str
    line: str = "-"
    width: float = 1.2


_OURS: Final = 2.4

_STYLES: Final = {
    "shared_memory_empty": _Style("deconvd, F.empty", "#1b7837", width=_OURS),
    "shared_memory": _Style("deconvd, shared memory", "#5aae61", width=_OURS),
    "unix": _Style("deconvd, Unix socket", "#2166ac", width=_OURS),
    "tcp": _Style("deconvd, TCP", "#67a9cf", width=_OURS),
    "grpc_tcp": _Style("deconvd by gRPC, TCP", "#9e9ac8", width=_OURS),
    "memcpy": _Style("one copy in memory", "#555555", line=":"),
    "raw_tcp": _Style("bare TCP socket", "#999999", line=":"),
    "flight_unix": _Style("Arrow Flight, Unix socket", "#b35806", line="--"),
    "flight_tcp": _Style("Arrow Flight, TCP", "#f1a340", line="--"),
    "bare_grpc": _Style("plain gRPC, no protobuf", "#e08bb4", line="-."),
    "stock_grpc": _Style("plain gRPC", "#c51b7d", line="-."),
}
"""By the names of `benchmarks.transport`."""


@click.command()
@click.argument("results", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="An SVG file.")
def main(results: Path, output: Path) -> None:
    """Draw the rows of a file that `benchmarks.transport --json` wrote."""
    # letters as letters, and the same file from the same figures
    with mpl.rc_context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "deconvd"}):
        _plot(json.loads(results.read_text())).savefig(
            output, format="svg", metadata={"Date": None}
        )


def _plot(measured: dict[str, Any]) -> Figure:
    # an opaque ground, so that it can be read on dark pages too
    figure = Figure(figsize=(7.2, 4.2), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    rows: list[dict[str, Any]] = measured["rows"]
    for path, style in _STYLES.items():
        points = sorted((row["bytes"], row["ms"]) for row in rows if row["path"] == path)
        if points:
            _draw_line(axes, points, style)
    _label(axes, sorted({row["bytes"] for row in rows}), str(measured["host"]))
    return figure


def _draw_line(axes: Axes, points: Sequence[tuple[int, float]], style: _Style) -> None:
    sizes_bytes, times_ms = zip(*points, strict=True)
    axes.plot(
        sizes_bytes,
        times_ms,
        label=style.label,
        color=style.color,
        linestyle=style.line,
        linewidth=style.width,
        marker="o",
        markersize=style.width + 1,
    )


def _label(axes: Axes, sizes_bytes: Sequence[int], host: str) -> None:
    axes.set(xscale="log", yscale="log", ylabel="ms, there and back (less is faster)")
    axes.set_title(f"A tensor there and the same back, on one host ({host})", fontsize=9)
    axes.set_xticks(sizes_bytes, [_human(size) for size in sizes_bytes])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, reverse=True)


def _human(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB" if size_bytes >= 1 << 20 else f"{size_bytes >> 10} KiB"


if __name__ == "__main__":
    main()
