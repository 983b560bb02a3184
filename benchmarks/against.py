"""Times another checkout and this one by turns: ``python -m benchmarks.against DIR transport --time-s 3``.

After DIR come a benchmark that writes rows of times, `transport`, `service` or `remote`, and its options. Each checkout
runs its own benchmark on its own code, with the packages of this environment. They take turns, so a machine that is
slower for a while is slower for both. The table has the medians of both, and the ratio of this checkout's to the
other's. Rows of what is no part of deconvd, such as a bare socket, tell how far to trust the rest.
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
@click.option("--rounds", "rounds_count", type=click.IntRange(min=1), default=4, show_default=True)
@click.argument("other", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("benchmark")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(other: Path, benchmark: str, options: Sequence[str], rounds_count: int) -> None:
    """Time the checkout in the folder OTHER and this one by a BENCHMARK with its OPTIONS, and compare them."""
    others_runs: list[dict[str, float]] = []
    our_runs: list[dict[str, float]] = []
    turns = [(other.resolve(), others_runs), (_HERE, our_runs)]
    for _ in range(rounds_count):
        for checkout, runs in turns:
            runs.append(_times_ms(checkout, benchmark, options))
        turns.reverse()  # so that neither is always the first
    others, ours = _medians_ms(others_runs), _medians_ms(our_runs)
    print(f"{'milliseconds, median':60} {'other':>9} {'this':>9} {'ratio':>6}")
    for name in others:
        if name in ours:
            ratio = ours[name] / others[name]
            print(f"{name:60} {others[name]:9.3f} {ours[name]:9.3f} {ratio:6.3f}")


def _times_ms(checkout: Path, benchmark: str, options: Sequence[str]) -> dict[str, float]:
    """Run a checkout's benchmark. Return each time that it measured, by what its row says it is of."""
    path = [*(str(checkout / source) for source in _SOURCES), os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        subprocess.run(
            [sys.executable, "-m", f"benchmarks.{benchmark}", *options, "--json", results],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        rows: list[dict[str, object]] = json.loads(results.read_text())["rows"]
    times_ms: dict[str, float] = {}
    for row in rows:
        about = [str(value) for value in row.values() if isinstance(value, (str, int))]
        for name, value in row.items():
            if name.endswith("ms") and isinstance(value, float):
                times_ms[" ".join([*about, name])] = value
    return times_ms


def _medians_ms(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(times[name] for times in runs) for name in runs[0]}


if __name__ == "__main__":
    main()
