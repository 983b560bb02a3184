"""What joining small requests could gain at most: ``python -m benchmarks.joining --device cuda --json FILE``.

A server that joined the small calls of several clients into one would compute once for all of them. All else it would
still do for each: receive it, check it, admit it, and answer it. So joining gains at most what computing costs. Clients
in their own processes make calls of a tiny layer, and the same calls without samples, of which nothing is computed. The
ratio of their rates is the bound. Real joining gains less: it copies operands together and results apart, and calls
wait for each other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import click
import numpy as np

import deconvd_client
from benchmarks.client_processes import ClientProcesses, Meet, start_client_processes
from benchmarks.commit import commit
from benchmarks.floor import card_name
from benchmarks.layer_calls import call_layer, make_operands
from benchmarks.layers import LAYERS
from examples.local_server import local_server

_LAYER = next(layer for layer in LAYERS if layer.name.startswith("tiny"))
_DTYPE = np.dtype(np.float32)
_WARM_UPS = 20
_ROUNDS = 5


@dataclass(frozen=True)
class JoiningRow:
    """Rates of calls by a number of clients, in calls a second; its fields are those of the JSON file.

    Attributes:
        empty_calls_per_s: Of calls without samples.
        most_gain: How many times as many calls joining could serve at most.
    """

    clients: int
    calls_per_s: float
    empty_calls_per_s: float
    most_gain: float

    def __str__(self) -> str:
        return (
            f"{self.clients:3} clients: {self.calls_per_s:7.0f} calls/s, {self.empty_calls_per_s:7.0f} without "
            f"computing: joining gains at most {self.most_gain:.2f} times"
        )


@click.command()
@click.option("--device", default="cpu", show_default=True, help="As of deconvd-server.")
@click.option("--clients", "counts", type=int, multiple=True, default=(1, 4, 16), show_default=True)
@click.option("--time-s", default=1.0, show_default=True, help="For each rate.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(device: str, counts: Sequence[int], time_s: float, json_file: Path | None) -> None:
    """Compare the rate of tiny calls with that of calls for which nothing is computed."""
    rows: list[JoiningRow] = []
    with local_server(device) as target, start_client_processes(counts) as clients:
        for count in counts:
            rows.append(_row(clients, count, target, time_s))
            print(rows[-1], flush=True)
    if json_file is not None:
        about = {
            "card": card_name(device),
            "layer": _LAYER.name,
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        text = json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1)
        json_file.write_text(text + "\n")


def _row(clients: ClientProcesses, count: int, target: str, time_s: float) -> JoiningRow:
    rates = [clients.run(count, _rates, target, time_s / _ROUNDS) for _ in range(_ROUNDS)]
    full, empty = (
        median(sum(client[kind] for client in of_one_round) for of_one_round in rates)
        for kind in (0, 1)
    )
    return JoiningRow(count, full, empty, empty / full)


def _rates(meet: Meet, target: str, time_s: float) -> Sequence[float]:
    """Return how many calls a second one of the clients that call together makes, with and without samples."""
    x, W = make_operands(_LAYER, _DTYPE)
    rates: list[float] = []
    with deconvd_client.connect(target, timeout_s=300) as F:
        for operands in ((x, W), (x[:0], W)):
            for _ in range(_WARM_UPS):
                call_layer(F, _LAYER, operands)
            meet()
            count, began_s = 0, time.perf_counter()
            while time.perf_counter() < began_s + time_s:
                call_layer(F, _LAYER, operands)
                count += 1
            rates.append(count / (time.perf_counter() - began_s))
    return rates


if __name__ == "__main__":
    main()
