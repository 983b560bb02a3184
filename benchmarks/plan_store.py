"""What a plan store costs, however full it is: ``python -m benchmarks.plan_store --device cuda --json FILE``.

100,000 plans are saved, of which the store keeps those that it has room for. Then its folders get further files until
there are 100,000, as if another version had had no bound. The store is opened empty, full, and overfull. With a card,
a server is started on each store, too; on the processor no server opens one. Needs no card otherwise.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click
import numpy as np

from benchmarks.commit import commit
from benchmarks.floor import card_name
from benchmarks.new_shapes import new_home, timed_server
from deconvd.model.geometry import Geometry
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.device.cuda.plan import Product
from deconvd_server.device.cuda.plans.choice import Choice, Provider
from deconvd_server.device.cuda.plans.key import PlanKey
from deconvd_server.device.cuda.plans.store import PlanStore

_ORIGIN: Final[dict[str, str | int]] = {"deconvd": 1, "cudnn": 91900, "card": "none"}
_CHOICE: Final = Choice(Provider.CUDNN_NHWC, "cudnn nhwc engine 73", False, "e" * 2500, 0.05)
"""A choice of about the usual size."""

_SAMPLES_COUNT: Final = 100


@dataclass(frozen=True, slots=True)
class PlanStoreRow:
    """A store; its fields are those of the JSON file.

    Attributes:
        files, size_mb: How many files it has, and their size.
        open_ms: The time to open it.
        find_ms, miss_ms, save_ms: The median time to load a plan, to look for one that is not there, and to save one,
            or to find that there is no room for it.
        start_s: From the start of a server's process with the store until it serves; None without a card.
    """

    files: int
    size_mb: float
    open_ms: float
    find_ms: float | None
    miss_ms: float
    save_ms: float
    start_s: float | None

    def __str__(self) -> str:
        found = "-" if self.find_ms is None else f"{self.find_ms:.3f}"
        start = "" if self.start_s is None else f"{self.start_s:8.2f} s until a server serves"
        return (
            f"{self.files:7} {self.size_mb:7.1f} {self.open_ms:8.3f} {found:>8} {self.miss_ms:8.3f} "
            f"{self.save_ms:8.3f}{start}"
        )


_HEADER: Final = f"{'files':>7} {'MB':>7} {'open':>8} {'find':>8} {'miss':>8} {'save':>8}, in ms"


@click.command(help=__doc__)
@click.option("--device", default="cpu", show_default=True, help="As of deconvd-server.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@click.option("--plans", "count", type=click.IntRange(min=1), default=100_000, show_default=True)
def main(device: str, json_file: Path | None, count: int) -> None:
    """Fill a store, and print a row for each size."""
    rows = []
    print(_HEADER, flush=True)
    with tempfile.TemporaryDirectory(prefix="deconvd-store-") as name:
        for row in _rows(device, Path(name), count):
            rows.append(row)
            print(row, flush=True)
    if json_file is not None:
        report = {
            "card": card_name(device),
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "plans": count,
            "rows": [*map(asdict, rows)],
        }
        json_file.write_text(json.dumps(report, indent=1) + "\n")


def _rows(device: str, folder: Path, count: int) -> Iterator[PlanStoreRow]:
    yield _row(device, folder / "empty", count)
    store = PlanStore(folder / "full", _ORIGIN)
    for number in range(count):
        store.save(_key(number), _CHOICE)
    yield _row(device, folder / "full", count)
    _add_files(folder / "full", count)
    yield _row(device, folder / "full", count)


def _key(number: int) -> PlanKey:
    x = TensorSpec((number + 1, 4, 8, 8), np.dtype(np.float32))
    W = TensorSpec((4, 2, 4, 4), np.dtype(np.float32))
    return PlanKey.of(Product.Y, Problem(x, W, Geometry(stride=(2, 2))), Options(), 1 << 20)


def _add_files(folder: Path, count: int) -> None:
    """Give a store that has a plan some files more, until there are so many: all of them one file on disk."""
    paths = [*folder.rglob("*.json")]
    for number in range(count - len(paths)):
        shard = folder / f"{number % 256:02x}"
        shard.mkdir(exist_ok=True)
        os.link(paths[0], shard / f"{number:064x}.json")


def _row(device: str, folder: Path, saved_count: int) -> PlanStoreRow:
    paths = [*folder.rglob("*.json")]
    size_bytes = sum(path.stat().st_size for path in paths)
    begin_s = time.perf_counter()
    store = PlanStore(folder, _ORIGIN)
    open_ms = (time.perf_counter() - begin_s) * 1e3
    saved = map(_key, range(0, saved_count, max(saved_count // _SAMPLES_COUNT, 1)))
    known = [key for key in saved if store.load(key) is not None]
    unknown = [_key(saved_count + number) for number in range(_SAMPLES_COUNT)]
    return PlanStoreRow(
        files=len(paths),
        size_mb=round(size_bytes * 1e-6, 1),
        open_ms=round(open_ms, 3),
        find_ms=_median_ms(store.load, known) if known else None,
        miss_ms=_median_ms(store.load, unknown),
        save_ms=_median_ms(lambda key: store.save(key, _CHOICE), unknown),
        start_s=_start_s(device, folder) if device.startswith("cuda") else None,
    )


def _median_ms(work: Callable[[PlanKey], object], keys: Sequence[PlanKey]) -> float:
    times_ms = []
    for key in keys:
        begin_s = time.perf_counter()
        work(key)
        times_ms.append((time.perf_counter() - begin_s) * 1e3)
    return round(statistics.median(times_ms), 3)


def _start_s(device: str, folder: Path) -> float:
    with new_home(), timed_server(device, "--plan-store", str(folder)) as (_F, start_s):
        return round(start_s, 3)


if __name__ == "__main__":
    main()
