"""What thousands of shapes leave behind: ``python -m benchmarks.many_shapes --device cuda --json FILE``.

20,000 small shapes, all different, are called once each: for y and for gradients, in float32 and float16. Each
transport has a server of its own, with an empty plan store. After each thousand calls there is a row: how long they
took, and what both processes hold. The latency should stay as it is from the second thousand on, and the memory once
all caches are full. If the file is there, it gets further rows: so transports can be measured one by one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
import numpy as np

import deconvd_client
from benchmarks.commit import commit
from benchmarks.floor import card_name
from benchmarks.new_shapes import new_home
from benchmarks.rows_file import load_rows, save_rows
from deconvd.model.dtypes import Array
from deconvd_client import Connection
from deconvd_client.workers.host import Host
from examples.local_server import local_server

_CHOICES: Final = ((1, 2, 3, 4), (8, 16, 32), range(4, 48), range(4, 48), (2, 3, 4), (1, 2))
"""What shapes are drawn from: the samples, channels, height and width of x, the size of filters, and the stride."""

_PAD: Final = 1
_KINDS: Final = tuple((op, dtype) for op in ("y", "grad") for dtype in ("float32", "float16"))
_TRANSPORTS: Final = ("shared_memory", "unix", "tcp", "grpc")


class _Shape(NamedTuple):
    n: int
    channels: int
    h: int
    w: int
    kernel: int
    stride: int


@dataclass(frozen=True, slots=True)
class ProcessUse:
    """What a process holds.

    Attributes:
        rss_mb, pss_mb: Its memory in MB; in `pss_mb`, what it shares counts in parts.
        anonymous_mb, shared_mb: Parts of `pss_mb`: its own memory, and memory that the server lends.
    """

    rss_mb: float
    pss_mb: float
    anonymous_mb: float
    shared_mb: float
    descriptors: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> ProcessUse:
        """Return what a process holds now."""
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        kib = {name: int(rest.split()[0]) for name, _, rest in (s.partition(":") for s in lines)}
        mb = {name: round(size * 1.024e-3, 2) for name, size in kib.items()}
        return cls(
            rss_mb=mb["Rss"],
            pss_mb=mb["Pss"],
            anonymous_mb=mb["Pss_Anon"],
            shared_mb=mb["Pss_Shmem"],
            descriptors=len(os.listdir(f"/proc/{pid}/fd")),
            threads=len(os.listdir(f"/proc/{pid}/task")),
        )


@dataclass(frozen=True, slots=True)
class ManyShapesRow:
    """Some calls in a row; its fields are those of the JSON file.

    Attributes:
        calls: How many calls the server has had with these.
        y_ms, y_p99_ms, grad_ms, grad_p99_ms: The median and the 99th percentile of calls for y, and for gx and gW.
        slowest_ms: The slowest call of all.
        server, client: What the processes hold after them.
        caches: How many entries each cache of the device has, and their bytes, by the cache's name.
        card_mb: What is in use of the card's memory, by all of its processes; None without a card, or nvidia-smi.
        stored_plans, stored_mb: Files in the plan store, and their size.
        idle_mb: What is idle in the client's pool of results; None if nobody has looked.
        pool_hits, pool_misses: How many results have had memory from there since the first call, and how many had none.
    """

    transport: str
    calls: int
    y_ms: float
    y_p99_ms: float
    grad_ms: float
    grad_p99_ms: float
    slowest_ms: float
    server: ProcessUse
    client: ProcessUse
    caches: Mapping[str, tuple[int, int]]
    card_mb: float | None
    stored_plans: int
    stored_mb: float
    idle_mb: float | None = None
    pool_hits: int = 0
    pool_misses: int = 0

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> ManyShapesRow:
        """Return a row of a JSON file."""
        uses = {side: ProcessUse(**fields[side]) for side in ("server", "client")}
        return cls(**{**fields, **uses})

    def __str__(self) -> str:
        text = (
            f"{self.transport:13} {self.calls:6} {self.y_ms:7.2f} {self.y_p99_ms:7.2f} {self.grad_ms:7.2f} "
            f"{self.grad_p99_ms:7.2f} {self.slowest_ms:7.1f} |"
        )
        for use in (self.server, self.client):
            text += (
                f" {use.rss_mb:7.1f} {use.pss_mb:7.1f} {use.anonymous_mb:7.1f} {use.shared_mb:6.1f} "
                f"{use.descriptors:4} {use.threads:4} |"
            )
        if self.card_mb is not None:
            text += f" {self.card_mb:.0f} MB of the card,"
        if self.idle_mb is not None:
            text += (
                f" {self.idle_mb:.1f} MB idle, {self.pool_hits} hits, {self.pool_misses} misses,"
            )
        return f"{text} {self.stored_plans} plans of {self.stored_mb:.1f} MB"


_USE_HEADER: Final = f"{'rss':>7} {'pss':>7} {'anon':>7} {'shared':>6} {'fds':>4} {'thr':>4} |"
_HEADER: Final = (
    f"{'':13} {'calls':>6} {'y':>7} {'p99':>7} {'grad':>7} {'p99':>7} {'slowest':>7} | {_USE_HEADER} {_USE_HEADER}\n"
    f"{'':13} {'':6} {'ms':>7} {'':23} {'':7} | server, MB{'':31}| client, MB"
)


@click.command(help=__doc__)
@click.option("--device", default="cpu", show_default=True, help="As of deconvd-server.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@click.option("--shapes", "count", type=click.IntRange(min=4), default=20_000, show_default=True)
@click.option(
    "--row",
    "row_count",
    type=click.IntRange(min=4),
    default=1000,
    show_default=True,
    help="Calls of a row; fewer at the end make none.",
)
@click.option(
    "--transport",
    "transports",
    type=click.Choice(_TRANSPORTS),
    multiple=True,
    default=("shared_memory", "tcp"),
)
def main(
    device: str, json_file: Path | None, count: int, row_count: int, transports: Sequence[str]
) -> None:
    """Make the calls, and print a row now and then."""
    about = {"card": card_name(device), "shapes": count, "commit": commit()}
    rows = [ManyShapesRow.of(row) for row in load_rows(json_file, about)]
    print(_HEADER, flush=True)
    for transport in transports:
        for row in _rows_of(device, transport, draw_shapes(count), min(row_count, count)):
            print(row, flush=True)
            rows.append(row)
            save_rows(json_file, about, rows)


def draw_shapes(count: int) -> list[_Shape]:
    """Return shapes, all different."""
    lengths = [len(choices) for choices in _CHOICES]
    numbers = np.random.default_rng(0).choice(np.prod(lengths), count, replace=False)
    indices = zip(*np.unravel_index(numbers, lengths), strict=True)
    return [
        _Shape(*(choices[i] for choices, i in zip(_CHOICES, index, strict=True)))
        for index in indices
    ]


def _rows_of(
    device: str, transport: str, shapes: Sequence[_Shape], row_count: int
) -> Iterator[ManyShapesRow]:
    with ExitStack() as stack:
        stack.enter_context(new_home())
        store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deconvd-store-")))
        F, pid = stack.enter_context(_server(device, transport, store))
        assert isinstance(F._server, Host)
        pool = F._server.entry.result_pool
        call = partial(_time_ms, F, {name: _noise(name) for _, name in _KINDS})
        for begin in range(0, len(shapes) - row_count + 1, row_count):
            times_ms: dict[str, list[float]] = {"y": [], "grad": []}
            for number, shape in enumerate(shapes[begin : begin + row_count]):
                op, dtype = _KINDS[number % len(_KINDS)]
                times_ms[op].append(call(op, dtype, shape))
            (y_ms, y_p99_ms), (grad_ms, grad_p99_ms) = map(_quantiles, times_ms.values())
            plans_bytes = [path.stat().st_size for path in store.rglob("*.json")]
            yield ManyShapesRow(
                transport=transport,
                calls=begin + row_count,
                y_ms=y_ms,
                y_p99_ms=y_p99_ms,
                grad_ms=grad_ms,
                grad_p99_ms=grad_p99_ms,
                slowest_ms=round(max(map(max, times_ms.values())), 3),
                server=ProcessUse.of(pid),
                client=ProcessUse.of(os.getpid()),
                caches={
                    cache.name: (cache.count, cache.size_bytes)
                    for cache in F.server_info().devices[0].caches
                },
                card_mb=_card_mb(device),
                stored_plans=len(plans_bytes),
                stored_mb=round(sum(plans_bytes) * 1e-6, 2),
                idle_mb=round(pool.idle_bytes * 1e-6, 2),
                pool_hits=pool.hits_count,
                pool_misses=pool.misses_count,
            )


def _quantiles(times_ms: Sequence[float]) -> tuple[float, float]:
    median, p99 = np.quantile(times_ms, (0.5, 0.99))
    return round(float(median), 3), round(float(p99), 3)


@contextmanager
def _server(device: str, transport: str, store: Path) -> Iterator[tuple[Connection, int]]:
    """Run a server for the block. Give a connection to it, and its process id."""
    address = None if transport in ("shared_memory", "unix") else "127.0.0.1:0"
    others = _children()
    with local_server(device, "--plan-store", str(store), address=address) as target:
        (pid,) = _children() - others
        with deconvd_client.connect(target, transport=transport, timeout_s=120) as F:
            yield F, pid


def _children() -> set[int]:
    lists = (path.read_text() for path in Path("/proc/self/task").glob("*/children"))
    return {int(pid) for pids in lists for pid in pids.split()}


def _noise(dtype: str) -> Array:
    """Return elements for the largest tensor. Made once: the calls alone should take memory."""
    most = _Shape(*(max(choices) for choices in _CHOICES))
    count = most.n * most.channels * most.stride**2 * (most.h + 2) * (most.w + 2)
    elements: Array = np.random.default_rng(0).standard_normal(count, np.float32).astype(dtype)
    return elements


def _time_ms(
    F: Connection, noise: Mapping[str, Array], op: str, dtype: str, shape: _Shape
) -> float:
    def operand(*extents: int) -> Array:
        return noise[dtype][: np.prod(extents)].reshape(extents)

    n, channels, h, w, kernel, stride = shape
    outputs = channels // 2
    x, W = operand(n, channels, h, w), operand(channels, outputs, kernel, kernel)
    gy = operand(n, outputs, *(stride * (i - 1) + kernel - 2 * _PAD for i in (h, w)))
    begin_s = time.perf_counter()
    if op == "y":
        F.deconvolution_2d(x, W, None, stride, _PAD)
    else:
        F.deconvolution_2d_grad(x, W, None, gy, stride, _PAD)
    return (time.perf_counter() - begin_s) * 1e3


def _card_mb(device: str) -> float | None:
    if not device.startswith("cuda") or shutil.which("nvidia-smi") is None:
        return None
    ordinal = device.partition(":")[2] or "0"
    command = ["nvidia-smi", f"--id={ordinal}", "--query-gpu=memory.used"]
    command += ["--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) * 1.048576


if __name__ == "__main__":
    main()
