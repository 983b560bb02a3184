"""How fast shapes are served that no server has seen: ``python -m benchmarks.new_shapes --device cuda --json FILE``.

40 shapes as of people who enlarge images of any size: x is (2, 64, h, w), W is (64, 32, 4, 4), the stride is 2, the pad
is 1, and h and w are drawn from 20 to 90. Each shape is called 24 times in a row, from numpy to numpy through shared
memory. Each row has a server of its own. Without a store that has an empty folder for each cache, and with one it knows
all shapes from a server before it. PyTorch does the same in a process of its own, from numpy to numpy. It is asked for
what a server gives by default: strict float32, and no search of its own. All figures but the slowest are medians over
the shapes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import site
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import click
import numpy as np

import deconvd_client
from benchmarks.commit import commit
from benchmarks.floor import card_name
from deconvd.model.dtypes import Array
from deconvd_client import Connection
from examples.local_server import local_server

_CHANNELS: Final = 64, 32
_KERNEL: Final = 4
_STRIDE, _PAD = 2, 1
_EXTENTS: Final = 20, 90
_SEARCHES_S: Final = 2.0
"""A server that has stored no plan for this long has searched all that it wants to."""

_CALLS_COUNT: Final = 24
"""Calls of each shape. The last one shows what a call takes once nothing is new, and its work is a graph."""


@dataclass(frozen=True, slots=True)
class NewShapesRow:
    """One operation and element type; its fields are those of the JSON file.

    Attributes:
        op: ``y``, or ``grad`` for gx and gW.
        store: Whether the server has a plan store that knows the shapes.
        first_ms, second_ms, last_ms: The first, second and last call of a shape.
        slowest_ms: The slowest of all first calls, and `very_first_ms` the server's first.
        first_server_ms, second_server_ms: What the server had of the first and second call.
        start_s: From the start of the server's process until it serves.
        torch_first_ms, torch_second_ms: PyTorch's; None without PyTorch.
    """

    dtype: str
    op: str
    store: bool
    first_ms: float
    second_ms: float
    last_ms: float
    slowest_ms: float
    very_first_ms: float
    first_server_ms: float
    second_server_ms: float
    start_s: float
    torch_first_ms: float | None
    torch_second_ms: float | None

    def __str__(self) -> str:
        store = "store" if self.store else "-"
        torch = "no PyTorch"
        if self.torch_first_ms is not None and self.torch_second_ms is not None:
            torch = f"{self.torch_first_ms:7.2f} {self.torch_second_ms:7.2f}"
        return (
            f"{self.dtype:8} {self.op:4} {store:5} {self.first_ms:7.2f} {self.second_ms:7.2f} {self.last_ms:7.2f} "
            f"{self.first_server_ms:7.2f} {self.second_server_ms:7.2f} {self.slowest_ms:8.1f} "
            f"{self.very_first_ms:8.1f} {self.start_s:6.2f} {torch}"
        )


_HEADER: Final = (
    f"{'type':8} {'op':4} {'':5} {'first':>7} {'second':>7} {'last':>7} {'1 srv':>7} {'2 srv':>7} {'slowest':>8} "
    f"{'1st ever':>8} {'start':>6} {'torch 1':>7} {'2':>7}"
)


@dataclass(frozen=True, slots=True)
class _ShapeTimes:
    """Milliseconds of the calls of one shape, and what the server had of each; empty if nobody said."""

    calls_ms: Sequence[float]
    server_ms: Sequence[float] = ()


@click.command(help=__doc__)
@click.option("--device", default="cpu", show_default=True, help="As of deconvd-server.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@click.option("--shapes", "count", type=click.IntRange(min=1), default=40, show_default=True)
@click.option("--type", "dtypes", multiple=True, default=("float32", "float16"))
@click.option("--op", "ops", type=click.Choice(["y", "grad"]), multiple=True, default=("y", "grad"))
@click.option("--store", "stores", type=bool, multiple=True, default=(False, True))
def main(
    device: str,
    json_file: Path | None,
    count: int,
    dtypes: Sequence[str],
    ops: Sequence[str],
    stores: Sequence[bool],
) -> None:
    """Time the calls and print a row for each kind."""
    shapes = draw_shapes(count)
    rows: list[NewShapesRow] = []
    print(_HEADER, flush=True)
    context = multiprocessing.get_context("spawn")  # PyTorch is not for this process, nor for forks
    with (
        tempfile.TemporaryDirectory(prefix="deconvd-new-shapes-") as folder,
        ProcessPoolExecutor(1, context) as torch_process,
    ):
        store = Path(folder) / "store"
        if True in stores:
            _fill_store(device, store, shapes, dtypes, ops)
        for dtype in dtypes:
            for op in ops:
                torch = _times_of_torch(torch_process, device, dtype, op, shapes)
                for has_store in stores:
                    options = ("--plan-store", str(store)) if has_store else ()
                    row = _row(device, dtype, op, shapes, options, torch)
                    rows.append(row)
                    print(row, flush=True)
                    if json_file is not None:
                        json_file.write_text(json.dumps(_report(device, count, rows), indent=1))


def _report(device: str, count: int, rows: Sequence[NewShapesRow]) -> Mapping[str, object]:
    return {
        "card": card_name(device),
        "shapes": count,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": [asdict(row) for row in rows],
    }


def draw_shapes(count: int) -> list[tuple[int, int]]:
    """Return the sizes of images: all different."""
    sizes = [(h, w) for h in range(*_EXTENTS) for w in range(*_EXTENTS)]
    return random.Random(0).sample(sizes, count)


def _row(
    device: str,
    dtype: str,
    op: str,
    shapes: Sequence[tuple[int, int]],
    options: Sequence[str],
    torch: Sequence[_ShapeTimes],
) -> NewShapesRow:
    with new_home(), timed_server(device, *options) as (F, start_s):
        times = [*_times_of_ours(F, dtype, op, shapes)]
    firsts = [one.calls_ms[0] for one in times]
    return NewShapesRow(
        dtype=dtype,
        op=op,
        store=bool(options),
        first_ms=_median(firsts),
        second_ms=_median([one.calls_ms[1] for one in times]),
        last_ms=_median([one.calls_ms[-1] for one in times]),
        slowest_ms=round(max(firsts), 3),
        very_first_ms=round(firsts[0], 3),
        first_server_ms=_median([one.server_ms[0] for one in times]),
        second_server_ms=_median([one.server_ms[1] for one in times]),
        start_s=round(start_s, 3),
        torch_first_ms=_median([one.calls_ms[0] for one in torch]) if torch else None,
        torch_second_ms=_median([one.calls_ms[1] for one in torch]) if torch else None,
    )


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 3)


@contextmanager
def timed_server(device: str, *options: str) -> Iterator[tuple[Connection, float]]:
    """Run a server for the block. Give a connection to it, and the seconds that its start took."""
    with ExitStack() as stack:
        begin_s = time.perf_counter()
        target = stack.enter_context(local_server(device, *options))
        start_s = time.perf_counter() - begin_s
        connection = deconvd_client.connect(target, transport="shared_memory", timeout_s=120)
        yield stack.enter_context(connection), start_s


@contextmanager
def new_home() -> Iterator[None]:
    """Give programs that start in the block empty folders for their caches, such as CuPy's and CUDA's."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="deconvd-home-") as home:
        os.environ["PYTHONUSERBASE"] = site.getuserbase()  # packages may be in the old home
        os.environ["HOME"] = home
        for name in ("XDG_CACHE_HOME", "CUPY_CACHE_DIR", "CUDA_CACHE_PATH"):
            os.environ.pop(name, None)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def _fill_store(
    device: str,
    store: Path,
    shapes: Sequence[tuple[int, int]],
    dtypes: Sequence[str],
    ops: Sequence[str],
) -> None:
    """Have a server search all plans, and store them."""
    with new_home(), timed_server(device, "--plan-store", str(store)) as (F, _):
        for dtype in dtypes:
            for op in ops:
                for _ in _times_of_ours(F, dtype, op, shapes):
                    pass
        count = -1
        while count != (count := len([*store.rglob("*.json")])):
            time.sleep(_SEARCHES_S)  # what calls have not waited for is searched while none come


def _times_of_ours(
    F: Connection, dtype: str, op: str, shapes: Sequence[tuple[int, int]]
) -> Iterator[_ShapeTimes]:
    for size in shapes:
        call = _calls_of_ours(F, op, make_operands(size, dtype))
        calls_ms, server_ms = [], []
        for _ in range(_CALLS_COUNT):
            calls_ms.append(_time_ms(call))
            server_ms.append(F.last_ledger["server_us"] / 1e3)
        yield _ShapeTimes(calls_ms, server_ms)


def _calls_of_ours(F: Connection, op: str, operands: Sequence[Array]) -> Callable[[], object]:
    x, W, gy = operands
    if op == "y":
        return lambda: F.deconvolution_2d(x, W, None, _STRIDE, _PAD)
    return lambda: F.deconvolution_2d_grad(x, W, None, gy, _STRIDE, _PAD)


def make_operands(size: tuple[int, int], dtype: str) -> tuple[Array, Array, Array]:
    """Return x, W and gy."""
    generator = np.random.default_rng(0)
    inputs, outputs = _CHANNELS
    larger = tuple(_STRIDE * extent for extent in size)
    shapes = ((2, inputs, *size), (inputs, outputs, _KERNEL, _KERNEL), (2, outputs, *larger))
    x, W, gy = (generator.standard_normal(shape, np.float32).astype(dtype) for shape in shapes)
    return x, W, gy


def _time_ms(call: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    call()
    return (time.perf_counter() - begin_s) * 1e3


def _times_of_torch(
    process: ProcessPoolExecutor,
    device: str,
    dtype: str,
    op: str,
    shapes: Sequence[tuple[int, int]],
) -> list[_ShapeTimes]:
    """Return the times of PyTorch; nothing without PyTorch."""
    if find_spec("torch") is None:
        return []
    return process.submit(_time_torch, device, dtype, op, shapes).result()


def _time_torch(
    device: str, dtype: str, op: str, shapes: Sequence[tuple[int, int]]
) -> list[_ShapeTimes]:
    import torch

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # as ours

    def on_device(array: Array) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    def compute(x: Array, W: Array, gy: Array) -> object:
        if op == "y":
            y = torch.nn.functional.conv_transpose2d(
                on_device(x), on_device(W), None, _STRIDE, _PAD
            )
            return y.cpu().numpy()
        gx, gW, _ = torch.ops.aten.convolution_backward(
            *(on_device(gy), on_device(x), on_device(W), None),
            *([_STRIDE] * 2, [_PAD] * 2, [1] * 2, True, [0] * 2, 1, (True, True, False)),
        )
        return gx.cpu().numpy(), gW.cpu().numpy()

    times = []
    with torch.no_grad():
        for size in shapes:
            call = partial(compute, *make_operands(size, dtype))
            calls_ms = [_time_ms(call) for _ in range(_CALLS_COUNT)]
            times.append(_ShapeTimes(calls_ms))
    return times


if __name__ == "__main__":
    main()
