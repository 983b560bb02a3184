"""The command `python -m benchmarks.transport`: prints a table and writes the rows as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import click
import numpy as np

from benchmarks.commit import commit
from benchmarks.transport.paths import PATHS, RoundTrip
from deconvd.tensor import Array

_DEFAULT_BYTES = (1 << 10, 32 << 10, 1 << 20, 8 << 20, 32 << 20, 256 << 20)
_LEAST_RUNS, _MOST_RUNS, _TIME_S = 7, 2000, 2.0


@click.command()
@click.option("--bytes", "sizes", type=int, multiple=True, default=_DEFAULT_BYTES)
@click.option("--path", "names", type=click.Choice(list(PATHS)), multiple=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(sizes: Sequence[int], names: Sequence[str], json_file: Path | None) -> None:
    """Time round trips of so many bytes there and the same back, by each path in turn."""
    rows = [row for name in names or PATHS for row in _rows(name, sizes)]
    if json_file is not None:
        about = {
            "host": f"{platform.machine()}, {len(os.sched_getaffinity(0))} processors",
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        json_file.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    _print_table(rows, sizes)


def _rows(name: str, sizes: Sequence[int]) -> list[dict[str, str | int | float]]:
    with PATHS[name]() as round_trip:
        return [
            {"path": name, "bytes": size, "ms": _median_ms(round_trip, _tensor(size))}
            for size in sizes
        ]


def _tensor(size_bytes: int) -> Array:
    """Return a tensor of so many bytes that can be cut into samples of at most a mebibyte."""
    elements_count = size_bytes // 4
    width = min(elements_count, 256)
    height = min(elements_count // width, 1024)
    n = elements_count // (width * height)
    return np.random.default_rng(0).random((n, 1, height, width), np.float32)


def _median_ms(round_trip: RoundTrip, x: Array) -> float:
    np.testing.assert_array_equal(round_trip(x), x)
    times_s: list[float] = []
    began_s = time.perf_counter()
    while len(times_s) < _LEAST_RUNS or (
        len(times_s) < _MOST_RUNS and time.perf_counter() - began_s < _TIME_S
    ):
        start_s = time.perf_counter()
        round_trip(x)
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s) * 1e3


def _print_table(rows: list[dict[str, str | int | float]], sizes: Sequence[int]) -> None:
    print("milliseconds, median".ljust(22) + "".join(f"{_human(size):>12}" for size in sizes))
    for name in dict.fromkeys(row["path"] for row in rows):
        times = [float(row["ms"]) for row in rows if row["path"] == name]
        print(f"{name:<22}" + "".join(f"{ms:>12.3f}" for ms in times))


def _human(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB" if size_bytes >= 1 << 20 else f"{size_bytes >> 10} KiB"


if __name__ == "__main__":
    main()
