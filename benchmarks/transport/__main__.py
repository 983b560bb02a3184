"""The command `python -m benchmarks.transport`: prints a table and writes the rows as JSON."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import click
import numpy as np

from benchmarks.transport.paths import PATHS, RoundTrip
from benchmarks.transport.timing import burst_s, human, tensor, write_rows

_DEFAULT_BYTES = (1 << 10, 32 << 10, 1 << 20, 8 << 20, 32 << 20, 256 << 20)
_LEAST_ROUNDS, _MOST_ROUNDS = 4, 20
"""Of each size: rounds over all paths are made until their time is over, or these are."""

_FLOORS = {"tcp": "raw_tcp", "grpc_tcp": "bare_grpc_stream"}
"""What a path can hope for: the same bytes by the same means, and nothing else."""


@click.command()
@click.option("--bytes", "sizes", type=int, multiple=True, default=_DEFAULT_BYTES)
@click.option("--path", "names", type=click.Choice(list(PATHS)), multiple=True)
@click.option("--time-s", default=60.0, show_default=True, help="For each size.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(sizes: Sequence[int], names: Sequence[str], time_s: float, json_file: Path | None) -> None:
    """Time round trips of so many bytes there and the same back, by each path in turn, many times over.

    So a machine that is slower for a while is slower for all of them.
    """
    with ExitStack() as stack:
        ways = {name: stack.enter_context(PATHS[name]()) for name in names or PATHS}
        rows = [row for size in sizes for row in _rows(ways, size, time_s)]
    if json_file is not None:
        write_rows(json_file, rows)
    _print_table(rows, sizes)


def _rows(
    ways: Mapping[str, RoundTrip], size: int, time_s: float
) -> Iterator[dict[str, str | int | float]]:
    x = tensor(size)
    times_s: dict[str, list[float]] = {name: [] for name in ways}
    for round_trip in ways.values():
        np.testing.assert_array_equal(round_trip(x), x)
    began_s = time.perf_counter()
    for round_number in range(_MOST_ROUNDS):
        if round_number >= _LEAST_ROUNDS and time.perf_counter() - began_s > time_s:
            break
        for name, round_trip in ways.items():
            times_s[name] += burst_s(partial(round_trip, x))
    for name, times in times_s.items():
        yield {"path": name, "bytes": size, "ms": statistics.median(times) * 1e3}


def _print_table(rows: list[dict[str, str | int | float]], sizes: Sequence[int]) -> None:
    print("milliseconds, median".ljust(22) + "".join(f"{human(size):>12}" for size in sizes))
    times: dict[str, list[float]] = {}
    for row in rows:
        times.setdefault(str(row["path"]), []).append(float(row["ms"]))
    for name, own in times.items():
        print(f"{name:<22}" + "".join(f"{ms:>12.3f}" for ms in own))
    for name, floor in _FLOORS.items():
        if name in times and floor in times:
            ratios = [ms / least for ms, least in zip(times[name], times[floor], strict=True)]
            print(f"{name} / {floor}".ljust(22) + "".join(f"{ratio:>12.3f}" for ratio in ratios))


if __name__ == "__main__":
    main()
