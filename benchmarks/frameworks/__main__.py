"""What adapters add to calls: ``python -m benchmarks.frameworks --json FILE``, in an environment with a framework.

A training step and an inference of the demo's decoder: by layers of ours in the framework, by NumPy with plain calls of
ours, and by the framework alone. A server runs on a Unix socket. The three take turns, and times are medians. A file
keeps the rows of other frameworks, since each has an environment of its own.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import click

import deconvd_client
from benchmarks.commit import commit
from benchmarks.frameworks.decoder import Workload, plain_calls
from benchmarks.host import host
from examples.local_server import local_server

__all__ = ["FrameworkRow", "main"]

_FRAMEWORKS: Final = ("torch", "jax", "chainer")
_CALLS_COUNTS: Final = {"step": 4, "infer": 2}
_WARM_UPS: Final = 20


@dataclass(frozen=True)
class FrameworkRow:
    """One piece of work in one framework; its fields are those of the JSON file.

    Attributes:
        what: `step` or `infer`.
        calls: How many calls of the server it makes.
        ours_ms: Its time with layers of ours.
        plain_ms: The same with NumPy and plain calls of ours.
        local_ms: The same with the framework's own layers.
    """

    framework: str
    what: str
    calls: int
    ours_ms: float
    plain_ms: float
    local_ms: float

    def __str__(self) -> str:
        added_ms = (self.ours_ms - self.plain_ms) / self.calls
        return (
            f"{self.framework:8} {self.what:6} ours {self.ours_ms:7.3f} ms  plain {self.plain_ms:7.3f} ms  "
            f"local {self.local_ms:7.3f} ms  over plain calls {added_ms:+.3f} ms a call"
        )


@click.command()
@click.option("--device", default="cpu", show_default=True, help="As of deconvd-server.")
@click.option("--framework", "names", type=click.Choice(_FRAMEWORKS), multiple=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@click.option("--time-s", default=5.0, show_default=True, help="For each row.")
def main(device: str, names: Sequence[str], json_file: Path | None, time_s: float) -> None:
    """Time the decoder in each framework of this environment, beside plain calls and the framework alone."""
    chosen = names or [name for name in _FRAMEWORKS if find_spec(name)]
    missing = [name for name in chosen if not find_spec(name)]
    if missing or not chosen:
        lacking = missing or _FRAMEWORKS
        raise click.UsageError(
            f"this environment has no {' or '.join(lacking)}: see make test-torch"
        )
    rows: list[FrameworkRow] = []
    for name in chosen:
        for row in _rows(name, device, time_s):
            rows.append(row)
            print(row, flush=True)
    if json_file is not None:
        about = {
            "host": host(),
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        all_rows = [*_other_rows(json_file, chosen), *map(asdict, rows)]
        json_file.write_text(json.dumps(about | {"rows": all_rows}, indent=1) + "\n")


def _other_rows(json_file: Path, measured: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows that a file has of other frameworks than those that were measured."""
    if not json_file.exists():
        return []
    rows = json.loads(json_file.read_text())["rows"]
    return [row for row in rows if row["framework"] not in measured]


def _rows(name: str, device: str, time_s: float) -> Iterator[FrameworkRow]:
    adapter = import_module(f"benchmarks.frameworks.by_{name}")
    workload = Workload.make()
    with local_server(device) as target, deconvd_client.connect(target) as F:
        ways = (
            adapter.remote_calls(F, workload),
            plain_calls(F, workload),
            adapter.local_calls(workload),
        )
        _check_losses([way.step() for way in ways])
        for what, calls_count in _CALLS_COUNTS.items():
            times_ms = _times_ms([getattr(way, what) for way in ways], time_s)
            yield FrameworkRow(name, what, calls_count, *times_ms)


def _check_losses(losses: Sequence[float]) -> None:
    """Raise unless all ways compute the same."""
    if max(losses) - min(losses) > 1e-5 * max(losses):
        raise click.ClickException(f"the ways have different losses: {losses}")


def _times_ms(works: Sequence[Any], time_s: float) -> list[float]:
    """Return the median times of works that take turns, so that all meet the same noise."""
    times_s: list[list[float]] = [[] for _ in works]
    began_s = time.perf_counter()
    turn = 0
    while turn <= _WARM_UPS or time.perf_counter() - began_s < time_s:
        for work, times in zip(works, times_s, strict=True):
            start_s = time.perf_counter()
            work()
            times.append(time.perf_counter() - start_s)
        turn += 1
    return [statistics.median(times[_WARM_UPS:]) * 1e3 for times in times_s]


if __name__ == "__main__":
    main()
