"""What several cards of one host are worth: ``python -m benchmarks.cards --processes 1 --json FILE``.

Client processes call a server on one card and then one on several, all through memory that they share with it. Beside
each rate is that of the bare program of `benchmarks.bare_cards`: as many processes do the same copies and transfers,
and compute nothing. The clients of a row begin together and call for the same time. Rows are added to those that FILE
has, so the table can be made in parts; a row that is measured again replaces the one before.

``--device cpu`` tries it where there is no card: "cards" is 1 then, and ``--processes`` is the number of processes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

import click
import grpc
import numpy as np

import deconvd_client
from benchmarks.bare_cards import bare_cards, bare_transfers
from benchmarks.call_options import (
    clients_option,
    layer_option,
    processes_option,
    time_option,
    type_option,
    warm_up_option,
)
from benchmarks.cards_rows import CardsFile, CardsRow
from benchmarks.client_processes import ClientProcesses, Meet, start_client_processes
from benchmarks.commit import commit
from benchmarks.floor import card_name
from benchmarks.host import host
from benchmarks.layer_calls import SERVICE_LAYERS, call_layer, operands_of
from benchmarks.layers import Layer
from benchmarks.timed_calls import Durations, time_calls, warm_up
from deconvd.model.dtypes import Array, DType
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from examples.local_server import local_server

_OPERANDS = ("plain", "empty")

_Way: TypeAlias = Callable[
    [str, Layer, Sequence[Array], str], AbstractContextManager[Callable[[], None]]
]
"""Connects a client to an address, and gives what makes a call of a layer with operands of some kind."""

_TIMEOUT_S = 300.0
_START_S = 120.0
_START_POLL_S = 0.1


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@processes_option(1)
@click.option(
    "--cards",
    "cards_counts",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 2),
    help="Numbers of cards.",
)
@layer_option([layer for layer in SERVICE_LAYERS if not layer.name.startswith("unet")])
@type_option
@click.option("--operands", "kinds", type=click.Choice(_OPERANDS), multiple=True, default=_OPERANDS)
@clients_option
@click.option(
    "--assign/--no-assign",
    "assigns",
    default=False,
    help="Connect the clients to the server's processes in turn, rather than leave the choice to each of them.",
)
@time_option
@warm_up_option(0.5)
def main(
    device: str,
    json_file: Path | None,
    processes: int,
    cards_counts: Sequence[int],
    layers: Sequence[Layer],
    dtypes: Sequence[DType],
    kinds: Sequence[str],
    clients_counts: Sequence[int],
    assigns: bool,
    time_s: float,
    warm_up_s: float,
) -> None:
    """Time calls by several processes on one card and on several, beside a bare program."""
    about = {
        "card": card_name(device),
        "host": host(),
        "commit": commit(),
        "processes": processes,
        "clients_are": "assigned" if assigns else "free",
    }
    file = CardsFile(json_file, about)
    durations = Durations(1_000_000, warm_up_s, time_s)
    with (
        TemporaryDirectory(prefix="deconvd-plans-") as plans,
        start_client_processes(clients_counts) as clients,
    ):
        for count in [1] if device == "cpu" else sorted(cards_counts):
            devices = ["cpu"] if device == "cpu" else [f"cuda:{n}" for n in range(count)]
            options = ["--processes", str(processes), "--plan-store", plans]
            with (
                local_server(",".join(devices), *options) as target,
                bare_cards(devices * max(processes, 1)) as bare,
            ):
                own_targets = _own_targets(target)
                targets = own_targets if assigns else [target]
                for layer, dtype, kind, clients_count in product(
                    layers, dtypes, kinds, clients_counts
                ):
                    row = CardsRow(
                        count,
                        layer.name,
                        dtype.name,
                        kind,
                        clients_count,
                        *(
                            _rate(clients, clients_count, way, layer, dtype, kind, ends, durations)
                            for way, ends in ((_our_calls, targets), (_bare_calls, bare))
                        ),
                    )
                    print(file.add(row), flush=True)


def _own_targets(target: str) -> list[str]:
    """Return a target for each of a server's processes, once all serve; `target` if there is one process.

    Those that follow each other have different cards, as far as possible.
    """
    with grpc.insecure_channel(target) as channel:
        stub = pb_grpc.DeconvolutionServiceStub(channel)
        end_s = time.monotonic() + _START_S
        while True:
            workers = stub.GetServerInfo(pb.GetServerInfoRequest()).workers
            if all(worker.is_serving for worker in workers):
                break
            if time.monotonic() > end_s:
                raise TimeoutError("not all processes of the server have started")
            time.sleep(_START_POLL_S)
    counts: Counter[str] = Counter()  # of those before, by card
    ranked = []
    for worker in workers:
        ranked.append((counts[worker.devices[0]], f"unix:{worker.unix_sockets[0]}"))
        counts[worker.devices[0]] += 1
    return [own for _, own in sorted(ranked, key=lambda each: each[0])] or [target]


def _rate(
    clients: ClientProcesses,
    clients_count: int,
    way: _Way,
    layer: Layer,
    dtype: DType,
    kind: str,
    ends: Sequence[str],
    durations: Durations,
) -> float:
    """Return how many calls in a second all clients make together."""
    return sum(clients.run(clients_count, _time_client, way, layer, dtype, kind, ends, durations))


def _time_client(
    meet: Meet,
    way: _Way,
    layer: Layer,
    dtype: DType,
    kind: str,
    ends: Sequence[str],
    durations: Durations,
) -> float:
    """Call together with others. Return the rate in calls per second."""
    number = meet()
    with way(ends[number % len(ends)], layer, operands_of(layer, dtype), kind) as call:
        call()
        meet()
        warm_up(call, durations)
        meet()
        return time_calls(call, durations.time_s)[1]


@contextmanager
def _our_calls(
    target: str, layer: Layer, operands: Sequence[Array], kind: str
) -> Iterator[Callable[[], None]]:
    with deconvd_client.connect(target, timeout_s=_TIMEOUT_S) as F:
        if kind == "empty":
            shared = [F.empty(array.shape, array.dtype) for array in operands]
            for place, array in zip(shared, operands, strict=True):
                np.copyto(place, array)
            operands = shared
        yield lambda: call_layer(F, layer, operands)


@contextmanager
def _bare_calls(
    path: str, layer: Layer, operands: Sequence[Array], kind: str
) -> Iterator[Callable[[], None]]:
    result_bytes = layer.problem(operands[0].dtype).y.nbytes
    with bare_transfers(path, operands, result_bytes) as (places, transfer):

        def copy_and_transfer() -> None:
            for place, array in zip(places, operands, strict=True):
                np.copyto(place, array)
            transfer()

        yield transfer if kind == "empty" else copy_and_transfer


if __name__ == "__main__":
    main()
