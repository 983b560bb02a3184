"""Shows what calls take as a table: drawn by the package rich on a terminal, else as plain text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby

import click

from deconvd_client.cli.bench_rows import BenchRow
from deconvd_client.cli.call_times import PARTS
from deconvd_client.cli.formats import format_bytes

__all__ = ["describe_case", "print_table"]

_HEADER = ("way", "ms", *PARTS, "floor", "floors")


def print_table(rows: Sequence[BenchRow]) -> None:
    """Print rows to standard output. Those of one layer and element type are together."""
    groups = [(title, list(each)) for title, each in groupby(rows, describe_case)]
    if sys.stdout.isatty() and _print_with_rich(groups):
        return
    for title, each in groups:
        click.echo(f"{title}\n{_format_line(_HEADER)}")
        for row in each:
            click.echo(_format_line(_cells(row)))


def describe_case(row: BenchRow) -> str:
    """Return which layer and element type a row is of, and what travels, in words."""
    x, W = (", ".join(map(str, shape)) for shape in (row.x, row.W))
    return (
        f"{row.layer}, {row.dtype}: x ({x}), W ({W}); "
        f"{format_bytes(row.sent_bytes)} there, {format_bytes(row.received_bytes)} back"
    )


def _print_with_rich(groups: Sequence[tuple[str, Sequence[BenchRow]]]) -> bool:
    """Return whether rich is there and has printed it. It is in the extra ``cli``."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return False
    console = Console()
    for title, rows in groups:
        table = Table(title=title, title_justify="left", title_style="bold")
        for index, name in enumerate(_HEADER):
            table.add_column(name, justify="right" if index else "left", no_wrap=True)
        for row in rows:
            table.add_row(*_cells(row))
        console.print(table)
    return True


def _cells(row: BenchRow) -> list[str]:
    times_ms = (row.ms, *row.parts_ms.values(), row.floor_ms)
    return [row.way, *map(_format_ms, times_ms), f"{row.floors:.2f}"]


def _format_ms(ms: float) -> str:
    return f"{ms:.3f}" if ms < 10 else f"{ms:.1f}"


def _format_line(cells: Sequence[str]) -> str:
    return f"  {cells[0]:14}" + "".join(f"{cell:>10}" for cell in cells[1:])
