"""How fast whole calls are: ``python -m benchmarks.service --device cuda --json FILE``.

A server runs in one process and its clients in others, over a Unix socket. One client's latency, with plain arrays and
with operands from `F.empty`, is split by stage, as the call's own ledger tells it. Beside it stand the floor (upload of
the operands from pinned memory, the kernels, and the download, each timed alone on the card) and a stock service, see
`benchmarks.stock`, by one client too. Then 1 to 16 clients call at once, for throughput. All figures are medians. With
``--only-latency`` there is our one client and the floor: that does for many layers. So it is with ``--gradients``, for
which the stock service is not made: calls for gx and gW.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import click
import numpy as np

import deconvd_client
from benchmarks.call_options import layer_option
from benchmarks.client_processes import ClientProcesses, Meet, start_client_processes
from benchmarks.commit import commit
from benchmarks.floor import card_name, floor_ms
from benchmarks.layer_calls import SERVICE_LAYERS, call_layer, make_operands
from benchmarks.layers import Layer
from benchmarks.stock import StockCall, stock_operator, stock_service
from deconvd.model.dtypes import Array, DType
from deconvd.wire.ledger import OVERLAP_ENTRY
from deconvd_client import Connection
from examples.local_server import local_server

_CLIENTS_COUNTS = (1, 2, 4, 8, 16)
_OTHER_ENTRIES = ("server_us", OVERLAP_ENTRY)
"""Of a ledger: all stages together, and a part of one of them."""

_WARM_UPS = 2
_LEAST_CALLS = 3
_LATENCY_S = 1.5
_THROUGHPUT_S = 1.0


@dataclass(frozen=True)
class ServiceRow:
    """One layer and element type; its fields are those of the JSON file.

    Attributes:
        megabytes: What a call moves: x, W and y together; for gradients x, W, gy, gx and gW.
        ms: Latency of a call, one client.
        stages_ms: Parts of it, as the server's ledger has them, and `rest` for all that is none of
            them: moving tensors. Where stages overlap, as in a stream, there may be no rest.
        empty_ms, empty_stages_ms: The same for operands that lie in shared memory already.
        floor_ms: Upload, kernels and download; None without a card.
        stock_ms: Latency of the stock service; None if it was not asked for, as is what follows.
        stock_ratio: How many times as long that is as `ms`.
        calls_per_s: By the number of clients.
    """

    layer: str
    dtype: str
    megabytes: float
    ms: float
    stages_ms: Mapping[str, float]
    empty_ms: float
    empty_stages_ms: Mapping[str, float]
    floor_ms: float | None
    stock_ms: float | None = None
    stock_ratio: float | None = None
    calls_per_s: Mapping[int, float] | None = None

    def __str__(self) -> str:
        lines = [
            f"{self.layer:24} {self.dtype:8} {self.megabytes:7.1f} MB",
            f"plain arrays: {self._shown(self.ms, self.stages_ms)}",
            f"from F.empty: {self._shown(self.empty_ms, self.empty_stages_ms)}",
        ]
        if self.stock_ms is not None:
            lines.append(
                f"stock service: {self.stock_ms:.2f} ms, {self.stock_ratio:.1f} times as long"
            )
        if self.calls_per_s is not None:
            rates = (f"{clients}: {rate:.0f}" for clients, rate in self.calls_per_s.items())
            lines.append(f"calls/s by clients: {'  '.join(rates)}")
        return "\n    ".join(lines)

    def _shown(self, ms: float, stages_ms: Mapping[str, float]) -> str:
        floor = "" if self.floor_ms is None else f", {ms / self.floor_ms:.2f} floors"
        stages = "  ".join(f"{name} {stage_ms:.2f}" for name, stage_ms in stages_ms.items())
        return f"{ms:.2f} ms{floor}: {stages}"


@click.command()
@click.option("--device", default="cpu", show_default=True, help="As of deconvd-server.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@layer_option(SERVICE_LAYERS)
@click.option("--only-latency", is_flag=True, help="Of one client of ours, beside the floor.")
@click.option("--gradients", is_flag=True, help="Calls for gx and gW; with --only-latency.")
@click.option(
    "--type", "dtypes", multiple=True, default=("float32", "float16"), help="Element types."
)
def main(
    device: str,
    json_file: Path | None,
    layers: Sequence[Layer],
    dtypes: Sequence[str],
    *,
    only_latency: bool,
    gradients: bool,
) -> None:
    """Time whole calls of a server on a device, from other processes."""
    rows: list[ServiceRow] = []
    with ExitStack() as stack:
        bench = _ServiceSetup(device, stack.enter_context(local_server(device)), gradients)
        if not (only_latency or gradients):
            stock = stack.enter_context(stock_service(device))
            clients = start_client_processes(_CLIENTS_COUNTS)
            bench = replace(bench, peers=_Peers(stock, stack.enter_context(clients)))
        for row in _rows(bench, layers, [np.dtype(dtype) for dtype in dtypes]):
            rows.append(row)
            print(row, flush=True)
    if json_file is not None:
        about = {
            "card": card_name(device),
            "calls": "gradients" if gradients else "y",
            "stock_operator": stock_operator(device),
            "host": platform.processor() or platform.machine(),
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        text = json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1)
        json_file.write_text(text + "\n")


@dataclass(frozen=True)
class _Peers:
    """What a client's latency is measured beside: a stock service, and other clients."""

    stock: StockCall
    clients: ClientProcesses


@dataclass(frozen=True)
class _ServiceSetup:
    """What is measured: a server on a device, by its target, and whether calls are for gradients."""

    device: str
    target: str
    is_of_gradients: bool
    peers: _Peers | None = None


def _rows(
    bench: _ServiceSetup, layers: Sequence[Layer], dtypes: Sequence[DType]
) -> Iterator[ServiceRow]:
    for layer in layers:
        for dtype in dtypes:
            yield _row(bench, layer, dtype)


def _row(bench: _ServiceSetup, layer: Layer, dtype: DType) -> ServiceRow:
    operands = make_operands(layer, dtype, is_of_gradients=bench.is_of_gradients)
    ms, stages_ms = _latency(bench.target, layer, operands, from_empty=False)
    empty_ms, empty_stages_ms = _latency(bench.target, layer, operands, from_empty=True)
    moved_bytes = layer.nbytes(dtype)
    if bench.is_of_gradients:
        moved_bytes += layer.problem(dtype).x.nbytes + layer.problem(dtype).W.nbytes
    row = ServiceRow(
        layer=layer.name,
        dtype=dtype.name,
        megabytes=moved_bytes / 1e6,
        ms=ms,
        stages_ms=stages_ms,
        empty_ms=empty_ms,
        empty_stages_ms=empty_stages_ms,
        floor_ms=floor_ms(
            bench.device, layer.problem(dtype), is_of_gradients=bench.is_of_gradients
        ),
    )
    if bench.peers is None:
        return row
    stock_ms = _stock_latency_ms(bench.peers.stock, layer, dtype)
    clients = bench.peers.clients
    return replace(
        row,
        stock_ms=stock_ms,
        stock_ratio=stock_ms / ms,
        calls_per_s={
            count: sum(clients.run(count, _client_rate, bench.target, layer, dtype))
            for count in _CLIENTS_COUNTS
        },
    )


def _latency(
    target: str, layer: Layer, operands: Sequence[Array], *, from_empty: bool
) -> tuple[float, dict[str, float]]:
    """Return the median latency of a call, and of each of its stages, in milliseconds.

    Args:
        from_empty: Whether operands are to be arrays that `F.empty` has made.
    """
    times: list[float] = []
    ledgers: list[dict[str, float]] = []
    with deconvd_client.connect(target) as F:
        if from_empty:
            operands = [_copy_to_empty(F, array) for array in operands]
        _warm_up(F, layer, operands)
        for ms in _times_ms(lambda: call_layer(F, layer, operands)):
            times.append(ms)
            ledgers.append(_stages_ms(F.last_ledger, ms))
    names = ledgers[0].keys()
    medians = {name: statistics.median(ledger[name] for ledger in ledgers) for name in names}
    return statistics.median(times), medians


def _stock_latency_ms(stock: StockCall, layer: Layer, dtype: DType) -> float:
    x, W = make_operands(layer, dtype)
    for _ in range(_WARM_UPS):
        stock(layer, x, W)
    return statistics.median(_times_ms(lambda: stock(layer, x, W)))


def _times_ms(call: Callable[[], object]) -> Iterator[float]:
    """Make calls, one after the other, and yield what each took."""
    count, began_s = 0, time.perf_counter()
    while count < _LEAST_CALLS or time.perf_counter() - began_s < _LATENCY_S:
        start_s = time.perf_counter()
        call()
        yield (time.perf_counter() - start_s) * 1e3
        count += 1


def _stages_ms(ledger: Mapping[str, int], total_ms: float) -> dict[str, float]:
    stages = {
        name.removesuffix("_us"): value / 1e3
        for name, value in ledger.items()
        if name not in _OTHER_ENTRIES
    }
    return stages | {"rest": max(total_ms - sum(stages.values()), 0.0)}


def _client_rate(meet: Meet, target: str, layer: Layer, dtype: DType) -> float:
    """Return how many calls a second one of the client processes that call together gets done."""
    operands = make_operands(layer, dtype)
    with deconvd_client.connect(target, timeout_s=300) as F:
        _warm_up(F, layer, operands)
        meet()
        start_s = time.perf_counter()
        count = 0
        while time.perf_counter() - start_s < _THROUGHPUT_S:
            call_layer(F, layer, operands)
            count += 1
        return count / (time.perf_counter() - start_s)


def _copy_to_empty(F: Connection, array: Array) -> Array:
    copy = F.empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def _warm_up(F: Connection, layer: Layer, operands: Sequence[Array]) -> None:
    for _ in range(_WARM_UPS):
        call_layer(F, layer, operands)


if __name__ == "__main__":
    main()
