"""Times another checkout and this one by turns: ``python -m benchmarks.against DIR transport --time-s 3``.

After DIR come a benchmark that writes rows of times, `transport` or `service`, and its options. Each checkout runs its own
benchmark on its own code, with the packages of this environment. They take turns, so a machine that is slower for a
while is slower for both. The table has the medians of both, and the ratio of this checkout's to the other's. Rows of
what is no part of deconvd, such as a bare socket, tell how far to trust the rest.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

_HERE = Path(__file__).parents[1]
_SOURCES = ("proto", "client", "server")


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--rounds", "rounds_count", default=4, show_default=True)
@click.argument("other", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("benchmark")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(other: Path, benchmark: str, options: Sequence[str], rounds_count: int) -> None:
    """Time the checkout in the folder OTHER and this one by a BENCHMARK with its OPTIONS, and compare them."""
    checkouts = [other.resolve(), _HERE]
    runs: dict[Path, list[dict[str, float]]] = {checkout: [] for checkout in checkouts}
    for _ in range(rounds_count):
        for checkout in checkouts:
            runs[checkout].append(_times_ms(checkout, benchmark, options))
        checkouts.reverse()  # so that neither is always the first
    before, after = (_medians_ms(times) for times in runs.values())
    ratios = {name: after[name] / before[name] for name in before.keys() & after.keys()}
    print(f"{'milliseconds, median':60} {'other':>9} {'this':>9} {'ratio':>6}")
    for name in before:
        if name in ratios:
            print(f"{name:60} {before[name]:9.3f} {after[name]:9.3f} {ratios[name]:6.3f}")
    print(f"{'geometric mean':80} {statistics.geometric_mean(ratios.values()):6.3f}")


def _times_ms(checkout: Path, benchmark: str, options: Sequence[str]) -> dict[str, float]:
    """Run a checkout's benchmark. Return each time that it measured, by what its row says it is of."""
    path = os.pathsep.join(str(checkout / source) for source in _SOURCES)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        subprocess.run(
            [sys.executable, "-m", f"benchmarks.{benchmark}", *options, "--json", results],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        rows: list[dict[str, object]] = json.loads(results.read_text())["rows"]
    times_ms: dict[str, float] = {}
    for row in rows:
        about = [str(row[name]) for name in row if name == "bytes" or isinstance(row[name], str)]
        for name, value in row.items():
            if name.endswith("ms") and isinstance(value, float):
                times_ms[" ".join([*about, name])] = value
    return times_ms


def _medians_ms(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(times[name] for times in runs) for name in runs[0]}


if __name__ == "__main__":
    main()
