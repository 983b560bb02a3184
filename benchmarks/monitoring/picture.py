"""Draws panels of the dashboard as Grafana shows them, from the dashboard's own expressions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, PercentFormatter, ScalarFormatter

from benchmarks.monitoring.configuration import SCRAPE_S
from benchmarks.monitoring.grafana import Panel, read_panels
from benchmarks.monitoring.prometheus import Prometheus, Series

__all__ = ["MAIN_PANELS", "Line", "draw", "read_main_panels"]

MAIN_PANELS: Final = (
    "Calls by tenant",
    "Calls that fail, by status",
    "p99 of each stage",
    "Calls on devices",
    "Received, by transport",
    "Device memory",
    "Evictions",
    "Processors",
)

_COLUMNS_COUNT: Final = 2

_UNITS: Final[Mapping[str, tuple[str, Callable[[], Formatter]]]] = {
    "s": ("", partial(EngFormatter, "s")),
    "Bps": ("", partial(EngFormatter, "B/s")),
    "bytes": ("", partial(EngFormatter, "B")),
    "percentunit": ("", partial(PercentFormatter, 1.0)),
    "reqps": ("calls/s", ScalarFormatter),
    "ops": ("each second", ScalarFormatter),
    "short": ("", ScalarFormatter),
}
"""What stands beside the axis, and how its numbers are written, by Grafana's names of units."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a panel: a series, and its name."""

    name: str
    series: Series

    @classmethod
    def of(cls, legend: str, series: Series, instance: str) -> Line:
        """Return the line of a series, named as Grafana does: by a text with labels as ``{{stage}}``.

        Args:
            instance: The only server, whose port says nothing to readers.
        """

        def label(found: re.Match[str]) -> str:
            return series.labels.get(found[1], "").replace(instance, "server")

        return cls(re.sub(r"{{(\w+)}}", label, legend).strip() or "(no name)", series)


def read_main_panels(
    prometheus: Prometheus, span: tuple[float, float], range_s: float, instance: str
) -> list[tuple[Panel, list[Line]]]:
    """Return the panels that tell most, each with its lines.

    Args:
        prometheus: Has the data.
        span: From when to when, on the Unix clock.
        range_s: Over how long rates are averaged.
        instance: The only server, ``host:port``.
    """
    return [
        (
            panel,
            [
                Line.of(target.legend, series, instance)
                for target in panel.targets
                for series in prometheus.query_range(target.with_values(range_s), *span, SCRAPE_S)
            ],
        )
        for panel in read_panels()
        if panel.title in MAIN_PANELS
    ]


def draw(
    panels: Sequence[tuple[Panel, Sequence[Line]]],
    spans: Mapping[str, tuple[float, float]],
    begin_s: float,
    path: Path,
) -> None:
    """Draw panels into an SVG file.

    Args:
        panels: Each with its lines.
        spans: What happened meanwhile: from when to when, on the Unix clock.
        begin_s: The time at the left edge.
        path: The file.
    """
    # letters as letters, and the same file from the same figures
    with mpl.rc_context({"font.size": 7.5, "svg.fonttype": "none", "svg.hashsalt": "deconvd"}):
        rows_count = -(-len(panels) // _COLUMNS_COUNT)
        # an opaque ground, so that it can be read on dark pages too
        figure = Figure(figsize=(9, 1.8 * rows_count), layout="constrained", facecolor="white")
        grid = figure.subplots(rows_count, _COLUMNS_COUNT, sharex=True, squeeze=False)
        for axes, (panel, lines) in zip(grid.flat, panels, strict=True):
            _draw_panel(axes, panel, lines, begin_s)
            for name, (from_s, to_s) in spans.items():
                axes.axvspan(from_s - begin_s, to_s - begin_s, color="#fff0e0", zorder=0)
                axes.text(
                    from_s - begin_s, 1, f" {name}", va="top", transform=axes.get_xaxis_transform()
                )
        for axes in grid[-1]:
            axes.set_xlabel("seconds")
        figure.savefig(path, format="svg", metadata={"Date": None})


def _draw_panel(axes: Axes, panel: Panel, lines: Sequence[Line], begin_s: float) -> None:
    for number, line in enumerate(sorted(lines, key=lambda each: each.name)):
        times_s = [time_s - begin_s for time_s in line.series.times_s]
        is_limit = line.name.endswith("limit")
        axes.plot(
            times_s,
            line.series.values,
            label=line.name,
            color="#555555" if is_limit else f"C{number}",
            linestyle="--" if is_limit else "-",
            linewidth=1.2,
        )
    label, formatter_of = _UNITS[panel.unit]
    axes.set_title(panel.title, fontsize=8, loc="left", fontweight="bold")
    axes.set_ylabel(label)
    axes.margins(x=0, y=0.2)  # at the top there is room for what happened
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(formatter_of())
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=6.5)
