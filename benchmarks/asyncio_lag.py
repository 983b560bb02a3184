"""How long large calls hold up an event loop: ``python -m benchmarks.asyncio_lag --json FILE``.

A ticker sleeps for a millisecond, again and again, and notes how late it wakes. Meanwhile a task makes calls of 100 MB
through `deconvd_client.aio`, 50 there and 50 back, by each transport, to a server in a process of its own that computes
little: one tap and one channel. The first and the last row have the lag of an idle loop, since a busy machine is late,
too. What holds the interpreter's lock for long in any thread shows here.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import click
import numpy as np

import deconvd_client.aio
from benchmarks.commit import commit
from deconvd_client.transports.route import TransportName
from examples.local_server import local_server

_TICK_S: Final = 1e-3
_HALF_BYTES: Final = 50_000_000
_LIMIT_MS: Final = 10.0
"""The lag that is wanted at most, at the 99th percentile."""


@dataclass(frozen=True, slots=True)
class LagRow:
    """The lag of a loop during calls by one transport; ``idle`` for none."""

    transport: str
    calls_count: int
    call_ms: float
    ticks_count: int
    p50_ms: float
    p99_ms: float
    max_ms: float


async def _note_lags(lags_s: list[float]) -> None:
    """Append how late each tick is, until cancelled."""
    while True:
        due_s = time.perf_counter() + _TICK_S
        await asyncio.sleep(_TICK_S)
        lags_s.append(time.perf_counter() - due_s)


async def _measure(target: str, transport: str, duration_s: float) -> LagRow:
    """Measure for a while. Without a transport nothing is called."""
    lags_s: list[float] = []
    calls_count = 0
    x = np.ones((25, 1, 500, 1000), np.float32)
    assert x.nbytes == _HALF_BYTES
    W = np.ones((1, 1, 1, 1), np.float32)
    connected_to = transport or TransportName.AUTO
    async with deconvd_client.aio.connect(target, transport=connected_to) as F:
        if transport:
            for _ in range(3):  # connections, memory and what pays are found out
                await F.deconvolution_2d(x, W)
        ticker = asyncio.create_task(_note_lags(lags_s))
        begin_s = time.perf_counter()
        while (elapsed_s := time.perf_counter() - begin_s) < duration_s:
            if transport:
                await F.deconvolution_2d(x, W)
                calls_count += 1
            else:
                await asyncio.sleep(duration_s)
        ticker.cancel()
    p50, p99, most = np.percentile(lags_s, [50, 99, 100]) * 1e3
    call_ms = elapsed_s / calls_count * 1e3 if calls_count else 0.0
    return LagRow(
        transport or "idle", calls_count, call_ms, len(lags_s), float(p50), float(p99), float(most)
    )


@click.command(help=__doc__)
@click.option("--duration-s", default=10.0, help="How long each transport is measured.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="File for the rows.")
def main(duration_s: float, path: Path | None) -> None:
    rows: list[LagRow] = []
    print("transport       calls  ms a call   lag of the loop, ms: p50     p99     max")
    with tempfile.TemporaryDirectory() as directory:
        unix = f"unix:{directory}/deconvd.sock"
        with (
            local_server("cpu", address=unix) as unix_target,
            local_server("cpu", address="127.0.0.1:0") as tcp_target,
        ):
            for transport in ("", *(t for t in TransportName if t is not TransportName.AUTO), ""):
                is_near = transport in (TransportName.UNIX, TransportName.SHARED_MEMORY)
                target = unix_target if is_near else tcp_target
                row = asyncio.run(_measure(target, transport, duration_s))
                rows.append(row)
                print(
                    f"{row.transport:14} {row.calls_count:6} {row.call_ms:10.1f} "
                    f"{row.p50_ms:28.2f} {row.p99_ms:7.2f} {row.max_ms:7.2f}"
                )
    if path is not None:
        report = {"commit": commit(), "limit_ms": _LIMIT_MS, "rows": [asdict(r) for r in rows]}
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
